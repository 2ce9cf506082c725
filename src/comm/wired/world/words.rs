//! What wardens tell each other.

use std::time::Duration;

use super::failure::{Known, Proposal};
use crate::Error;
use crate::comm::wired::codec::{Reader, Writer};
use crate::comm::wired::group::Left;

#[derive(Debug)]
pub(super) enum Word {
    /// To the judge: the world should fail with this.
    Propose(Proposal),
    /// From the judge: what is known of it?
    Ask(Proposal),
    /// To the judge: this is.
    Know(Known),
    /// From the judge: the world fails with this error.
    Fate(Error),
    /// From a decider: so many collectives of this group were committed, and there will be no more.
    Closed { group: u64, committed: u64 },
    /// A rank will not come to this group again.
    Left { group: u64, left: Left },
    /// A rank is done with the world.
    Bye,
}

impl Word {
    pub fn write(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        match self {
            Self::Propose(proposal) => write_proposal(writer.byte(0), proposal),
            Self::Ask(proposal) => write_proposal(writer.byte(1), proposal),
            Self::Know(Known { waits, line, elsewhere, waits_for }) => {
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
            Self::Fate(error) => {
                writer.byte(3).error(error);
            }
            Self::Closed { group, committed } => {
                writer.byte(4).number(*group).number(*committed);
            }
            Self::Left { group, left: Left { rank, collectives, messages, panicked } } => {
                writer.byte(5).number(*group).number(*rank as u64);
                writer.number(*collectives).number(*messages).byte(u8::from(*panicked));
            }
            Self::Bye => {
                writer.byte(6);
            }
        }
        writer.0
    }

    /// A word of one of so many ranks, if it makes sense.
    pub fn read(message: &[u8], ranks: usize) -> Option<Self> {
        let mut reader = Reader(message);
        Some(match reader.byte()? {
            0 => Self::Propose(read_proposal(&mut reader, ranks)?),
            1 => Self::Ask(read_proposal(&mut reader, ranks)?),
            2 => Self::Know(Known {
                waits: reader.list(Reader::number)?.pop().map(Duration::from_micros),
                line: reader.list(Reader::text)?.pop(),
                elsewhere: reader.list(Reader::text)?,
                waits_for: known_ranks(reader.list(Reader::index)?, ranks)?,
            }),
            3 => Self::Fate(reader.error()?),
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
            6 => Self::Bye,
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
