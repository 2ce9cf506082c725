//! A transport as a user of the crate could write one: ranks are threads that exchange everything through channels.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::DType;
use burn_parallel::Error;
use burn_parallel::comm::{
    BufferMut, BufferRef, Call, CallHistory, CallLog, CallShape, Communicator, Message, Operation, OutputAllocator,
    ReduceOp, Transfer, Transport, part, reduce_contributions,
};

/// How long a rank that finds a peer gone waits for the reason.
const GRACE: Duration = Duration::from_millis(100);

/// What the groups of a world share.
#[derive(Default)]
struct World {
    failure: OnceLock<Error>,
    groups: Mutex<Vec<Weak<Group>>>,
}

/// A group that is being split off, and the channels that its ranks have yet to fetch.
type Split = (Arc<Group>, Vec<Option<Channels>>);

/// What the ranks of a group share beside their channels.
struct Group {
    name: Arc<str>,
    /// World ranks.
    members: Vec<usize>,
    timeout: Duration,
    world: Arc<World>,
    history: CallHistory,
    /// Ranks that have left, and whether they panicked.
    left: Mutex<Vec<(usize, bool)>>,
    /// Groups that are being split from this one, by collective and color, with the channels of the ranks that have not
    /// fetched them yet.
    splits: Mutex<HashMap<(u64, u64), Split>>,
}

/// The channels of one rank: to each rank, and from each.
type Channels = (Vec<Sender<Packet>>, Vec<Receiver<Packet>>);

enum Packet {
    Contribution(Arc<Contribution>),
    Message(u64, Message),
}

/// A rank's contribution to a collective.
struct Contribution {
    call: Call,
    /// The bytes of its buffers, aligned for every dtype, and their elements.
    buffers: Vec<(Vec<u64>, usize)>,
    color: u64,
    key: i64,
    /// In the second exchange of a collective: why this rank has no memory for the result.
    shortage: Option<Error>,
}

/// What has arrived from one rank.
struct Inbox {
    channel: Receiver<Packet>,
    contributions: VecDeque<Arc<Contribution>>,
    messages: VecDeque<(u64, Message)>,
}

/// One rank's member of a group.
struct ChannelTransport {
    group: Arc<Group>,
    rank: usize,
    outgoing: Vec<Sender<Packet>>,
    incoming: Vec<Mutex<Inbox>>,
    /// Number of the next collective, locked during one: a rank does one at a time.
    sequence: Mutex<u64>,
    panicked: AtomicBool,
}

/// A world of so many ranks: one communicator for each.
pub fn world(size: usize, timeout: Duration) -> Vec<Communicator> {
    let group = Group::new("world".into(), (0..size).collect(), timeout, Arc::default());
    let member = |(rank, channels)| Communicator::new(ChannelTransport::new(group.clone(), rank, channels));
    channels(size).into_iter().enumerate().map(member).collect()
}

/// A channel from each rank to each.
fn channels(size: usize) -> Vec<Channels> {
    let mut ranks: Vec<Channels> = (0..size).map(|_| Channels::default()).collect();
    for from in 0..size {
        for to in 0..size {
            let (sender, receiver) = channel();
            ranks[from].0.push(sender);
            ranks[to].1.push(receiver);
        }
    }
    ranks
}

impl Group {
    fn new(name: Arc<str>, members: Vec<usize>, timeout: Duration, world: Arc<World>) -> Arc<Self> {
        let (history, left, splits) = (CallHistory::new(members.len()), Mutex::default(), Mutex::default());
        let group = Arc::new(Self { name, members, timeout, world, history, left, splits });
        group.world.groups.lock().unwrap().push(Arc::downgrade(&group));
        group
    }

    fn log(&self) -> CallLog {
        let groups: Vec<_> = self.world.groups.lock().unwrap().iter().filter_map(Weak::upgrade).collect();
        let others = groups.iter().filter(|group| !std::ptr::eq(&***group, self));
        let waiting =
            others.flat_map(|group| group.history.waiting().map(|line| format!("in `{}` {line}", group.name)));
        CallLog::new(self.history.lines().chain(waiting))
    }

    fn leave(&self, rank: usize, panicked: bool) {
        self.left.lock().unwrap().push((rank, panicked));
    }

    /// Fails the world, unless it has failed already. Returns the error that it has failed with.
    fn fail(&self, error: Error) -> Error {
        self.world.failure.get_or_init(|| error).clone()
    }
}

