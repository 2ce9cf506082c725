//! Schedules, their validator and their simulator, without any model.

use std::collections::HashSet;
use std::path::Path;

use burn_parallel::Error;
use burn_parallel::pipeline_parallel::schedule::{
    Action, Costs, Direction, Edge, Routes, Schedule, StageCosts, Timetable, Unit,
};
use proptest::prelude::*;

/// All schedules that train, with up to three stages a rank.
fn training() -> Vec<Schedule> {
    use Schedule::*;
    let interleaved = (1..=3).map(|stages_per_rank| Interleaved { stages_per_rank });
    [GPipe, OneForwardOneBackward, ZeroBubbleH1].into_iter().chain(interleaved).collect()
}

fn all() -> Vec<Schedule> {
    let evaluation = (1..=3).map(|stages_per_rank| Schedule::ForwardOnly { stages_per_rank });
    training().into_iter().chain(evaluation).collect()
}

fn chain(timetable: &Timetable) -> Routes {
    Routes::chain(timetable.stages())
}

/// A chain with a connection from the first stage to the last, and one from the second to the last, and back.
fn skipping(stages: usize) -> Routes {
    let mut edges: Vec<Edge> = Routes::chain(stages).edges().collect();
    let far = [Edge::new(0, stages - 1, 2), Edge::new(1, stages - 1, 1)];
    edges.extend(far.iter().filter(|edge| edge.from + 1 < edge.to).flat_map(|edge| [*edge, edge.reversed()]));
    Routes::new(edges).unwrap()
}

fn idle(schedule: &Schedule, ranks: usize, micro_batches: usize) -> f64 {
    let timetable = schedule.timetable(ranks, micro_batches).unwrap();
    timetable.simulate(&chain(&timetable), &Costs::default()).unwrap().idle_share()
}

#[track_caller]
fn refusal(result: Result<impl std::fmt::Debug, Error>) -> String {
    match result.unwrap_err() {
        Error::Schedule { problem } => problem,
        other => panic!("another error: {other}"),
    }
}

fn parse(text: &str) -> Timetable {
    text.parse().unwrap()
}

#[test]
fn actions_print_and_parse_in_the_notation_of_the_field() {
    let unit = Unit::new(1, 3);
    let known = [
        ("1F3", Action::Forward(unit)),
        ("1B3", Action::Backward(unit)),
        ("1I3", Action::BackwardInput(unit)),
        ("1W3", Action::BackwardWeight(unit)),
        ("1SEND_F3", Action::Send(Direction::Forward, unit)),
        ("1RECV_F3", Action::Receive(Direction::Forward, unit)),
        ("1SEND_B3", Action::Send(Direction::Backward, unit)),
        ("1RECV_B3", Action::Receive(Direction::Backward, unit)),
    ];
    for (text, action) in known {
        assert_eq!(action.to_string(), text);
        assert_eq!(text.parse::<Action>().unwrap(), action);
    }
    assert_eq!(" 12F0 ".parse::<Action>().unwrap(), Action::Forward(Unit::new(12, 0)));
    assert_eq!(format!("{:6}|", Action::Forward(unit)), "1F3   |");
}

#[test]
fn texts_that_are_no_actions_are_refused_with_the_reason() {
    for (text, reason) in [
        ("", "the number of the stage before the letters, as in `2F0`, is expected, and there is none"),
        ("F3", "the number of the stage before the letters"),
        ("1F", "the number of the micro-batch behind the letters, as in `2F0`, is expected, and there is none"),
        ("13", "the number of the micro-batch behind the letters"),
        ("1X3", "`X` is none of F, B, I, W, SEND_F, RECV_F, SEND_B, RECV_B"),
        ("1f3", "`f` is none of"),
        ("1F 3", "`F ` is none of"),
        ("1SENDF3", "`SENDF` is none of"),
        ("-1F3", "`-1F` is none of"),
        ("1Fé3", "`Fé` is none of"),
        ("99999999999999999999999F0", "`99999999999999999999999`, which is too large"),
    ] {
        let problem = refusal(text.parse::<Action>());
        assert!(problem.contains(reason), "{text:?}: {problem}");
    }
}

