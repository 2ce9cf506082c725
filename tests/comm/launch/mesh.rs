//! Starting worlds of threads, and arranging them along axes.

use std::collections::HashSet;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use burn_parallel::Error;
use burn_parallel::comm::ReduceOp;
use burn_parallel::launch::{self, Rank};
use burn_parallel::mesh::Mesh;
use rand::RngCore;

/// Far below the time-out of the worlds that fail: nobody may need that to find out.
const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn results_come_in_rank_order() {
    for size in [1, 2, 3, 8] {
        let results = launch::threads(size).run(|rank| {
            // The last is done first.
            thread::sleep(Duration::from_millis(3 * (size - rank.rank()) as u64));
            Ok((rank.rank(), rank.size(), rank.prefix()))
        });
        let expected = (0..size).map(|rank| (rank, size, format!("[rank {rank}/{size}]"))).collect();
        assert_eq!(results, Ok(expected));
    }
}

#[test]
fn results_may_be_anything_that_can_be_sent() {
    let names = ["a".to_owned(), "b".to_owned()];
    // Borrowed from outside, for the ranks end before `run` does.
    let borrowed: Vec<&str> = launch::threads(2).run(|rank| Ok(names[rank.rank()].as_str())).unwrap();
    assert_eq!(borrowed, ["a", "b"]);
}

#[test]
fn each_rank_has_a_pool_of_its_own() {
    for threads in [1, 3] {
        let seen: Vec<(usize, HashSet<thread::ThreadId>)> = launch::threads(3)
            .threads_per_rank(threads)
            .run(|rank| {
                assert_eq!((rank.threads(), rayon::current_num_threads()), (threads, threads));
                let name = thread::current().name().unwrap_or_default().to_owned();
                assert!(name.starts_with(&format!("rank {} compute ", rank.rank())), "{name}");
                let ids = rayon::broadcast(|_| thread::current().id()).into_iter().collect();
                rank.barrier()?;
                Ok((rayon::current_num_threads(), ids))
            })
            .unwrap();
        let all: HashSet<_> = seen.iter().flat_map(|(_, ids)| ids).collect();
        assert_eq!(all.len(), 3 * threads, "no two ranks share a thread");
    }
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    let shares = launch::threads(2).run(|rank| Ok((rank.threads(), rayon::current_num_threads()))).unwrap();
    let share = (cores / 2).max(1);
    assert_eq!(shares, vec![(share, share); 2]);
}

#[test]
fn seeds_and_streams() {
    let draw = |seed, size| {
        launch::threads(size)
            .seed(seed)
            .run(|rank| {
                assert_eq!(rank.seed(), seed);
                // Asked for again, the stream begins again.
                assert_eq!(rank.rng().next_u64(), rank.rng().next_u64());
                let mut rng = rank.rng();
                Ok([rng.next_u64(), rng.next_u64(), rng.next_u64()])
            })
            .unwrap()
    };
    let numbers = draw(7, 4);
    assert_eq!(draw(7, 4), numbers, "the same seed, the same numbers");
    assert_eq!(draw(7, 2), numbers[..2], "a rank's numbers do not depend on how many there are");
    let other = draw(8, 4);
    let distinct: HashSet<u64> = numbers.iter().chain(&other).flatten().copied().collect();
    assert_eq!(distinct.len(), 2 * 4 * 3, "ranks and seeds draw different numbers");
    assert_eq!(launch::threads(1).run(|rank| Ok(rank.seed())), Ok(vec![0]));
}

#[test]
fn ranks_know_their_device() {
    let devices = launch::threads(2).run(|rank| Ok(rank.device())).unwrap();
    assert_eq!(devices, vec![Device::flex(); 2]);
    let given = Device::flex().autodiff();
    let devices = launch::threads(1).device(given.clone()).run(|rank| Ok(rank.device())).unwrap();
    assert_eq!(devices, [given]);
}