impl Contribution {
    fn new(call: Call) -> Self {
        Self { call, buffers: Vec::new(), color: 0, key: 0, shortage: None }
    }

    /// Copies a buffer in.
    fn push(&mut self, data: *const u8, elements: usize, dtype: DType) {
        let bytes = elements * dtype.size();
        let mut copy = vec![0u64; bytes.div_ceil(8)];
        if bytes > 0 {
            // SAFETY: the buffer is borrowed for reading and has so many bytes.
            unsafe { data.copy_to_nonoverlapping(copy.as_mut_ptr().cast(), bytes) };
        }
        self.buffers.push((copy, elements));
    }

    /// `elements` of a buffer from element `start` on.
    fn slice(&self, buffer: usize, start: usize, elements: usize, dtype: DType) -> BufferRef<'_> {
        assert!(start + elements <= self.buffers[buffer].1);
        let data = self.buffers[buffer].0.as_ptr().cast::<u8>();
        // SAFETY: the elements lie within the buffer, which is aligned and initialised.
        unsafe { BufferRef::from_raw(data.add(start * dtype.size()), elements, dtype) }
    }

    fn op(&self) -> ReduceOp {
        match self.call.operation {
            Operation::AllReduce(op) | Operation::ReduceScatter(op) | Operation::Reduce { op, .. } => op,
            _ => ReduceOp::Sum,
        }
    }
}

impl Inbox {
    /// Sorts what has arrived.
    fn sort(&mut self) {
        while let Ok(packet) = self.channel.try_recv() {
            match packet {
                Packet::Contribution(contribution) => self.contributions.push_back(contribution),
                Packet::Message(tag, message) => self.messages.push_back((tag, message)),
            }
        }
    }

    fn message(&mut self, tag: u64) -> Option<Message> {
        self.sort();
        let place = self.messages.iter().position(|(other, _)| *other == tag)?;
        self.messages.remove(place).map(|(_, message)| message)
    }
}

impl std::fmt::Debug for ChannelTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChannelTransport(rank {} of {})", self.rank, self.group.name)
    }
}

impl ChannelTransport {
    fn new(group: Arc<Group>, rank: usize, (outgoing, incoming): Channels) -> Arc<Self> {
        let inbox = |channel| Mutex::new(Inbox { channel, contributions: VecDeque::new(), messages: VecDeque::new() });
        let incoming = incoming.into_iter().map(inbox).collect();
        let (sequence, panicked) = (Mutex::new(0), AtomicBool::new(false));
        Arc::new(Self { group, rank, outgoing, incoming, sequence, panicked })
    }

    /// Waits until `ready` returns something, as long as none of the ranks that `missing` names has left.
    fn wait<R>(
        &self,
        call: &Call,
        number: u64,
        mut ready: impl FnMut() -> Option<R>,
        missing: impl Fn() -> (Vec<usize>, String),
    ) -> Result<R, Error> {
        let (group, began) = (&*self.group, Instant::now());
        let mut gone_since = None;
        let mut polls = 0u32;
        loop {
            // Read before what has arrived: what a rank has sent before it left still counts.
            let left = group.left.lock().unwrap().clone();
            if let Some(result) = ready() {
                group.history.finish(self.rank, number);
                return Ok(result);
            }
            if let Some(error) = group.world.failure.get() {
                return Err(error.clone());
            }
            let (ranks, words) = missing();
            if let Some((rank, panicked)) = left.into_iter().find(|(rank, _)| ranks.contains(rank)) {
                if gone_since.get_or_insert_with(Instant::now).elapsed() > GRACE {
                    let (log, name) = (group.log(), group.name.clone());
                    return Err(group.fail(match panicked {
                        true => Error::RankPanicked {
                            rank: group.members[rank],
                            message: "see its own message".into(),
                            log,
                        },
                        false => Error::RankLost { group: name, rank, operation: call.to_string(), log },
                    }));
                }
            } else if began.elapsed() > group.timeout {
                return Err(group.fail(Error::Timeout {
                    group: group.name.clone(),
                    rank: self.rank,
                    operation: call.to_string(),
                    waited: began.elapsed(),
                    missing: words,
                    log: group.log(),
                }));
            }
            polls += 1;
            match polls {
                0..100 => thread::yield_now(),
                _ => {
                    group.history.mark_waiting(self.rank, number, began);
                    thread::sleep(Duration::from_micros(100));
                }
            }
        }
    }

