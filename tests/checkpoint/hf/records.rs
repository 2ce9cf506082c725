//! burn's own records, where one rank holds the model, and replicas whose optimizer is sharded.

use burn::module::Module;
use burn_parallel::hf::{self, Mapping, SaveConfig};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;

use crate::Dir;
use crate::hf::golden::Name;
use crate::hf::save::same;

#[test]
fn a_directory_is_a_record_and_back() {
    let dir = Dir::fresh();
    let name = Name::Qwen2;
    launch::threads(1)
        .run(|rank| {
            let device = rank.device().autodiff();
            let model = name.fresh(&device).data_parallel(&rank, DataParallelConfig::new())?;
            let model = model.load(&mut hf::open(name.folder())?.mapped(Mapping::llama())?)?;
            model.assemble()?.save_file(dir.join("model.bpk")).map_err(Error::user)?;
            let model = name.fresh(&device).try_load_file(dir.join("model.bpk")).map_err(Error::user)?;
            let model = model.data_parallel(&rank, DataParallelConfig::new())?;
            hf::save(&model, &rank, dir.join("out"), &SaveConfig::new(Mapping::llama())).map(drop)
        })
        .unwrap();
    same(&name.folder(), &dir.join("out"));
}

#[test]
fn sharded_replicas_write_what_they_hold() {
    let name = Name::Llama;
    for sharding in [Sharding::Optimizer, Sharding::Gradients] {
        let dir = Dir::fresh();
        launch::threads(2)
            .run(|world| {
                let config = DataParallelConfig::new().with_sharding(sharding);
                let model = name.fresh(&world.device().autodiff()).data_parallel(&world, config)?;
                let model = model.load(&mut hf::open(name.folder())?.mapped(Mapping::llama())?)?;
                hf::save(&model, &world, dir.join("out"), &SaveConfig::new(Mapping::llama())).map(drop)
            })
            .unwrap();
        same(&name.folder(), &dir.join("out"));
    }
}
