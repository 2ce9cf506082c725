//! Which parts of which documents make a row.

/// So many rows are being filled at once: a part goes to the fullest that has room for it.
const OPEN: usize = 64;

/// A part of a document: `length` tokens from `start` on, each with the token after it as its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The number of the document in its file.
    pub document: u32,
    pub start: u32,
    pub length: u32,
}

/// Rows of parts, one after the other.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Packing {
    parts: Vec<Part>,
    /// Where the parts of each row end.
    ends: Vec<u32>,
}

/// The parts of a document of so many tokens, in rows of `seq`. The last token has no target, so it begins no part;
/// what cannot be divided is cut off.
pub fn parts(document: u32, tokens: u32, divisible: bool, seq: u32) -> impl Iterator<Item = Part> {
    let targets = tokens.saturating_sub(1);
    let end = if divisible { targets } else { targets.min(seq) };
    (0..end).step_by(seq as usize).map(move |start| Part { document, start, length: seq.min(end - start) })
}

impl Packing {
    /// One part a row.
    pub fn one_a_row(parts: impl IntoIterator<Item = Part>) -> Self {
        let mut packing = Self::default();
        parts.into_iter().for_each(|part| packing.close(vec![part]));
        packing
    }

    /// Fills rows of `seq` tokens, without reordering more than it must: what it holds on to are the rows that are
    /// being filled.
    pub fn packed(parts: impl IntoIterator<Item = Part>, seq: u32) -> Self {
        let mut packing = Self::default();
        let mut open: Vec<(u32, Vec<Part>)> = Vec::with_capacity(OPEN);
        for part in parts {
            let fits = |(_, (room, _)): &(usize, &(u32, Vec<Part>))| *room >= part.length;
            let fullest = open.iter().enumerate().filter(fits).min_by_key(|(_, (room, _))| *room).map(|(at, _)| at);
            let at = fullest.unwrap_or_else(|| {
                if open.len() == OPEN {
                    // The fullest of all, of which the first was opened first.
                    let full = (0..OPEN).min_by_key(|at| open[*at].0).unwrap_or(0);
                    packing.close(open.remove(full).1);
                }
                open.push((seq, Vec::new()));
                open.len() - 1
            });
            open[at].0 -= part.length;
            open[at].1.push(part);
            if open[at].0 == 0 {
                packing.close(open.remove(at).1);
            }
        }
        open.into_iter().for_each(|(_, row)| packing.close(row));
        packing
    }

    fn close(&mut self, row: Vec<Part>) {
        self.parts.extend(row);
        self.ends.push(self.parts.len() as u32);
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.ends.len()
    }

    /// The parts of a row.
    pub fn row(&self, row: usize) -> &[Part] {
        let start = if row == 0 { 0 } else { self.ends[row - 1] as usize };
        &self.parts[start..self.ends[row] as usize]
    }

    /// The tokens of a row.
    pub fn tokens(&self, row: usize) -> usize {
        self.row(row).iter().map(|part| part.length as usize).sum()
    }

    /// A number that is the same for the same rows.
    pub fn fingerprint(&self) -> u64 {
        let numbers = self
            .parts
            .iter()
            .flat_map(|part| [part.document, part.start, part.length])
            .chain(self.ends.iter().copied());
        let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
        xxhash_rust::xxh3::xxh3_64(&bytes)
    }
}
