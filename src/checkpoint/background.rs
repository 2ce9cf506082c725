//! A save that runs in the background, and the wait for it.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::checkpoint_error;
use super::directory::name_of;
use super::job::Saved;
use crate::Error;
use crate::comm::panic_message;
use crate::lock::lock;

/// What a save and whoever waits for it tell each other.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress {
    written: Arc<AtomicU64>,
    given_up: Arc<AtomicBool>,
    /// The lock of its draft.
    held: Arc<Mutex<Weak<File>>>,
}

impl Progress {
    /// So many more bytes are written.
    pub(super) fn wrote(&self, bytes: usize) {
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// That somebody still wants the save. One that was given up must not touch what came after it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if not.
    pub(super) fn check(&self) -> Result<(), Error> {
        match self.given_up.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err(checkpoint_error("the save took too long and was given up")),
        }
    }

    /// That the save holds this lock, until it ends or is given up.
    pub(super) fn holds(&self, held: &Arc<File>) {
        *lock(&self.held) = Arc::downgrade(held);
        if self.check().is_err() {
            self.let_go();
        }
    }

    /// Nobody wants the save any more: what it has written is the next one's to remove.
    fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        self.let_go();
    }

    fn let_go(&self) {
        // That of a disk that is gone may fail, and keeps nobody.
        let _ = lock(&self.held).upgrade().map(|held| held.unlock());
    }
}

/// A save in the background.
pub(super) struct Running {
    step: u64,
    outcome: Receiver<Result<Saved, Error>>,
    thread: JoinHandle<()>,
    progress: Progress,
    begin: Sender<()>,
}

impl Running {
    /// Starts a thread that saves a step when it is told to [begin](Self::begin).
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the system gives no thread.
    pub(super) fn prepare(
        step: u64,
        progress: Progress,
        save: impl FnOnce() -> Result<Saved, Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let (begin, begun) = channel::<()>();
        let (tell, outcome) = channel();
        let run = move || {
            let ran = match begun.recv() {
                Ok(()) => save(),
                Err(_) => Err(checkpoint_error("another rank has no thread to save in")),
            };
            // Nobody asks any more if the program has not waited to the end.
            let _ = tell.send(ran);
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(run);
        let thread = thread.map_err(|why| checkpoint_error(format!("no thread to save in: {why}")))?;
        Ok(Self { step, outcome, thread, progress, begin })
    }

    /// Has it begin.
    pub(super) fn begin(&self) {
        let _ = self.begin.send(());
    }

    /// Waits for the outcome. One that writes nothing for as long as `time_out` is given up: the first error then says
    /// so, of a save into `root` by `rank`.
    pub(super) fn wait(self, time_out: Duration, (rank, root): (usize, &Path)) -> Result<Result<Saved, Error>, Error> {
        let Self { step, outcome, thread, progress, .. } = self;
        let written = || progress.written.load(Ordering::Relaxed);
        let mut before = written();
        loop {
            match outcome.recv_timeout(time_out) {
                Ok(outcome) => {
                    // It has nothing left to do but to let go of the group.
                    let _ = thread.join();
                    return Ok(outcome);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let panic = thread.join().err().map(|panic| panic_message(&*panic)).unwrap_or_default();
                    return Ok(Err(checkpoint_error(format!("the save panicked: {panic}"))));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = written();
            if now == before {
                progress.give_up();
                return Err(checkpoint_error(format!(
                    "rank {rank}: the save of {} into {} has written {now} bytes, and none in the last {time_out:?}: does the \
                     disk still answer? BURN_PARALLEL_TIMEOUT_S gives it more time; open another `Checkpointer` to go on",
                    name_of(step),
                    root.display()
                )));
            }
            before = now;
        }
    }
}
