//! Starting ranks as threads and as processes, arranging them, and their random numbers.

#[path = "../common"]
mod common {
    pub mod failing;
}

mod mesh;
mod processes;
mod rendezvous;
mod rng;
mod stop;
