//! The descriptor of a call: what a rank sends to the others when it enters a collective.

use super::codec::{Reader, Writer};
use crate::comm::Call;

/// Bytes of a call descriptor.
pub(super) const DESCRIPTOR_BYTES: usize = 192;

/// What a rank tells the others of its call.
#[derive(Debug, Clone, Copy)]
pub(super) struct CallDescriptor {
    pub call: Call,
    /// For [`Operation::Split`]; in the second agreement of a collective, the number that the rank tells all.
    pub color: u64,
    pub key: i64,
    /// Whether this rank has attached to the offered shared memory, see
    /// [`ControlPath`](super::control_path::ControlPath).
    pub attached: bool,
}

impl CallDescriptor {
    pub fn to_bytes(self) -> [u8; DESCRIPTOR_BYTES] {
        let mut writer = Writer(Vec::with_capacity(DESCRIPTOR_BYTES));
        writer.call(&self.call).number(self.color).number(self.key as u64).byte(self.attached.into());
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..writer.0.len()].copy_from_slice(&writer.0);
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let call = reader.call()?;
        let (color, key, attached) = (reader.number()?, reader.number()? as i64, reader.byte()? != 0);
        Some(Self { call, color, key, attached })
    }
}
