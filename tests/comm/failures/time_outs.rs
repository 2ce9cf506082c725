//! Ranks that do not come in time.

use std::thread;
use std::time::Duration;

use burn_parallel::comm::WorldConfig;
use burn_parallel::comm::{ReduceOp, local};
use burn_parallel::mesh::Mesh;
use burn_parallel::{Error, launch};

use super::harness::{SHORT, SIZES, failure, hide_panics_on_purpose, says, tells_the_log, until_it_fails, within};

#[test]
fn a_rank_that_never_comes() {
    for size in SIZES {
        let culprit = size - 1;
        let error = failure(size, SHORT, None, move |rank| {
            if rank.rank() == culprit {
                until_it_fails(rank);
            }
            rank.all_reduce(vec![1.0f32; 5], ReduceOp::Sum).map(drop)
        });
        let Error::Timeout { rank, waited, missing, .. } = &error else { panic!("{error:?}") };
        assert!(*rank < culprit && *waited >= SHORT && *missing == format!("rank {culprit}"), "{error:?}");
        says(&error, &["`world`", "all_reduce(Sum) of F32 [5]", "BURN_PARALLEL_TIMEOUT_S", "with_timeout"]);
        tells_the_log(&error, size);
    }
}

#[test]
fn several_ranks_that_never_come() {
    let error = failure(4, SHORT, None, |rank| {
        if rank.rank() % 2 == 1 {
            until_it_fails(rank);
        }
        rank.barrier()
    });
    assert!(matches!(&error, Error::Timeout { missing, .. } if missing == "ranks 1, 3"), "{error:?}");
}

#[test]
fn time_outs_on_all_ranks_at_once_are_one_error() {
    // The clocks of three ranks run out together; whichever fails the world, all tell the same.
    hide_panics_on_purpose();
    within(Duration::from_secs(30), || {
        for _ in 0..150 {
            let config = WorldConfig::from_env().unwrap().with_timeout(Duration::from_millis(3));
            let mut world = local::world(4, config).unwrap();
            let absent = world.pop();
            let errors: Vec<Error> = thread::scope(|scope| {
                let threads: Vec<_> = world
                    .iter()
                    .map(|comm| {
                        scope.spawn(move || match comm.rank() {
                            2 => comm.recv::<Vec<f32>>(3, 0).map(drop).unwrap_err(),
                            _ => comm.barrier().unwrap_err(),
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(matches!(errors[0], Error::Timeout { .. }), "{}", errors[0]);
            assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
            drop(absent);
        }
    });
}

/// Run by the test below in a process of its own, for the environment is the process's.
#[test]
#[ignore = "a helper of `the_time_out_of_the_environment`"]
fn prints_the_time_out() {
    match WorldConfig::from_env() {
        Ok(config) => println!("<{config:?}>"),
        Err(error) => println!("<{error}>"),
    }
    let run = launch::threads(1).run(|_| Ok(()));
    println!("<{}>", run.map_or_else(|error| error.to_string(), |_| "runs".into()));
}

#[test]
fn the_time_out_of_the_environment() {
    let with = |value: Option<&std::ffi::OsStr>| {
        let mut probe = std::process::Command::new(std::env::current_exe().unwrap());
        probe.args(["--exact", "failures::time_outs::prints_the_time_out", "--ignored", "--nocapture"]);
        probe.env_remove("BURN_PARALLEL_TIMEOUT_S");
        if let Some(value) = value {
            probe.env("BURN_PARALLEL_TIMEOUT_S", value);
        }
        let output = probe.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for (value, seconds) in [(None, "300s"), (Some("1.5"), "1.5s"), (Some(" 20 "), "20s"), (Some("1e-3"), "1ms")] {
        let said = with(value.map(AsRef::as_ref));
        assert!(said.contains(&format!("timeout: {seconds},")) && said.contains("<runs>"), "{value:?}: {said}");
    }
    for value in ["", "0", "-1", "nan", "inf", "1e300", "1e-30", "ten", "5s", "1,5"] {
        let said = with(Some(value.as_ref()));
        let expected = "a positive number of seconds, less than 1.8e19";
        let line = format!("<environment variable BURN_PARALLEL_TIMEOUT_S={value:?} is not {expected}>");
        assert_eq!(said.matches(&line).count(), 2, "{value:?}: {said}");
    }
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let said = with(Some(std::ffi::OsStr::from_bytes(b"5\xff")));
        assert_eq!(said.matches("is not a positive number").count(), 2, "{said}");
    }
}

/// Ranks of a mesh wait for ranks that wait for another one themselves.
#[test]
fn the_rank_that_all_wait_for_in_the_end_is_named_first() {
    for culprit in [0, 3] {
        let error = launch::threads(4)
            .timeout(Duration::from_secs(2))
            .run(|world| {
                let mesh = Mesh::new(&world, [("dp", 2), ("tp", 2)])?;
                for round in 0..4 {
                    if (round, world.rank()) == (2, culprit) {
                        until_it_fails(&world);
                    }
                    for axis in ["tp", "dp"] {
                        mesh.axis(axis)?.all_reduce(vec![1.0f32; 100], ReduceOp::Sum)?;
                    }
                }
                Ok(())
            })
            .unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        says(&error, &[&format!("for rank {culprit} of the world, which is in no call")]);
    }
}
