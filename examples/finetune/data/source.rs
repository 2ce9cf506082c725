//! A file of documents, of which only places are held in memory.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::document::{Document, Kind};
use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;

/// So many bytes are read and tokenised at once when a file is looked through.
const AT_ONCE: usize = 8 << 20;

/// The longest line of JSON Lines: a file without line breaks would be read whole.
const LONGEST_LINE: u64 = 64 << 20;

/// What some systems write before a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What turns text into documents.
pub struct Reading {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
}

impl Reading {
    /// Reads the tokenizer and the chat template of a model's directory.
    pub fn open(model: &Path) -> Result<Self, String> {
        let tokenizer = Tokenizer::open(model)?;
        let template = ChatTemplate::open(model, &tokenizer)?;
        Ok(Self { tokenizer, template })
    }
}

impl Reading {
    /// The tokens of the beginning of a text; in a conversation, of one in which the user has said it.
    pub fn prompt(&self, text: &str, conversation: bool) -> Result<Vec<u32>, String> {
        match self.template.as_ref().filter(|_| conversation) {
            Some(template) => {
                let said = serde_json::json!([{ "role": "user", "content": text }]);
                self.tokenizer.encode(&template.render(said.as_array().map_or(&[], Vec::as_slice), true)?)
            }
            None => self.tokenizer.beginning(text),
        }
    }
}

/// Where a document is, and how long it is.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    offset: u64,
    bytes: u32,
    /// The number of its first line, from 1.
    line: u32,
    /// How many tokens it has.
    pub tokens: u32,
    /// After how many tokens comes the first that is trained on.
    pub first_trained: u32,
    pub kind: Kind,
    /// Whether it is the last of its file.
    last: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A document a line.
    Json,
    /// One document, in blocks of whole lines.
    Text,
}

/// A file of documents: JSON Lines if its name ends in `.jsonl`, else a plain text. It is looked through once, when it
/// is opened; documents are read and tokenised again when they are needed.
pub struct Source {
    path: PathBuf,
    form: Form,
    places: Vec<Place>,
}

impl Source {
    /// Looks through a file. A plain text is divided into blocks of lines of about `block` bytes, each a document.
    ///
    /// # Errors
    /// What is wrong, with file and line, in one line.
    pub fn open(path: &Path, block: usize, reading: &Reading) -> Result<Self, String> {
        let wrong = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
        let found = fs::metadata(path).map_err(|why| wrong(&why))?;
        // Others may have no end, or wait for somebody who writes.
        if !found.is_file() {
            return Err(wrong(&"it is not a file"));
        }
        let form = match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => Form::Json,
            Some("json") => return Err(wrong(&"a .json file: give JSON Lines, one document a line, as a .jsonl file")),
            _ => Form::Text,
        };
        let mut source = Self { path: path.into(), form, places: Vec::new() };
        let mut lines = Lines::open(path, if form == Form::Text { block } else { 0 }).map_err(|why| wrong(&why))?;
        loop {
            let (batch, more) = lines.batch(form).map_err(|why| format!("{}:{why}", path.display()))?;
            let places: Vec<Result<Place, String>> =
                batch.into_par_iter().map(|(place, bytes)| source.measured(place, &bytes, reading)).collect();
            // Of several wrong lines always the first is told.
            for place in places {
                source.places.push(place?);
            }
            if !more {
                break;
            }
        }
        if source.places.is_empty() {
            return Err(wrong(&"has no documents"));
        }
        if u32::try_from(source.places.len()).is_err() {
            return Err(wrong(&"has more than 4294967295 documents: divide it"));
        }
        Ok(source)
    }

    /// Where the documents are, in the order of the file.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Reads and tokenises a document.
    ///
    /// # Errors
    /// If the file can no longer be read, or has changed.
    pub fn document(&self, number: usize, reading: &Reading) -> Result<Document, String> {
        let place = self.places[number];
        let mut bytes = vec![0; place.bytes as usize];
        let read = |bytes: &mut [u8]| {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(place.offset))?;
            file.read_exact(bytes)
        };
        read(&mut bytes).map_err(|why| self.wrong(place, &why.to_string()))?;
        let document = self.parse(place, &bytes, reading)?;
        match document.tokens.len() == place.tokens as usize {
            true => Ok(document),
            false => Err(self.wrong(place, "has changed since the training began")),
        }
    }

    fn parse(&self, place: Place, bytes: &[u8], reading: &Reading) -> Result<Document, String> {
        let wrong = |why: String| self.wrong(place, &why);
        let text =
            std::str::from_utf8(bytes).map_err(|why| self.not_utf_8(place, &bytes[..why.valid_up_to()], bytes))?;
        match self.form {
            Form::Json => {
                Document::of_json(text.trim_end(), &reading.tokenizer, reading.template.as_ref()).map_err(wrong)
            }
            Form::Text => {
                let (tokenizer, text) = (&reading.tokenizer, line_feeds(text));
                let tokens = if place.last { tokenizer.document(&text) } else { tokenizer.beginning(&text) };
                tokens.map(Document::text).map_err(wrong)
            }
        }
    }

    fn measured(&self, place: Place, bytes: &[u8], reading: &Reading) -> Result<Place, String> {
        let Document { tokens, trained, kind } = self.parse(place, bytes, reading)?;
        let tokens = u32::try_from(tokens.len()).map_err(|_| self.wrong(place, "is too long"))?;
        // The first token of all is no target.
        let first_trained = trained.iter().skip(1).position(|trained| *trained).map_or(u32::MAX, |at| at as u32 + 1);
        Ok(Place { tokens, first_trained, kind, ..place })
    }

    /// Says where the first byte is that is no UTF-8, behind those that are.
    fn not_utf_8(&self, place: Place, before: &[u8], all: &[u8]) -> String {
        if place.offset == 0 && (all.starts_with(b"\xff\xfe") || all.starts_with(b"\xfe\xff")) {
            return self.wrong(place, "is UTF-16: save the file as UTF-8");
        }
        let within = before.rsplit(|byte| *byte == b'\n').next().map_or(0, <[u8]>::len);
        let line = place.line + before.iter().filter(|byte| **byte == b'\n').count() as u32;
        self.wrong(Place { line, ..place }, &format!("is not UTF-8: its byte {} is the first bad one", within + 1))
    }

    fn wrong(&self, place: Place, why: &str) -> String {
        format!("{}:{}: {why}", self.path.display(), place.line)
    }
}

