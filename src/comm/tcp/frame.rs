//! What goes over a connection: heads of 24 bytes, some with bytes behind them.
//!
//! A small message is sent *whole*, whether or not the other side has asked for it yet. A large one is *offered*; the
//! other side *accepts* it when it knows where its bytes go, and then they come in *parts*, straight into that place. Whole
//! messages are sent on credit: what nobody has asked for yet takes the receiver's memory, and *credit* says how much of it is
//! free again. A sender that has none left offers. A part of the credit is kept for the words of wardens: what is said last
//! reaches a rank that was stopped, even after the speaker has gone.

/// Bytes of a head.
pub(super) const HEAD: usize = 24;
/// Most bytes of a message that is sent whole.
pub(super) const WHOLE: usize = 256 << 10;
/// Most bytes of whole messages that nobody has asked for.
pub(super) const CREDIT: usize = 8 << 20;
/// Most bytes of a part: small messages need not wait for more.
pub(super) const PART: usize = 512 << 10;
/// Bytes read from a connection before others have their turn.
const TURN: usize = 4 << 20;
/// Bytes read at a time beside those that have a place.
const STAGING: usize = 64 << 10;

/// The sizes at which messages change their way. Both sides of a connection have the same.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub whole: usize,
    pub credit: usize,
    pub part: usize,
    pub turn: usize,
    pub staging: usize,
}

impl Limits {
    pub const STANDARD: Self = Self { whole: WHOLE, credit: CREDIT, part: PART, turn: TURN, staging: STAGING };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A message, `name` is its tag.
    Whole,
    /// `len` bytes are ready, `name` is their tag, `id` the number of the offer.
    Offer,
    /// They are wanted; `id` as in the offer.
    Accept,
    /// Some of them; `id` as in the offer.
    Part,
    /// `len` bytes of whole messages have been taken.
    Credit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub kind: Kind,
    pub len: usize,
    pub tag: u64,
    pub id: u64,
}

impl Head {
    pub fn write(self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        let words = [self.kind as u64 | (self.len as u64) << 8, self.tag, self.id];
        for (place, word) in bytes.chunks_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub fn read(bytes: &[u8; HEAD]) -> Option<Self> {
        let word = |place: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * place..][..8]);
            u64::from_le_bytes(word)
        };
        let kind = match word(0) as u8 {
            0 => Kind::Whole,
            1 => Kind::Offer,
            2 => Kind::Accept,
            3 => Kind::Part,
            4 => Kind::Credit,
            _ => return None,
        };
        Some(Self { kind, len: usize::try_from(word(0) >> 8).ok()?, tag: word(1), id: word(2) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_there_and_back() {
        for kind in [Kind::Whole, Kind::Offer, Kind::Accept, Kind::Part, Kind::Credit] {
            let head = Head { kind, len: (1 << 40) + 3, tag: u64::MAX, id: 7 };
            assert_eq!(Head::read(&head.write()), Some(head));
        }
        assert_eq!(Head::read(&[5; HEAD]), None);
    }
}
