//! Directories written from any mesh.

use std::fs;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use burn_parallel::hf::{self, Mapping, SaveConfig, SavedDirectory};
use burn_parallel::params::SliceSource;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Engine;

use crate::Dir;
use crate::hf::golden::Name;
use crate::hf::values;

/// Loads a directory on a mesh, and writes it again.
pub fn through(
    name: Name,
    from: &Path,
    axes: [usize; 3],
    to: &Path,
    config: &SaveConfig,
) -> Result<Vec<SavedDirectory>, Error> {
    through_by(&name.strategy(axes), name, from, axes, to, config)
}

pub fn through_by(
    strategy: &Strategy,
    name: Name,
    from: &Path,
    axes: [usize; 3],
    to: &Path,
    config: &SaveConfig,
) -> Result<Vec<SavedDirectory>, Error> {
    launch::threads(axes.iter().product()).run(|world| {
        let model = name.fresh(&world.device().autodiff()).parallelize(&world, strategy)?;
        let model = model.load(&mut hf::open(from)?.mapped(Mapping::llama())?)?;
        hf::save(&model, &world, to, config)
    })
}

/// Demands that two directories have the same tensors, bit for bit.
pub fn same(one: &Path, other: &Path) {
    compare(one, other, |name, a, b| assert_eq!((a.dtype(), a.bytes()), (b.dtype(), b.bytes()), "{name}"));
}

/// Demands that two directories have the same tensors of f32, within a part of the largest value of each.
pub fn near(one: &Path, other: &Path, tolerance: f32) {
    compare(one, other, |name, a, b| {
        let (a, b) = (a.try_to_vec::<f32>().unwrap(), b.try_to_vec::<f32>().unwrap());
        let largest = a.iter().fold(0f32, |most, value| most.max(value.abs()));
        let worst = a.iter().zip(&b).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(worst <= tolerance * largest, "{name}: {worst} of {largest}");
    });
}

fn compare(one: &Path, other: &Path, demand: impl Fn(&str, TensorData, TensorData)) {
    let (mut one, mut other) = (hf::open(one).unwrap(), hf::open(other).unwrap());
    let names: Vec<String> = one.names().map(Into::into).collect();
    assert_eq!(names, other.names().collect::<Vec<_>>());
    for name in names {
        let dims = one.tensor_dims(&name).unwrap().to_vec();
        assert_eq!(other.tensor_dims(&name), Some(&dims[..]), "{name}");
        let ranges: Vec<_> = dims.iter().map(|size| 0..*size).collect();
        demand(&name, one.read(&name, &ranges).unwrap(), other.read(&name, &ranges).unwrap());
    }
}

#[test]
fn what_any_mesh_writes_any_other_reads() {
    let meshes = [[1, 1, 1], [2, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 1], [2, 2, 2], [3, 1, 2]];
    for name in Name::BOTH {
        let dirs: Vec<Dir> = meshes.iter().map(|_| Dir::fresh()).collect();
        let mut from = name.folder();
        for (axes, dir) in meshes.into_iter().zip(&dirs) {
            let to = dir.join("out");
            // Pieces of a few rows, and of parts of a row.
            let config = SaveConfig::new(Mapping::llama()).with_piece_bytes(if axes[0] > 1 { 100 } else { 3000 });
            let saved = through(name, &from, axes, &to, &config).unwrap();
            same(&name.folder(), &to);
            assert_eq!(saved[0].files, ["model.safetensors"]);
            assert_eq!(saved.iter().map(|of| of.bytes_written).sum::<u64>(), saved[0].bytes, "{axes:?}");
            from = to;
        }
    }
}

/// Each replica holds rows, which are all that it writes.
#[test]
fn what_replicas_divide_is_written_once() {
    let name = Name::Llama;
    for axes in [[2, 1, 1], [3, 1, 2], [2, 2, 1]] {
        let dir = Dir::fresh();
        let data = DataParallelConfig::new().with_sharding(Sharding::Parameters);
        let strategy = name.strategy(axes).with_data(data).with_engine(Engine::Captured);
        let config = SaveConfig::new(Mapping::llama()).with_piece_bytes(3000);
        let saved = through_by(&strategy, name, &name.folder(), axes, &dir.join("out"), &config).unwrap();
        assert_eq!(saved.iter().map(|of| of.bytes_written).sum::<u64>(), saved[0].bytes, "{axes:?}");
        same(&name.folder(), &dir.join("out"));
    }
}