#[test]
fn arguments_that_make_no_sense() {
    let never = |_: Rank| -> Result<(), Error> { panic!("nothing must run") };
    let said = launch::threads(0).run(never).unwrap_err().to_string();
    assert!(said.contains("at least 1 rank, not 0"), "{said}");
    let said = launch::threads(2).threads_per_rank(0).run(never).unwrap_err().to_string();
    assert!(said.contains("at least 1 thread, not 0"), "{said}");
}

#[test]
fn the_first_error_wins_and_nobody_is_left_behind() {
    for culprit in 0..4 {
        let began = Instant::now();
        let ended = Mutex::new(Vec::new());
        let error = launch::threads(4)
            .timeout(Duration::from_secs(60))
            .run(|rank| {
                if rank.rank() == culprit {
                    return Err(Error::user(format!("rank {culprit} was first")));
                }
                // Waits for the culprit, then fails in a way of its own.
                let error = rank.barrier().unwrap_err();
                thread::sleep(Duration::from_millis(10));
                ended.lock().unwrap().push(error);
                Err::<(), _>(Error::user("and I was later"))
            })
            .unwrap_err();
        assert!(began.elapsed() < LIMIT);
        assert!(matches!(&error, Error::RankFailed { rank, .. } if *rank == culprit), "{error}");
        assert!(error.to_string().contains(&format!("rank {culprit} failed: rank {culprit} was first")));
        assert_eq!(ended.into_inner().unwrap(), vec![error; 3]);
    }
}

#[test]
fn an_error_that_comes_after_all_others_have_ended_is_returned() {
    let error = launch::threads(3)
        .run(|rank| match rank.rank() {
            1 => {
                thread::sleep(Duration::from_millis(30));
                Err(Error::user("late"))
            }
            _ => Ok(()),
        })
        .unwrap_err();
    assert!(matches!(&error, Error::RankFailed { rank: 1, .. }), "{error}");
}

#[test]
fn an_error_that_is_handled_is_not_returned() {
    let results = launch::threads(2).run(|rank| {
        if rank.rank() == 0 {
            rank.abort("on purpose");
        }
        Ok(rank.barrier().is_err())
    });
    assert_eq!(results, Ok(vec![true, true]));
}

#[test]
fn two_worlds_at_once_do_not_know_of_each_other() {
    let bad = thread::spawn(|| {
        launch::threads(3).run(|rank| {
            for _ in 0..50 {
                rank.all_reduce(vec![1i32], ReduceOp::Sum)?;
            }
            if rank.rank() == 2 { Err(Error::user("the other world must not care")) } else { rank.barrier() }
        })
    });
    let good = launch::threads(4).run(|rank| {
        let mut last = vec![];
        for _ in 0..300 {
            last = rank.all_reduce(vec![1i32], ReduceOp::Sum)?;
        }
        Ok(last)
    });
    assert_eq!(good, Ok(vec![vec![4]; 4]));
    assert!(matches!(bad.join().unwrap(), Err(Error::RankFailed { rank: 2, .. })));
}

#[test]
fn a_world_within_each_rank_of_a_world() {
    let results = launch::threads(2).run(|outer| {
        let inner = launch::threads(3).threads_per_rank(1).run(|inner| {
            assert_eq!(rayon::current_num_threads(), 1);
            inner.all_reduce(vec![outer.rank() * 10 + inner.rank()].map_to_u64(), ReduceOp::Sum)
        })?;
        outer.barrier()?;
        Ok(inner[0][0])
    });
    assert_eq!(results, Ok(vec![3, 33]));
    // An error of an inner world is the outer rank's own.
    let error = launch::threads(2)
        .run(|outer| {
            launch::threads(2).run(|inner| {
                if (outer.rank(), inner.rank()) == (1, 0) { Err(Error::user("inside")) } else { inner.barrier() }
            })?;
            outer.barrier()
        })
        .unwrap_err();
    assert!(error.to_string().starts_with("rank 1 failed: rank 0 failed: inside"), "{error}");
}

trait MapToU64 {
    fn map_to_u64(self) -> Vec<u64>;
}

impl MapToU64 for Vec<usize> {
    fn map_to_u64(self) -> Vec<u64> {
        self.into_iter().map(|x| x as u64).collect()
    }
}

