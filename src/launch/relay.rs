//! What ranks say, with the rank before each line.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// Lines of a failed rank that its error holds.
const STDERR_LINES: usize = 12;

/// What stands before each line of a rank; nothing where it is not known which rank says it.
pub(super) fn prefix(rank: Option<usize>, size: usize) -> String {
    rank.map_or_else(String::new, |rank| format!("[rank {rank}/{size}] "))
}

/// Hands on lines, with the rank before each.
pub(super) fn relay(
    from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    rank: Option<usize>,
    size: usize,
    keep: Option<Arc<Mutex<VecDeque<String>>>>,
) -> std::io::Result<JoinHandle<()>> {
    thread::Builder::new().name("lines of a rank".into()).spawn(move || {
        let mut from = BufReader::new(from);
        let mut bytes = Vec::new();
        while from.read_until(b'\n', &mut bytes).is_ok_and(|len| len > 0) {
            let text = String::from_utf8_lossy(&bytes);
            let line = text.trim_end_matches(['\n', '\r']);
            let (rank, line) = match rank {
                Some(rank) => (Some(rank), line.to_owned()),
                None => tagged(line),
            };
            let prefix = prefix(rank, size);
            // One write a line: lines of several ranks do not get into each other.
            let _ = to.write_all(format!("{prefix}{line}\n").as_bytes()).and_then(|()| to.flush());
            if let Some(keep) = &keep {
                let mut kept = keep.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                if kept.len() == STDERR_LINES {
                    kept.pop_front();
                }
                kept.push_back(format!("{prefix}{line}"));
            }
            bytes.clear();
        }
    })
}

/// Takes off what `mpirun --tag-output` puts before a line: `[1,0]<stderr>:`, where 0 is the rank. It stands again
/// wherever a piece began that was read by itself, as programs write that don't buffer.
fn tagged(line: &str) -> (Option<usize>, String) {
    let parse = || {
        let (tag, rest) = line.strip_prefix('[')?.split_once(']')?;
        let (_, rank) = tag.split_once(',')?;
        let rest = rest.strip_prefix("<stdout>:").or_else(|| rest.strip_prefix("<stderr>:"))?;
        let tag = &line[..line.len() - rest.len()];
        Some((Some(rank.parse().ok()?), rest.replace(tag, "")))
    };
    parse().unwrap_or_else(|| (None, line.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::tagged;

    #[test]
    fn tags_of_mpirun() {
        assert_eq!(tagged("[1,12]<stderr>:step 3"), (Some(12), "step 3".into()));
        assert_eq!(tagged("[1,0]<stdout>:"), (Some(0), String::new()));
        let pieces = "[1,0]<stderr>:step [1,0]<stderr>:1[1,0]<stderr>:/6[1,0]<stderr>:";
        assert_eq!(tagged(pieces), (Some(0), "step 1/6".into()));
        for line in ["", "plain", "[1,0] is no tag", "[x,y]<stdout>:a", "[warn] it"] {
            assert_eq!(tagged(line), (None, line.to_owned()));
        }
    }
}
