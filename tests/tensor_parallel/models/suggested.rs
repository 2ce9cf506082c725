//! What is suggested against the best known plans.

use burn::prelude::*;
use burn_parallel::graph::TensorTree;
use burn_parallel::plan::PlanCost;
use burn_parallel::prelude::*;

use super::{bert, burn_layers, device, gpt2, tokens};
use crate::common::llama::{self, LLAMA, LlamaConfig, QWEN2};
use crate::common::models::seeded;
use crate::common::rotary::Rotary;
use crate::compare::splits_like_one;

/// Columns with their biases, and rows.
fn split(columns: &[&str], rows: &[&str]) -> Plan {
    let plan = columns.iter().fold(Plan::new(), |plan, name| {
        plan.shard(format!("*{name}.weight"), 1).shard_if_present(format!("*{name}.bias"), 0)
    });
    rows.iter().fold(plan, |plan, name| plan.shard(format!("*{name}.weight"), 0))
}

fn decoder(tied: bool) -> Plan {
    let ends = if tied { Plan::tied_vocabulary("embed_tokens") } else { Plan::vocabulary("embed_tokens", "lm_head") };
    let columns = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"];
    ends.then(split(&columns, &["o_proj", "down_proj"]))
}

/// What is suggested from the layers alone takes no more than 1.2 times the collectives of the best plan by hand; what
/// is searched for costs no more in all than any of them.
#[track_caller]
fn near_the_best<M: Module, I: TensorTree + Clone, R: Into<Loss>>(
    name: &str,
    model: &M,
    inputs: I,
    loss: fn(&M, I) -> R,
    (by_hand, degrees): (&[Plan], &[usize]),
) {
    for degree in degrees {
        let cost = |plan: &Plan| plan.cost(model, *degree, inputs.clone(), loss).unwrap();
        let by_hand: Vec<PlanCost> = by_hand.iter().map(cost).collect();
        let cheapest = |a: &&PlanCost, b: &&PlanCost| a.total().total_cmp(&b.total());
        let best = by_hand.iter().min_by(cheapest).unwrap();
        let suggested = Plan::suggest(model, *degree);
        let guess = cost(&suggested);
        let found = cost(&Plan::suggest_for(model, *degree, inputs.clone(), loss).unwrap());
        println!("{name} over {degree}\n  by hand {by_hand:?}\n  suggested {guess:?}\n  searched {found:?}");
        assert!(guess.collectives as f64 <= 1.2 * best.collectives as f64, "{name} over {degree}: {guess:?} {best:?}");
        assert!(guess.total() <= 1.2 * best.total(), "{name} over {degree}: {guess:?} {best:?}");
        assert!(found.total() <= best.total().min(guess.total()), "{name} over {degree}: {found:?} {best:?}");
        let whole = suggested.table(model, *degree).unwrap().whole_share();
        assert!(whole < 0.1, "{name} over {degree}: {whole} of it whole");
    }
}

#[test]
fn a_llama() {
    let model = LLAMA.init(&device());
    near_the_best("llama", &model, tokens(65, 1, 0), llama::loss, (&[decoder(false)], &[2, 3, 4, 6]));
}

#[test]
fn a_llama_of_burns_rotary_encoding() {
    let model = Rotary::new(LLAMA, &device());
    near_the_best("rotary", &model, tokens(65, 1, 0), Rotary::loss, (&[decoder(false)], &[2, 3, 4, 6]));
    // It takes no more collectives than positions by hand do.
    let by_hand = LLAMA.init(&device());
    for degree in [2, 3, 4, 6] {
        let burns = decoder(false).cost(&model, degree, tokens(65, 1, 0), Rotary::loss).unwrap();
        let own = decoder(false).cost(&by_hand, degree, tokens(65, 1, 0), llama::loss).unwrap();
        assert_eq!((burns.collectives, own.collectives), (14, 14));
    }
}

#[test]
fn a_qwen2() {
    let model = QWEN2.init(&device());
    // Six heads of keys and values.
    near_the_best("qwen2", &model, tokens(65, 1, 0), llama::loss, (&[decoder(true)], &[2, 3, 6]));
}

#[test]
fn a_bert() {
    let model = bert::init(&device());
    let ends = Plan::vocabulary("word_embeddings", "decoder");
    let layers = split(&["query", "key", "value", "intermediate.dense"], &["output.dense"]);
    let plans = [ends.clone().then(layers.clone()), ends.then(layers).then(split(&["transform"], &[]))];
    near_the_best("bert", &model, bert::inputs(&device()), bert::Bert::loss, (&plans, &[2, 3, 4, 6]));
}

#[test]
fn a_gpt2() {
    let ends = || Plan::tied_vocabulary("wte");
    let columns = ends().then(split(&["c_attn", "c_fc"], &["c_proj"]));
    let rows = ends().then(split(&["c_fc"], &["c_attn", "c_proj"]));
    for by_head in [true, false] {
        let model = gpt2::init(1200, 192, by_head, &device());
        let plans = [columns.clone(), rows.clone(), Plan::hugging_face()];
        let name = format!("gpt2, by head {by_head}");
        near_the_best(&name, &model, tokens(65, 1, 0), gpt2::Gpt2::loss, (&plans, &[2, 3, 4, 6]));
    }
}

#[test]
fn burns_own_layers() {
    let plan = Plan::megatron()
        .then(Plan::swiglu("gate"))
        .then(Plan::new().shard("down.weight", 0))
        .then(Plan::vocabulary("tokens", "head"));
    let model = burn_layers::init(&device());
    near_the_best("burn", &model, tokens(65, 1, 0), burn_layers::Lm::loss, (&[plan], &[2, 3, 4, 6]));
}

/// Degrees that divide neither heads nor widths nor the vocabulary.
#[test]
fn what_a_degree_does_not_divide_is_padded() {
    let model = LlamaConfig { vocab: 1201, ..LLAMA }.init(&device());
    for degree in [5, 7] {
        let plan = Plan::suggest(&model, degree);
        let table = plan.table(&model, degree).unwrap();
        let layout = |path: &str| table.rows().iter().find(|row| row.path == path).unwrap();
        let down = layout("model.layers.0.mlp.down_proj.weight");
        assert_eq!((down.layouts[0], down.padded_dims[0]), (Layout::Sharded(0), 528usize.next_multiple_of(degree)));
        assert_eq!(layout("lm_head.weight").padded_dims[1], 1201usize.next_multiple_of(degree));
        // Heads are not cut through.
        assert_ne!(layout("model.layers.0.self_attn.q_proj.weight").layouts[0], Layout::Sharded(1));
        assert!(table.whole_share() < 0.35, "{table}");
        let cost = |plan: &Plan| plan.cost(&model, degree, tokens(65, 1, 0), llama::loss).unwrap().total();
        let found = Plan::suggest_for(&model, degree, tokens(65, 1, 0), llama::loss).unwrap();
        assert!(cost(&found) <= cost(&plan));
        assert!(found.table(&model, degree).unwrap().whole_share() < 0.35);
    }
}

#[test]
fn a_suggested_plan_that_pads_trains_like_one_device() {
    let config = LlamaConfig { vocab: 37, layers: 1, ..llama::small(LLAMA) };
    let model = seeded(config.init(&device()));
    for degree in [2, 3, 5] {
        let plan = Plan::suggest(&model, degree);
        splits_like_one(&model, |step| tokens(9, 37, step as u64), llama::loss, &plan, &[degree]);
    }
}
