//! Plans of what is written.

use burn::tensor::DType;

use super::config::SaveConfig;
use super::plan::{HeldParam, SavePlan};
use super::rounds::Rounds;
use crate::hf::mapping::Mapping;
use crate::hf::rule::Rule;

fn whole(place: usize, path: &str, dims: &[usize], holders: &[usize]) -> HeldParam {
    let ranges = dims.iter().map(|size| 0..*size).collect();
    let parts = vec![(ranges, holders.to_vec())];
    HeldParam { place, path: path.into(), dims: dims.to_vec(), dtype: DType::F32, parts }
}

fn plan(params: &[HeldParam], config: &SaveConfig) -> Result<SavePlan, String> {
    SavePlan::new(params, "model", config).map_err(|error| error.to_string())
}

#[test]
fn work_is_shared_out() {
    let params: Vec<HeldParam> =
        (0..6).map(|at| whole(at, &format!("p.{at}"), &[2, 4], &[2 * (at % 2), 2 * (at % 2) + 1])).collect();
    let config = SaveConfig::new(Mapping::identity());
    let found = plan(&params, &config).unwrap();
    let turns = Rounds::new(&found, &params, 1 << 20, 4).flatten();
    let mut writers: Vec<(usize, usize)> = turns.map(|turn| (turn.tensor, turn.writer)).collect();
    writers.sort_unstable();
    assert_eq!(writers, [(0, 0), (1, 2), (2, 1), (3, 3), (4, 0), (5, 2)]);
    assert_eq!(found.files.len(), 1);
    let shards = plan(&params, &config.clone().with_shard_bytes(70)).unwrap();
    let names: Vec<&str> = shards.files.iter().map(|(name, _)| name.as_str()).collect();
    let of = |number| format!("model-0000{number}-of-00003.safetensors");
    assert_eq!(names, [of(1), of(2), of(3)]);
    assert_eq!(shards.tensors.iter().map(|tensor| tensor.file).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2]);
    // What is too large for a file has one of its own.
    assert_eq!(plan(&params, &config.with_shard_bytes(1)).unwrap().files.len(), 6);
}

#[test]
fn what_cannot_be_written() {
    let params = [whole(0, "a", &[4], &[0]), whole(1, "b", &[4], &[0])];
    let says = |mapping: Mapping, params: &[HeldParam], words: &str| {
        let said = plan(params, &SaveConfig::new(mapping)).unwrap_err();
        assert!(said.contains(words), "`{words}` is missing in: {said}");
    };
    says(Mapping::new().rule(Rule::new("x", "a")), &params, "no rule of the mapping fits parameter `b`");
    let both = Mapping::new().rule(Rule::new("x", "a")).rule(Rule::new("x", "b"));
    says(both, &params, "parameters `a` and `b` would both be tensor `x`");
    let fused = Mapping::new().rule(Rule::new("x", ["a", "b", "c"]));
    says(fused, &params, "tensor `x` is made of parameters `a`, `b`, `c`, and the model has no `c`");
    let shares = Mapping::new().rule(Rule::new("x", ["a", "b"]).shares([1, 3]));
    says(shares, &params, "say their `shares`");
    let mut half = params.clone();
    half[1].parts[0].0[0] = 0..2;
    says(Mapping::identity(), &half, "parameter `b` has 4 elements, and the ranks hold 2");
    let kept = Mapping::new().rule(Rule::new("x", "a")).keep("b");
    assert_eq!(plan(&params, &SaveConfig::new(kept)).unwrap().tensors.len(), 1);
}
