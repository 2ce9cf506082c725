//! The frames on a connection: headers of 24 bytes, some followed by data.
//!
//! A small message is sent *eagerly*, whether or not the other side has posted the receive yet. For a large one the
//! sender sends an *RTS* (request to send); the other side answers with a *CTS* (clear to send) when it knows the
//! buffer, and then the bytes follow in *data* frames, straight into that buffer. Eager messages are sent on credit:
//! unexpected ones take the receiver's memory, and *credit* frames say how much of it is free again. A sender without
//! credit sends an RTS. A part of the credit is reserved for control messages: the last ones reach a rank that was
//! stopped, even after their sender has gone.

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 24;
/// Most bytes of an eager message.
pub(super) const MAX_EAGER: usize = 256 << 10;
/// Most bytes of eager messages without a posted receive.
pub(super) const EAGER_CREDIT: usize = 8 << 20;
/// Most bytes of a data frame: small messages need not wait for more.
pub(super) const MAX_DATA: usize = 512 << 10;
/// Bytes read from a connection before the others get their turn.
const READ_TURN: usize = 4 << 20;
/// Bytes read at a time beside those that go into a posted buffer.
const STAGING: usize = 64 << 10;

/// The sizes at which the protocol changes. Both sides of a connection have the same.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub eager: usize,
    pub credit: usize,
    pub data: usize,
    pub turn: usize,
    pub staging: usize,
}

impl Limits {
    pub const STANDARD: Self =
        Self { eager: MAX_EAGER, credit: EAGER_CREDIT, data: MAX_DATA, turn: READ_TURN, staging: STAGING };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FrameKind {
    /// An eager message with this tag.
    Eager,
    /// Request to send: `len` bytes with this tag are ready, `id` is the number of the request.
    Rts,
    /// Clear to send; `id` as in the request.
    Cts,
    /// Some of the bytes; `id` as in the request.
    Data,
    /// `len` bytes of eager messages have been received.
    Credit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHeader {
    pub kind: FrameKind,
    pub len: usize,
    pub tag: u64,
    pub id: u64,
}

impl FrameHeader {
    pub fn write(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let words = [self.kind as u64 | (self.len as u64) << 8, self.tag, self.id];
        for (target, word) in bytes.chunks_mut(8).zip(words) {
            target.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub fn read(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let word = |place: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * place..][..8]);
            u64::from_le_bytes(word)
        };
        let kind = match word(0) as u8 {
            0 => FrameKind::Eager,
            1 => FrameKind::Rts,
            2 => FrameKind::Cts,
            3 => FrameKind::Data,
            4 => FrameKind::Credit,
            _ => return None,
        };
        Some(Self { kind, len: usize::try_from(word(0) >> 8).ok()?, tag: word(1), id: word(2) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_written() {
        for kind in [FrameKind::Eager, FrameKind::Rts, FrameKind::Cts, FrameKind::Data, FrameKind::Credit] {
            let header = FrameHeader { kind, len: (1 << 40) + 3, tag: u64::MAX, id: 7 };
            assert_eq!(FrameHeader::read(&header.write()), Some(header));
        }
        assert_eq!(FrameHeader::read(&[5; HEADER_BYTES]), None);
    }
}
