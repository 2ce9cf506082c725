//! Whatever a peer sends to a world, out of any bytes.

use super::agree::fuzzing::post;
use super::codec::{Reader, Writer};
use super::world::fuzzing::word;

/// Reads bytes as one of the things that ranks tell each other; the first byte says which.
pub fn codec(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => word(bytes),
        1 => post(bytes),
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
                // As bytes: a factor that is no number is not equal to itself.
                again.call(&Reader(&written.0).call().expect("it was just written"));
                assert_eq!(written.0, again.0);
            }
        }
    }
}
