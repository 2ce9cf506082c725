//! Where the ranks of a group meet: by messages at first, then on a board if all can reach one.
//!
//! It takes no message of its own to come to that. With its first word the decider offers a board that it has made; whoever
//! hears it tries to reach it, and says in its next call whether it has. All know all calls, so all know whether the
//! third meeting is on the board.

use super::agree::Post;
use super::board::{Address, Board, Rounds};
use super::group::Group;

#[derive(Debug)]
pub(super) enum Venue {
    /// Nobody has spoken of a board so far.
    Unsettled,
    /// A board has been offered, and this is what this rank has found.
    Offered(Option<Board>),
    Messages,
    /// On the board of the group.
    Board(Rounds),
}

impl Venue {
    pub fn new(shares_memory: bool, size: usize) -> Self {
        if shares_memory && size > 1 { Self::Unsettled } else { Self::Messages }
    }

    /// The board that the ranks meet on.
    pub fn board<'a>(&'a mut self, group: &'a Group) -> Option<(&'a Board, &'a mut Rounds)> {
        match self {
            Self::Board(rounds) => Some((group.board.get()?, rounds)),
            _ => None,
        }
    }

    /// Whether this rank can reach the board that was offered.
    pub fn reaches(&self) -> bool {
        matches!(self, Self::Offered(Some(_)))
    }

    /// What the decider offers with its word.
    pub fn offer(&mut self, size: usize) -> Option<Address> {
        if !matches!(self, Self::Unsettled) {
            return None;
        }
        let (board, address) = Board::new(size).unzip();
        *self = Self::Offered(board);
        address
    }

    /// Draws the conclusions from a meeting by messages.
    pub fn settle(&mut self, group: &Group, posts: &[Post], offered: Option<Address>) {
        *self = match (std::mem::replace(self, Self::Messages), offered) {
            (Self::Unsettled, Some(address)) => Self::Offered(Board::open(&address, group.size())),
            // The decider has made it.
            (Self::Offered(board), Some(_)) => Self::Offered(board),
            (Self::Offered(Some(mut board)), None) if posts.iter().all(|post| post.reaches) => {
                board.is_shared();
                let _ = group.board.set(board);
                Self::Board(Rounds::new(group.rank))
            }
            _ => Self::Messages,
        };
    }
}