    /// Sends a contribution to all ranks, and returns those of all.
    fn exchange(&self, contribution: Contribution, number: u64) -> Result<Vec<Arc<Contribution>>, Error> {
        let (call, contribution) = (contribution.call, Arc::new(contribution));
        for outgoing in &self.outgoing {
            // A rank that has left is noticed below.
            let _ = outgoing.send(Packet::Contribution(contribution.clone()));
        }
        let absent = || -> Vec<usize> {
            let came = |rank: &usize| {
                let mut inbox = self.incoming[*rank].lock().unwrap();
                inbox.sort();
                inbox.contributions.is_empty()
            };
            (0..self.incoming.len()).filter(came).collect()
        };
        let ready = || absent().is_empty().then_some(());
        self.wait(&call, number, ready, || {
            let ranks = absent();
            let names: Vec<String> = ranks.iter().map(usize::to_string).collect();
            let words = format!("{} {}", if names.len() == 1 { "rank" } else { "ranks" }, names.join(", "));
            (ranks, words)
        })?;
        let first = |inbox: &Mutex<Inbox>| inbox.lock().unwrap().contributions.pop_front();
        Ok(self.incoming.iter().map(|inbox| first(inbox).expect("all have arrived")).collect())
    }

    /// Enters a collective: returns the contributions of all ranks if their calls match, and its number in the history.
    fn enter(&self, contribution: Contribution, sequence: &mut u64) -> Result<(Vec<Arc<Contribution>>, u64), Error> {
        let group = &*self.group;
        if let Some(error) = group.world.failure.get() {
            return Err(error.clone());
        }
        let number = group.history.begin(self.rank, &contribution.call);
        let all = self.exchange(contribution, number)?;
        let lens = |contribution: &Contribution| contribution.buffers.iter().map(|(_, len)| *len).collect::<Vec<_>>();
        let mut dtypes = all.iter().filter_map(|other| other.call.dtype);
        let first = dtypes.next();
        let in_place = all[0].call.buffers > 1;
        let matching = dtypes.all(|dtype| Some(dtype) == first)
            && all.iter().all(|other| other.call.agrees(&all[0].call) && (!in_place || lens(other) == lens(&all[0])));
        if !matching {
            let calls = all.iter().map(|other| other.call).collect();
            let (group_name, log) = (group.name.clone(), group.log());
            return Err(group.fail(Error::Mismatch { group: group_name, sequence: *sequence, calls, log }));
        }
        *sequence += 1;
        Ok((all, number))
    }

