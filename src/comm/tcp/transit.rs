//! Messages in transit, and the memory that they lie in.

use super::frame::HEAD;

/// Memory that is lent for a message to come into.
#[derive(Debug)]
pub(super) struct Place {
    pub data: *mut u8,
    pub len: usize,
    pub op: usize,
}

/// Memory that is lent for a message to be sent from.
#[derive(Debug)]
pub(super) struct Lent {
    pub data: *const u8,
    pub len: usize,
    pub op: usize,
}

/// A message that has come before it was asked for.
#[derive(Debug)]
pub(super) enum Arrival {
    Whole(Vec<u8>),
    Offered {
        id: u64,
        len: usize,
    },
    /// An offer that was accepted into memory of our own.
    Coming(u64),
    /// A large one of this rank to itself.
    Own(Lent),
}

/// Where what comes goes.
#[derive(Debug)]
pub(super) enum Into {
    Place(Place),
    Owned(Vec<u8>),
    /// Nobody wants it any more.
    Nowhere,
}

/// A large message on its way here.
#[derive(Debug)]
pub(super) struct Accepted {
    pub tag: u64,
    pub len: usize,
    pub got: usize,
    pub into: Into,
}

/// The message, or the part of one, that is being read.
#[derive(Debug)]
pub(super) enum Reading {
    Whole { tag: u64, len: usize, got: usize, into: Into },
    Part { id: u64, left: usize },
}

/// A large message on its way out.
#[derive(Debug)]
pub(super) struct Bulk {
    pub id: u64,
    pub lent: Lent,
    pub sent: usize,
}

#[derive(Debug)]
pub(super) enum Body {
    Lent(*const u8, usize),
    Own(Vec<u8>),
}

impl Body {
    pub fn bytes(&self) -> &[u8] {
        match self {
            // SAFETY: lent until the operation is done or withdrawn, and then this is no more.
            Self::Lent(data, len) => unsafe { std::slice::from_raw_parts(*data, *len) },
            Self::Own(bytes) => bytes,
        }
    }
}

/// Something to be written.
#[derive(Debug)]
pub(super) struct Parcel {
    pub head: [u8; HEAD],
    pub body: Body,
    /// The operation that lends the body, and whether it is done with it.
    pub op: Option<(usize, bool)>,
}
