//! However many shapes come, a pipeline has one group.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor};

use crate::lock::lock;
use crate::prelude::*;

type Model = (Linear, Linear);

fn loss(model: &Model, rows: Tensor<2>) -> Tensor<1> {
    model.1.forward(model.0.forward(rows)).powf_scalar(2.0).mean()
}

#[test]
fn all_graphs_share_one_group() {
    let device = Device::flex().autodiff();
    let whole: Model = (LinearConfig::new(4, 6).init(&device), LinearConfig::new(6, 2).init(&device));
    for ranks in [1, 2] {
        let splits = launch::threads(ranks).run(|rank| {
            let cut = if ranks == 1 { Cut::default() } else { Cut::before(["1.*"]) };
            let config = PipelineConfig::new(2).with_cut(cut).with_graphs(3);
            let mut model = whole.clone().fork(&device).pipeline_parallel(&rank, config)?;
            let group = lock(&model.state).group.clone();
            let before = (rank.counters().of("split").calls, group.counters().of("split").calls);
            for count in 2..12 {
                let rows = Tensor::ones([count, 4], &device);
                model.step(rows.clone(), loss)?;
                model.forward_with(rows, |model: &Model, rows: Tensor<2>| model.1.forward(model.0.forward(rows)))?;
            }
            let after = (rank.counters().of("split").calls, group.counters().of("split").calls);
            assert_eq!((before, model.graphs()), (after, 6));
            Ok(after)
        });
        assert_eq!(splits.unwrap(), vec![(ranks as _, 0); ranks]);
    }
}
