//! The header that announces a message between GPUs, as a message of the host transport.
//!
//! It is told from a user's message by its form: 64-bit integers of eight dims that begin with a fixed number.

use burn::backend::flex::FlexTensor;
use burn::tensor::{BoolStore, DType, TensorData};

use super::Message;
use crate::Error;

const MAGIC: u64 = 0x6e63_636c_6865_6164;
/// Dims of a header but the last.
const FORM: [usize; 7] = [1; 7];

/// The dtypes that it can announce.
pub(super) const DTYPES: [DType; 13] = [
    DType::F64,
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::I64,
    DType::I32,
    DType::I8,
    DType::U64,
    DType::U32,
    DType::U8,
    DType::Bool(BoolStore::Native),
    DType::Bool(BoolStore::U8),
    DType::Bool(BoolStore::U32),
];

/// The announcement of a message.
#[derive(Debug, PartialEq)]
pub(super) struct MessageHeader {
    pub number: u64,
    pub dtype: DType,
    pub dims: Vec<usize>,
}

impl MessageHeader {
    pub fn write(&self) -> Result<Message, Error> {
        let unsupported = || Error::UnsupportedDType { operation: "send over NCCL", dtype: self.dtype };
        let dtype = DTYPES.iter().position(|dtype| *dtype == self.dtype).ok_or_else(unsupported)?;
        let words = [MAGIC, self.number, dtype as u64].into_iter().chain(self.dims.iter().map(|dim| *dim as u64));
        let words: Vec<u64> = words.collect();
        let dims: Vec<usize> = FORM.into_iter().chain([words.len()]).collect();
        Ok(Message(FlexTensor::from_data(TensorData::new(words, dims))))
    }

    /// Whether a message has the form of a header.
    pub fn is_in(Message(tensor): &Message) -> bool {
        let dims = tensor.layout().shape();
        tensor.dtype() == DType::U64
            && dims.num_dims() == FORM.len() + 1
            && dims[..FORM.len()] == FORM
            && words(tensor).first() == Some(&MAGIC)
    }

    pub fn read(Message(tensor): &Message) -> Option<Self> {
        match words(tensor)[..] {
            [MAGIC, number, dtype, ref dims @ ..] => {
                let dtype = *DTYPES.get(usize::try_from(dtype).ok()?)?;
                let dims = dims.iter().map(|dim| usize::try_from(*dim).ok()).collect::<Option<Vec<_>>>()?;
                // Nobody has sent more than there is memory.
                dims.iter().try_fold(dtype.size(), |bytes, dim| bytes.checked_mul(*dim))?;
                Some(Self { number, dtype, dims })
            }
            _ => None,
        }
    }
}

fn words(tensor: &FlexTensor) -> Vec<u64> {
    tensor.clone().into_data().try_into_vec().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use burn::backend::flex::FlexTensor;
    use burn::tensor::{BoolStore, DType, TensorData};

    use super::{DTYPES, FORM, MAGIC, Message, MessageHeader};

    #[test]
    fn headers_are_read_as_written() {
        for (number, dtype) in DTYPES.into_iter().enumerate() {
            for dims in [vec![], vec![0], vec![3, 5], vec![1; 9]] {
                let header = MessageHeader { number: number as u64 + (1 << 40), dtype, dims };
                let message = header.write().unwrap();
                assert!(MessageHeader::is_in(&message));
                assert_eq!(MessageHeader::read(&message), Some(header));
            }
        }
        let header = MessageHeader { number: 0, dtype: DType::I16, dims: vec![1] };
        assert!(header.write().is_err(), "NCCL does not know it");
    }

    #[test]
    fn other_messages_are_no_headers() {
        let message = |words: Vec<u64>, dims: Vec<usize>| Message(FlexTensor::from_data(TensorData::new(words, dims)));
        let form = |len| FORM.into_iter().chain([len]).collect::<Vec<_>>();
        assert!(!MessageHeader::is_in(&message(vec![MAGIC, 0, 0], vec![3])));
        assert!(!MessageHeader::is_in(&message(vec![7, 0, 0], form(3))));
        assert!(!MessageHeader::is_in(&message(vec![], form(0))));
        assert!(MessageHeader::is_in(&message(vec![MAGIC], form(1))), "of that form");
        let huge = vec![MAGIC, 1, 0, u64::MAX / 4, 2];
        for garbled in [vec![MAGIC], vec![MAGIC, 1], vec![MAGIC, 1, 99], vec![MAGIC, 1, u64::MAX, 4], huge] {
            let len = garbled.len();
            assert_eq!(MessageHeader::read(&message(garbled, form(len))), None);
        }
        assert_eq!(DTYPES[10], DType::Bool(BoolStore::Native));
    }
}
