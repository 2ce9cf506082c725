//! Ready plans for models by their names, and what is said of plans that fit no name.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;

use super::{bert, device, gpt2, tokens};
use crate::common::heard::Heard;
use crate::common::llama::{self, LLAMA, LlamaConfig, QWEN2};
use crate::common::models::seeded;
use crate::common::rotary::Rotary;
use crate::compare::splits_like_one;

fn problem(plan: Plan, model: &impl Module) -> String {
    match plan.table(model, 2) {
        Err(Error::Plan { problem }) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn hugging_faces_names() {
    let whole = |model: &dyn Fn(usize) -> f64| [2, 3, 4, 6].map(model);
    for config in [LLAMA, QWEN2] {
        let model = config.init(&device());
        let shares = whole(&|degree| Plan::hugging_face().table(&model, degree).unwrap().whole_share());
        assert!(shares.iter().all(|share| *share < 0.01), "{shares:?}");
        let report = Plan::hugging_face().cost(&model, 2, tokens(65, 1, 0), llama::loss).unwrap();
        assert_eq!(report.collectives, 14);
    }
    let model = bert::init(&device());
    let share = Plan::hugging_face().table(&model, 4).unwrap().whole_share();
    // Its head has other names here.
    assert!(share > 0.2 && share < 0.3, "{share}");
    // Words that the degree does not divide.
    let model = LlamaConfig { vocab: 1201, ..LLAMA }.init(&device());
    assert!(Plan::hugging_face().table(&model, 2).unwrap().whole_share() < 0.01);
    let model = gpt2::init(1200, 192, false, &device());
    let table = Plan::hugging_face().table(&model, 2).unwrap();
    let split = |path: &str| table.rows().iter().find(|row| row.path == path).unwrap().is_split();
    let fields = ["wte", "wpe", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.1.mlp.c_fc", "h.1.mlp.c_proj"];
    let fields = fields.map(|field| split(&format!("{field}.weight")));
    assert_eq!(fields, [true, false, true, true, true, true], "{table}");
}

#[test]
fn names_trains_like_one_device() {
    for config in [LLAMA, QWEN2] {
        let config = LlamaConfig { layers: 1, ..llama::small(config) };
        trains_like_one_device(config.init(&device()), llama::loss);
    }
    let config = LlamaConfig { layers: 1, ..llama::small(QWEN2) };
    trains_like_one_device(Rotary::new(config, &device()), Rotary::loss);
}

fn trains_like_one_device<M: Module + Sync>(model: M, loss: fn(&M, Tensor<2, Int>) -> Tensor<1>) {
    let batch = |step: usize| tokens(9, 36, step as u64);
    splits_like_one(&seeded(model), batch, loss, &Plan::hugging_face(), &[2, 3, 6]);
}

#[test]
fn empty_names_are_refused() {
    let model = QWEN2.init(&device());
    for plan in [
        Plan::vocabulary("embed_tokens", ""),
        Plan::vocabulary("", "lm_head"),
        Plan::tied_vocabulary(""),
        Plan::megatron().then(Plan::vocabulary("embed_tokens", "")),
        Plan::hugging_face().on("dp", Plan::tied_vocabulary("")),
    ] {
        let axes: &[(&str, usize)] = if plan == Plan::hugging_face() { &[("tp", 2)] } else { &[("tp", 2), ("dp", 1)] };
        let said = plan.table_over(&model, axes).unwrap_err().to_string();
        assert!(said.contains("empty name of a field") && said.contains("tied_vocabulary(embedding)"), "{said}");
        // It is so once it was written down, too.
        let again: Plan = toml::from_str(&toml::to_string(&plan).unwrap()).unwrap();
        assert_eq!(again, plan);
    }
    // An output that is not there is no tied one.
    let said = problem(Plan::vocabulary("embed_tokens", "lm_head"), &model);
    assert!(said.contains("`*lm_head.weight` matches none"), "{said}");
    let table = Plan::tied_vocabulary("embed_tokens").table(&model, 2).unwrap();
    assert_eq!(table.rows().iter().filter(|row| row.is_split()).count(), 1);
}

#[derive(Module, Debug)]
struct Other {
    inward: Linear,
    outward: Linear,
    query: Linear,
}

#[test]
fn a_plan_of_other_names_says_what_it_leaves_whole() {
    let linear = |takes, gives| LinearConfig::new(takes, gives).with_bias(false).init(&device());
    let model = Other { inward: linear(48, 100), outward: linear(100, 48), query: linear(8, 8) };
    let table = Plan::megatron().table(&model, 2).unwrap();
    assert_eq!(table.model_bytes(), 4 * (2 * 4800 + 64));
    assert_eq!(table.whole_share(), 9600.0 / 9664.0);
    let said = table.to_string();
    assert!(said.contains("of the model's 38656 bytes 99.3 % are whole on every rank"), "{said}");
    assert!(said.contains("above all `inward.weight`, `outward.weight`: do its patterns fit"), "{said}");
    // Who means to split nothing is not asked.
    assert!(!Plan::new().table(&model, 2).unwrap().to_string().contains("above all"));
    assert!(!Plan::new().shard("*ward.weight", 1).table(&model, 2).unwrap().to_string().contains("above all"));
    // Nothing at all fits.
    let said = problem(Plan::megatron(), &LinearConfig::new(8, 8).init(&device()));
    assert!(said.contains("the patterns of the plan match none"), "{said}");
}

#[test]
fn wrapping_by_a_plan_of_other_names_warns() {
    let heard = Heard::install(log::LevelFilter::Warn);
    let linear = |takes, gives| LinearConfig::new(takes, gives).with_bias(false).init(&device());
    let model = Other { inward: linear(48, 97), outward: linear(97, 48), query: linear(8, 8) }.train();
    launch::threads(2)
        .run(|rank| model.clone().fork(&device()).tensor_parallel(&rank, Plan::megatron()).map(|_| ()))
        .unwrap();
    // Small enough for no padding to be worth it.
    let tiny = Other { inward: linear(3, 3), outward: linear(3, 3), query: linear(3, 3) };
    assert_eq!(Plan::suggest(&tiny, 7), Plan::new());
    let heard = heard.take();
    assert_eq!(heard.iter().filter(|said| said.contains("WARN the plan leaves 99.3 %")).count(), 1, "{heard:?}");
    assert!(
        heard.iter().any(|said| said.contains("WARN the plan that is suggested for 7 ranks splits no")),
        "{heard:?}"
    );
}
