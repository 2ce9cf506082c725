//! A stand-in for `mapping.rs` on systems without shared memory.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::comm::message_passing) enum Address {}

impl Address {
    pub const BYTES: usize = 24;

    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        match self {}
    }

    pub fn from_bytes(_: &[u8]) -> Option<Self> {
        None
    }
}

#[derive(Debug)]
pub(super) enum SharedMapping {}

impl SharedMapping {
    pub const SEAL: usize = 0;

    pub fn create(_: usize) -> Option<(Self, Address)> {
        None
    }

    pub fn open(address: &Address, _: usize) -> Option<Self> {
        match *address {}
    }

    pub fn all_opened(&mut self) {}

    pub fn at(&self, _: usize) -> *mut u8 {
        match *self {}
    }
}