#[test]
fn every_schedule_is_valid_for_every_number_of_ranks_and_micro_batches() {
    for schedule in all() {
        for ranks in 1..=8 {
            for micro_batches in 1..=16 {
                let timetable = schedule.timetable(ranks, micro_batches).unwrap();
                let name = format!("{schedule:?} with {ranks} ranks and {micro_batches} micro-batches");
                assert_eq!((timetable.ranks(), timetable.micro_batches()), (ranks, micro_batches), "{name}");
                assert_eq!(timetable.stages(), ranks * schedule.stages_per_rank(), "{name}");
                for routes in [chain(&timetable), skipping(timetable.stages())] {
                    let peak = timetable.validate(&routes).unwrap_or_else(|error| panic!("{name}: {error}"));
                    let full = timetable.with_communication(&routes).unwrap();
                    let with = full.validate(&routes).unwrap_or_else(|error| panic!("{name}, with messages: {error}"));
                    assert_eq!(peak, with, "{name}");
                    assert_eq!(full.computing(), timetable, "{name}: the order on a rank is kept");
                    assert_eq!(full.communicates(), ranks > 1, "{name}");
                }
            }
        }
    }
}

#[test]
fn as_many_activations_are_alive_as_the_papers_promise() {
    for p in 1..=8 {
        for m in 1..=16 {
            let peak = |schedule: Schedule| {
                let timetable = schedule.timetable(p, m).unwrap();
                timetable.validate(&chain(&timetable)).unwrap()
            };
            assert_eq!(peak(Schedule::GPipe).per_stage, vec![m; p]);
            let one_by_one: Vec<usize> = (0..p).map(|stage| m.min(p - stage)).collect();
            assert_eq!(peak(Schedule::OneForwardOneBackward).per_stage, one_by_one);
            assert_eq!(peak(Schedule::OneForwardOneBackward).per_rank, one_by_one);
            assert_eq!(peak(Schedule::ZeroBubbleH1).per_stage, vec![m.min(p); p]);
            assert_eq!(peak(Schedule::ForwardOnly { stages_per_rank: 2 }).per_rank, vec![0; p]);
            if m % p == 0 {
                // Narayanan et al. 2021: the first rank has p v + p - 1 stages' worth under way, where m allows.
                let interleaved = peak(Schedule::Interleaved { stages_per_rank: 2 }).per_rank;
                let first: Vec<usize> = (0..p).map(|rank| (2 * m).min(p + 2 * (p - 1 - rank) + 1)).collect();
                assert_eq!(interleaved, first, "p {p}, m {m}");
            }
        }
    }
}

#[test]
fn idle_shares_are_those_of_the_papers() {
    for p in 1..=8usize {
        for m in 1..=32usize {
            let (pf, mf) = (p as f64, m as f64);
            let check = |schedule: Schedule, expected: f64| {
                let found = idle(&schedule, p, m);
                assert!((found - expected).abs() < 1e-12, "{schedule:?}, p {p}, m {m}: {found} for {expected}");
            };
            check(Schedule::GPipe, (pf - 1.0) / (mf + pf - 1.0));
            check(Schedule::OneForwardOneBackward, (pf - 1.0) / (mf + pf - 1.0));
            if m >= p {
                check(Schedule::ZeroBubbleH1, (pf - 1.0) / (3.0 * mf + pf - 1.0));
            }
            for v in [1, 2, 3usize] {
                let gap = (pf - 1.0) / v as f64;
                if m % p == 0 {
                    check(Schedule::Interleaved { stages_per_rank: v }, gap / (mf + gap));
                    check(Schedule::ForwardOnly { stages_per_rank: v }, gap / (mf + gap));
                }
            }
        }
    }
}

