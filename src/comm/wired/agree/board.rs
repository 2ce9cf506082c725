//! Meeting on a board: a rank shows its call, the decider reads all and gives its word.

use std::sync::atomic::Ordering;

use super::{Agreement, POST, Post, agree};
use crate::Error;
use crate::comm::wired::board::{Board, Rounds};
use crate::comm::wired::pace::Pace;

impl Agreement<'_> {
    pub(super) fn on_board(&self, board: &Board, rounds: &mut Rounds) -> Result<(Vec<Post>, u64), Error> {
        let called = self.post.to_bytes();
        board.write_post(self.group.rank, rounds, &called);
        board.show(rounds);
        let all = |rounds: &Rounds| {
            // Most calls are alike.
            let post = |bytes: [u8; POST]| if bytes == called { Some(self.post) } else { Post::from_bytes(&bytes) };
            let posts: Option<Vec<Post>> =
                (0..self.group.size()).map(|rank| post(board.read_post(rank, rounds))).collect();
            posts.ok_or_else(|| self.garbled())
        };
        if self.group.rank == 0 {
            self.wait(Pace::at_board(self.world, false), || Ok(board.all_shown(rounds)))?;
            let posts = all(rounds)?;
            let id = self.decide(&posts)?;
            board.number().store(id, Ordering::Relaxed);
            board.commit(rounds);
            return Ok((posts, id));
        }
        self.wait(Pace::at_board(self.world, false), || Ok(board.committed(rounds)))?;
        let (posts, id) = (all(rounds)?, board.number().load(Ordering::Relaxed));
        // Lengths and roots are taken from these: they must go with what this rank has called.
        if !agree(&posts) || !self.is_group(id) {
            return Err(self.garbled());
        }
        Ok((posts, id))
    }
}
