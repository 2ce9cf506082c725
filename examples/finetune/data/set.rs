//! Rows of documents in an order, and the batches that are taken from it.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use burn_parallel::comm::part;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::document::{Document, Kind};
use super::packing::{Packing, Part, parts};
use super::row::Row;
use super::source::{Reading, Source};

/// The stream of random numbers that shuffles documents before they are packed; epochs have those from 0 on.
const DOCUMENTS: u64 = u64::MAX;

/// How much makes a batch, over all replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// So many rows.
    Rows(usize),
    /// As many rows as have at most so many tokens, without padding, and one for each of so many replicas at least.
    Tokens { most: usize, replicas: usize },
}

/// What of a file is not trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Documents that are longer than a row and must not be divided: their ends.
    pub cut: usize,
    /// Documents without a target in the part that fits a row.
    pub dropped: usize,
}

/// The rows of a file. Which rows there are is a function of file, seed and length; their order in an epoch, of the
/// seed and the number of the epoch. Rows are numbered through all epochs: the number of the next row is all that a run
/// needs to go on.
pub struct DataSet {
    source: Source,
    reading: Arc<Reading>,
    packing: Packing,
    seq: usize,
    seed: u64,
    left: Left,
    /// The order of an epoch that was asked for.
    order: Mutex<Option<(u64, Arc<Vec<u32>>)>>,
}

impl DataSet {
    /// Looks through a file, and packs its documents into rows of `seq` tokens, or gives each a row of its own.
    ///
    /// # Errors
    /// What is wrong, with file and line, in one line.
    pub fn open(path: &Path, seq: usize, packed: bool, seed: u64, reading: Arc<Reading>) -> Result<Self, String> {
        // Four rows a block, or so: what fills no row is packed with others, and a row needs one block read and
        // tokenised.
        let source = Source::open(path, 16 * seq, &reading)?;
        let mut left = Left::default();
        let mut all: Vec<Part> = Vec::new();
        for number in shuffled(source.places().len(), seed, DOCUMENTS) {
            let place = source.places()[number as usize];
            let cut = !place.kind.divisible() && place.tokens as usize > seq + 1;
            if place.first_trained >= place.tokens || cut && place.first_trained as usize > seq {
                left.dropped += 1;
                continue;
            }
            left.cut += usize::from(cut);
            all.extend(parts(number, place.tokens, place.kind.divisible(), seq as u32));
        }
        let packing = if packed { Packing::packed(all, seq as u32) } else { Packing::one_a_row(all) };
        if packing.rows() == 0 {
            return Err(format!(
                "{}: there is nothing to train on in the first {seq} tokens of any document",
                path.display()
            ));
        }
        Ok(Self { source, reading, packing, seq, seed, left, order: Mutex::new(None) })
    }

    /// Whether the file begins with a conversation.
    pub fn conversations(&self) -> bool {
        self.source.places().first().is_some_and(|place| place.kind == Kind::Conversation)
    }

    /// The rows of an epoch.
    pub fn rows(&self) -> u64 {
        self.packing.rows() as u64
    }

    /// The documents of the file.
    pub fn documents(&self) -> usize {
        self.source.places().len()
    }

    /// The tokens of an epoch, without padding.
    pub fn tokens(&self) -> u64 {
        (0..self.packing.rows()).map(|row| self.packing.tokens(row) as u64).sum()
    }

    /// The tokens of a row, without padding.
    pub fn filled(&self, row: u64) -> usize {
        self.packing.tokens(self.place(row))
    }

    /// What is not trained on.
    pub fn left(&self) -> Left {
        self.left
    }

    /// A number that differs where the rows or their order do.
    pub fn fingerprint(&self) -> u64 {
        self.packing.fingerprint() ^ self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// The rows of the batch that begins with row `from`, of a run that ends before row `end`.
    pub fn batch(&self, from: u64, end: u64, size: BatchSize) -> Range<u64> {
        let stop = match size {
            BatchSize::Rows(rows) => from.saturating_add(rows as u64),
            BatchSize::Tokens { most, replicas } => {
                let (mut to, mut tokens) = (from, 0);
                while to < end {
                    tokens += self.filled(to);
                    if tokens > most && to - from >= replicas as u64 {
                        break;
                    }
                    to += 1;
                }
                to
            }
        };
        from..stop.min(end)
    }

    /// How many batches there are from row `from` to row `end`.
    pub fn batches(&self, mut from: u64, end: u64, size: BatchSize) -> usize {
        let mut batches = 0;
        while from < end {
            from = self.batch(from, end, size).end;
            batches += 1;
        }
        batches
    }

    /// The share of one replica of some rows, in micro-batches of `micro` rows, all of one shape: rows without tokens
    /// fill the last one. There is at least one, so that all replicas do the same.
    pub fn share(
        &self,
        rows: Range<u64>,
        replica: usize,
        replicas: usize,
        micro: usize,
    ) -> Result<Vec<Vec<Row>>, String> {
        let mine = part((rows.end - rows.start) as usize, replicas, replica);
        let mut all: Vec<Row> = mine.map(|at| self.row(rows.start + at as u64)).collect::<Result<_, _>>()?;
        let full = all.len().div_ceil(micro).max(1) * micro;
        all.resize_with(full, || Row::empty(self.seq));
        let mut chunks = Vec::with_capacity(full / micro);
        while !all.is_empty() {
            let rest = all.split_off(micro);
            chunks.push(std::mem::replace(&mut all, rest));
        }
        Ok(chunks)
    }

    /// A row, of those of all epochs.
    pub fn row(&self, row: u64) -> Result<Row, String> {
        let mut filled = Row::empty(self.seq);
        for (number, (part, document)) in self.parts(row)?.into_iter().enumerate() {
            filled.add(number, part, &document);
        }
        Ok(filled)
    }

    /// The documents of a row as text, with what is trained on between `⟦` and `⟧`.
    pub fn shown(&self, row: u64) -> Result<Vec<String>, String> {
        let shown = |(part, document): (Part, Document)| {
            let from = part.start as usize;
            let mut text = String::new();
            let (mut at, end) = (from, from + part.length as usize + 1);
            while at < end {
                // The first token of a part is no target.
                let trained = |at: usize| at > from && document.trained[at];
                let run = (at..end).take_while(|next| trained(*next) == trained(at)).count();
                let words = self.reading.tokenizer.decode(&document.tokens[at..at + run])?;
                text += &if trained(at) { format!("⟦{words}⟧") } else { words };
                at += run;
            }
            Ok(text)
        };
        self.parts(row)?.into_iter().map(shown).collect()
    }

    fn parts(&self, row: u64) -> Result<Vec<(Part, Document)>, String> {
        let read = |part: &Part| {
            let document = self.source.document(part.document as usize, &self.reading)?;
            Ok((*part, document))
        };
        self.packing.row(self.place(row)).iter().map(read).collect()
    }

    /// Which of the packed rows comes as row `row`.
    fn place(&self, row: u64) -> usize {
        let (epoch, at) = (row / self.rows(), (row % self.rows()) as usize);
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        match &*order {
            Some((known, order)) if *known == epoch => order[at] as usize,
            _ => {
                let made = Arc::new(shuffled(self.packing.rows(), self.seed, epoch));
                let place = made[at] as usize;
                *order = Some((epoch, made));
                place
            }
        }
    }
}

/// The numbers below `count` in an order that depends on seed and stream alone.
fn shuffled(count: usize, seed: u64, stream: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let mut numbers: Vec<u32> = (0..count as u32).collect();
    for last in (1..count).rev() {
        numbers.swap(last, rng.random_range(0..=last as u64) as usize);
    }
    numbers
}
