//! Models of what threads and processes meet by, checked by loom over every interleaving and every permitted reordering.

mod board;
mod explore;
mod local;
