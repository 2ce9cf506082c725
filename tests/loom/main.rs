//! Models of the synchronization between threads and processes, checked by loom over every interleaving and every
//! permitted reordering.

mod explore;
mod local;
mod shared_memory;
