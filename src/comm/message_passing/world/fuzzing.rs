//! Fuzzes the control messages.

use super::control_message::ControlMessage;

/// A message that is read is the same when it is written and read again.
pub fn control_message(bytes: &[u8]) {
    if let Some(message) = ControlMessage::read(bytes, 8) {
        let written = message.write();
        let again = ControlMessage::read(&written, 8).map(|message| message.write());
        assert_eq!(again.as_ref(), Some(&written), "{message:?}");
    }
}
