//! Checkpoints of any bytes: an index and a file of tensors, restored.
#![no_main]

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use burn_parallel::checkpoint::{CheckpointOptions, Checkpointer, DataPosition, TrainState};
use burn_parallel::prelude::*;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

const STEP: &str = "step-000000001";

thread_local! {
    /// The directory of this process, with a checkpoint in it that is replaced by each input.
    static ROOT: RefCell<PathBuf> = RefCell::new(root());
}

fn root() -> PathBuf {
    let root = std::env::temp_dir().join(format!("burn-parallel-fuzz-{}", std::process::id()));
    fs::create_dir_all(root.join(STEP)).expect("there is a place for files");
    root
}

fn model() -> Linear {
    let ones = burn::nn::Initializer::Ones;
    LinearConfig::new(2, 3).with_initializer(ones).init(&Device::flex().autodiff())
}

fn values<M: Module>(model: &M) -> Vec<f32> {
    struct Values(Vec<f32>);
    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.extend(param.val().into_data().iter::<f32>());
        }
    }
    let mut values = Values(Vec::new());
    model.visit(&mut values);
    values.0
}

/// Gives all slices the checksums of what the file has where the header says. Without that no input would get further.
fn with_checksums(index: &[u8], file: &[u8]) -> Option<Vec<u8>> {
    let mut index: Value = serde_json::from_slice(index).ok()?;
    let block = index["block_bytes"].as_u64()?.clamp(1, 1 << 30) as usize;
    let length = u64::from_le_bytes(*file.first_chunk()?) as usize;
    let header: Value = serde_json::from_slice(file.get(8..8usize.checked_add(length)?)?).ok()?;
    let data = file.get(8 + length..)?;
    let sums = |tensor: &mut Value| -> Option<()> {
        for slice in tensor["slices"].as_array_mut()? {
            let place = &header[slice["tensor"].as_str()?]["data_offsets"];
            let bytes = data.get(place[0].as_u64()? as usize..place[1].as_u64()? as usize)?;
            let sums: Vec<String> = bytes.chunks(block).map(|block| format!("{:016x}", xxh3_64(block))).collect();
            slice["xxh3"] = sums.into();
        }
        Some(())
    };
    let of_optimizers = |index: &mut Value| -> Option<()> {
        let params = index["optimizers"].as_object_mut()?.values_mut().filter_map(Value::as_object_mut);
        let moments = params.flat_map(|params| params.values_mut()).filter_map(|param| param["moments"].as_object_mut());
        moments.flat_map(|moments| moments.values_mut()).for_each(|tensor| drop(sums(tensor)));
        Some(())
    };
    index["model"].as_object_mut()?.values_mut().for_each(|tensor| drop(sums(tensor)));
    of_optimizers(&mut index)?;
    serde_json::to_vec(&index).ok()
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Where the index ends, and whether its checksums are to be right.
    let [low, high, right, rest @ ..] = bytes else { return };
    let (index, file) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
    let index = match right & 1 {
        0 => index.to_vec(),
        _ => with_checksums(index, file).unwrap_or_else(|| index.to_vec()),
    };
    let root = ROOT.with(|root| root.borrow().clone());
    let dir = root.join(STEP);
    fs::write(dir.join("checkpoint.json.xxh3"), format!("{:016x}\n", xxh3_64(&index))).expect("it is written");
    fs::write(dir.join("checkpoint.json"), index).expect("it is written");
    fs::write(dir.join("rank-00000.safetensors"), file).expect("it is written");
    let run = launch::threads(1).run(|world| {
        let mut model = model().data_parallel(&world, DataParallelConfig::new())?;
        let (mut optim, mut position): (ModuleOptimizer, _) = (AdamWConfig::new().init(), DataPosition::default());
        let mut checkpoints = Checkpointer::new(&world, &root, CheckpointOptions::new())?;
        let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
        let restored = checkpoints.restore_step(1, state.with_value("position", &mut position));
        if let Err(error) = restored {
            assert!(matches!(error, Error::Checkpoint { .. } | Error::InvalidArgument { .. }), "{error:?}");
            assert!(error.to_string().contains(STEP) || error.to_string().contains('`'), "{error}");
            assert_eq!(values(model.local()), [1.0; 9]);
            assert!(optim.to_record().is_empty() && position == DataPosition::default());
        }
        Ok(())
    });
    run.expect("there is no other error");
});
