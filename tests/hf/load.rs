//! Directories loaded on any mesh.

use std::fs;

use burn::module::{Module, ModuleVisitor, Param};
use burn::prelude::*;
use burn_parallel::hf::{self, Mapping, Weights};
use burn_parallel::params::SliceSource;
use burn_parallel::prelude::*;

use crate::common::rotary::Rotary;
use crate::golden::Name;
use crate::{Dir, counting, file_of, values};

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
        // A tied embedding is read on its own stage; the first step sends it to the other.
        assert_eq!(of([1, 2, 1]), whole);
    }
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