    fn in_place(&self, all: &[Arc<Contribution>], buffers: &mut [BufferMut<'_>]) -> Result<(), Error> {
        for (piece, buffer) in buffers.iter_mut().enumerate() {
            let (elements, dtype) = (buffer.elements(), buffer.dtype());
            let whole = |rank: usize| all[rank].slice(piece, 0, elements, dtype);
            match all[self.rank].call.operation {
                Operation::Broadcast { root } => copy(whole(root), buffer.as_mut_ptr()),
                Operation::Reduce { root, .. } if root != self.rank => {}
                _ => {
                    let contributions: Vec<_> = (0..all.len()).map(|rank| (whole(rank), all[rank].op())).collect();
                    reduce_contributions(&contributions, buffer)?;
                }
            }
        }
        Ok(())
    }

    fn out_of_place(
        &self,
        all: &[Arc<Contribution>],
        number: u64,
        output: &mut dyn OutputAllocator,
    ) -> Result<(), Error> {
        let (rank, size, operation) = (self.rank, all.len(), all[self.rank].call.operation);
        let source = match operation {
            Operation::Scatter { root } => &all[root].call,
            _ => &all[rank].call,
        };
        let Call { dtype: Some(dtype), shape, .. } = *source else { return Ok(()) };
        let rows = |from: usize| received(operation, all[from].call.shape.rows(), (from, rank), size);
        let taken: usize = match operation {
            Operation::Gather { root } if root != rank => return self.check_shortages(&all[rank].call, number, None),
            Operation::ReduceScatter(_) => rows(rank).len(),
            _ => (0..size).map(|from| rows(from).len()).sum(),
        };
        let mut dims = shape.dims().to_vec();
        dims[0] = taken;
        let allocated = output.allocate(&dims, dtype);
        let shortage = allocated.as_ref().err().filter(|error| matches!(error, Error::OutOfMemory { .. })).cloned();
        self.check_shortages(&all[rank].call, number, shortage)?;
        let mut buffer = allocated?;
        let width = shape.width();
        if let Operation::ReduceScatter(_) = operation {
            let start = rows(rank).start * width;
            let part = |contribution| Contribution::slice(contribution, 0, start, taken * width, dtype);
            let contributions: Vec<_> = all.iter().map(|other| (part(other), other.op())).collect();
            return reduce_contributions(&contributions, &mut buffer);
        }
        let mut place = buffer.as_mut_ptr();
        for (from, other) in all.iter().enumerate().filter(|(from, _)| !rows(*from).is_empty()) {
            let rows = rows(from);
            copy(other.slice(0, rows.start * width, rows.len() * width, dtype), place);
            // SAFETY: the output takes the rows of all.
            place = unsafe { place.add(rows.len() * width * dtype.size()) };
        }
        Ok(())
    }

    /// Makes all ranks return the error of one that has no memory for the result.
    fn check_shortages(&self, call: &Call, number: u64, shortage: Option<Error>) -> Result<(), Error> {
        let all = self.exchange(Contribution { shortage, ..Contribution::new(*call) }, number)?;
        all.iter().find_map(|other| other.shortage.clone()).map_or(Ok(()), Err)
    }

    fn check_rank(&self, rank: usize, operation: &'static str) -> Result<(), Error> {
        let (group, size) = (self.group.name.clone(), self.size());
        (rank < size).then_some(()).ok_or(Error::NoSuchRank { group, rank, size, operation })
    }
}

/// The rows of `rows` that go from one rank to another.
fn received(operation: Operation, rows: usize, (from, to): (usize, usize), size: usize) -> std::ops::Range<usize> {
    match operation {
        Operation::AllGather | Operation::Gather { .. } => 0..rows,
        Operation::Scatter { root } if root != from => 0..0,
        _ => part(rows, size, to),
    }
}

fn copy(from: BufferRef<'_>, to: *mut u8) {
    // SAFETY: `to` is a buffer of the caller with at least as many bytes.
    unsafe { from.as_ptr().copy_to_nonoverlapping(to, from.elements() * from.dtype().size()) };
}

/// The bytes that a rank has to read from its peers and to write to them.
fn moved(all: &[Arc<Contribution>], rank: usize) -> u64 {
    let (size, call) = (all.len(), &all[rank].call);
    let others = size - 1;
    let element = |call: &Call| call.dtype.map_or(0, |dtype| dtype.size());
    let share = part(call.shape.elements(), size, rank).len() * element(call);
    let bytes = match call.operation {
        Operation::AllReduce(_) => 2 * share * others,
        Operation::Reduce { root, .. } => share * others + if root == rank { 0 } else { share },
        Operation::Broadcast { root } if root != rank => call.shape.elements() * element(call),
        Operation::ReduceScatter(_) => part(call.shape.rows(), size, rank).len() * call.shape.width() * others,
        operation @ (Operation::AllGather
        | Operation::Gather { .. }
        | Operation::Scatter { .. }
        | Operation::AllToAll) => {
            let bytes = |(from, other): (usize, &Arc<Contribution>)| match operation {
                Operation::Gather { root } if root != rank => 0,
                _ => {
                    let rows = received(operation, other.call.shape.rows(), (from, rank), size).len();
                    rows * other.call.shape.width() * element(&other.call)
                }
            };
            all.iter().enumerate().filter(|(from, _)| *from != rank).map(bytes).sum()
        }
        _ => 0,
    };
    match call.operation {
        Operation::ReduceScatter(_) => (bytes * element(call)) as u64,
        _ => bytes as u64,
    }
}

impl Transport for ChannelTransport {
    fn name(&self) -> &'static str {
        "channels"
    }

