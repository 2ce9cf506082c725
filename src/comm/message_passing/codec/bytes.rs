//! Encodes numbers, texts and lists of them as bytes.

/// Bytes being written.
#[derive(Debug, Default)]
pub(in crate::comm::message_passing) struct Writer(pub Vec<u8>);

impl Writer {
    pub fn byte(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    pub fn number(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub fn text(&mut self, value: &str) -> &mut Self {
        self.number(value.len() as u64);
        self.0.extend_from_slice(value.as_bytes());
        self
    }

    pub fn list<T>(&mut self, items: &[T], mut write: impl FnMut(&mut Self, &T)) -> &mut Self {
        self.number(items.len() as u64);
        items.iter().for_each(|item| write(self, item));
        self
    }
}

/// Bytes being read; `None` when they are malformed.
pub(in crate::comm::message_passing) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    pub fn number(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    pub fn index(&mut self) -> Option<usize> {
        self.number()?.try_into().ok()
    }

    pub fn text(&mut self) -> Option<String> {
        let len = self.index()?;
        Some(String::from_utf8_lossy(self.take(len)?).into_owned())
    }

    pub fn list<T>(&mut self, mut read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let len = self.index()?;
        (0..len).map(|_| read(self)).collect()
    }
}
