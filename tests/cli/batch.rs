//! What the examples make of the noise of a gradient: advice, a batch that grows, a learning rate that follows it.

use burn_parallel::prelude::*;
use clap::Parser;
use serde_json::{Value, json};

use crate::programs::batch::{Batch, GrowthFlags};

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    growth: GrowthFlags,
}

fn flags(given: &[&str]) -> GrowthFlags {
    Flags::try_parse_from([&["program"], given].concat()).unwrap().growth
}

/// A batch of so many rows of 16 items each, which has measured a noise scale of so many rows, in many steps.
fn batch(rows: usize, noise: f64, grow: Value) -> Batch {
    measured(100, rows, noise, grow)
}

/// The same in so many steps.
fn measured(steps: u64, rows: usize, noise: f64, grow: Value) -> Batch {
    let measured = json!({ "decay": 0.5, "squared_norm": 1.0, "trace": 16.0 * noise, "weight": 1.0, "steps": steps, "last": null });
    let saved = json!({ "noise": measured, "grow": grow, "rows": rows, "measured": [64.0, 4] });
    serde_json::from_value(saved).unwrap()
}

#[test]
fn advice_goes_by_how_far_the_batch_is_from_the_noise_scale() {
    let measures = flags(&["--noise-scale"]);
    for (noise, said) in [
        (33.0, "33 rows; with 8 rows a step: a larger batch would take fewer steps"),
        (32.0, "32 rows; with 8 rows a step: the batch suits it"),
        (2.0, "2 rows; with 8 rows a step: the batch suits it"),
        (1.9, "2 rows; with 8 rows a step: a smaller batch would take less data for the same loss"),
    ] {
        assert_eq!(batch(8, noise, Value::Null).advice(measures), said);
    }
    // Of a few steps, in which it may be anything.
    let said = measured(1, 1, 1.0, Value::Null).advice(measures);
    assert_eq!(said, "1 row; with 1 row a step: the batch suits it; uncertain, of 1 measurement");
    assert!(measured(19, 8, 33.0, Value::Null).advice(measures).ends_with("; uncertain, of 19 measurements"));
    assert!(!measured(20, 8, 33.0, Value::Null).advice(measures).contains("uncertain"));
    assert!(batch(8, 33.0, Value::Null).advice(flags(&[])).starts_with("not measured: --noise-scale says"));
    assert!(Batch::default().advice(measures).starts_with("none: it was not measured"));
}

/// By the root of how much the batch has grown, after a while.
#[test]
fn the_learning_rate_follows_a_batch_that_has_grown() {
    let grown = |rows: usize, since: u64| {
        let grow = json!({ "rows": rows, "most": 64, "patience": 10, "since": since });
        batch(rows, 64.0, grow).lr_factor(4)
    };
    assert_eq!(grown(4, 100), 1.0);
    assert_eq!((grown(16, 100), grown(16, 19)), (2.0, 2.0));
    let root = 0.5f64.sqrt();
    assert!((grown(16, 0) - 2.0 * (root + (1.0 - root) / 20.0)).abs() < 1e-12, "from where it was, in twenty steps");
    assert_eq!(batch(16, 64.0, Value::Null).lr_factor(4), 1.0);
}

/// A size is kept for a tenth of the run, and what a checkpoint has of it goes on.
#[test]
fn a_batch_grows_as_the_flags_say() {
    let grow = |batch: Batch, given: &[&str], steps: usize| {
        let batch = batch.begin(8, flags(given), steps).unwrap();
        (batch.rows(), serde_json::to_value(batch).unwrap()["grow"].clone())
    };
    for (steps, patience) in [(40, 10), (500, 50), (5000, 100)] {
        let begun = json!({ "rows": 8, "most": 64, "patience": patience, "since": 0, "measured": 0 });
        assert_eq!(grow(Batch::default(), &["--grow-batch", "64"], steps), (8, begun));
    }
    let saved = || batch(16, 64.0, json!({ "rows": 16, "most": 16, "patience": 10, "since": 7, "measured": 1 }));
    let goes_on = json!({ "rows": 16, "most": 64, "patience": 10, "since": 7, "measured": 1 });
    assert_eq!(grow(saved(), &["--grow-batch", "64"], 40), (16, goes_on));
    assert_eq!(grow(saved(), &[], 40), (8, Value::Null), "without the flag it is as large as the others say");
}

/// How often it is measured: as a flag says, else the file of the strategy, else as suits the run.
#[test]
fn the_noise_is_measured_as_often_as_suits_the_run() {
    let every = |given: &[&str], file: u64, steps: usize| {
        let strategy = Strategy::new().with_data(DataParallelConfig::new().with_noise_scale_every(file));
        flags(given).strategy(strategy, steps).data.noise_scale_every
    };
    assert_eq!((every(&[], 0, 100), every(&[], 3, 100)), (0, 3));
    for measures in [&["--noise-scale"][..], &["--grow-batch", "8"]] {
        assert_eq!((every(measures, 0, 63), every(measures, 0, 64), every(measures, 3, 64)), (1, 4, 3));
    }
    assert_eq!(every(&["--noise-scale=7"], 3, 10), 7);
}
