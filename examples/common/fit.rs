//! How many rows fit into memory at once, for `--batch auto`: by what is known of a step, then by trials.

use std::env;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Device;
use burn_parallel::batch::{
    MemoryBudget, RankMemory, Trial, largest_that_fits, model_memory, rows_within_on_all, try_in_child,
};
use burn_parallel::graph::TensorTree;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use clap::Args;
use log::LevelFilter;

use super::batch::Rows;
use super::device::Compute;
use super::flags::{bytes, count, seconds};
use super::mesh;
use super::program::{Failure, unsuited};
use super::start::{Launch, Start};

/// Tells a child of `--batch auto` how many rows to try.
const TRIAL: &str = "BURN_PARALLEL_TRIAL_ROWS";

/// The steps of a trial: in the second one the optimizer has its state.
pub const TRIAL_STEPS: usize = 2;

/// What `--batch auto` goes by.
#[derive(Args, Clone, Copy, Debug)]
pub struct FitFlags {
    /// The most memory that --batch auto gives to all ranks together, as 500M or 6G [default: nine tenths of what the
    /// system says is left, which is never gone beyond]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    memory_budget: Option<u64>,

    /// The longest that a trial of --batch auto takes: one that takes longer ends the run [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    trial_timeout: Option<Duration>,
}

impl FitFlags {
    /// What is wrong with these flags for such a batch.
    pub fn check(&self, batch: Rows) -> Result<(), String> {
        let given =
            [("--memory-budget", self.memory_budget.is_some()), ("--trial-timeout", self.trial_timeout.is_some())];
        match given.iter().find(|(_, given)| *given && batch != Rows::Auto) {
            Some((flag, _)) => Err(format!("{flag} is for --batch auto: give that as well")),
            None => Ok(()),
        }
    }

    /// The bytes that all ranks together may take, and what sets the limit.
    fn budget(&self) -> Result<(u64, String), Error> {
        let MemoryBudget { bytes, limit } = MemoryBudget::of_system()?;
        // What others take meanwhile.
        let left = bytes / 10 * 9;
        Ok(match self.memory_budget.filter(|given| *given < left) {
            Some(given) => (given, "--memory-budget".into()),
            None => (left, limit),
        })
    }
}

/// What is wrong with `--batch auto` beside these flags.
pub fn check_auto(start: &Start, micro_batch: Option<usize>) -> Result<(), String> {
    if start.launch != Launch::Threads || start.device != Compute::Flex {
        return Err(
            "--batch auto tries batches on ranks that are threads of a CPU: give --launch threads, or a number".into(),
        );
    }
    match micro_batch {
        Some(_) => Err("--batch auto finds out how many rows go through at once: leave --micro-batch out".into()),
        None => Ok(()),
    }
}

/// The rows that this process is to try for `--batch auto`, if it is such a child.
pub fn trial() -> Option<usize> {
    env::var(TRIAL).ok()?.parse().ok()
}

/// How many rows, of at most so many, are known to go through every layer at once with no more than so many bytes on
/// all ranks together, which are threads. `make` makes the whole model, and `batch` inputs of so many rows.
///
/// # Errors
/// If the model cannot be spread, or its step not captured.
pub fn known_to_fit<M: Module, I: TensorTree + Clone>(
    (strategy, ranks): (&Strategy, usize),
    (bytes, most): (u64, usize),
    make: impl Fn(&Device) -> Result<M, Error> + Sync,
    batch: impl Fn(usize) -> I + Sync,
    loss: impl Fn(&M, I) -> Loss + Sync,
) -> Result<usize, Error> {
    let [_, pp, _] = strategy.axes(ranks)?;
    if !can_be_held((strategy, ranks), bytes, &make)? {
        return Ok(0);
    }
    let pieces = strategy.pipeline.as_ref().filter(|_| pp > 1).map_or(1, |pipeline| pipeline.micro_batches);
    let known = launch::threads(ranks).run(|rank| {
        let device = mesh::autodiff(strategy, rank.device());
        let mut model = make(&device)?.parallelize(&rank, strategy).map_err(unsuited)?;
        rows_within_on_all(bytes, most, &rank, |rows| {
            let own = RankMemory::of(&mut model, 2, batch(rows * pieces), &loss).map_err(unsuited)?.total();
            Ok(rank.all_reduce(vec![own as u64], ReduceOp::Sum)?[0] as usize)
        })
    })?;
    Ok(known[0])
}

