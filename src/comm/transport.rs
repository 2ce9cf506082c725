//! The trait that joins the ranks of a group, and the buffers and messages that it takes.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;

use super::{Call, CallLog, Element};
use crate::Error;

/// Elements of one dtype, borrowed by a transport for reading.
#[derive(Debug, Clone, Copy)]
pub struct BufferRef<'a> {
    pub(crate) data: *const u8,
    pub(crate) elements: usize,
    pub(crate) dtype: DType,
    lent: PhantomData<&'a [u8]>,
}

/// Elements of one dtype, borrowed by a transport for reading and writing.
#[derive(Debug)]
pub struct BufferMut<'a> {
    pub(crate) data: *mut u8,
    pub(crate) elements: usize,
    pub(crate) dtype: DType,
    lent: PhantomData<&'a mut [u8]>,
}

impl<'a> BufferRef<'a> {
    /// A slice.
    pub fn new<E: Element>(slice: &'a [E]) -> Self {
        Self { data: slice.as_ptr().cast(), elements: slice.len(), dtype: E::DTYPE, lent: PhantomData }
    }

    /// `elements` elements of `dtype` at `data`.
    ///
    /// # Safety
    /// They must be initialised and aligned, and stay valid and unchanged for `'a`; but for an output with these
    /// elements in it, which has the same in their place, and which a transport is given with them if it
    /// [gathers in place](Transport::gathers_in_place).
    pub unsafe fn from_raw(data: *const u8, elements: usize, dtype: DType) -> Self {
        Self { data, elements, dtype, lent: PhantomData }
    }

