//! Directories loaded on any mesh.

use std::fs;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::prelude::*;
use burn_parallel::hf::{self, Mapping, Weights};
use burn_parallel::params::SliceSource;
use burn_parallel::prelude::*;

use crate::Dir;
use crate::common::llama::{Batch, Llama};
use crate::common::reference;
use crate::common::rotary::Rotary;
use crate::hf::golden::Name;
use crate::hf::{counting, file_of, values};

#[test]
fn every_mesh_has_the_losses_of_pytorch() {
    for name in Name::BOTH {
        for axes in [[1, 1, 1], [2, 1, 1], [1, 1, 2], [1, 2, 1], [1, 3, 1], [2, 2, 2]] {
            launch::threads(axes.iter().product())
                .run(|world| {
                    let device = world.device().autodiff();
                    let model = name.fresh(&device).parallelize(&world, &name.strategy(axes))?;
                    let mut weights = hf::open(name.folder())?.mapped(Mapping::llama())?;
                    let mut model = model.load(&mut weights)?;
                    let share = (model.mesh().coordinate("dp")?, axes[0]);
                    name.golden().check(&mut model, share, 2e-5)
                })
                .unwrap();
        }
    }
}

#[test]
fn burns_rotary_encoding_turns_what_transformers_turns() {
    for name in Name::BOTH {
        launch::threads(2)
            .run(|world| {
                let device = world.device().autodiff();
                let model = Rotary::new(name.config(), &device).parallelize(&world, &name.strategy([1, 1, 2]))?;
                let mut weights = hf::open(name.folder())?.mapped(Mapping::llama().rotary_pairs(8))?;
                let golden = name.golden();
                golden.demand(golden.loss_by(&mut model.load(&mut weights)?, (0, 1), Rotary::loss)?, 2e-5);
                Ok(())
            })
            .unwrap();
    }
}

/// The bytes of the floats that a rank holds.
fn held<M: Module>(model: &M) -> u64 {
    struct Bytes(u64, std::collections::HashSet<u64>);
    impl ModuleVisitor for Bytes {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.1.insert(param.id.val()) {
                self.0 += 4 * param.lazy_shape().num_elements() as u64;
            }
        }
    }
    let mut bytes = Bytes(0, Default::default());
    model.visit(&mut bytes);
    bytes.0
}

#[test]
fn each_rank_reads_its_slices_and_nothing_else() {
    for name in Name::BOTH {
        let of = |axes: [usize; 3]| -> u64 {
            let read = launch::threads(axes.iter().product()).run(|world| {
                let device = world.device().autodiff();
                let model = name.fresh(&device).parallelize(&world, &name.strategy(axes))?;
                let mut weights = hf::open(name.folder())?.mapped(Mapping::llama())?;
                let headers = weights.bytes_read();
                let model = model.load(&mut weights)?;
                let read = weights.bytes_read() - headers;
                assert_eq!(read, held(model.local()), "{name:?} {axes:?} on rank {}", world.rank());
                Ok(read)
            });
            read.unwrap().iter().sum()
        };
        let whole = of([1, 1, 1]);
        assert_eq!(of([2, 1, 1]), 2 * whole);
        // Norms are whole on both ranks: two of 64 elements for each layer, and the last.
        assert_eq!(of([1, 1, 2]), whole + 9 * 64 * 4);
        // A tied embedding is read on its own stage; the rank of the other reads it in the first step.
        assert_eq!(of([1, 2, 1]), whole);
    }
}

/// The batch of PyTorch's first step.
fn batch(name: Name, device: &Device) -> Batch {
    let rows = &name.golden().tokens[0];
    let dims = [rows.len(), rows[0].len()];
    Batch::of_documents(Tensor::from_data(TensorData::new(rows.concat(), dims), device))
}

