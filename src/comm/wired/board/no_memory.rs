//! No memory is shared with other processes here.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::comm::wired) enum Address {}

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
pub(super) enum Memory {}

impl Memory {
    pub const SEAL: usize = 0;

    pub fn create(_: usize) -> Option<(Self, Address)> {
        None
    }

    pub fn open(address: &Address, _: usize) -> Option<Self> {
        match *address {}
    }

    pub fn is_shared(&mut self) {}

    pub fn at(&self, _: usize) -> *mut u8 {
        match *self {}
    }
}
