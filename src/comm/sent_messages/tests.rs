//! Messages that outlive the communicator of their sender, over threads, with a channel in place of NCCL.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use burn::backend::flex::FlexTensor;
use burn::tensor::TensorData;

use super::{OrphanedMessages, SentMessages, ask, ask_nothing_more};
use crate::Error;
use crate::comm::pending::OutstandingJobs;
use crate::comm::{Communicator, Message, Transport, WorldConfig, local};

const LIMIT: Duration = Duration::from_secs(20);

type Data = (u64, Vec<f32>);

/// One rank's end: the group, and that for the answers.
struct End {
    group: Arc<dyn Transport>,
    answers: Arc<dyn Transport>,
}

/// Two ranks, and what moves the data of rank 0 to rank 1.
fn ranks() -> ([End; 2], Sender<Data>, Receiver<Data>) {
    let comms = local::world(2, WorldConfig::from_env().unwrap().with_timeout(LIMIT)).unwrap();
    let end = |comm: Communicator| {
        let group = comm.transport_arc();
        let answers = group.split("answers", 0, group.rank() as i64).unwrap();
        End { group, answers }
    };
    let started: Vec<_> = comms.into_iter().map(|comm| thread::spawn(move || end(comm))).collect();
    let mut ends = started.into_iter().map(|end| end.join().unwrap());
    let ends = [ends.next().unwrap(), ends.next().unwrap()];
    let (wire, arrived) = channel();
    (ends, wire, arrived)
}

fn header(number: u64) -> Message {
    Message(FlexTensor::from_data(TensorData::new(vec![number], [1])))
}

fn number(Message(header): Message) -> u64 {
    header.into_data().try_into_vec::<u64>().unwrap()[0]
}

/// Sends messages with these tags, and drops the communicator.
fn send_and_drop(end: End, tags: &[u64]) -> Arc<SentMessages<Data>> {
    let sent = Arc::new(SentMessages::new(end.answers, 1));
    for tag in tags {
        let header = sent.put(Some((*tag, vec![*tag as f32; 3])), |number| Ok(header(number))).unwrap();
        end.group.send(1, *tag, header).unwrap();
    }
    sent
}

/// What the watchdog does until nothing is wanted any more; returns for how long.
fn keep(orphaned: &OrphanedMessages<Data>, limit: Duration, wire: &Sender<Data>) -> Duration {
    let began = Instant::now();
    while orphaned.is_wanted(limit, |(tag, _)| *tag) {
        let delivered = orphaned.messages.deliver(|data, rest| {
            assert_eq!(rest, b"id");
            wire.send(data).map_err(Error::user)
        });
        delivered.unwrap();
        sleep(Duration::from_millis(1));
    }
    began.elapsed()
}

#[test]
fn messages_are_delivered_after_their_sender_has_gone() {
    let ([sender, receiver], wire, arrived) = ranks();
    let jobs = Arc::new(OutstandingJobs::default());
    let sent = send_and_drop(sender, &[7, 8, 7]);
    let orphaned = OrphanedMessages::new(&sent, &jobs).unwrap();
    drop(sent);
    let leaves = {
        let jobs = jobs.clone();
        thread::spawn(move || {
            jobs.wait(LIMIT);
            Instant::now()
        })
    };
    let holder = thread::spawn(move || {
        keep(&orphaned, LIMIT, &wire);
        Instant::now()
    });
    // The receiver computes for a while, and takes them out of order.
    sleep(Duration::from_millis(100));
    let mut found = Vec::new();
    for tag in [8, 7, 7] {
        let number = number(receiver.group.receive(0, tag).unwrap());
        ask(&*receiver.answers, 0, number, b"id").unwrap();
        found.push((number, arrived.recv_timeout(LIMIT).unwrap()));
    }
    assert_eq!(found, [(1, (8, vec![8.0; 3])), (0, (7, vec![7.0; 3])), (2, (7, vec![7.0; 3]))]);
    // The rank has not left before, and does then.
    let kept_until = holder.join().unwrap();
    assert!(leaves.join().unwrap() >= kept_until - Duration::from_millis(50));
}

#[test]
fn they_are_dropped_when_nobody_will_ask() {
    let ([sender, receiver], wire, arrived) = ranks();
    let jobs = Arc::new(OutstandingJobs::default());
    let sent = send_and_drop(sender, &[7, 8]);
    let orphaned = OrphanedMessages::new(&sent, &jobs).unwrap();
    ask_nothing_more(&*receiver.answers, 0).unwrap();
    assert!(keep(&orphaned, LIMIT, &wire) < LIMIT / 2, "the receiver has gone");
    assert!(sent.is_empty() && arrived.try_recv().is_err());
    // Nothing is kept for a receiver that has gone.
    sent.put(Some((9, Vec::new())), Ok).unwrap();
    assert!(OrphanedMessages::new(&sent, &jobs).is_none());

    let ([sender, _receiver], wire, _arrived) = ranks();
    let sent = send_and_drop(sender, &[7]);
    assert_eq!(sent.to(), 1);
    assert!(sent.describe(|(tag, _)| *tag).contains("of rank 0 to rank 1 with tags [7]"));
    let orphaned = OrphanedMessages::new(&sent, &jobs).unwrap();
    let limit = Duration::from_millis(60);
    assert!(keep(&orphaned, limit, &wire) >= limit, "as long as the time-out");
    assert!(sent.is_empty());
}

#[test]
fn answers_that_make_no_sense_are_errors() {
    let ([sender, receiver], ..) = ranks();
    let sent = send_and_drop(sender, &[7]);
    ask(&*receiver.answers, 0, 5, b"id").unwrap();
    let error = sent.deliver(|_, _| Ok(())).unwrap_err();
    assert!(error.to_string().contains("the answer of rank 1 is garbled"), "{error}");
    // A message without data waits for nobody, and one that cannot be announced has no number.
    let ([sender, _receiver], ..) = ranks();
    let sent = SentMessages::<Data>::new(sender.answers, 1);
    assert!(sent.put(None, Ok).is_ok_and(|number| number == 0) && sent.is_empty());
    let failed = sent.put(Some((1, Vec::new())), |_| Err::<u64, _>(Error::user("no")));
    assert!(failed.is_err() && sent.is_empty());
    assert_eq!(sent.put(Some((1, Vec::new())), Ok).unwrap(), 1);
    assert!(sent.take(1).is_some() && sent.take(1).is_none() && sent.is_empty());
}