/// A text with the line ends that models have seen most.
fn line_feeds(text: &str) -> Cow<'_, str> {
    if text.contains("\r\n") { text.replace("\r\n", "\n").into() } else { text.into() }
}

/// A document that is not tokenised yet.
type Found = (Place, Vec<u8>);

/// Lines of a file, or blocks of them.
struct Lines {
    file: BufReader<File>,
    /// The bytes of a block at least; one line if none.
    block: usize,
    offset: u64,
    /// The lines that have ended before.
    line: u32,
}

impl Lines {
    fn open(path: &Path, block: usize) -> std::io::Result<Self> {
        let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
        let mark = if file.fill_buf()?.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        file.consume(mark);
        Ok(Self { file, block, offset: mark as u64, line: 0 })
    }

    /// The next documents with their places, and whether there are more; or what is wrong, after the number of its
    /// line.
    fn batch(&mut self, form: Form) -> Result<(Vec<Found>, bool), String> {
        let (mut batch, mut taken) = (Vec::new(), 0);
        while taken < AT_ONCE {
            let (offset, line) = (self.offset, self.line + 1);
            let bytes = self.next(form).map_err(|why| format!("{}: {why}", self.line + 1))?;
            self.offset += bytes.len() as u64;
            let last = self.file.fill_buf().map_err(|why| format!("{}: {why}", self.line + 1))?.is_empty();
            taken += bytes.len();
            // Lines of white space are no documents.
            if form == Form::Text && !bytes.is_empty() || !bytes.trim_ascii().is_empty() {
                // A block is no longer than `LONGEST_LINE`, or little.
                let length = bytes.len() as u32;
                let place = Place { offset, bytes: length, line, tokens: 0, first_trained: 0, kind: Kind::Text, last };
                batch.push((place, bytes));
            }
            if last {
                return Ok((batch, false));
            }
        }
        Ok((batch, true))
    }

    /// The next line, or block of lines. A long line of a plain text is divided among blocks, between words.
    fn next(&mut self, form: Form) -> Result<Vec<u8>, String> {
        let most = match form {
            Form::Json => LONGEST_LINE,
            Form::Text => (8 * self.block as u64).clamp(64 << 10, LONGEST_LINE),
        };
        let mut bytes = Vec::new();
        loop {
            let read = (&mut self.file).take(most).read_until(b'\n', &mut bytes).map_err(|why| why.to_string())?;
            let ended = bytes.last() == Some(&b'\n');
            self.line += u32::from(ended && read > 0);
            if read as u64 == most && !ended {
                if form == Form::Json {
                    return Err(format!("has more than {LONGEST_LINE} bytes: a line is one document"));
                }
                let end = word_end(&bytes);
                self.file.seek_relative(end as i64 - bytes.len() as i64).map_err(|why| why.to_string())?;
                bytes.truncate(end);
                return Ok(bytes);
            }
            if read == 0 || bytes.len() >= self.block {
                return Ok(bytes);
            }
        }
    }
}

/// Where the last word that is whole ends in the second half of some text; where no space is there, the last character.
fn word_end(text: &[u8]) -> usize {
    let half = text.len() / 2;
    if let Some(space) = text[half..].iter().rposition(|byte| *byte == b' ') {
        return half + space;
    }
    let begins = |at: &usize| text[*at] & 0b1100_0000 != 0b1000_0000;
    // A character has four bytes at most.
    (text.len().saturating_sub(4).max(1)..text.len()).rev().find(begins).unwrap_or(text.len())
}