#[test]
fn no_rank_holds_more_than_its_parts_and_some_pieces() {
    for axes in [[2, 1, 1], [1, 1, 2], [1, 2, 1], [1, 1, 4]] {
        let dir = Dir::fresh();
        let config = SaveConfig::new(Mapping::llama());
        let large = through(Name::Llama, &Name::Llama.folder(), axes, &dir.join("large"), &config).unwrap();
        let config = config.with_piece_bytes(4096);
        let ranks = axes.iter().product::<usize>();
        let saved = through(Name::Llama, &Name::Llama.folder(), axes, &dir.join("out"), &config).unwrap();
        for of in &saved {
            assert!(of.largest_buffer <= 3 * 4096, "{axes:?}: {of:?}");
            // All have a share of the work.
            assert!(of.bytes_written > of.bytes / (2 * ranks as u64), "{axes:?}: {of:?}");
        }
        let sent: u64 = saved.iter().map(|of| of.bytes_sent).sum();
        assert!(large.iter().map(|of| of.bytes_sent).sum::<u64>() <= sent * 11 / 10, "{large:?}, {saved:?}");
        match axes {
            // What is written is what the writer holds.
            [2, 1, 1] | [1, 2, 1] => assert_eq!(sent, 0),
            // Rows of a tensor are written by who holds them; columns travel.
            _ => assert!(sent > saved[0].bytes / 10 && sent < saved[0].bytes / 3, "{sent}"),
        }
    }
}

