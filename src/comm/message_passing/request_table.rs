//! The pending requests of an endpoint, by number.

use super::endpoint::Request;

/// Which requests are done, by number.
#[derive(Debug, Default)]
pub(in crate::comm) struct RequestTable {
    done: Vec<bool>,
    free: Vec<usize>,
    /// Requests done and messages arrived so far: what a thread may wait for.
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

    /// A message has arrived that nobody has posted a receive for.
    pub fn arrived(&mut self) {
        self.count += 1;
    }

    pub fn is_done(&self, request: usize) -> bool {
        self.done[request]
    }

    /// Frees the number of a request.
    pub fn forget(&mut self, request: usize) {
        self.free.push(request);
    }

    /// Removes the requests that are done, and frees their numbers. Returns whether all are.
    pub fn remove_done(&mut self, requests: &mut Vec<Request>) -> bool {
        requests.retain(|request| {
            let request = request.0 as usize;
            let done = self.is_done(request);
            if done {
                self.forget(request);
            }
            !done
        });
        requests.is_empty()
    }
}