/// World ranks along an axis, as its members tell them.
fn along(mesh: &Mesh, axis: &str, world: &Rank) -> Result<Vec<u64>, Error> {
    mesh.axis(axis)?.all_gather(vec![world.rank() as u64])
}

#[test]
fn meshes_of_one_to_three_axes() {
    let names = ["dp", "pp", "tp"];
    let shapes: [&[usize]; 14] = [
        &[1],
        &[2],
        &[4],
        &[8],
        &[1, 1],
        &[1, 2],
        &[2, 2],
        &[4, 2],
        &[2, 4],
        &[1, 1, 1],
        &[2, 1, 2],
        &[2, 2, 2],
        &[1, 8, 1],
        &[4, 1, 2],
    ];
    for shape in shapes {
        let size = shape.iter().product();
        launch::threads(size)
            .threads_per_rank(1)
            .run(|world| {
                let axes: Vec<(&str, usize)> = names.iter().copied().zip(shape.iter().copied()).collect();
                let mesh = Mesh::new(&world, axes.iter().copied())?;
                assert_eq!(mesh.axes().collect::<Vec<_>>(), axes);
                assert_eq!(mesh.all().size(), size);
                // The last axis runs fastest.
                let mut rest = world.rank();
                let mut coordinates: Vec<usize> = shape.iter().rev().map(|n| (rest % n, rest /= n).0).collect();
                coordinates.reverse();
                assert_eq!(mesh.coordinates(), coordinates);
                for (place, (name, n)) in axes.iter().enumerate() {
                    let comm = mesh.axis(name)?;
                    assert_eq!(
                        (mesh.coordinate(name)?, comm.rank(), comm.size()),
                        (coordinates[place], coordinates[place], *n)
                    );
                    let stride: usize = shape[place + 1..].iter().product();
                    let first = world.rank() - coordinates[place] * stride;
                    let members: Vec<u64> = (0..*n).map(|i| (first + i * stride) as u64).collect();
                    assert_eq!(along(&mesh, name, &world)?, members);
                }
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn sub_meshes() {
    launch::threads(8)
        .threads_per_rank(1)
        .run(|world| {
            let mesh = Mesh::new(&world, [("dp", 2), ("pp", 2), ("tp", 2)])?;
            let me = mesh.coordinates();
            let rank_at = |dp: usize, pp: usize, tp: usize| (4 * dp + 2 * pp + tp) as u64;

            let sub = mesh.sub_mesh(["dp", "tp"])?;
            assert_eq!(sub.axes().collect::<Vec<_>>(), [("dp", 2), ("tp", 2)]);
            assert_eq!(sub.coordinates(), [me[0], me[2]]);
            let members = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(dp, tp)| rank_at(dp, me[1], tp));
            assert_eq!(sub.all().all_gather(vec![world.rank() as u64])?, members);
            assert_eq!(along(&sub, "tp", &world)?, along(&mesh, "tp", &world)?);
            assert_eq!(along(&sub, "dp", &world)?, along(&mesh, "dp", &world)?);
            assert!(sub.axis("pp").is_err());

            // In another order: the axes keep their members, the ranks of the whole are counted anew.
            let turned = mesh.sub_mesh(["tp", "dp"])?;
            assert_eq!(turned.coordinates(), [me[2], me[0]]);
            let members = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(dp, tp)| rank_at(dp, me[1], tp));
            assert_eq!(turned.all().all_gather(vec![world.rank() as u64])?, members);
            assert_eq!(along(&turned, "dp", &world)?, along(&mesh, "dp", &world)?);

            let one = mesh.sub_mesh(["pp"])?;
            assert_eq!(one.all().all_gather(vec![world.rank() as u64])?, along(&mesh, "pp", &world)?);
            let all = mesh.sub_mesh(["dp", "pp", "tp"])?;
            assert_eq!((all.all().rank(), all.coordinates()), (world.rank(), me));
            let nested = sub.sub_mesh(["tp"])?;
            assert_eq!(along(&nested, "tp", &world)?, along(&mesh, "tp", &world)?);
            Ok(())
        })
        .unwrap();
}

#[test]
fn axes_work_at_once() {
    let sums = launch::threads(8)
        .threads_per_rank(1)
        .run(|world| {
            let mesh = Mesh::new(&world, [("dp", 2), ("pp", 2), ("tp", 2)])?;
            let start = |axis: &str| {
                Ok::<_, Error>(mesh.axis(axis)?.start({
                    let mine = vec![world.rank() as i64];
                    move |comm| comm.all_reduce(mine, ReduceOp::Sum)
                }))
            };
            let pending = [start("tp")?, start("dp")?, start("pp")?];
            pending.into_iter().map(|pending| pending.wait().map(|sum| sum[0])).collect::<Result<Vec<_>, _>>()
        })
        .unwrap();
    for (rank, sums) in sums.iter().enumerate() {
        let with = |bit: usize| (rank + (rank ^ bit)) as i64;
        assert_eq!(*sums, [with(1), with(4), with(2)]);
    }
}

#[test]
fn meshes_that_do_not_fit() {
    launch::threads(4)
        .run(|world| {
            let refused = |axes: &[(&str, usize)], words: &[&str]| {
                let error = Mesh::new(&world, axes.iter().copied()).unwrap_err();
                assert!(matches!(error, Error::Mesh { .. }), "{error:?}");
                words.iter().for_each(|word| assert!(error.to_string().contains(word), "`{word}` is missing: {error}"));
            };
            refused(&[("dp", 3)], &["dp 3 makes 3 ranks", "the world has 4"]);
            refused(&[("dp", 2), ("tp", 4)], &["dp 2 x tp 4 makes 8 ranks", "the world has 4"]);
            refused(&[("dp", 2), ("dp", 2)], &["`dp` is named twice in dp 2 x dp 2"]);
            refused(&[("dp", 4), ("", 1)], &["axis 1 of size 1 has no name"]);
            refused(&[("dp", 4), ("tp", 0)], &["`tp` has size 0", "size 1"]);
            refused(&[], &["at least one axis"]);
            refused(&[("dp", usize::MAX), ("tp", 2)], &["more ranks than can be counted"]);

            let mesh = Mesh::new(&world, [("dp", 2), ("tp", 2)])?;
            for error in [
                mesh.axis("pp").unwrap_err(),
                mesh.coordinate("pp").unwrap_err(),
                mesh.sub_mesh(["dp", "pp"]).unwrap_err(),
            ] {
                assert_eq!(error.to_string(), "mesh: there is no axis `pp`; the axes are [\"dp\", \"tp\"]");
            }
            let error = mesh.sub_mesh(["dp", "dp"]).unwrap_err();
            assert_eq!(error.to_string(), "mesh: axis `dp` is named twice in dp 2 x dp 2");
            assert!(mesh.sub_mesh([]).unwrap_err().to_string().contains("at least one axis"));
            // All of this was found without talking; the world is unharmed.
            world.barrier()
        })
        .unwrap();
}

#[test]
fn ranks_that_make_different_meshes_are_told() {
    let error = launch::threads(4)
        .run(|world| {
            let sizes = if world.rank() == 2 { [("dp", 4), ("tp", 1)] } else { [("dp", 2), ("tp", 2)] };
            Mesh::new(&world, sizes).map(drop)
        })
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("rank 2 of group `world` names other axes"), "{text}");
}

#[test]
fn a_lost_rank_is_found_on_every_axis() {
    let began = Instant::now();
    let error = launch::threads(8)
        .threads_per_rank(1)
        .timeout(Duration::from_secs(60))
        .run(|world| {
            let mesh = Mesh::new(&world, [("dp", 2), ("pp", 2), ("tp", 2)])?;
            if world.rank() == 5 {
                return Err(Error::user("gone"));
            }
            let axis = ["dp", "pp", "tp"][world.rank() % 3];
            // Not every one of these axes has lost a member, and all fail.
            loop {
                mesh.axis(axis)?.barrier()?;
            }
        })
        .map(|_: Vec<()>| ())
        .unwrap_err();
    assert!(matches!(error, Error::RankFailed { rank: 5, .. }), "{error}");
    assert!(began.elapsed() < LIMIT);
}