/// Whether all ranks together can hold the models that `make` makes in so many bytes: what cannot be held is not made.
///
/// # Errors
/// If the strategy is not one for so many ranks, or no model can be made.
pub fn can_be_held<M: Module>(
    (strategy, ranks): (&Strategy, usize),
    bytes: u64,
    make: &impl Fn(&Device) -> Result<M, Error>,
) -> Result<bool, Error> {
    let [dp, ..] = strategy.axes(ranks)?;
    let copies = if strategy.data.sharding == Sharding::Parameters { 1 } else { dp };
    Ok((copies * model_memory(&make(&Device::flex().autodiff())?, 0)) as u64 <= bytes)
}

/// That not even one row fits, and what to do: by `smaller` the model is made smaller.
fn nothing_fits((bytes, limit): (u64, &str), said: &str, smaller: &str) -> Failure {
    let more = if limit == "--memory-budget" { "a larger --memory-budget" } else { "more memory" };
    Failure::Refused(format!(
        "--batch auto: not even one row fits into the {bytes} bytes of {limit}{said}: give shorter rows (--seq), a smaller model \
         ({smaller}), fewer replicas (--dp; --tp, --pp and --zero 3 divide what these hold), or {more}"
    ))
}

/// Rows that a replica does not go beyond at once, whatever fits; and why.
pub struct Most {
    rows: usize,
    why: String,
}

impl Most {
    /// What `sense` says, and no more than the data gives, which is called so and has `all` rows, for a step of so many
    /// micro-batches on all replicas together.
    pub fn of((rows, why): (usize, String), (all, called): (u64, &str), micro_batches: usize) -> Self {
        let given = usize::try_from(all / micro_batches as u64).unwrap_or(usize::MAX).max(1);
        if given >= rows {
            return Self { rows, why };
        }
        let among = if micro_batches == 1 { String::new() } else { format!(", for {micro_batches} micro-batches") };
        Self { rows: given, why: format!("{called} has {}{among}", count(all as usize, "row")) }
    }
}

/// The most rows, at most `most`, that go through every layer at once on each replica. `known` says how many of so many
/// are known to need no more than so many bytes on all ranks together. This process takes no step for it: children do,
/// with a limit on their memory, which are this program with the same arguments and [`trial`]. `smaller` names the
/// flags by which the model is made smaller.
///
/// # Errors
/// What `known` and trials return; if not even one row fits, [`Failure::Refused`].
pub fn largest(
    Most { rows: most, why }: Most,
    (fit, smaller): (FitFlags, &str),
    known: impl FnOnce(u64, usize) -> Result<usize, Error>,
) -> Result<usize, Failure> {
    let (bytes, limit) = fit.budget()?;
    let looked_for = count(most, "row");
    eprintln!("--batch auto: at most {looked_for} at once are looked for ({why}), within {bytes} bytes ({limit})");
    // What is to be warned of is when the run begins.
    let level = log::max_level();
    log::set_max_level(LevelFilter::Error);
    let known = known(bytes, most);
    log::set_max_level(level);
    let most = known?;
    if most == 0 {
        return Err(nothing_fits((bytes, &limit), "", smaller));
    }
    eprintln!("--batch auto: {} at once may fit, by what is known of a step; more are not tried", count(most, "row"));
    let program = env::current_exe().map_err(Error::user)?;
    let timeout = fit.trial_timeout.unwrap_or(Duration::from_secs(600));
    // Why one row does not fit, if it does not.
    let one_row = Mutex::new(None);
    let one = |rank: Rank| {
        largest_that_fits(most, &rank, |rows| {
            eprintln!("--batch auto: tries {} at once", count(rows, "row"));
            let mut child = Command::new(&program);
            child.args(env::args_os().skip(1)).env(TRIAL, rows.to_string());
            let began = Instant::now();
            let trial = try_in_child(&mut child, bytes, timeout).map_err(|why| match began.elapsed() < timeout {
                true => why,
                false => Error::user(format!("{why}; --trial-timeout gives it more")),
            })?;
            if let Trial::TooLarge(why) = &trial {
                let do_not = if rows == 1 { "does not" } else { "do not" };
                eprintln!("--batch auto: {} {do_not} fit: {why}", count(rows, "row"));
                if let (1, Ok(mut one_row)) = (rows, one_row.lock()) {
                    *one_row = Some(format!(" ({why})"));
                }
            }
            Ok(trial)
        })
    };
    let fit = launch::threads(1).run(one).map(|mut all| all.swap_remove(0));
    let fit = match one_row.into_inner() {
        Ok(Some(why)) => return Err(nothing_fits((bytes, &limit), &why, smaller)),
        _ => fit?,
    };
    let found = count(fit.rows, "row");
    eprintln!("{found} at once fit on a rank, of {most} that were tried first, in {bytes} bytes");
    Ok(fit.rows)
}
