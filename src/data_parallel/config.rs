//! Settings of data parallelism.

use std::sync::Arc;

use burn::tensor::FloatDType;

use super::comm_hook::{AllReduceHook, CastHook, CommHook};

/// Settings of [`DataParallel::data_parallel`](super::DataParallel::data_parallel).
#[derive(Debug, Clone)]
pub struct DataParallelConfig {
    pub(super) bucket_bytes: usize,
    pub(super) first_bucket_bytes: usize,
    pub(super) hook: Arc<dyn CommHook>,
    pub(super) overlap: bool,
}

impl DataParallelConfig {
    /// The default: buckets of 25 MB, the first of 1 MB, gradients reduced in their own dtype while backward runs.
    pub fn new() -> Self {
        Self { bucket_bytes: 25_000_000, first_bucket_bytes: 1_000_000, hook: Arc::new(AllReduceHook), overlap: true }
    }

    /// Sets how many bytes of gradients are reduced together. Larger buckets mean fewer collectives, smaller ones start
    /// earlier. A single larger gradient makes a bucket of its own.
    pub fn with_bucket_bytes(mut self, bytes: usize) -> Self {
        self.bucket_bytes = bytes;
        self.first_bucket_bytes = self.first_bucket_bytes.min(bytes);
        self
    }

    /// Sets the size of the first bucket, the last layers' gradients: small, so that communication starts early.
    pub fn with_first_bucket_bytes(mut self, bytes: usize) -> Self {
        self.first_bucket_bytes = bytes;
        self
    }

    /// Sends gradients in another float dtype, as `FloatDType::BF16`, and casts the sum back. Sums of 16-bit floats are
    /// accumulated in `f32`; each contribution and the result are rounded once. Over NCCL, which cannot do that, they travel as
    /// `f32` all the same, and no bytes are saved. Replaces any other hook.
    pub fn with_reduce_dtype(self, dtype: FloatDType) -> Self {
        self.with_comm_hook(CastHook::new(dtype))
    }

    /// Sets how a bucket is reduced: a compression of one's own. See [`CommHook`].
    pub fn with_comm_hook(mut self, hook: impl CommHook + 'static) -> Self {
        self.hook = Arc::new(hook);
        self
    }

    /// Sets whether buckets are reduced while backward still runs (default), or all after it.
    pub fn with_overlap(mut self, overlap: bool) -> Self {
        self.overlap = overlap;
        self
    }
}

impl Default for DataParallelConfig {
    fn default() -> Self {
        Self::new()
    }
}