#[test]
fn idle_shares_in_figures() {
    let interleaved = Schedule::Interleaved { stages_per_rank: 2 };
    for (p, m, one_by_one, twice, zero_bubble) in [
        (2, 4, 0.200, 0.111, 0.077),
        (2, 8, 0.111, 0.059, 0.040),
        (4, 8, 0.273, 0.158, 0.111),
        (4, 16, 0.158, 0.086, 0.059),
        (8, 32, 0.179, 0.099, 0.068),
    ] {
        let rounded = |schedule: &Schedule| (idle(schedule, p, m) * 1000.0).round() / 1000.0;
        assert_eq!(rounded(&Schedule::GPipe), one_by_one, "p {p}, m {m}");
        assert_eq!(rounded(&Schedule::OneForwardOneBackward), one_by_one, "p {p}, m {m}");
        assert_eq!(rounded(&interleaved), twice, "p {p}, m {m}");
        assert_eq!(rounded(&Schedule::ZeroBubbleH1), zero_bubble, "p {p}, m {m}");
    }
}

#[test]
fn a_simulation_counts_communication_and_uneven_stages() {
    let timetable = Schedule::OneForwardOneBackward.timetable(2, 2).unwrap();
    let costs = Costs::per_stage(vec![StageCosts::new(2.0, 1.0, 1.5), StageCosts::new(3.0, 2.0, 0.5)]);
    let simulation = timetable.simulate(&chain(&timetable), &costs.with_communication(0.25)).unwrap();
    let events: Vec<(String, f64, f64)> =
        simulation.events.iter().map(|event| (event.action.to_string(), event.start, event.end)).collect();
    let expected = [
        ("0F0", 0.0, 2.0),
        ("0F1", 2.0, 4.0),
        ("1F0", 2.25, 5.25),
        ("1B0", 5.25, 7.75),
        ("1F1", 7.75, 10.75),
        ("0B0", 8.0, 10.5),
        ("1B1", 10.75, 13.25),
        ("0B1", 13.5, 16.0),
    ];
    assert_eq!(events, expected.map(|(action, start, end)| (action.to_string(), start, end)));
    assert_eq!((simulation.makespan, simulation.busy.clone()), (16.0, vec![9.0, 11.0]));
    assert!((simulation.idle_share() - 12.0 / 32.0).abs() < 1e-12);
}

#[test]
fn stages_on_one_rank_need_no_communication() {
    let timetable = Schedule::Interleaved { stages_per_rank: 3 }.timetable(1, 4).unwrap();
    assert!(!timetable.with_communication(&chain(&timetable)).unwrap().communicates());
    let costs = Costs::default().with_communication(100.0);
    assert_eq!(timetable.simulate(&chain(&timetable), &costs).unwrap().idle_share(), 0.0);
}

#[test]
fn costs_that_mean_nothing_are_refused() {
    let timetable = Schedule::GPipe.timetable(2, 2).unwrap();
    let simulate = |costs: Costs| refusal(timetable.simulate(&chain(&timetable), &costs));
    let stage = StageCosts::default();
    assert!(simulate(Costs::per_stage(vec![stage; 3])).contains("for 3 stages, and there are 2"));
    assert!(simulate(Costs::default().with_communication(-1.0)).contains("a cost is -1"));
    assert!(simulate(Costs::uniform(StageCosts { forward: f64::NAN, ..stage })).contains("a cost is NaN"));
}

/// What is drawn and written is held in `tests/pipeline_parallel/golden`. With `UPDATE_GOLDEN=1` it is written anew, to
/// be looked at with `git diff`.
#[track_caller]
fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pipeline_parallel/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_else(|problem| panic!("{}: {problem}", path.display()));
    assert_eq!(text, expected, "{}", path.display());
}

