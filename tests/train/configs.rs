//! The configs of all modules go into files and come back.

use std::fs;
use std::time::Duration;

use burn::config::{Config, ConfigError};
use burn::tensor::{DType, FloatDType};
use burn_parallel::comm::WorldConfig;
use burn_parallel::hf::{AdapterConfig, Mapping, Rule, SaveConfig};
use burn_parallel::partition::PartitionOptions;
use burn_parallel::prelude::*;

use crate::common::dir::Dir;

/// What is read from a file of this text.
fn read<C: Config>(text: &str) -> Result<C, ConfigError> {
    let dir = Dir::fresh();
    let path = dir.join("config.json");
    fs::write(&path, text).unwrap();
    C::load(path)
}

/// Writes a config and reads it again; then with a key that no config has.
fn comes_back<C: Config>(config: &C) {
    let dir = Dir::fresh();
    let path = dir.join("config.json");
    config.save(&path).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let again = C::load(&path).unwrap_or_else(|error| panic!("{error:?}: {text}"));
    assert_eq!(format!("{again:?}"), format!("{config:?}"), "{text}");
    assert!(read::<C>(&text.replacen('{', "{\"nobody_knows\": 1,", 1)).is_err(), "{text}");
}

#[test]
fn every_config_comes_back_from_a_file() {
    comes_back(&DataParallelConfig::new().with_reduce_dtype(FloatDType::BF16).with_compare_every(3));
    comes_back(&TensorParallelConfig::new(Plan::megatron()).with_seed(7));
    comes_back(&PipelineConfig::new(8).with_cut(Cut::before(["layers.6.*"])).with_whole_input("1"));
    comes_back(&PartitionOptions::new("tp", 4, 1).with_sequence_dim(1));
    comes_back(&AdapterConfig::new(8, 16.0));
    let config = CheckpointConfig::new().with_keep_last(3).with_keep_every(100).with_allow_missing(["head.*"]);
    comes_back(&config.with_allow_unexpected(["old.*"]).with_strategy("dp = 2"));
    comes_back(&SaveConfig::new(Mapping::new().rule(Rule::new("a.*.weight", "b.*.weight").transposed())));
    let config = SaveConfig::new(Mapping::llama()).with_dtype(DType::BF16).with_shard_bytes(1 << 30);
    comes_back(&config.with_files_of("base").with_overwrite(true).with_merged_adapters(16.0).with_file("a", "text"));
    comes_back(&WorldConfig::from_env().unwrap().with_timeout(Duration::from_millis(1500)).with_name("mine"));
}

#[test]
fn what_a_file_leaves_out_has_its_default() {
    let same = |found: &dyn std::fmt::Debug, expected: &dyn std::fmt::Debug| {
        assert_eq!(format!("{found:?}"), format!("{expected:?}"));
    };
    same(&read::<CheckpointConfig>("{}").unwrap(), &CheckpointConfig::new());
    same(&read::<SaveConfig>("{\"mapping\": {}}").unwrap(), &SaveConfig::new(Mapping::new()));
    same(&read::<WorldConfig>("{}").unwrap(), &WorldConfig::from_env().unwrap());
    let half = read::<SaveConfig>("{\"mapping\": {}, \"dtype\": \"f16\"}").unwrap();
    same(&half, &SaveConfig::new(Mapping::new()).with_dtype(DType::F16));
    for (wrong, said) in [("0", "`timeout_s` is 0"), ("-1", "positive"), ("1e300", "positive")] {
        let refused = read::<WorldConfig>(&format!("{{\"timeout_s\": {wrong}}}")).unwrap_err();
        assert!(format!("{refused:?}").contains(said), "{refused:?}");
    }
}
