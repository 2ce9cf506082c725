//! Fuzzes what a peer sends to a world.

use super::call_descriptor::CallDescriptor;
use super::codec::{Reader, Writer};
use super::world::fuzzing::control_message;

/// Reads bytes as one of the kinds of messages between ranks; the first byte selects it.
pub fn codec(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => control_message(bytes),
        1 => call_descriptor(bytes),
        2 => {
            if let Some(error) = Reader(bytes).error() {
                let mut written = Writer::default();
                written.error(&error);
                assert_eq!(Reader(&written.0).error(), Some(error));
            }
        }
        _ => {
            if let Some(call) = Reader(bytes).call() {
                let (mut written, mut again) = (Writer::default(), Writer::default());
                written.call(&call);
                // Compared as bytes: a NaN factor is not equal to itself.
                again.call(&Reader(&written.0).call().expect("it was just written"));
                assert_eq!(written.0, again.0);
            }
        }
    }
}

/// A descriptor that is read is the same when it is written and read again.
fn call_descriptor(bytes: &[u8]) {
    if let Some(descriptor) = CallDescriptor::from_bytes(bytes) {
        let written = descriptor.to_bytes();
        let again = CallDescriptor::from_bytes(&written).map(CallDescriptor::to_bytes);
        assert_eq!(again, Some(written), "{descriptor:?}");
        // What is computed from the calls of others, and printed.
        let shape = descriptor.call.shape;
        assert!(shape.elements() <= shape.rows().max(1) * shape.width().max(1));
        let _ = (shape.with_rows(shape.rows()), descriptor.call.digest(), descriptor.call.to_string());
    }
}
