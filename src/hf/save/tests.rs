//! Plans of what is written, and ranks that fail alone.

use std::collections::BTreeMap;
use std::time::Duration;

use burn::tensor::{DType, Device, Tensor};

use super::config::SaveConfig;
use super::exchange::exchange;
use super::held::HeldPart;
use super::merge::merge;
use super::own::OwnParam;
use super::plan::{HeldParam, SavePlan};
use super::problem::together;
use super::rounds::WriteRounds;
use crate::comm::Communicator;
use crate::hf::mapping::Mapping;
use crate::hf::rule::Rule;
use crate::launch;
use crate::tensor::PlainTensor;
use crate::tensor_file::Draft;

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
    let turns = WriteRounds::new(&found, &params, 1 << 20, 4).flatten();
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

/// What a rank holds of a tensor, it writes: halves of rows as two pieces, of heads whose rows alternate as well.
#[test]
fn rows_are_written_by_who_holds_them() {
    let half = |dim: usize, dims: [usize; 2]| {
        let mut param = whole(0, "p", &dims, &[]);
        let middle = dims[dim] / 2;
        let part = |range: std::ops::Range<usize>| {
            let mut ranges: Vec<_> = dims.iter().map(|size| 0..*size).collect();
            ranges[dim] = range;
            ranges
        };
        param.parts = vec![(part(0..middle), vec![0]), (part(middle..dims[dim]), vec![1])];
        [param]
    };
    let turns = |params: &[HeldParam], rule: Rule| {
        let found = plan(params, &SaveConfig::new(Mapping::new().rule(rule))).unwrap();
        let turns: Vec<_> = WriteRounds::new(&found, params, 1 << 20, 2).flatten().collect();
        let travels = turns.iter().any(|turn| turn.given.iter().any(|given| given.from != turn.writer));
        (turns.len(), travels)
    };
    assert_eq!(turns(&half(1, [6, 8]), Rule::new("t", "p").transposed()), (2, false));
    assert_eq!(turns(&half(1, [6, 8]), Rule::new("t", "p").transposed().rotary_pairs(4)), (2, false));
    assert_eq!(turns(&half(0, [6, 8]), Rule::new("t", "p")), (2, false));
    assert_eq!(turns(&half(1, [6, 8]), Rule::new("t", "p")), (1, true));
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

fn zeros(dims: [usize; 2], ranges: Vec<std::ops::Range<usize>>) -> HeldPart {
    HeldPart { value: PlainTensor::from(Tensor::<2>::zeros(dims, &Device::flex())), ranges, adapter: None }
}

/// A rank lacks what it is to give, and to write: it goes on with zeros, and at the end all have its error, long before
/// the time-out.
#[test]
fn a_rank_that_fails_alone_does_not_keep_the_others_waiting() {
    let mut param = whole(0, "p", &[4, 6], &[]);
    let columns = [0..3, 3..6].map(|columns| vec![0..4, columns]);
    param.parts = vec![(columns[0].clone(), vec![0]), (columns[1].clone(), vec![1])];
    let params = [param];
    for failing in 0..2 {
        let dir = std::env::temp_dir().join(format!("burn-parallel-hf-alone-{failing}-{}", std::process::id()));
        let ran = launch::threads(2).timeout(Duration::from_secs(20)).run(|rank| {
            let group: &Communicator = &rank;
            let found = SavePlan::new(&params, "model", &SaveConfig::new(Mapping::identity()))?;
            let draft = Draft::new(&dir, true)?;
            if group.rank() == 0 {
                super::begin(&draft, &found)?;
            }
            group.barrier()?;
            let own = zeros([4, 3], columns[group.rank()].clone());
            let own = BTreeMap::from_iter((group.rank() != failing).then_some((0, own)));
            let (done, wrote) = exchange(&found, &params, &own, &draft.made_in, (24, group))?;
            assert_eq!((wrote.is_err(), done.written), (group.rank() == failing, 48));
            Ok(together(wrote, group).unwrap_err().to_string())
        });
        let errors = ran.unwrap();
        std::fs::remove_dir_all(dir.with_file_name(format!(".{}.unfinished", dir.file_name().unwrap().display())))
            .unwrap();
        assert_eq!(errors[0], errors[1]);
        assert!(
            errors[0].contains(&format!("rank {failing}: ")) && errors[0].contains("a part of `p` is missing"),
            "{errors:?}"
        );
    }
}

/// The same where adapters are brought to the weights.
#[test]
fn a_rank_that_lacks_a_factor_does_not_keep_the_others_waiting() {
    let params =
        [whole(0, "w", &[4, 6], &[1]), whole(1, "w.lora.a", &[4, 2], &[0]), whole(2, "w.lora.b", &[2, 6], &[0])];
    let ran = launch::threads(2).timeout(Duration::from_secs(20)).run(|rank| {
        let own = params.iter().map(|param| {
            let holds = param.parts[0].1[0] == rank.rank() && param.path != "w.lora.a";
            let dims = [param.dims[0], param.dims[1]];
            let part = holds.then(|| zeros(dims, param.parts[0].0.clone()));
            OwnParam { place: param.place, path: param.path.clone(), dims: param.dims.clone(), part }
        });
        Ok(merge(&mut own.collect(), &mut params.to_vec(), 1.0, &rank).unwrap_err().to_string())
    });
    let errors = ran.unwrap();
    assert_eq!(errors[0], errors[1]);
    assert!(errors[0].contains("rank 0: ") && errors[0].contains("a factor of an adapter is missing"), "{errors:?}");
}
