//! Safetensors files of any bytes: opened, and read in parts.
#![no_main]

use burn::tensor::DType;
use burn_parallel::hf::Weights;
use burn_parallel::params::SliceSource;

libfuzzer_sys::fuzz_target!(|input: (bool, u8, &[u8])| {
    let (framed, numbers, bytes) = input;
    // As a rule the length at the beginning is right, or no input would get further.
    let header = bytes.iter().rposition(|byte| *byte == b'}').map_or(bytes.len(), |last| last + 1);
    let file = match framed {
        true => [&(header as u64).to_le_bytes()[..], bytes].concat(),
        false => bytes.to_vec(),
    };
    let len = file.len();
    let Ok(mut source) = Weights::from_bytes(file) else { return };
    let names: Vec<String> = source.names().map(Into::into).collect();
    for name in &names {
        let Ok(Some(dims)) = source.dims(name) else { continue };
        let whole: Vec<_> = dims.iter().map(|size| 0..*size).collect();
        if let Ok(data) = source.read(name, &whole) {
            assert!(data.bytes().len() <= len && data.shape().as_slice() == dims);
        }
        let (from, to) = (usize::from(numbers & 15), usize::from(numbers >> 4));
        let part: Vec<_> = dims.iter().map(|size| from.min(*size)..size.saturating_sub(to)).collect();
        let _ = source.read(name, &part);
        let _ = source.read_as(name, &part, DType::BF16);
        let _ = source.read(name, &part[..part.len().saturating_sub(1)]);
    }
});
