//! Random numbers of a rank: a stream of its own, the same in every run with the seed.

use std::collections::HashSet;

use burn_parallel::prelude::*;
use rand::RngCore;

fn draw(size: usize, seed: u64) -> Vec<Vec<u64>> {
    let numbers = |rank: Rank| {
        let mut rng = rank.rng();
        Ok((0..64).map(|_| rng.next_u64()).collect())
    };
    launch::threads(size).seed(seed).run(numbers).expect("nothing fails")
}

#[test]
fn streams_differ_per_rank_and_seed_and_repeat() {
    let mut seen = HashSet::new();
    for seed in [0, 1, u64::MAX] {
        let streams = draw(8, seed);
        assert_eq!(streams, draw(8, seed));
        assert_eq!(streams[..3], draw(3, seed), "the size of the world does not matter");
        for number in streams.into_iter().flatten() {
            assert!(seen.insert(number), "two streams share the number {number}");
        }
    }
}
