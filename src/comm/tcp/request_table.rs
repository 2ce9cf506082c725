//! The pending requests of an endpoint, by number.

/// Which requests are done, by number.
#[derive(Debug, Default)]
pub(super) struct RequestTable {
    done: Vec<bool>,
    free: Vec<usize>,
    /// Requests done so far.
    pub count: u64,
}

impl RequestTable {
    pub fn begin(&mut self) -> usize {
        match self.free.pop() {
            Some(request) => {
                self.done[request] = false;
                request
            }
            None => {
                self.done.push(false);
                self.done.len() - 1
            }
        }
    }

    pub fn done(&mut self, request: usize) {
        self.done[request] = true;
        self.count += 1;
    }

    pub fn is_done(&self, request: usize) -> bool {
        self.done[request]
    }

    /// Frees the number of a request.
    pub fn forget(&mut self, request: usize) {
        self.free.push(request);
    }
}