    /// First byte.
    pub fn as_ptr(&self) -> *const u8 {
        self.data
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Their type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

impl<'a> BufferMut<'a> {
    /// A slice.
    pub fn new<E: Element>(slice: &'a mut [E]) -> Self {
        Self { data: slice.as_mut_ptr().cast(), elements: slice.len(), dtype: E::DTYPE, lent: PhantomData }
    }

    /// `elements` elements of `dtype` at `data`.
    ///
    /// # Safety
    /// They must be aligned, valid for writes, and for reads if the operation reads them, and untouched by others for
    /// `'a`; but for an input that lies in it, as [`BufferRef::from_raw`] says.
    pub unsafe fn from_raw(data: *mut u8, elements: usize, dtype: DType) -> Self {
        Self { data, elements, dtype, lent: PhantomData }
    }

    /// First byte.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.data
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Their type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

/// Allocates the buffer that received elements go to. Their number may be known only once every rank has called
/// (gathers of unequal lengths), so the transport asks for it when it knows.
pub trait OutputAllocator {
    /// A buffer for a tensor of these dims and `dtype`, which the transport fills completely if the operation succeeds.
    ///
    /// # Errors
    /// If the receiver wants another dtype or another number of elements; [`Error::OutOfMemory`] if there is no memory
    /// for them.
    fn allocate(&mut self, dims: &[usize], dtype: DType) -> Result<BufferMut<'_>, Error>;
}

/// The data of one collective.
pub enum Transfer<'a, 'b> {
    /// Buffers that hold this rank's contribution before and the result after: all-reduce, reduce, broadcast. Several
    /// buffers are reduced as one collective, without being copied together.
    InPlace(&'a mut [BufferMut<'b>]),
    /// A contribution and an output for the result: all the others. A rank that only receives passes an empty input.
    /// The input of an all-gather lies in the output, where the result has it, if the transport says that it
    /// [gathers in place](Transport::gathers_in_place); else the two lie apart.
    OutOfPlace {
        /// This rank's contribution.
        input: BufferRef<'b>,
        /// Where the result goes.
        output: &'a mut dyn OutputAllocator,
    },
    /// Nothing: barrier.
    Nothing,
}

/// A message from rank to rank: a tensor that moves, storage and all.
#[derive(Debug, Clone)]
pub struct Message(pub FlexTensor);

/// A received message, in host memory or on a device.
#[derive(Debug, Clone)]
pub enum Arrival {
    /// In host memory.
    Host(Message),
    /// On a device: that of the receiver, or of the sender if both are threads of one process.
    #[cfg(feature = "cubecl")]
    Device(Box<super::DeviceTensor>),
}

impl From<Message> for Arrival {
    fn from(message: Message) -> Self {
        Self::Host(message)
    }
}

impl Arrival {
    /// The message in host memory. Waits for the device if it is on one.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the device cannot be read.
    pub fn into_host(self) -> Result<Message, Error> {
        match self {
            Self::Host(message) => Ok(message),
            #[cfg(feature = "cubecl")]
            Self::Device(tensor) => super::device::to_host(*tensor).map(Message),
        }
    }

    /// Element type and dims of the message.
    pub(crate) fn dtype_and_dims(&self) -> (DType, Vec<usize>) {
        match self {
            Self::Host(Message(tensor)) => (tensor.dtype(), tensor.shape().to_vec()),
            #[cfg(feature = "cubecl")]
            Self::Device(tensor) => (tensor.dtype, tensor.meta.shape().to_vec()),
        }
    }
}

/// Joins the ranks of one group: runs their collectives and delivers their messages.
///
/// # Contract
///
/// - A transport belongs to one rank of one group; its methods block until the operation is done on this rank's side,
///   and may be called from any thread of the rank, one collective at a time.
/// - A collective is checked: when the calls of the ranks do not [match](Call), all ranks get the same error, and no
///   buffer has been touched.
/// - No method blocks past the time-out. When it runs out, a rank is lost, or [`abort`](Self::abort) is called, *every*
///   rank of the group, and of every group split from the same world, returns the same error from then on.
/// - Dropping a transport leaves the group. Peers that then still wait for this rank get an error.
pub trait Transport: Debug + Send + Sync {
    /// Name of the transport, as in `local`.
    fn name(&self) -> &'static str;

    /// Name of the group.
    fn group(&self) -> &Arc<str>;

    /// Index of this rank in the group.
    fn rank(&self) -> usize;

    /// Index of this rank in the world that the group was split from.
    fn world_rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// Runs one collective. Returns the bytes that this rank moved: those it read from peers and those it wrote to
    /// them.
    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error>;

    /// Sends a message. May return before it is received.
    fn send(&self, to: usize, tag: u64, message: Message) -> Result<(), Error>;

    /// Receives the oldest message of `from` with this `tag`.
    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error>;

    /// Takes the oldest message of `from` with this `tag` if it has arrived, and does not wait for it. Transports of
    /// device data on top of this one need it: their threads poll. So it does not show that the rank itself goes on, as
    /// its other calls do, by which peers learn that it has dropped a group.
    fn try_receive(&self, from: usize, tag: u64) -> Result<Option<Message>, Error> {
        let _ = (from, tag);
        let problem = "it cannot poll for a message: implement `Transport::try_receive`";
        Err(Error::Transport { transport: self.name(), problem: problem.into() })
    }

    /// How long any wait may last.
    fn timeout(&self) -> Duration;

    /// Splits the group: ranks of equal `color` form a group, ordered by `key`, then by rank. Collective. The new group
    /// is called by the name of this one, `name` and its color.
    fn split(&self, name: &str, color: u64, key: i64) -> Result<Arc<dyn Transport>, Error>;

    /// Fails the world with `error`, unless it has failed already.
    fn abort(&self, error: Error);

    /// Leaves the world: this rank will call nothing more on this group, nor on any group split from the same world.
    fn leave(&self);

    /// This rank unwinds from a panic. If it now leaves the group, that is the reason; the thread that drops the
    /// transport last, and so leaves the group, may be another one. Without an implementation the rank counts as lost.
    fn panicking(&self) {}

    /// The error that the world has failed with.
    fn failure(&self) -> Option<Error>;

    /// The last collectives of every rank.
    fn log(&self) -> CallLog;

    /// Whether the input of an all-gather may lie in its output, where the result has it: the transport does not write
    /// to it then, nor to anything else of the output before it has the input's elements. If not, they are copied.
    fn gathers_in_place(&self) -> bool {
        false
    }

    /// Whether a collective on host memory runs on the threads that call it, memory traffic included, so that one in
    /// the background takes a core from those that compute. Where a network or another device does the work, it does
    /// not.
    fn works_on_callers(&self) -> bool {
        false
    }

    /// The transport of device data without a copy through the host, if there is one.
    #[cfg(feature = "cubecl")]
    fn on_device(&self) -> Option<&dyn super::DeviceTransport> {
        None
    }
}

/// Demands that a group has a rank.
///
/// # Errors
/// [`Error::NoSuchRank`].
pub(super) fn check_rank(group: &dyn Transport, rank: usize, operation: &'static str) -> Result<(), Error> {
    let size = group.size();
    match rank < size {
        true => Ok(()),
        false => Err(Error::NoSuchRank { group: group.group().clone(), rank, size, operation }),
    }
}
