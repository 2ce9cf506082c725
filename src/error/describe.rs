//! The parts of error messages that depend on what there is to say.

use std::collections::BTreeSet;

use super::Error;
use crate::comm::{
    ANOTHER_NORM, BATCH_LEFT, Call, CallLog, GATHERED_PARAMETERS, NEW_OPTIMIZER, StepPart, WANTED_PARAMETERS,
};

/// What says by itself what is wrong, as errors of settings do, is likely found by all ranks, and one of them was
/// first; what they have called before is of no use then.
pub(super) fn rank_failed(rank: usize, cause: &Error, log: &CallLog) -> String {
    match cause {
        Error::Environment { .. }
        | Error::Graph { .. }
        | Error::InvalidArgument { .. }
        | Error::Mesh { .. }
        | Error::ModelMismatch { .. }
        | Error::Nesting { .. }
        | Error::Optimizer { .. }
        | Error::Pipeline { .. }
        | Error::Plan { .. }
        | Error::Schedule { .. }
        | Error::Settings { .. }
        | Error::Strategy { .. } => format!("{cause} (rank {rank} found it first)"),
        _ => format!("rank {rank} failed: {cause}{log}"),
    }
}

pub(super) fn last_words(said: &[String]) -> String {
    if said.is_empty() { "; it said nothing".into() } else { format!("; the last it said:\n  {}", said.join("\n  ")) }
}

pub(super) fn left_behind(operation: &str) -> String {
    match operation {
        "nobody" => {
            "nobody was waiting for it: its process has ended without a word, as when it is killed, or its machine \
                     can't be reached; see what it wrote last, and the log of the system"
                .into()
        }
        _ => format!(
            "{operation} was waiting for it: its process has ended, or it dropped its communicator, or the rank that waits calls one more \
             than the others, such as a barrier, or a step where the others have no batch left, for which there is `join`; keep communicators alive until every rank has issued its last collective"
        ),
    }
}

/// What to do, if a rank was waiting for what only those call that were given a new optimizer, or that clip in another
/// way, or for parameters that replicas divide among themselves. `called` says what was called.
pub(super) fn advice(group: &str, called: &str, log: &CallLog) -> &'static str {
    named(called, log).unwrap_or_else(|| gathering(group, log))
}

/// The same of a wait that has outlasted the time-out, in `called`; also if ranks wait in different parts of a step.
pub(super) fn advice_on_wait(group: &str, called: &str, log: &CallLog) -> &'static str {
    let waiting = log.lines().iter().flat_map(|line| line.split(" < ")).filter(|call| is_in(call));
    let parts: BTreeSet<&str> = waiting.chain([called]).filter_map(part_of).collect();
    named(called, log).or((parts.len() > 1).then_some(APART)).unwrap_or_else(|| gathering(group, log))
}

/// The same of calls that do not match; also if they are of different parts of a step.
pub(super) fn advice_on_calls(group: &str, calls: &[Call], log: &CallLog) -> &'static str {
    let said: Vec<String> = calls.iter().map(Call::to_string).collect();
    let parts: BTreeSet<u64> = calls.iter().filter_map(Call::step_part).collect();
    let said = said.join(", ");
    match named(&said, log).or((parts.len() > 1).then_some(APART)).unwrap_or_else(|| gathering(group, log)) {
        "" if said.contains(BATCH_LEFT) => JOINING,
        advice => advice,
    }
}

/// What to do if some ranks ask whether any has a batch left, and others call something else.
const JOINING: &str = "; `join` asks before each step whether any rank has a batch left: all ranks loop over it, and take a step for \
                       each item, also for a `None`, which `step_micro_batches` takes for no micro-batch";

/// What to do if ranks are in different parts of a step.
const APART: &str = "; ranks that train one model take its steps together: each step is asked for its norm in the same way on all of \
                     them, equally often (`step.clip_grad_norm`, or on all `model.clip_grad_norm`), and goes to `optimize` on all of \
                     them or, as one that `clip_grad_norm` has `skipped`, on none (nobody else sets that); and all make as many \
                     steps, and restore the same checkpoint or none";

/// The part of a step that a call of a log says that it belongs to.
fn part_of(call: &str) -> Option<&str> {
    let mut words = call.split('(').skip(1).filter_map(|behind| behind.split(')').next());
    words.find(|words| StepPart::is_described(words))
}

/// What to do, if a rank was in a call whose name says it.
fn named(called: &str, log: &CallLog) -> Option<&'static str> {
    let is_called = |name| called.contains(name) || log.lines().iter().any(|line| waits_for(line, name));
    if is_called(NEW_OPTIMIZER) {
        return Some(
            "; a rank whose optimizer is new, or has a state that was loaded since its last step, compares its moments in \
                `optimize`, and the others went on with the optimizer that they had, or left `optimize` out: all ranks put a new one \
                in the place of the old, or load a state into it, after the same step, and call `optimize` after every step",
        );
    }
    if is_called(ANOTHER_NORM) {
        return Some(
            "; that rank was asked by `clip_grad_norm` for another norm than the step came with, or for that of gradients that it has \
                changed, and the others were not: ranks that divide rows among themselves clip alike, and all of them change gradients \
                before or none; where each changes its own as it likes, all clip by `model.clip_grad_norm(step.grads, ..)`",
        );
    }
    None
}

/// Whether the line of a rank says that it is in a call of a name that begins like this.
fn waits_for(line: &str, name: &str) -> bool {
    line.split(" < ").any(|call| is_in(call) && call.contains(&format!("({name}")))
}