/// Rows of logits, the first of which PyTorch has as well.
fn check_logits<P: ParallelModule<Model = Llama>>(name: Name, model: &P) -> Result<(), Error> {
    let logits = model.forward_with(batch(name, &Device::flex()), |model, batch| {
        model.forward(batch.tokens, batch.positions, batch.documents)
    })?;
    let expected = name.golden().logits_first;
    let found: Vec<f32> = logits.slice([0..1, 0..1, 0..expected.len()]).into_data().try_to_vec().unwrap();
    let largest = expected.iter().fold(0f64, |most, x| most.max(x.abs()));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((f64::from(*found) - expected).abs() <= 2e-5 * largest, "{name:?}: {found}, not {expected}");
    }
    Ok(())
}

/// Before a pipeline is prepared or after, on its own or split as well, tied or not: each rank reads what it holds, and
/// sends nothing of it.
#[test]
fn pipelines_are_loaded_before_and_after_they_are_prepared() {
    for name in Name::BOTH {
        for (axes, prepared) in [([1, 2, 1], true), ([1, 2, 1], false), ([1, 2, 2], true), ([1, 2, 2], false)] {
            launch::threads(axes.iter().product())
                .run(|world| {
                    let device = world.device().autodiff();
                    let mut model = name.fresh(&device).parallelize(&world, &name.strategy(axes))?;
                    if prepared {
                        model.prepare(batch(name, &device), Llama::loss)?;
                    }
                    let mut weights = hf::open(name.folder())?.mapped(Mapping::llama())?;
                    let headers = weights.bytes_read();
                    let mut model = model.load(&mut weights)?;
                    let at_once = held(model.local());
                    assert_eq!(weights.bytes_read() - headers, at_once);
                    name.golden().check(&mut model, (0, 1), 2e-5)?;
                    check_logits(name, &model)?;
                    let later = held(model.local()) - at_once;
                    assert_eq!(weights.bytes_read() - headers, at_once + later, "on rank {}", world.rank());
                    let other_stage = model.mesh().coordinate("pp")? == 1;
                    assert_eq!(later > 0, name.tied() && other_stage && !prepared);
                    assert_eq!(model.counters().pipeline.of("broadcast").calls, 0, "{name:?} {axes:?} {prepared}");
                    Ok(())
                })
                .unwrap();
        }
    }
}

/// The same where replicas divide the rows of all parameters among themselves (ZeRO 3).
#[test]
fn stages_of_divided_parameters_read_their_rows() {
    for prepared in [true, false] {
        launch::threads(4)
            .run(|world| {
                let (name, device) = (Name::Qwen2, world.device().autodiff());
                let data = DataParallelConfig::new().with_sharding(Sharding::Parameters);
                let mut model = name.fresh(&device).parallelize(&world, &name.strategy([2, 2, 1]).with_data(data))?;
                let share = (model.mesh().coordinate("dp")?, 2);
                if prepared {
                    model.prepare(batch(name, &device), Llama::loss)?;
                }
                let mut model = model.load(&mut hf::open(name.folder())?.mapped(Mapping::llama())?)?;
                name.golden().check(&mut model, share, 2e-5)?;
                assert_eq!(model.counters().pipeline.of("broadcast").calls, 0);
                Ok(())
            })
            .unwrap();
    }
}

/// What is not what was read any more is sent.
#[test]
fn what_changes_before_the_first_step_counts() {
    struct Doubled;
    impl ModuleMapper for Doubled {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|value| Tensor::from_data((value * 2.0).into_data(), &Device::flex().autodiff()).require_grad())
        }
    }
    launch::threads(2)
        .run(|world| {
            let device = world.device().autodiff();
            let model = Name::Qwen2.fresh(&device).parallelize(&world, &Name::Qwen2.strategy([1, 2, 1]))?;
            let model = model.load(&mut hf::open(Name::Qwen2.folder())?.mapped(Mapping::llama())?)?;
            let mut model = model.map(&mut Doubled);
            model.prepare(batch(Name::Qwen2, &device), Llama::loss)?;
            assert_eq!(model.counters().pipeline.of("broadcast").calls, 1);
            let embedding = "model.embed_tokens.weight";
            let file = crate::hf::values(&mut hf::open(Name::Qwen2.folder())?, embedding);
            let doubled: Vec<f32> = file.iter().map(|value| 2.0 * value).collect();
            assert_eq!(reference::values(model.local())[embedding].values, doubled, "on rank {}", world.rank());
            Ok(())
        })
        .unwrap();
}