#[test]
fn several_files_and_another_dtype() {
    let dir = Dir::fresh();
    let name = Name::Llama;
    let config = SaveConfig::new(Mapping::llama())
        .with_shard_bytes(200_000)
        .with_dtype(DType::BF16)
        .with_files_of(name.folder());
    let saved = through(name, &name.folder(), [1, 2, 2], &dir.join("out"), &config).unwrap();
    assert!(saved[0].files.len() > 2 && saved.iter().all(|of| of.files == saved[0].files), "{saved:?}");
    let mut listed: Vec<String> =
        fs::read_dir(dir.join("out")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    listed.sort();
    let mut expected = saved[0].files.clone();
    expected.extend(["config.json".into(), "model.safetensors.index.json".into()]);
    expected.sort();
    assert_eq!(listed, expected);
    let (mut before, mut after) = (hf::open(name.folder()).unwrap(), hf::open(dir.join("out")).unwrap());
    for tensor in ["lm_head.weight", "model.layers.2.self_attn.k_proj.weight", "model.norm.weight"] {
        assert_eq!(after.tensor_dtype(tensor), Some(DType::BF16));
        let rounded: Vec<f32> =
            values(&mut before, tensor).into_iter().map(|x| burn::tensor::bf16::from_f32(x).to_f32()).collect();
        assert_eq!(values(&mut after, tensor), rounded);
    }
    let config = after.config().unwrap();
    assert_eq!(config["dtype"], "bfloat16");
    assert_eq!(config["num_hidden_layers"], before.config().unwrap()["num_hidden_layers"]);
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("out/model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], saved[0].bytes);

    // What is loaded of 16 bits, trained and written with more says so: nobody rounds it when it is loaded.
    let config = SaveConfig::new(Mapping::llama()).with_files_of(dir.join("out"));
    through(name, &dir.join("out"), [1, 1, 2], &dir.join("wide"), &config).unwrap();
    let wide = hf::open(dir.join("wide")).unwrap();
    assert_eq!(wide.tensor_dtype("model.norm.weight"), Some(DType::F32));
    assert_eq!(wide.config().unwrap()["dtype"], "float32");
}

#[test]
fn a_directory_is_there_as_a_whole_or_not_at_all() {
    let dir = Dir::fresh();
    let (name, to) = (Name::Qwen2, dir.join("out"));
    let config = SaveConfig::new(Mapping::llama());
    // What a save left that was ended does not matter.
    fs::create_dir(dir.join(".out.unfinished")).unwrap();
    fs::write(dir.join(".out.unfinished/model.safetensors"), "half").unwrap();
    through(name, &name.folder(), [2, 1, 1], &to, &config).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let said = through(name, &name.folder(), [2, 1, 1], &to, &config).unwrap_err().to_string();
    assert!(said.contains("out: is there already, and not empty"), "{said}");
    fs::write(to.join("old"), "").unwrap();
    through(name, &name.folder(), [1, 1, 2], &to, &config.clone().with_overwrite(true)).unwrap();
    assert!(!to.join("old").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    same(&name.folder(), &to);

    // An error leaves what there was, and the world goes on.
    let lacks = config.with_overwrite(true).with_files_of(dir.join("nowhere"));
    launch::threads(2)
        .run(|world| {
            let model = name.fresh(&world.device().autodiff()).parallelize(&world, &name.strategy([1, 1, 2]))?;
            let said = hf::save(&model, &world, &to, &lacks).unwrap_err().to_string();
            assert!(said.contains("rank 0: ") && said.contains("config.json: cannot be read"), "{said}");
            world.barrier()
        })
        .unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    same(&name.folder(), &to);
    // A file in the place of the directory, and of its parent.
    let (file, config) = (to.join("model.safetensors"), SaveConfig::new(Mapping::llama()).with_overwrite(true));
    let said = through(name, &name.folder(), [1, 2, 1], &file, &config).unwrap_err().to_string();
    assert!(said.contains("is there already, and is no directory"), "{said}");
    let said =
        through(name, &name.folder(), [1, 2, 1], &to.join("model.safetensors/x"), &SaveConfig::new(Mapping::llama()));
    assert!(said.unwrap_err().to_string().contains("rank 0: "));
}

#[test]
fn ranks_that_differ_hear_of_it() {
    let dir = Dir::fresh();
    let error = launch::threads(2).run(|world| {
        let model = Name::Llama.fresh(&world.device().autodiff()).data_parallel(&world, DataParallelConfig::new())?;
        let config = SaveConfig::new(Mapping::llama()).with_piece_bytes(100 + world.rank());
        hf::save(&model, &world, dir.join("out"), &config).map(drop)
    });
    let said = error.unwrap_err().to_string();
    assert!(said.contains("the config of a save"), "{said}");
}

#[test]
fn parameters_in_several_places_and_layouts() {
    use burn_parallel::hf::Rule;
    let dir = Dir::fresh();
    // Neighbours are halves again, and two layers one.
    let mapping = || {
        Mapping::new()
            .rule(
                Rule::new(
                    "model.layers.*.mlp.gate_up.weight",
                    ["model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"],
                )
                .transposed()
                .groups(4),
            )
            .then(Mapping::llama().rotary_pairs(8))
    };
    let name = Name::Llama;
    for (axes, other) in [([1, 1, 2], [1, 2, 1]), ([2, 2, 1], [1, 1, 3])] {
        let (fused, back) = (dir.join(&format!("fused{}", axes[0])), dir.join(&format!("back{}", axes[0])));
        let spread =
            |world: &Rank, axes| name.fresh(&world.device().autodiff()).parallelize(world, &name.strategy(axes));
        let config = SaveConfig::new(mapping()).with_piece_bytes(1000);
        launch::threads(axes.iter().product())
            .run(|world| {
                let mut weights = hf::open(name.folder())?.mapped(Mapping::llama().rotary_pairs(8))?;
                hf::save(&spread(&world, axes)?.load(&mut weights)?, &world, &fused, &config)
            })
            .unwrap();
        let opened = hf::open(&fused).unwrap();
        assert_eq!(opened.tensor_dims("model.layers.1.mlp.gate_up.weight"), Some(&[352, 64][..]));
        launch::threads(other.iter().product())
            .run(|world| {
                let model = spread(&world, other)?.load(&mut hf::open(&fused)?.mapped(mapping())?)?;
                hf::save(&model, &world, &back, &SaveConfig::new(Mapping::llama().rotary_pairs(8)))
            })
            .unwrap();
        same(&name.folder(), &back);
    }
}

#[test]
fn a_pipeline_that_is_not_cut_is_an_error() {
    let dir = Dir::fresh();
    let error = launch::threads(2).run(|world| {
        let model = Name::Llama.fresh(&world.device().autodiff()).pipeline_parallel(&world, PipelineConfig::new(2))?;
        hf::save(&model, &world, dir.join("out"), &SaveConfig::new(Mapping::llama())).map(drop)
    });
    let said = error.unwrap_err().to_string();
    assert!(said.contains("`prepare` the model before it is saved"), "{said}");
}