    fn group(&self) -> &Arc<str> {
        &self.group.name
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn world_rank(&self) -> usize {
        self.group.members[self.rank]
    }

    fn size(&self) -> usize {
        self.group.members.len()
    }

    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error> {
        let mut sequence = self.sequence.lock().unwrap();
        let mut contribution = Contribution::new(*call);
        match transfer {
            Transfer::Nothing => self.enter(contribution, &mut sequence).map(|_| 0),
            Transfer::InPlace(buffers) => {
                for buffer in buffers.iter_mut() {
                    contribution.push(buffer.as_mut_ptr(), buffer.elements(), buffer.dtype());
                }
                let (all, _) = self.enter(contribution, &mut sequence)?;
                self.in_place(&all, buffers).map(|()| moved(&all, self.rank))
            }
            Transfer::OutOfPlace { input, output } => {
                contribution.push(input.as_ptr(), input.elements(), input.dtype());
                let (all, number) = self.enter(contribution, &mut sequence)?;
                self.out_of_place(&all, number, output).map(|()| moved(&all, self.rank))
            }
        }
    }

    fn send(&self, to: usize, tag: u64, message: Message) -> Result<(), Error> {
        self.check_rank(to, "send")?;
        if let Some(error) = self.group.world.failure.get() {
            return Err(error.clone());
        }
        // A rank that has left receives nothing more.
        let _ = self.outgoing[to].send(Packet::Message(tag, message));
        Ok(())
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error> {
        if let Some(message) = self.try_receive(from, tag)? {
            return Ok(message);
        }
        let call = Call::new(Operation::Receive { from, tag }, None, CallShape::flat(0));
        let number = self.group.history.begin(self.rank, &call);
        self.wait(
            &call,
            number,
            || self.incoming[from].lock().unwrap().message(tag),
            || {
                let inbox = self.incoming[from].lock().unwrap();
                let tags: Vec<u64> = inbox.messages.iter().map(|(tag, _)| *tag).collect();
                (vec![from], format!("rank {from}; tags that it has sent and nobody has read: {tags:?}"))
            },
        )
    }

    fn try_receive(&self, from: usize, tag: u64) -> Result<Option<Message>, Error> {
        self.check_rank(from, "recv")?;
        match self.group.world.failure.get() {
            Some(error) => Err(error.clone()),
            None => Ok(self.incoming[from].lock().unwrap().message(tag)),
        }
    }

    fn timeout(&self) -> Duration {
        self.group.timeout
    }

    fn split(&self, name: &str, color: u64, key: i64) -> Result<Arc<dyn Transport>, Error> {
        let mut sequence = self.sequence.lock().unwrap();
        let number = *sequence;
        let (all, _) =
            self.enter(Contribution { color, key, ..Contribution::new(Call::split(name)) }, &mut sequence)?;
        let mut members: Vec<(i64, usize)> = (all.iter().enumerate())
            .filter(|(_, other)| other.color == color)
            .map(|(rank, other)| (other.key, rank))
            .collect();
        members.sort_unstable();
        let rank = members.iter().position(|(_, rank)| *rank == self.rank).expect("it is of its own color");
        let parent = &*self.group;
        // The first rank makes the group; the last one that fetches it removes the entry.
        let mut splits = parent.splits.lock().unwrap();
        let (group, ends) = splits.entry((number, color)).or_insert_with(|| {
            let world_ranks = members.iter().map(|(_, rank)| parent.members[*rank]).collect();
            let name = format!("{}/{name}{color}", parent.name).into();
            let group = Group::new(name, world_ranks, parent.timeout, parent.world.clone());
            (group, channels(members.len()).into_iter().map(Some).collect())
        });
        let member = Self::new(group.clone(), rank, ends[rank].take().expect("each rank fetches its channels once"));
        if ends.iter().all(Option::is_none) {
            splits.remove(&(number, color));
        }
        Ok(member)
    }

    fn abort(&self, error: Error) {
        self.group.fail(error);
    }

    fn leave(&self) {
        let world_rank = self.world_rank();
        let groups: Vec<_> = self.group.world.groups.lock().unwrap().iter().filter_map(Weak::upgrade).collect();
        for group in groups {
            if let Some(rank) = group.members.iter().position(|member| *member == world_rank) {
                group.leave(rank, false);
            }
        }
    }

    fn panicking(&self) {
        self.panicked.store(true, Ordering::Relaxed);
    }

    fn failure(&self) -> Option<Error> {
        self.group.world.failure.get().cloned()
    }

    fn log(&self) -> CallLog {
        self.group.log()
    }
}

impl Drop for ChannelTransport {
    fn drop(&mut self) {
        self.group.leave(self.rank, self.panicked.load(Ordering::Relaxed));
    }
}

/// The transport suite on it.
#[test]
fn a_transport_from_outside_the_crate_passes_the_suite() {
    use crate::transport_suite::{self, over_threads};
    for size in 1..=3 {
        let counts = over_threads::run_with(size, world, |worlds| transport_suite::run(&worlds, &|_| ()));
        assert_eq!(counts, vec![Some(if size == 1 { 13 } else { 21 }); size]);
    }
}
