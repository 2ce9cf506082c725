//! Starting ranks as threads and as processes, arranging them, and their random numbers.

mod mesh;
mod processes;
mod rendezvous;
mod rng;
mod stop;
