//! Checkpoints that were changed and have the right checksums all the same, as somebody makes them who means harm. The
//! fuzzer of checkpoints (`fuzz/targets/checkpoint.rs`) has this file too.

use std::fs;
use std::path::Path;

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

pub const INDEX: &str = "checkpoint.json";
pub const SUM: &str = "checkpoint.json.xxh3";

/// Writes an index, whatever it is, and its checksum.
pub fn put_index(dir: &Path, index: &[u8]) {
    fs::write(dir.join(SUM), format!("{:016x}\n", xxh3_64(index))).expect("it is written");
    fs::write(dir.join(INDEX), index).expect("it is written");
}

/// An index with the sizes of these files, and for all slices with the checksums of what the files have where their
/// headers say, as far as there is such; `None` if it is no index at all.
pub fn sealed(index: &[u8], files: &[(String, &[u8])]) -> Option<Vec<u8>> {
    let mut index: Value = serde_json::from_slice(index).ok()?;
    let block = index["block_bytes"].as_u64()?.clamp(1, 1 << 30) as usize;
    let mut listed = Vec::new();
    for file in index.get_mut("files")?.as_array_mut()? {
        let there = files.iter().find(|(name, _)| file["name"] == name.as_str());
        if let Some((_, bytes)) = there {
            file["bytes"] = bytes.len().into();
        }
        listed.push(there.and_then(|(_, bytes)| parts(bytes)));
    }
    let moments = |params: &mut Value| -> Option<()> {
        for param in params.as_object_mut()?.values_mut() {
            for tensor in param.get_mut("moments")?.as_object_mut()?.values_mut() {
                seal(tensor, &listed, block);
            }
        }
        Some(())
    };
    for params in index.get_mut("optimizers")?.as_object_mut()?.values_mut() {
        moments(params);
    }
    for tensor in index.get_mut("model")?.as_object_mut()?.values_mut() {
        seal(tensor, &listed, block);
    }
    serde_json::to_vec(&index).ok()
}

/// The header of a safetensors file, and the bytes behind it.
fn parts(file: &[u8]) -> Option<(Value, &[u8])> {
    let length = u64::from_le_bytes(*file.first_chunk()?) as usize;
    let (header, data) = file[8..].split_at_checked(length)?;
    Some((serde_json::from_slice(header).ok()?, data))
}

fn seal(tensor: &mut Value, files: &[Option<(Value, &[u8])>], block: usize) -> Option<()> {
    for slice in tensor.get_mut("slices")?.as_array_mut()? {
        let (header, data) = files.get(slice["file"].as_u64()? as usize)?.as_ref()?;
        let place = &header[slice["tensor"].as_str()?]["data_offsets"];
        let bytes = data.get(place[0].as_u64()? as usize..place[1].as_u64()? as usize)?;
        let sums: Vec<String> = bytes.chunks(block).map(|block| format!("{:016x}", xxh3_64(block))).collect();
        slice["xxh3"] = sums.into();
    }
    Some(())
}
