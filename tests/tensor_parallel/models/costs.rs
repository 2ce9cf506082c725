//! What a plan is said to cost is what a wrapped model takes.

use burn::module::Module;
use burn_parallel::prelude::*;

use super::{device, tokens};
use crate::common::llama::{self, LLAMA, LlamaConfig};

#[test]
fn everything_that_a_plan_says_counts() {
    let model = LlamaConfig { layers: 1, ..llama::small(LLAMA) }.init(&device()).train();
    let plain = Plan::hugging_face();
    let sequence = plain.clone().sequence_parallel(1);
    let batch = Plan::hugging_face().shard_input("", 0);
    let both = plain.clone().on("dp", Plan::new().shard_input("", 0));
    let padded = Plan::new().shard_padded("*up_proj.weight", 1).shard_padded("*down_proj.weight", 0);
    let cases: [(&Plan, &[(&str, usize)]); 6] = [
        (&plain, &[("tp", 2)]),
        (&sequence, &[("tp", 2)]),
        (&sequence, &[("tp", 3)]),
        (&batch, &[("tp", 2)]),
        (&both, &[("tp", 2), ("dp", 2)]),
        (&padded, &[("tp", 7)]),
    ];
    let mut counts = Vec::new();
    for (plan, axes) in cases {
        let cost = plan.cost_over(&model, axes, tokens(7, 36, 0), llama::loss).unwrap();
        let ranks = axes.iter().map(|axis| axis.1).product();
        let taken = launch::threads(ranks).run(|rank| {
            let mesh = Mesh::new(&rank, axes.iter().copied())?;
            let names: Vec<&str> = axes.iter().map(|axis| axis.0).collect();
            let mut model = model.clone().fork(&device()).tensor_parallel_over(&mesh, &names, plan)?;
            model.step(tokens(7, 36, 0), llama::loss)?;
            let bytes = model.table().bytes();
            Ok((model.report().shards.iter().map(|report| report.collectives.len()).sum::<usize>(), bytes))
        });
        for (collectives, bytes) in taken.unwrap() {
            assert_eq!((cost.collectives, cost.parameter_bytes as usize), (collectives, bytes), "{plan:?}");
        }
        counts.push(cost.collectives);
    }
    assert!(counts[0] < counts[1] && counts[0] < counts[3] && counts[0] < counts[4], "{counts:?}");
    // One axis is the short form.
    let short = sequence.cost(&model, 2, tokens(7, 36, 0), llama::loss).unwrap();
    assert_eq!(short.collectives, counts[1]);
    let error = both.cost(&model, 2, tokens(7, 36, 0), llama::loss).unwrap_err().to_string();
    assert!(error.contains("axis `dp`"), "{error}");
    let error = Plan::new().shard_input("1", 0).cost(&model, 2, tokens(7, 36, 0), llama::loss).unwrap_err();
    assert!(error.to_string().contains("no input `1`"), "{error}");
}