#[test]
fn shards_are_one_directory() {
    let dir = Dir::fresh();
    let all = counting(&[("a", &[3, 2]), ("b", &[4]), ("c", &[])]);
    fs::write(dir.join("x-1.safetensors"), file_of(&all[..1].to_vec())).unwrap();
    // A tensor that the index does not name is nobody's.
    fs::write(dir.join("x-2.safetensors"), file_of(&all[1..].to_vec())).unwrap();
    let index = r#"{"weight_map":{"a":"x-1.safetensors","b":"x-2.safetensors"}}"#;
    fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    let mut weights = hf::open(dir.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(weights.tensor_dtype("a"), Some(burn::tensor::DType::F32));
    for (name, _, expected) in &all[..2] {
        assert_eq!(&values(&mut weights, name), expected);
    }
    let part = weights.read("a", &[1..3, 1..2]).unwrap();
    assert_eq!(part.try_to_vec::<f32>().unwrap(), [3.0 / 64.0, 5.0 / 64.0]);
    assert_eq!(hf::open(dir.join("x-2.safetensors")).unwrap().names().count(), 2);
}

#[test]
fn halves_are_cast_to_what_the_model_has() {
    let bytes = |dtype: &str, values: &[u16]| {
        let header = format!(r#"{{"weight":{{"dtype":"{dtype}","shape":[2,2],"data_offsets":[0,8]}}}}"#);
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), bytemuck::cast_slice(values)].concat()
    };
    for (dtype, file) in [("BF16", [0x3f80, 0x4000, 0xbf80, 0x3f00]), ("F16", [0x3c00, 0x4000, 0xbc00, 0x3800])] {
        launch::threads(2)
            .run(|rank| {
                let device = rank.device().autodiff();
                let model: burn::nn::Linear = burn::nn::LinearConfig::new(2, 2).with_bias(false).init(&device);
                let model = model.tensor_parallel(&rank, Plan::new().shard("weight", 1))?;
                let mut weights = Weights::from_bytes(bytes(dtype, &file))?;
                let before = weights.bytes_read();
                let model = model.load(&mut weights)?;
                assert_eq!(weights.bytes_read() - before, 4);
                let held: Vec<f32> = model.local().weight.val().into_data().try_to_vec().unwrap();
                assert_eq!(held, [[1.0, -1.0], [2.0, 0.5]][rank.rank()]);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn errors_name_the_tensors() {
    let says = |mapping: Mapping, words: &[&str]| {
        let error = launch::threads(1).run(|rank| {
            let model = Name::Llama.fresh(&rank.device().autodiff()).data_parallel(&rank, DataParallelConfig::new())?;
            model.load(&mut hf::open(Name::Llama.folder())?.mapped(mapping.clone())?).map(drop)
        });
        let said = error.unwrap_err().to_string();
        for words in words {
            assert!(said.contains(words), "`{words}` is missing in: {said}");
        }
    };
    says(Mapping::new(), &["no rule of the mapping fits parameter `model.embed_tokens.weight`", "hf::compare"]);
    says(Mapping::identity(), &["llama_gqa: has none of the tensors `model.layers.0.input_layernorm.gamma`"]);
    let straight = Mapping::new().rule(hf::Rule::new("*norm.weight", "*norm.gamma")).then(Mapping::identity());
    says(
        straight,
        &["`model.layers.0.self_attn.k_proj.weight` has dims [64, 16] in the model and [16, 64] in the source"],
    );
}
