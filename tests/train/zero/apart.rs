//! A rank of sharded replicas that is in another part of a step than the others: it leaves out an update, or makes a
//! step or takes a norm by itself. All have an error that says in which part each is, and nobody waits for the
//! time-out.

use std::time::Duration;

use burn_parallel::prelude::*;
use burn_parallel::train::{Engine, Parallel};

use super::norm::by_hand;
use super::{LEVELS, config, optimizer};
use crate::common::checkpointing::own_by;
use crate::common::failing::{LONG, says};
use crate::common::models::device;
use crate::grad_norm::lm::{Kind, Lm, loss};
use crate::zero_captured::parity::{share, strategy};

const KIND: Kind = Kind { tied: false, frozen: false, dtype: burn::tensor::DType::F32 };

/// What a rank does between a step and its update, which it is given the step for, if it makes one.
type Way = fn(&mut Parallel<Lm>, Step) -> Result<Option<Step>, Error>;

/// What all ranks do but one.
const CLIPS: Way = |model, step| step.clip_grad_norm(model, 1.0).map(Some);

const LEAVES_OUT: Way = |model, step| step.clip_grad_norm(model, 1.0).map(|_| None);

/// Steps in one of which the last rank goes another way.
fn train(ranks: usize, strategy: &Strategy, optim: &str, (number, way): (usize, Way), timeout: Duration) -> Error {
    let whole = KIND.init(&device());
    let ran = launch::threads(ranks).timeout(timeout).run(|rank| {
        let mut model = own_by(&whole, strategy).parallelize(&rank, strategy)?;
        let (mut optim, (replica, replicas)) = (optimizer(optim), model.replica());
        for step in 0..number + 3 {
            let way = if (rank.rank(), step) == (ranks - 1, number) { way } else { CLIPS };
            let done = model.step(share(step, replica, replicas), loss)?;
            if let Some(done) = way(&mut model, done)? {
                model = model.optimize(&mut optim, 0.01, done)?;
            }
        }
        Ok(())
    });
    ran.map(drop).expect_err(&format!("{strategy}: nobody has noticed"))
}

/// What the last rank does otherwise, in which step, and what ranks are in that take rows of parameters apart (ZeRO 1
/// and 2), and in ZeRO 3.
fn mistakes() -> [(&'static str, usize, Way, [&'static [&'static str]; 2]); 6] {
    const UPDATE: &[&str] = &["(the update of step 2)", "(step 3)", "take its steps together"];
    const OFTEN: &[&str] = &["equally often", "1 on rank", "2 on rank"];
    [
        ("leaves out an update", 1, LEAVES_OUT, [UPDATE, OFTEN]),
        (
            "says that a step is skipped",
            1,
            |model, step| {
                let mut step = step.clip_grad_norm(model, 1.0)?;
                step.skipped = true;
                Ok(Some(step))
            },
            [UPDATE, OFTEN],
        ),
        (
            "makes a step more",
            1,
            |model, step| {
                let step = step.clip_grad_norm(model, 1.0)?;
                let (replica, replicas) = model.replica();
                drop(model.step(share(2, replica, replicas), loss)?);
                Ok(Some(step))
            },
            [UPDATE, OFTEN],
        ),
        (
            "takes the norm by the gradients",
            3,
            |model, step| by_hand(model, step, 3).map(Some),
            [
                &["(the norm of step 4)", "(the update of step 4)", "take its steps together"],
                &["(the norm of step 4)", "(step 5)", "take its steps together"],
            ],
        ),
        (
            "clips twice",
            1,
            |model, step| step.clip_grad_norm(model, 1.0)?.clip_grad_norm(model, 1.0).map(Some),
            [
                &["(the norm of step 2)", "(the update of step 2)", "take its steps together"],
                &["(the norm of step 2)", "(step 3)", "take its steps together"],
            ],
        ),
        (
            "leaves out a norm that has not come with the step",
            1,
            |_, step| Ok(Some(step)),
            [
                &["(the norm of step 2)", "(the update of step 2)", "take its steps together"],
                &["(the norm of step 2)", "(step 3)", "take its steps together"],
            ],
        ),
    ]
}

#[test]
fn all_ranks_have_an_error_at_once_that_says_where_each_is() {
    for (what, number, way, words) in mistakes() {
        for (ranks, level, engine) in LEVELS
            .into_iter()
            .map(|level| (2, level, Engine::Eager))
            .chain([(3, Sharding::Optimizer, Engine::Eager), (3, Sharding::Gradients, Engine::Captured)])
            .chain([2, 3].map(|ranks| (ranks, Sharding::Parameters, Engine::Captured)))
        {
            let strategy = Strategy::new().with_dp(ranks).with_data(config(level)).with_engine(engine);
            let error = train(ranks, &strategy, "adamw", (number, way), LONG);
            assert!(!matches!(error, Error::Timeout { .. }), "{strategy}: a rank {what}: {error}");
            says(&error, words[usize::from(level == Sharding::Parameters)]);
        }
    }
}

/// With parts and stages others find it first where they meet, and with Muon the update gathers matrices.
#[test]
fn so_it_is_with_parts_and_stages_and_with_updates_of_whole_matrices() {
    for (what, number, way, _) in mistakes() {
        for (axes, level, optim) in [
            ([2, 1, 2], Sharding::Optimizer, "adamw"),
            ([2, 2, 1], Sharding::Gradients, "adamw"),
            ([2, 1, 2], Sharding::Parameters, "adamw"),
            ([2, 1, 1], Sharding::Parameters, "muon"),
        ] {
            let strategy = strategy(axes, KIND, level, Keep::Pass);
            let error = train(axes.iter().product(), &strategy, optim, (number, way), LONG);
            assert!(!matches!(error, Error::Timeout { .. }), "{strategy}, {optim}: a rank {what}: {error}");
            let said = error.to_string();
            let about = format!("{strategy}, {optim}: a rank {what}: {error}");
            match &error {
                Error::Optimizer { problem } => assert!(problem.contains("equally often"), "{about}"),
                _ => {
                    // In the first line, that of the calls.
                    let calls = said.lines().next().unwrap();
                    let parts = ["(the update of step ", "(the norm of step ", "(step "];
                    assert!(parts.into_iter().filter(|part| calls.contains(part)).count() > 1, "{about}");
                    assert!(said.contains("take its steps together"), "{about}");
                }
            }
        }
    }
}

/// Rows that are divided among some of the replicas only are gathered among these, and all replicas begin a step: a
/// rank that has left out its update waits for the others elsewhere. The error of the time-out says where.
#[test]
fn the_time_out_says_it_where_only_some_of_the_ranks_meet() {
    let strategy = Strategy::new().with_dp(4).with_data(config(Sharding::Optimizer).with_sharding_ranks(2));
    let error = train(4, &strategy, "adamw", (1, LEAVES_OUT), Duration::from_secs(5));
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    says(&error, &["(the update of step 2) (waiting", "(step 3) (waiting", "take its steps together"]);
}
