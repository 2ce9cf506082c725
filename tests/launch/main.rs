//! Starting ranks as threads and as processes, arranging them, and their random numbers.

#[path = "../common"]
mod common {
    pub mod failing;
    pub mod ports;
}

mod mesh;
mod processes;
mod rendezvous;
mod rng;
mod stop;