#[test]
fn grids_are_as_they_were_drawn() {
    use Schedule::*;
    for (name, schedule, ranks, micro_batches) in [
        ("gpipe_4_4", GPipe, 4, 4),
        ("1f1b_4_8", OneForwardOneBackward, 4, 8),
        ("1f1b_4_2", OneForwardOneBackward, 4, 2),
        ("interleaved_2_4_v2", Interleaved { stages_per_rank: 2 }, 2, 4),
        ("interleaved_4_8_v2", Interleaved { stages_per_rank: 2 }, 4, 8),
        ("interleaved_3_5_v2", Interleaved { stages_per_rank: 2 }, 3, 5),
        ("zb_h1_4_8", ZeroBubbleH1, 4, 8),
        ("forward_only_3_4_v2", ForwardOnly { stages_per_rank: 2 }, 3, 4),
    ] {
        let timetable = schedule.timetable(ranks, micro_batches).unwrap();
        let simulation = timetable.simulate(&chain(&timetable), &Costs::default()).unwrap();
        golden(&format!("{name}.grid.txt"), &simulation.grid());
    }
}

#[test]
fn sends_and_receives_are_where_they_were() {
    for (name, schedule, ranks, micro_batches, skips) in [
        ("1f1b_3_4", Schedule::OneForwardOneBackward, 3, 4, false),
        ("zb_h1_2_3", Schedule::ZeroBubbleH1, 2, 3, false),
        ("gpipe_4_2_skipping", Schedule::GPipe, 4, 2, true),
        ("interleaved_2_2_v2", Schedule::Interleaved { stages_per_rank: 2 }, 2, 2, false),
    ] {
        let timetable = schedule.timetable(ranks, micro_batches).unwrap();
        let routes = if skips { skipping(timetable.stages()) } else { chain(&timetable) };
        let full = timetable.with_communication(&routes).unwrap();
        golden(&format!("{name}.csv"), &full.to_string());
        assert_eq!(parse(&full.to_string()), full);
    }
}

#[test]
fn timetables_are_read_from_text() {
    let timetable = parse("# comment\n\n0F0,,0F1,\" 0B0 \", ,0B1\n,1F0,1B0,1F1,1B1\n");
    assert_eq!((timetable.ranks(), timetable.stages(), timetable.micro_batches()), (2, 2, 2));
    assert_eq!(timetable.stage_ranks(), [0, 1]);
    assert_eq!(timetable, Schedule::OneForwardOneBackward.timetable(2, 2).unwrap());
    let empty_rank = parse("0F0,0B0\n\"\"\n1F0,1B0");
    assert_eq!((empty_rank.ranks(), empty_rank.stage_ranks()), (3, [0, 2].as_slice()));
    assert_eq!(parse(&empty_rank.to_string()), empty_rank);
    for (text, reason) in [
        ("", "the timetable has no action"),
        ("0F0,0B0\n1F0,1X0", "line 2, cell 2: `1X0` is no action"),
        ("0F0,2F0", "stage 1 has no action, and there is a stage 2"),
        ("0F0,1UNSHARD", "`UNSHARD` is none of"),
    ] {
        let problem = refusal(text.parse::<Timetable>());
        assert!(problem.contains(reason), "{text:?}: {problem}");
    }
    let missing = refusal(Timetable::read("/does/not/exist.csv"));
    assert!(missing.starts_with("/does/not/exist.csv: "), "{missing}");
}

/// What anybody may write into a file is refused at once, or means what it says.
#[test]
fn hostile_texts_are_refused_at_once() {
    let most = usize::MAX;
    for text in [
        format!("0F{most},0B{most}"),
        "0F0,0B0,0F18446744073709551614".into(),
        format!("{most}F0"),
        "0F0,4294967296B0".into(),
        "0F0,\"0B0\n1F0,1B0".into(),
        "\0".into(),
        "0F0\u{feff},0B0".into(),
        "0F٣,0B٣".into(),
        ",".repeat(100_000),
        "\n".repeat(100_000),
        "0F0,".repeat(100_000),
        "0RECV_B0,0SEND_F0".into(),
        "9".repeat(100_000),
    ] {
        let shown: String = text.chars().take(40).collect();
        let outcome = text.parse::<Timetable>().and_then(|timetable| {
            let routes = chain(&timetable);
            timetable.validate(&routes)?;
            timetable.simulate(&routes, &Costs::default())
        });
        let Error::Schedule { problem } = outcome.unwrap_err() else { panic!("{shown}") };
        assert!(!problem.is_empty(), "{shown}");
    }
    let path = std::env::temp_dir().join(format!("hostile-{}.csv", std::process::id()));
    std::fs::write(&path, b"0F0,\xff\xfe0B0").unwrap();
    let problem = refusal(Timetable::read(&path));
    std::fs::remove_file(&path).unwrap();
    assert!(problem.contains("hostile-") && problem.contains("UTF-8"), "{problem}");
    assert!(refusal(Timetable::read(std::env::temp_dir())).contains("directory"));
}

