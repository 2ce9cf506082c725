//! What a rank holds while it reads and writes a directory: its parts, and a bounded buffer.

#[path = "../common/dir.rs"]
#[allow(dead_code)]
pub mod dir;

use std::sync::atomic::Ordering::Relaxed;

use burn_parallel::hf::{self, Mapping, Rule, SaveConfig};
use burn_parallel::prelude::*;
use dir::Dir;

use crate::memory::{HELD, MOST, Mlp, WHOLE, plan};

const RANKS: usize = 2;
const PIECE: usize = 1 << 18;
/// What the ranks' machinery holds: messages, plans, names.
pub const REST: usize = 1 << 18;

/// Runs on all ranks between two meetings. Returns the most bytes that the process held meanwhile, beyond those before.
pub fn most<T>(rank: &Rank, run: impl FnOnce() -> Result<T, Error>) -> Result<(T, usize), Error> {
    rank.barrier()?;
    let before = HELD.load(Relaxed);
    MOST.store(before, Relaxed);
    rank.barrier()?;
    let result = run()?;
    rank.barrier()?;
    let most = MOST.load(Relaxed) - before;
    rank.barrier()?;
    Ok((result, most.max(0) as usize))
}

#[test]
fn no_rank_holds_more_than_its_parts_and_a_bounded_buffer() {
    let _turn = crate::turn();
    let dir = Dir::fresh();
    let mapping = || Mapping::new().rule(Rule::new("*.weight", "*.weight").transposed()).then(Mapping::identity());
    let config = || SaveConfig::new(mapping()).with_piece_bytes(PIECE);
    // All of it on each rank, for one that reads a part.
    let parts = 2 * WHOLE;
    launch::threads(RANKS)
        .run(|rank| {
            let device = rank.device().autodiff();
            let model = Mlp::new(&device).tensor_parallel(&rank, plan())?;
            hf::save(&model, &rank, dir.join("first"), &config()).map(drop)
        })
        .unwrap();
    launch::threads(RANKS)
        .run(|rank| {
            let device = rank.device().autodiff();
            let lazy = Mlp::new(&device).tensor_parallel(&rank, plan())?;
            let (model, held) = most(&rank, || lazy.load(&mut hf::open(dir.join("first"))?.mapped(mapping())?))?;
            assert!((parts..parts + REST).contains(&held), "loading held {held} bytes for parts of {parts}");
            let ((), held) = most(&rank, || hf::save(&model, &rank, dir.join("second"), &config()).map(drop))?;
            let bound = RANKS * 3 * PIECE + REST;
            assert!(held < bound, "saving held {held} bytes beside the parts, of {bound} at most");
            Ok(())
        })
        .unwrap();
    let files = ["first", "second"].map(|name| std::fs::read(dir.join(name).join("model.safetensors")).unwrap());
    assert!(files[0] == files[1]);
}
