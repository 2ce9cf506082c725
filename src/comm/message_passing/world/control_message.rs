//! The control messages between the ranks of a world.

use std::sync::Arc;
use std::time::Duration;

use crate::Error;
use crate::comm::Call;
use crate::comm::message_passing::codec::{Reader, Writer};
use crate::comm::message_passing::group::{Group, Left};

/// A failure that a rank has found.
#[derive(Debug, Clone)]
pub(in crate::comm::message_passing) struct Proposal {
    pub error: Error,
    pub group: Arc<str>,
    /// World ranks of that group.
    pub members: Vec<usize>,
    /// The call that timed out, and its number in the group: ranks that are not in it are the missing ones.
    pub call: Option<(u64, Call)>,
}

impl Proposal {
    /// A failure in this group; `call` is as above.
    pub fn new(group: &Group, error: Error, call: Option<(u64, Call)>) -> Self {
        Self { error, group: group.name.clone(), members: group.members.clone(), call }
    }
}

/// One rank's answer to a query.
#[derive(Debug, Clone, Default)]
pub(super) struct RankReport {
    /// How long it has been in the call, if it is.
    pub waits: Option<Duration>,
    pub line: Option<String>,
    pub elsewhere: Vec<String>,
    /// The ranks of the world that it waits for in the calls that it is in.
    pub waits_for: Vec<usize>,
}

#[derive(Debug)]
pub(super) enum ControlMessage {
    /// To the coordinator: the world should fail with this.
    Propose(Proposal),
    /// From the coordinator: what does this rank know of it?
    Query(Proposal),
    /// To the coordinator: the answer.
    Report(RankReport),
    /// From the coordinator: the world fails with this error.
    Failed(Error),
    /// From a group root: so many collectives of this group were committed, and there will be no more.
    Closed { group: u64, committed: u64 },
    /// A rank has left this group.
    Left { group: u64, left: Left },
    /// A rank is done with the world.
    Finished,
}

impl ControlMessage {
    pub fn write(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        match self {
            Self::Propose(proposal) => write_proposal(writer.byte(0), proposal),
            Self::Query(proposal) => write_proposal(writer.byte(1), proposal),
            Self::Report(RankReport { waits, line, elsewhere, waits_for }) => {
                let lines = |lines: &[String], writer: &mut Writer| {
                    writer.list(lines, |w, line| {
                        w.text(line);
                    });
                };
                writer.byte(2).list(waits.as_slice(), |w, waited| {
                    w.number(waited.as_micros() as u64);
                });
                lines(line.as_slice(), &mut writer);
                lines(elsewhere, &mut writer);
                writer.list(waits_for, |w, rank| {
                    w.number(*rank as u64);
                });
            }
            Self::Failed(error) => {
                writer.byte(3).error(error);
            }
            Self::Closed { group, committed } => {
                writer.byte(4).number(*group).number(*committed);
            }
            Self::Left { group, left: Left { rank, collectives, messages, panicked } } => {
                writer.byte(5).number(*group).number(*rank as u64);
                writer.number(*collectives).number(*messages).byte(u8::from(*panicked));
            }
            Self::Finished => {
                writer.byte(6);
            }
        }
        writer.0
    }

    /// A message of one of so many ranks, if it is well-formed.
    pub fn read(message: &[u8], ranks: usize) -> Option<Self> {
        let mut reader = Reader(message);
        Some(match reader.byte()? {
            0 => Self::Propose(read_proposal(&mut reader, ranks)?),
            1 => Self::Query(read_proposal(&mut reader, ranks)?),
            2 => Self::Report(RankReport {
                waits: reader.list(Reader::number)?.pop().map(Duration::from_micros),
                line: reader.list(Reader::text)?.pop(),
                elsewhere: reader.list(Reader::text)?,
                waits_for: known_ranks(reader.list(Reader::index)?, ranks)?,
            }),
            3 => Self::Failed(reader.error()?),
            4 => Self::Closed { group: reader.number()?, committed: reader.number()? },
            5 => Self::Left {
                group: reader.number()?,
                left: Left {
                    rank: reader.index()?,
                    collectives: reader.number()?,
                    messages: reader.number()?,
                    panicked: reader.byte()? != 0,
                },
            },
            6 => Self::Finished,
            _ => return None,
        })
    }
}

fn write_proposal(writer: &mut Writer, Proposal { error, group, members, call }: &Proposal) {
    writer.error(error).text(group);
    writer.list(members, |w, member| {
        w.number(*member as u64);
    });
    writer.list(call.as_slice(), |w, (sequence, call)| {
        w.number(*sequence).call(call);
    });
}

fn known_ranks(found: Vec<usize>, ranks: usize) -> Option<Vec<usize>> {
    found.iter().all(|rank| *rank < ranks).then_some(found)
}

fn read_proposal(reader: &mut Reader<'_>, ranks: usize) -> Option<Proposal> {
    Some(Proposal {
        error: reader.error()?,
        group: reader.text()?.into(),
        members: known_ranks(reader.list(Reader::index)?, ranks)?,
        call: reader.list(|r| Some((r.number()?, r.call()?)))?.pop(),
    })
}