#[test]
fn a_custom_timetable_must_be_for_the_pipeline() {
    let custom = Schedule::Custom(Schedule::GPipe.timetable(2, 3).unwrap());
    assert_eq!(custom.timetable(2, 3).unwrap(), Schedule::GPipe.timetable(2, 3).unwrap());
    assert!(
        refusal(custom.timetable(2, 4)).contains("2 ranks and 3 micro-batches, and the pipeline has 2 ranks and 4")
    );
    assert!(refusal(Schedule::GPipe.timetable(0, 4)).contains("0 ranks"));
    assert!(refusal(Schedule::GPipe.timetable(2, 0)).contains("0 micro-batches"));
    for huge in [1 << 30, usize::MAX] {
        let interleaved = Schedule::Interleaved { stages_per_rank: huge };
        assert!(refusal(Schedule::GPipe.timetable(2, huge)).contains(&format!("{huge} micro-batches are more than")));
        assert!(refusal(interleaved.timetable(2, 2)).contains(&format!("{huge} stages each")));
    }
    assert!(refusal(Schedule::Interleaved { stages_per_rank: 0 }.timetable(2, 2)).contains("0 stages per rank"));
}

#[test]
fn edges_that_cannot_be_are_refused() {
    assert!(refusal(Routes::new([Edge::new(1, 1, 1)])).contains("from stage 1 to itself"));
    assert!(
        refusal(Routes::new([Edge::new(0, 1, 1), Edge::new(0, 1, 2)])).contains("two edges from stage 0 to stage 1")
    );
    let timetable = Schedule::GPipe.timetable(2, 2).unwrap();
    assert!(
        refusal(timetable.validate(&Routes::chain(3))).contains("from stage 1 to stage 2, and the timetable has 2")
    );
}

