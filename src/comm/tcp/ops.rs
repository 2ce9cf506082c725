//! What is under way, by number, and whether it is done.

/// What is done, by number.
#[derive(Debug, Default)]
pub(super) struct Ops {
    done: Vec<bool>,
    free: Vec<usize>,
    /// How many have been done so far.
    pub count: u64,
}

impl Ops {
    pub fn begin(&mut self) -> usize {
        match self.free.pop() {
            Some(op) => {
                self.done[op] = false;
                op
            }
            None => {
                self.done.push(false);
                self.done.len() - 1
            }
        }
    }

    pub fn done(&mut self, op: usize) {
        self.done[op] = true;
        self.count += 1;
    }

    pub fn is_done(&self, op: usize) -> bool {
        self.done[op]
    }

    /// Its number may be used again.
    pub fn forget(&mut self, op: usize) {
        self.free.push(op);
    }
}
