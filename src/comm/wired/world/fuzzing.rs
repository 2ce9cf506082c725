//! What wardens tell each other, out of any bytes.

use super::words::Word;

/// What is understood is the same when it is written and read again.
pub fn word(bytes: &[u8]) {
    if let Some(word) = Word::read(bytes, 8) {
        let written = word.write();
        let again = Word::read(&written, 8).map(|word| word.write());
        assert_eq!(again.as_ref(), Some(&written), "{word:?}");
    }
}