/// The first wrong action, and what is wrong with it.
#[test]
fn wrong_timetables_are_refused_with_the_first_wrong_action() {
    for (text, reason) in [
        ("0F0,0B0\n1B0,1F0", "1B0 on rank 1 is wrong: it comes without 1F0 before it"),
        ("0F0,0F0,0B0\n1F0,1B0", "0F0 on rank 0 is wrong: it is there twice"),
        ("0F0,0B0\n1F0,1B0,0W0", "0W0 on rank 1 is wrong: stage 0 is on rank 0"),
        ("0F0,0I0,0B0,0W0\n1F0,1B0", "0B0 on rank 0 is wrong: 0I0 is there as well"),
        ("0F0,0B0,0I0,0W0\n1F0,1B0", "0I0 on rank 0 is wrong: 0B0 is there as well"),
        ("0F0,0W0,0I0\n1F0,1B0", "0W0 on rank 0 is wrong: it comes without 0I0 before it"),
        ("0F0,0B0,0W0\n1F0,1B0", "0W0 on rank 0 is wrong: it comes without 0I0 before it"),
        ("0F0,0I0\n1F0,1B0", "0W0 is missing on rank 0"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1B1", "1B1 on rank 1 is wrong: it comes without 1F1"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0", "1F1 is missing on rank 1"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1", "1B1 is missing on rank 1"),
        ("0F0,0F1\n1F0", "1F1 is missing on rank 1"),
        // Sends and receives.
        ("0SEND_F0,0F0,0B0\n1F0,1B0", "0SEND_F0 on rank 0 is wrong: it comes without 0F0 before it"),
        ("0F0,0SEND_F0,0B0\n1F0,1RECV_F0,1B0", "1RECV_F0 on rank 1 is wrong: it comes after 1F0, which needs it"),
        ("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0", "1SEND_B0 is missing on rank 1"),
        ("0F0,0SEND_F0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0", "0RECV_B0 is missing on rank 0"),
        ("0RECV_F0,0F0,0B0\n1F0,1B0", "0RECV_F0 on rank 0 is wrong: no other rank gives anything to it"),
        ("0F0,0B0,0SEND_B0\n1F0,1B0", "0SEND_B0 on rank 0 is wrong: no other rank takes what it sends"),
        ("0F0,0SEND_F0,0SEND_F0,0B0\n1RECV_F0,1F0,1B0", "0SEND_F0 on rank 0 is wrong: it is there twice"),
        // Each row is right, and all of them together are not.
        (
            "0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1",
            "the ranks wait for each other for ever: 0B0 on rank 0 waits for 1B0, 1F1 on rank 1 waits for 0F1",
        ),
        // Sends that wait for receives behind the other's send.
        (
            "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1",
            "the ranks wait for each other for ever: 0SEND_F1 on rank 0 waits for 1RECV_F1, 1SEND_B0 on rank 1 waits for 0RECV_B0",
        ),
    ] {
        let timetable = parse(text);
        let problem = refusal(timetable.validate(&chain(&timetable)));
        assert!(problem.starts_with(reason), "{text}\n{problem}");
    }
}

#[test]
fn the_first_wrong_action_is_marked_in_the_timetable() {
    let mut rows = Schedule::OneForwardOneBackward.timetable(3, 4).unwrap().rows().to_vec();
    rows[1].swap(3, 6);
    let timetable = Timetable::new(rows).unwrap();
    golden("marked.txt", &format!("{}\n", refusal(timetable.validate(&chain(&timetable)))));
}

/// Another way to tell whether a timetable runs: ranks as little machines that move as long as one of them can. Sends
/// wait until all their receives are posted.
fn runs(timetable: &Timetable, routes: &Routes) -> bool {
    let home = |stage: usize| timetable.stage_ranks()[stage];
    let mut done: HashSet<Action> = HashSet::new();
    let mut next = vec![0; timetable.ranks()];
    let mut wanted: HashSet<Action> = HashSet::new();
    for stage in 0..timetable.stages() {
        for m in 0..timetable.micro_batches() {
            let unit = Unit::new(stage, m);
            wanted.insert(Action::Forward(unit));
            wanted.insert(Action::Backward(unit));
            for edge in routes.edges().filter(|edge| home(edge.from) != home(edge.to)) {
                wanted.insert(Action::Send(edge.direction(), Unit::new(edge.from, m)));
                wanted.insert(Action::Receive(edge.direction(), Unit::new(edge.to, m)));
            }
        }
    }
    let split = |done: &HashSet<Action>, unit| done.contains(&Action::BackwardInput(unit));
    loop {
        let mut moved = false;
        for (rank, row) in timetable.rows().iter().enumerate() {
            while let Some(action) = row.get(next[rank]) {
                let unit = action.unit();
                let computed = |direction: Direction, unit: Unit| match direction {
                    Direction::Forward => done.contains(&Action::Forward(unit)),
                    Direction::Backward => done.contains(&Action::Backward(unit)) || split(&done, unit),
                };
                let came = |direction: Direction| {
                    routes.edges().filter(|edge| edge.to == unit.stage && edge.direction() == direction).all(|edge| {
                        let from = Unit::new(edge.from, unit.micro_batch);
                        match home(edge.from) == rank {
                            true => computed(direction, from),
                            false => {
                                done.contains(&Action::Send(direction, from))
                                    && done.contains(&Action::Receive(direction, unit))
                            }
                        }
                    })
                };
                let fresh = !done.contains(action) && home(unit.stage) == rank;
                let can = match action {
                    Action::Forward(_) => came(Direction::Forward),
                    Action::Backward(_) => {
                        computed(Direction::Forward, unit) && came(Direction::Backward) && !split(&done, unit)
                    }
                    Action::BackwardInput(_) => {
                        let whole = done.contains(&Action::Backward(unit));
                        computed(Direction::Forward, unit) && came(Direction::Backward) && !whole
                    }
                    Action::BackwardWeight(_) => split(&done, unit),
                    Action::Send(direction, _) => {
                        let mut takers = routes
                            .edges()
                            .filter(|edge| {
                                edge.from == unit.stage && edge.direction() == *direction && home(edge.to) != rank
                            })
                            .peekable();
                        let any = takers.peek().is_some();
                        let posted = |edge: Edge| {
                            done.contains(&Action::Receive(*direction, Unit::new(edge.to, unit.micro_batch)))
                        };
                        any && computed(*direction, unit) && takers.all(posted)
                    }
                    Action::Receive(direction, _) => {
                        let from_elsewhere = routes.edges().any(|edge| {
                            edge.to == unit.stage && edge.direction() == *direction && home(edge.from) != rank
                        });
                        from_elsewhere && !computed(*direction, unit)
                    }
                };
                if !(fresh && can) {
                    break;
                }
                done.insert(*action);
                next[rank] += 1;
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    let finished = (0..timetable.ranks()).all(|rank| next[rank] == timetable.rows()[rank].len());
    let has = |action: &Action| match *action {
        Action::Backward(unit) => {
            done.contains(action) || split(&done, unit) && done.contains(&Action::BackwardWeight(unit))
        }
        _ => done.contains(action),
    };
    finished && wanted.iter().all(has)
}

fn pipelines() -> impl proptest::strategy::Strategy<Value = (Schedule, usize, usize, bool)> {
    let schedule = prop_oneof![
        Just(Schedule::GPipe),
        Just(Schedule::OneForwardOneBackward),
        Just(Schedule::ZeroBubbleH1),
        (1..=4usize).prop_map(|stages_per_rank| Schedule::Interleaved { stages_per_rank }),
    ];
    (schedule, 1..=11usize, 2..=37usize, any::<bool>())
}

fn full(schedule: &Schedule, ranks: usize, micro_batches: usize, skips: bool) -> (Timetable, Routes) {
    let timetable = schedule.timetable(ranks, micro_batches).unwrap();
    let routes = if skips { skipping(timetable.stages()) } else { chain(&timetable) };
    (timetable.with_communication(&routes).unwrap(), routes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn schedules_beyond_the_table_are_valid((schedule, ranks, micro_batches, skips) in pipelines()) {
        let (timetable, routes) = full(&schedule, ranks, micro_batches, skips);
        prop_assert!(timetable.validate(&routes).is_ok());
        prop_assert!(runs(&timetable, &routes));
        prop_assert_eq!(parse(&timetable.to_string()), timetable);
    }

    #[test]
    fn a_step_takes_at_least_its_longest_way_and_its_busiest_rank(
        (schedule, ranks, micro_batches, skips) in pipelines(),
        costs in prop::collection::vec((0.1..2.0f64, 0.1..2.0f64, 0.1..2.0f64), 44),
        communication in 0.0..0.5f64,
    ) {
        let (timetable, routes) = full(&schedule, ranks, micro_batches, skips);
        let stages: Vec<StageCosts> =
            costs[..timetable.stages()].iter().map(|(f, i, w)| StageCosts::new(*f, *i, *w)).collect();
        let way: f64 = stages.iter().map(|stage| stage.forward + stage.backward_input).sum();
        let crossings = (1..timetable.stages())
            .filter(|stage| timetable.stage_ranks()[*stage] != timetable.stage_ranks()[stage - 1])
            .count();
        let costs = Costs::per_stage(stages).with_communication(communication);
        let simulation = timetable.simulate(&routes, &costs).unwrap();
        let longest = way + 2.0 * communication * crossings as f64;
        prop_assert!(simulation.makespan >= longest - 1e-9);
        prop_assert!(simulation.busy.iter().all(|busy| *busy <= simulation.makespan + 1e-9));
        prop_assert!((0.0..1.0).contains(&simulation.idle_share()));
        // No rank does two things at once, and everything is done.
        let mut free = vec![0.0; ranks];
        for event in &simulation.events {
            prop_assert!(event.start >= free[event.rank]);
            free[event.rank] = event.end;
        }
        prop_assert_eq!(simulation.events.len(), timetable.computing().rows().iter().map(Vec::len).sum::<usize>());
    }

    #[test]
    fn no_text_makes_a_timetable_panic(text in "([0-3](F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)[0-2][,\n]| |,|\"|#|.){0,40}") {
        if let Ok(timetable) = text.parse::<Timetable>() {
            prop_assert_eq!(parse(&timetable.to_string()), timetable.clone());
            let routes = chain(&timetable);
            let valid = timetable.validate(&routes);
            prop_assert_eq!(timetable.simulate(&routes, &Costs::default()).is_ok(), valid.is_ok());
            if valid.is_ok() && !timetable.communicates() {
                prop_assert!(timetable.with_communication(&routes).is_ok());
            }
        }
    }

    #[test]
    fn a_timetable_that_lacks_an_action_is_refused(
        (schedule, ranks, micro_batches, skips) in pipelines(), rank: prop::sample::Index, place: prop::sample::Index,
    ) {
        let (timetable, routes) = full(&schedule, ranks, micro_batches, skips);
        let mut rows = timetable.rows().to_vec();
        let rank = rank.index(ranks);
        let place = place.index(rows[rank].len());
        let removed = rows[rank].remove(place);
        let mutated = Timetable::new(rows).unwrap();
        prop_assert!(mutated.validate(&routes).is_err(), "without {} on rank {}", removed, rank);
    }

    #[test]
    fn a_timetable_with_an_action_twice_is_refused(
        (schedule, ranks, micro_batches, skips) in pipelines(),
        rank: prop::sample::Index, place: prop::sample::Index, to: prop::sample::Index, again: prop::sample::Index,
    ) {
        let (timetable, routes) = full(&schedule, ranks, micro_batches, skips);
        let mut rows = timetable.rows().to_vec();
        let (rank, to) = (rank.index(ranks), to.index(ranks));
        let copied = rows[rank][place.index(rows[rank].len())];
        let again = again.index(rows[to].len() + 1);
        rows[to].insert(again, copied);
        let mutated = Timetable::new(rows).unwrap();
        prop_assert!(mutated.validate(&routes).is_err(), "{} once more on rank {}", copied, to);
    }

    #[test]
    fn an_action_on_the_wrong_rank_is_refused(
        (schedule, ranks, micro_batches, skips) in pipelines(),
        rank: prop::sample::Index, place: prop::sample::Index, to: prop::sample::Index,
    ) {
        prop_assume!(ranks > 1);
        let (timetable, routes) = full(&schedule, ranks, micro_batches, skips);
        let mut rows = timetable.rows().to_vec();
        let rank = rank.index(ranks);
        let to = (rank + 1 + to.index(ranks - 1)) % ranks;
        let place = place.index(rows[rank].len());
        let moved = rows[rank].remove(place);
        rows[to].push(moved);
        prop_assert!(Timetable::new(rows).unwrap().validate(&routes).is_err(), "{} from rank {} to {}", moved, rank, to);
    }

    #[test]
    fn the_validator_accepts_what_runs_and_nothing_else(
        (schedule, ranks, micro_batches, skips) in pipelines(),
        swaps in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1..8usize), 1..6),
    ) {
        let (timetable, routes) = full(&schedule, ranks, micro_batches, skips);
        let mut rows = timetable.rows().to_vec();
        for (rank, place, distance) in swaps {
            let row = &mut rows[rank.index(ranks)];
            let place = place.index(row.len());
            let other = (place + distance).min(row.len() - 1);
            row.swap(place, other);
        }
        let mutated = Timetable::new(rows).unwrap();
        prop_assert_eq!(mutated.validate(&routes).is_ok(), runs(&mutated, &routes), "\n{}", mutated);
    }
}
