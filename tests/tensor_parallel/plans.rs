//! Plans as text, and what is wrong with them.

use burn::module::{Module, Param};
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig};
use burn::nn::{Linear, LinearConfig, SwiGlu, SwiGluConfig};
use burn::prelude::*;
use burn_parallel::layout::Layout;
use burn_parallel::prelude::*;
use proptest::prelude::*;

fn both(plan: &Plan) -> (String, String) {
    let (text, json) = (toml::to_string(plan).unwrap(), serde_json::to_string(plan).unwrap());
    assert_eq!(toml::from_str::<Plan>(&text).unwrap(), *plan, "{text}");
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), *plan, "{json}");
    (text, json)
}

#[test]
fn plans_are_readable() {
    let (text, json) = both(&Plan::new());
    assert_eq!((text.as_str(), json.as_str()), ("", "{}"));
    both(&Plan::megatron());
    let plan = Plan::new()
        .shard("*.up.weight", 1)
        .shard_if_present("*.up.bias", 0)
        .replicate("*")
        .shard_input("1.0", 2)
        .sequence_parallel(1)
        .on("dp", Plan::new().shard_input("", 0));
    let (text, json) = both(&plan);
    let expected = r#"sequence_parallel = 1

[[parameters]]
pattern = "*.up.weight"
shard = 1

[[parameters]]
pattern = "*.up.bias"
shard = 0
if_present = true

[[parameters]]
pattern = "*"
replicate = true

[[inputs]]
path = "1.0"
shard = 2

[[axes.dp.inputs]]
path = ""
shard = 0
"#;
    assert_eq!(text, expected);
    assert!(json.starts_with(r#"{"sequence_parallel":1,"parameters":[{"pattern":"*.up.weight","shard":1},"#), "{json}");
}

#[test]
fn text_that_is_no_plan() {
    for (text, what) in [
        ("sequence_paralel = 1", "sequence_paralel"),
        ("parameters = [{ pattern = 'a', shard = 1, extra = 2 }]", "extra"),
        ("parameters = [{ pattern = 'a' }]", "either `shard`"),
        ("parameters = [{ pattern = 'a', shard = 1, replicate = true }]", "either `shard`"),
        ("parameters = [{ shard = 1 }]", "pattern"),
        ("parameters = [{ pattern = 'a', shard = -1 }]", "-1"),
        ("inputs = [{ path = '0' }]", "shard"),
        ("axes.dp.axes.tp = {}", "axes"),
    ] {
        let error = toml::from_str::<Plan>(text).unwrap_err().to_string();
        assert!(error.contains(what), "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn any_plan_survives_being_written_down(
        rules in prop::collection::vec(("[a-z*.0-9]{0,12}", prop::option::of(0usize..5), any::<bool>()), 0..6),
        inputs in prop::collection::vec(("[0-9.]{0,4}", 0usize..4), 0..3),
        sequence in prop::option::of(0usize..3),
        axes in prop::collection::vec("[a-z \"']{0,5}", 0..3),
    ) {
        let own = || {
            let mut plan = Plan::new();
            for (pattern, dim, optional) in &rules {
                plan = match (dim, optional) {
                    (None, _) => plan.replicate(pattern.clone()),
                    (Some(dim), false) => plan.shard(pattern.clone(), *dim),
                    (Some(dim), true) => plan.shard_if_present(pattern.clone(), *dim),
                };
            }
            plan = inputs.iter().fold(plan, |plan, (path, dim)| plan.shard_input(path.clone(), *dim));
            sequence.map_or(plan.clone(), |dim| plan.sequence_parallel(dim))
        };
        both(&axes.iter().fold(own(), |plan, axis| plan.on(axis.clone(), own())));
    }
}

#[derive(Module, Debug)]
struct Pair {
    first: Linear,
    second: Linear,
}

fn pair() -> Pair {
    let device = Device::flex();
    Pair { first: LinearConfig::new(4, 6).init(&device), second: LinearConfig::new(4, 6).init(&device) }
}

fn problem(plan: Plan, model: &impl Module, axes: &[(&str, usize)]) -> String {
    match plan.table_over(model, axes) {
        Err(Error::Plan { problem }) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_path_that_is_claimed_twice() {
    let tp = [("tp", 2)];
    let said = problem(Plan::new().shard("*.weight", 1).shard("first.weight", 0), &pair(), &tp);
    assert!(said.contains("`first.weight` is claimed twice on axis `tp`"), "{said}");
    assert!(said.contains("`*.weight` comes first and says sharded along dim 1"), "{said}");
    problem(Plan::new().shard("first.weight", 1).shard("first.weight", 1), &pair(), &tp);
    problem(Plan::new().shard("first.weight", 1).shard("second.weight", 1).shard("*.weight", 0), &pair(), &tp);
    // The narrower first is how exceptions are written, and what may be absent may be taken.
    let table = Plan::new().shard("first.weight", 0).shard("*.weight", 1).table(&pair(), 2).unwrap();
    let layouts: Vec<Layout> = table.rows().iter().map(|row| row.layouts[0]).collect();
    let expected = [Layout::Sharded(0), Layout::Replicated, Layout::Sharded(1), Layout::Replicated];
    assert_eq!(layouts, expected);
    Plan::new().shard("*.weight", 1).shard_if_present("first.weight", 0).table(&pair(), 2).unwrap();

    let mut tied = pair();
    tied.second.weight = Param::initialized(tied.first.weight.id, tied.first.weight.val());
    let said = problem(Plan::new().shard("first.weight", 1).shard("second.weight", 0), &tied, &tp);
    assert!(said.contains("pattern `second.weight` matches none") || said.contains("also `second.weight`"), "{said}");
    let said = problem(Plan::new().shard("first.weight", 1).shard("second*", 0), &tied, &tp);
    assert!(said.contains("it is `first.weight`") && said.contains("also `second.weight`"), "{said}");
    Plan::new().shard("*.weight", 1).table(&tied, 2).unwrap();
}

#[test]
fn axes_and_what_they_divide() {
    let plan = Plan::new().shard("first.weight", 1).on("dp", Plan::new().shard("first.weight", 1).shard("*.bias", 0));
    let table = plan.table_over(&pair(), &[("tp", 2), ("dp", 3)]).unwrap();
    assert_eq!(table.rows()[0].local_dims, [4, 1]);
    assert_eq!(table.rows()[1].local_dims, [2]);
    assert_eq!((table.degree(), table.bytes()), (6, (4 + 2 + 24 + 2) * 4));
    let text = table.to_string();
    let line = text.lines().nth(1).unwrap();
    let words = ["first.weight", "[4, 6]", "sharded along dim 1", "sharded along dim 1", "[4, 1]", "16"];
    let mut rest = line;
    for word in words {
        rest = rest.split_once(word).unwrap_or_else(|| panic!("no `{word}` in `{line}`")).1;
    }
    assert!(text.lines().next().unwrap().contains("tp 2") && text.contains("128 bytes on each of 6 ranks"), "{text}");

    let said = problem(plan.clone(), &pair(), &[("tp", 2)]);
    assert!(said.contains("axis `dp`"), "{said}");
    let said = problem(plan.clone(), &pair(), &[("tp", 4), ("dp", 3)]);
    assert!(said.contains("`first.weight` of dims [4, 6]") && said.contains("the 4 ranks of axis `tp`"), "{said}");
    let said = problem(plan, &pair(), &[("tp", 3), ("dp", 4)]);
    assert!(said.contains("dims [4, 2]") && said.contains("the 4 ranks of axis `dp`"), "{said}");
    assert!(problem(Plan::new(), &pair(), &[("tp", 0)]).contains("no ranks"));
}

#[test]
fn a_table_makes_no_lazy_parameter() {
    let model: TransformerEncoder = TransformerEncoderConfig::new(16, 32, 4, 2).init(&Device::flex());
    let table = Plan::megatron().table(&model, 4).unwrap();
    assert_eq!(Plan::suggest(&model, 4).table(&model, 4).unwrap(), table);
    assert!(!model.layers[0].mha.query.weight.is_initialized());
}

#[derive(Module, Debug)]
struct Gated {
    gate: SwiGlu,
    down: Linear,
    head: Linear,
    odd: Linear,
}

#[test]
fn a_plan_from_the_layers_alone() {
    let device = Device::flex();
    let linear = |takes, gives| LinearConfig::new(takes, gives).init(&device);
    let model = Gated {
        gate: SwiGluConfig::new(64, 256).init(&device),
        down: linear(256, 64),
        head: linear(64, 1000),
        odd: linear(5, 7),
    };
    let table = Plan::suggest(&model, 4).table(&model, 4).unwrap();
    let layout = |path: &str| table.rows().iter().find(|row| row.path == path).unwrap().layouts[0];
    assert_eq!([layout("gate.linear_inner.weight"), layout("gate.linear_outer.weight")], [Layout::Sharded(1); 2]);
    assert_eq!([layout("down.weight"), layout("down.bias")], [Layout::Sharded(0), Layout::Replicated]);
    assert_eq!([layout("head.weight"), layout("head.bias")], [Layout::Sharded(1), Layout::Sharded(0)]);
    assert_eq!([layout("odd.weight"), layout("odd.bias")], [Layout::Replicated; 2]);
    assert!(!model.head.weight.is_initialized());
}

#[derive(Module, Debug)]
struct Stack {
    layers: Vec<Linear>,
}

impl Stack {
    fn new(widths: &[usize]) -> Self {
        let linear = |pair: &[usize]| LinearConfig::new(pair[0], pair[1]).init(&Device::flex());
        Self { layers: widths.windows(2).map(linear).collect() }
    }

    fn suggested(&self, degree: usize) -> Vec<Layout> {
        let table = Plan::suggest(self, degree).table(self, degree).unwrap();
        let weights = table.rows().iter().filter(|row| row.path.ends_with("weight"));
        weights.map(|row| row.layouts[0]).collect()
    }
}

/// A layer that cannot be split keeps the others of its chain from nothing.
#[test]
fn a_layer_between_that_cannot_be_split() {
    let [rows, columns, whole] = [Layout::Sharded(0), Layout::Sharded(1), Layout::Replicated];
    assert_eq!(Stack::new(&[64, 21, 21, 64]).suggested(4), [rows, whole, columns]);
    assert_eq!(Stack::new(&[256, 1024, 256, 9, 9]).suggested(4)[..2], [columns, rows]);
    assert_eq!(Stack::new(&[7, 9, 7]).suggested(4), [whole; 2]);
    // Little more for padding is worth it.
    assert!(!Stack::new(&[64, 254, 254, 64]).suggested(4).contains(&whole));
}

/// One weight in two layers lies in one way.
#[test]
fn a_plan_for_a_weight_that_two_layers_share() {
    let mut model = Stack::new(&[64, 64, 64, 256]);
    model.layers[1].weight = model.layers[0].weight.clone();
    let layouts = model.suggested(4);
    assert_eq!(layouts.len(), 2);
    assert!(layouts.iter().all(|layout| *layout != Layout::Replicated), "{layouts:?}");
}
#[test]
fn a_plan_for_more_ranks_than_there_are_numbers() {
    let model: Linear = LinearConfig::new(4, 6).init(&Device::flex());
    let plan = Plan::new().shard_padded("*weight", 1);
    for degree in [usize::MAX, 1 << 32] {
        for table in [plan.table(&model, degree), plan.table_over(&model, &[("tp", degree), ("dp", degree)])] {
            let message = table.unwrap_err().to_string();
            assert!(message.contains("more ranks than a model can be split over"), "{message}");
        }
    }
    assert!(plan.table(&model, 0).unwrap_err().to_string().contains("no ranks"));
}
