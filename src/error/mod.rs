//! The one error type of the crate.
//!
//! Every failure a user or a peer can cause is a variant of [`Error`]. Its message names the rank, the group and the
//! operation, the numbers involved, and the knob to turn. When a group fails, every rank of it returns a clone of the
//! *same* error, so an [`Error`] never holds anything that differs from rank to rank.

mod describe;
mod quiet;
mod show;
mod stop_signal;
mod thrown;

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::DType;

use self::describe::{advice, advice_on_calls, advice_on_wait, describe_calls, last_words, left_behind, rank_failed};
pub(crate) use self::quiet::catch_quietly;
pub use self::stop_signal::StopSignal;
pub(crate) use self::thrown::{caught, is_thrown, throw};
use crate::comm::{Call, CallLog, ReduceOp};

/// What went wrong: the same error on every rank of the group.
#[derive(Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A wait outlasted the time-out: some ranks never came.
    #[error(
        "time-out in group `{group}`: rank {rank} waited {waited:.1?} in {operation} for {missing}; raise the limit with \
         BURN_PARALLEL_TIMEOUT_S, `Threads::timeout` or `with_timeout` if the others were only slow{}{log}",
        advice_on_wait(.group, .operation, .log)
    )]
    Timeout {
        /// Group in which the wait happened.
        group: Arc<str>,
        /// Rank, within the group, whose wait ran out first.
        rank: usize,
        /// What it was waiting in.
        operation: String,
        /// How long it waited.
        waited: Duration,
        /// Whom it was waiting for, in words: ranks within the group, or, where these wait for others in turn, first
        /// the ranks of the world at the root of it.
        missing: String,
        /// The last collectives of every rank of the group.
        log: CallLog,
    },

    /// The ranks of a group called different collectives, or the same one with other lengths, dtypes or roots.
    #[error(
        "the ranks of group `{group}` do not agree on collective #{sequence}: {}; every rank must issue the same \
         collectives in the same order with matching arguments{}{log}", describe_calls(.calls), advice_on_calls(.group, .calls, .log)
    )]
    Mismatch {
        /// Group in which it happened.
        group: Arc<str>,
        /// Number of the collective in this group, counted from 0.
        sequence: u64,
        /// What each rank called, in rank order.
        calls: Vec<Call>,
        /// The last collectives of every rank of the group.
        log: CallLog,
    },

    /// A received message is not what the receiver asked for.
    #[error(
        "rank {to} of group `{group}` expected {expected} from rank {from} with tag {tag}, but {found} came; \
         make both sides agree on dtype and shape, or use another tag{log}"
    )]
    UnexpectedMessage {
        /// Group in which it happened.
        group: Arc<str>,
        /// Sending rank.
        from: usize,
        /// Receiving rank.
        to: usize,
        /// Tag of the message.
        tag: u64,
        /// What the receiver wanted.
        expected: String,
        /// What the sender sent.
        found: String,
        /// The last collectives of every rank of the group.
        log: CallLog,
    },

    /// A rank dropped its communicator while others still needed it, or its process ended.
    #[error(
        "rank {rank} left group `{group}` while {}{}{log}", left_behind(.operation), advice(.group, .operation, .log)
    )]
    RankLost {
        /// Group in which it happened.
        group: Arc<str>,
        /// The rank, within the group, that left.
        rank: usize,
        /// What another rank was calling, with the group if it is another one, or `nobody`.
        operation: String,
        /// The last collectives of every rank of the group.
        log: CallLog,
    },

    /// A rank panicked.
    #[error("rank {rank} panicked: {message}{log}")]
    RankPanicked {
        /// World rank.
        rank: usize,
        /// The panic's message.
        message: String,
        /// The last collectives of every rank of the world, or of the group in which it was noticed.
        log: CallLog,
    },

    /// The function that a rank ran returned an error.
    #[error("{}", rank_failed(*.rank, .cause, .log))]
    RankFailed {
        /// World rank.
        rank: usize,
        /// The error it returned.
        cause: Box<Error>,
        /// The last collectives of every rank of the world.
        log: CallLog,
    },

    /// A rank called [`abort`](crate::comm::Communicator::abort).
    #[error("rank {rank} of group `{group}` aborted the run: {reason}{log}")]
    Aborted {
        /// Group on which `abort` was called.
        group: Arc<str>,
        /// Rank, within the group, that called it.
        rank: usize,
        /// Its words.
        reason: String,
        /// The last collectives of every rank of the group.
        log: CallLog,
    },

    /// A rank has no memory for what a collective would bring it. All ranks of the group return this. Among threads,
    /// and over TCP from 16 MiB on, the world does not fail with it; below that, where other ranks are at work already,
    /// it does, and over MPI it ends as if the rank were killed while data is moving. It can be asked with
    /// [`failure`](crate::comm::Communicator::failure).
    #[error(
        "rank {rank} of group `{group}` has no memory for the {bytes} bytes that {operation} would bring it; bring less at a \
         time, or give the rank more memory"
    )]
    OutOfMemory {
        /// Group in which it happened.
        group: Arc<str>,
        /// The rank, within the group, that lacks the memory.
        rank: usize,
        /// What was called, and who brought most to it.
        operation: String,
        /// How much it lacks; `usize::MAX` if more than there are addresses for.
        bytes: usize,
    },

    /// A rank index that the group does not have.
    #[error("rank {rank} does not exist in group `{group}` of {size} ranks, asked for by {operation}")]
    NoSuchRank {
        /// Group that was asked.
        group: Arc<str>,
        /// The index.
        rank: usize,
        /// Ranks in the group.
        size: usize,
        /// The operation.
        operation: &'static str,
    },

    /// A model was wrapped that is wrapped already, in an order that makes no sense.
    #[error(
        "{operation} was given a model that is, or holds, a `{wrapper}`: a model is split first, then cut into stages, then \
         replicated, `.tensor_parallel(..)?.pipeline_parallel(..)?.data_parallel(..)?`, each at most once; code that is \
         generic over the module must take it before it is wrapped"
    )]
    Nesting {
        /// What was to wrap it.
        operation: &'static str,
        /// The wrapper that it is in already.
        wrapper: &'static str,
    },

    /// A strategy cannot be read, or does not fit the world.
    #[error("the strategy is wrong: {problem}")]
    Strategy {
        /// What is wrong.
        problem: String,
    },

    /// An optimizer does not suit the parameters.
    #[error("the optimizer does not suit this model: {problem}")]
    Optimizer {
        /// What is wrong, with the parameter.
        problem: String,
    },

    /// The reduction has no meaning for this element type.
    #[error("{op:?} is not defined for {dtype:?}; {advice}")]
    UnsupportedReduction {
        /// The reduction.
        op: ReduceOp,
        /// The element type.
        dtype: DType,
        /// What to do instead.
        advice: &'static str,
    },

    /// The element type cannot travel.
    #[error("{operation} cannot carry {dtype:?}; cast the tensor to a plain float, integer or bool dtype first")]
    UnsupportedDType {
        /// The operation.
        operation: &'static str,
        /// The element type.
        dtype: DType,
    },

    /// An argument that the rank alone can tell to be wrong.
    #[error("{operation}: {problem}")]
    InvalidArgument {
        /// The function.
        operation: &'static str,
        /// What is wrong, with the numbers and the knob.
        problem: String,
    },

    /// A checkpoint cannot be written or read.
    #[error("checkpoint: {problem}")]
    Checkpoint {
        /// What is wrong, with the rank, the file, the path and what to do.
        problem: String,
    },

    /// The axes of a mesh do not fit the world, or are not well named.
    #[error("mesh: {problem}")]
    Mesh {
        /// What is wrong, with the numbers.
        problem: String,
    },

    /// The ranks hold models of different structure.
    #[error(
        "the model of rank {rank} differs from that of rank 0 in group `{group}` at `{path}`: {problem}; build the same \
         model on every rank"
    )]
    ModelMismatch {
        /// Group over which the model was wrapped.
        group: Arc<str>,
        /// First rank that differs.
        rank: usize,
        /// Path of the first parameter that differs.
        path: String,
        /// How.
        problem: String,
    },

    /// The ranks of a group were given different settings.
    #[error(
        "`{name}` is {value} on rank {rank} of group `{group}`, and {value_of_0} on rank 0: give all ranks the same"
    )]
    Settings {
        /// Group whose ranks were to be given the same.
        group: Arc<str>,
        /// First rank that differs from rank 0.
        rank: usize,
        /// The first setting that differs, as in `data.overlap`.
        name: String,
        /// Its value on that rank as JSON, or in words that it has none.
        value: String,
        /// Its value on rank 0.
        value_of_0: String,
    },

    /// An environment variable that does not parse.
    #[error("environment variable {variable}={value:?} is not {expected}")]
    Environment {
        /// Its name.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },

    /// A rank could not be started.
    #[error("rank {rank} of {size} could not be started: {problem}; ask for fewer ranks or fewer threads per rank")]
    Launch {
        /// World rank.
        rank: usize,
        /// Ranks asked for.
        size: usize,
        /// What the system said.
        problem: String,
    },

    /// A process that was started as a rank ended with a failure.
    #[error("{} of {size} ended {status}{}", .rank.map_or("a rank".into(), |rank| format!("rank {rank}")), last_words(.said))]
    ProcessFailed {
        /// Rank of the process; `None` if a launcher in between knows it: see what it said.
        rank: Option<usize>,
        /// Processes started.
        size: usize,
        /// Its exit status, or the signal that ended it, in words.
        status: String,
        /// The last lines that it wrote to its standard error.
        said: Vec<String>,
    },

    /// The run was asked to end by a signal, and has ended.
    #[error("the run was ended by {signal}")]
    Stopped {
        /// The signal.
        signal: StopSignal,
    },

    /// The transport under the communicator, or a service that it needs, could not be used.
    #[error("{transport}: {problem}")]
    Transport {
        /// Name of the transport, as in `mpi`.
        transport: &'static str,
        /// What it said, and what to try.
        problem: String,
    },

    /// A GPU, or a library that it takes, is missing or cannot be used.
    #[error("GPU: {problem}")]
    Gpu {
        /// What is missing, and where to get it.
        problem: String,
    },

    /// NCCL refused a call, or did not come to its end.
    #[error(
        "NCCL, rank {rank} of group `{group}`, in {operation}: {problem}; NCCL_DEBUG=INFO makes NCCL say more, \
         NCCL_SOCKET_IFNAME names its network, BURN_PARALLEL_TIMEOUT_S gives it more time"
    )]
    Nccl {
        /// Group in which it happened.
        group: Arc<str>,
        /// Rank, within the group, that found it.
        rank: usize,
        /// What was called.
        operation: String,
        /// What NCCL said.
        problem: String,
    },

    /// The training step could not be captured or rewritten as a graph.
    #[error("graph: {problem}")]
    Graph {
        /// What is wrong and what to do.
        problem: String,
    },

    /// A plan does not fit the model, the inputs or the number of ranks.
    #[error("plan: {problem}")]
    Plan {
        /// What is wrong, with the path, the dims and the degree.
        problem: String,
    },

    /// A schedule of a pipeline is wrong, or does not fit the pipeline.
    #[error("schedule: {problem}")]
    Schedule {
        /// What is wrong, with the action, and the timetable around it.
        problem: String,
    },

    /// The stages of a pipeline do not fit each other or the batch.
    #[error("pipeline: {problem}")]
    Pipeline {
        /// What is wrong, with the stages and the numbers.
        problem: String,
    },

    /// A stage of a pipeline failed.
    #[error("rank {rank} of group `{group}` failed in action {action} of its timetable: {cause}")]
    Stage {
        /// Group of the pipeline.
        group: Arc<str>,
        /// Rank, within the group, that holds the stage.
        rank: usize,
        /// What it was doing, as in `1B3`: the backward of micro-batch 3 in stage 1.
        action: String,
        /// The error that the stage returned, or its panic.
        cause: Box<Error>,
    },

    /// A gradient has an element that is NaN or infinite.
    #[error(
        "the gradient of `{path}` is not finite, and rank {rank} brought it: look at the data and the loss of that rank, lower the \
         learning rate, or let such steps be skipped with `NonFinite::Skip`"
    )]
    NonFinite {
        /// Path of the first such parameter.
        path: String,
        /// World rank that brought it.
        rank: usize,
    },

    /// An error of the user's own code, passed through.
    #[error("{0}")]
    User(String),
}