/// Whether a call of a line is one that the rank is in.
fn is_in(call: &str) -> bool {
    ["(waiting", "(just begun"].iter().any(|words| call.contains(words))
}

fn gathering(group: &str, log: &CallLog) -> &'static str {
    let of = |words: &str, name: &str| words.contains(&format!("/{name}"));
    let waits = |name| of(group, name) || log.lines().iter().any(|line| line.starts_with("in `") && of(line, name));
    if waits(WANTED_PARAMETERS) {
        return "; with `allow_unused_parameters` replicas say what they gather next: none waits for the others by anything but the \
                replica in the middle of a forward, or between a forward and its `backward`; and all evaluate by `forward_with`, \
                equally often, so a rank that is done goes on with the others for as long as `join` says so";
    }
    if waits(GATHERED_PARAMETERS) {
        return "; replicas that divide their parameters gather them together: if ranks are to use different layers, set \
                `allow_unused_parameters` (`with_allow_unused_parameters(true)`), which captured steps (`engine` \"captured\" in \
                `parallelize`) have no need of; without it all run the same layers in the same order; forwards (`forward_with`, and \
                the model's own) all run equally often, so a rank that is done goes on with the others for as long as `join` says so";
    }
    ""
}

pub(super) fn describe_calls(calls: &[Call]) -> String {
    let said = |rank: usize| format!("rank {rank} called {}", calls[rank]);
    let of = |ranks: &mut dyn Iterator<Item = usize>| ranks.map(said).collect::<Vec<_>>().join(", ");
    match odd_one(calls) {
        Some(odd) => {
            let others = of(&mut (0..calls.len()).filter(|rank| *rank != odd));
            format!("{}, unlike all others: {others}", said(odd))
        }
        None => of(&mut (0..calls.len())),
    }
}

/// The rank that calls something else than all others, of which there are two at least, and which call the same.
fn odd_one(calls: &[Call]) -> Option<usize> {
    let agree = |one: &Call, other: &Call| one.agrees(other);
    (0..calls.len()).filter(|_| calls.len() > 2).find(|odd| {
        let mut others = calls.iter().enumerate().filter(|(rank, _)| rank != odd).map(|(_, call)| call);
        others.next().is_some_and(|first| !agree(&calls[*odd], first) && others.all(|other| agree(first, other)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{CallShape, Operation};

    const WORDS: &str = "take its steps together";

    fn mismatch(calls: Vec<Call>) -> String {
        Error::Mismatch { group: "world/control".into(), sequence: 7, calls, log: CallLog::default() }.to_string()
    }

    fn gather(part: StepPart, step: u64, elements: usize) -> Call {
        Call::new(Operation::AllGather, None, CallShape::flat(elements)).agreeing(part.of(step))
    }

    fn time_out(operation: &str, lines: &[&str]) -> String {
        let (operation, log) = (operation.into(), CallLog::new(lines.iter().map(|line| (*line).into())));
        let (group, waited, missing) = ("world/control".into(), std::time::Duration::from_secs(1), "rank 1".into());
        Error::Timeout { group, rank: 0, operation, waited, missing, log }.to_string()
    }

    #[test]
    fn ranks_in_different_parts_of_a_step_are_told_so() {
        let update = gather(StepPart::Update, 3, 9);
        for other in [gather(StepPart::Norm, 3, 7), gather(StepPart::Step, 4, 9), gather(StepPart::Update, 4, 9)] {
            let said = mismatch(vec![update, other]);
            assert!(said.contains(WORDS) && said.contains("(the update of step 3)"), "{said}");
        }
        let said = mismatch(vec![gather(StepPart::Step, 4, 9), gather(StepPart::Step, 9, 9)]);
        assert!(said.contains(WORDS) && said.contains("(step 4)") && said.contains("(step 9)"), "{said}");
        let waiting = ["rank 0: #3 all_gather (the update of step 3) (waiting for 1.0s)", "rank 1: #2 barrier"];
        let elsewhere = "in `world/other` rank 1: #4 all_reduce(Sum) of F64 [2] (step 4) (waiting for 1.0s)";
        let said = time_out("all_gather (the update of step 3)", &[waiting[0], waiting[1], elsewhere]);
        assert!(said.contains(WORDS), "{said}");
    }

    /// A rank that is slow, was killed, or brings other lengths has done nothing else than the others.
    #[test]
    fn others_are_not() {
        let lengths = mismatch(vec![gather(StepPart::Update, 3, 9), gather(StepPart::Update, 3, 8)]);
        let other = Call::new(Operation::Barrier, None, CallShape::flat(0));
        let plain = mismatch(vec![other, Call::new(Operation::AllGather, None, CallShape::flat(1))]);
        let line =
            "rank 0: #3 all_gather (the update of step 3) (waiting for 1.0s) < #2 all_gather (the norm of step 3)";
        let slow = time_out("all_gather (the update of step 3)", &[line, "rank 1: #2 all_gather (the norm of step 3)"]);
        let joining = format!("all_reduce(Max) of U8 [1] ({BATCH_LEFT})");
        let saves = time_out(&joining, &[&format!("rank 0: #3 {joining} (waiting for 1.0s)"), "rank 1: #2 barrier"]);
        assert!(!saves.contains("`None`"), "{saves}");
        let (group, log) = ("world/control".into(), CallLog::new(std::iter::once(line.into())));
        let operation = "all_gather (the update of step 3)".into();
        let lost = Error::RankLost { group, rank: 1, operation, log }.to_string();
        for said in [lengths, plain, slow, lost] {
            assert!(!said.contains(WORDS), "{said}");
        }
    }
}
