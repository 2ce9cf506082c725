//! What a file says of itself, checked before anything is done with it.

use std::collections::BTreeMap;
use std::fmt;

use burn::tensor::DType;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::dtype::{bits_of, dtype_of};
use super::strided::can_lie_in_memory;

/// A header is no longer than this, says the format.
pub(super) const LONGEST: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its dtype as the file names it.
    pub(crate) named: String,
    /// The same for burn; `None` if it has no such dtype.
    pub(crate) dtype: Option<DType>,
    pub(crate) dims: Vec<usize>,
    /// Where its bytes are, from the end of the header on.
    pub(super) begin: usize,
    pub(super) end: usize,
}

/// All tensors of a file.
#[derive(Debug, Default)]
pub(super) struct TensorTable {
    pub(super) tensors: BTreeMap<String, Entry>,
}

impl TensorTable {
    /// Reads the JSON of a header that `there` bytes of tensors follow.
    ///
    /// # Errors
    /// What is wrong, with the tensor: JSON of another kind, two tensors of one name, a dtype that is not known, places
    /// that do not fit dims and dtype, overlap, leave gaps or are not in the file.
    pub(super) fn parse(json: &[u8], there: u64) -> Result<Self, String> {
        let read: Read = serde_json::from_slice(json).map_err(|why| format!("this is no safetensors file: {why}"))?;
        let mut tensors = BTreeMap::new();
        for (name, said) in read.tensors {
            let entry = said.checked(there).map_err(|problem| format!("tensor `{name}` {problem}"))?;
            tensors.insert(name, entry);
        }
        let mut places: Vec<(&String, &Entry)> = tensors.iter().collect();
        places.sort_by_key(|(_, entry)| (entry.begin, entry.end));
        let mut end = 0;
        let mut before: Option<&String> = None;
        for (name, entry) in places {
            let last = || before.map_or("the header".to_owned(), |before| format!("tensor `{before}`"));
            if entry.begin < end {
                return Err(format!(
                    "tensor `{name}` begins at byte {} and {} ends at {end}: they overlap",
                    entry.begin,
                    last()
                ));
            }
            if entry.begin > end {
                return Err(format!(
                    "tensor `{name}` begins at byte {} and {} ends at {end}: bytes between that are nobody's",
                    entry.begin,
                    last()
                ));
            }
            (end, before) = (entry.end, Some(name));
        }
        if end as u64 != there {
            return Err(format!("the header speaks of {end} bytes of tensors, and the file has {there}"));
        }
        Ok(Self { tensors })
    }
}

/// A tensor as the header has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl Said {
    fn checked(self, there: u64) -> Result<Entry, String> {
        let Self { dtype: named, shape, data_offsets: [begin, end] } = self;
        if begin > end || end > there {
            return Err(format!("is said to be at bytes {begin} to {end} of {there}: it is cut off, or lies"));
        }
        let bits = bits_of(&named).ok_or_else(|| format!("is of the unknown dtype `{named}`"))?;
        let elements = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
        let size = elements.and_then(|elements| elements.checked_mul(bits as u64));
        if size != (end - begin).checked_mul(8) {
            let bytes =
                size.map_or("more bytes than there can be".to_owned(), |bits| format!("{} bytes", bits.div_ceil(8)));
            return Err(format!("of dims {shape:?} and dtype {named} takes {bytes}, and is given {}", end - begin));
        }
        if !can_lie_in_memory(shape.iter().copied(), bits as u64) {
            return Err(format!(
                "of dims {shape:?} and dtype {named} takes more bytes than there can be, were none of its dims 0"
            ));
        }
        let word = |number: u64| usize::try_from(number).map_err(|_| format!("has a size of {number}, too large here"));
        Ok(Entry {
            dtype: dtype_of(&named),
            named,
            dims: shape.into_iter().map(word).collect::<Result<_, _>>()?,
            begin: word(begin)?,
            end: word(end)?,
        })
    }
}

/// The header before it is checked. No name comes twice.
#[derive(Default)]
struct Read {
    tensors: BTreeMap<String, Said>,
}

impl<'de> Deserialize<'de> for Read {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Entries)
    }
}

struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Read;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from names to tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Read, A::Error> {
        let (mut read, mut described) = (Read::default(), false);
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut described, true) {
                    return Err(A::Error::custom("`__metadata__` is there twice"));
                }
                // Words of whoever wrote the file.
                map.next_value::<BTreeMap<String, String>>()?;
                continue;
            }
            let said = map.next_value().map_err(|why| A::Error::custom(format!("tensor `{name}`: {why}")))?;
            if read.tensors.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor `{name}` is there twice")));
            }
            read.tensors.insert(name, said);
        }
        Ok(read)
    }
}
