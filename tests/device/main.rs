//! Ranks and models on a GPU, or on what Vulkan offers in its place.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/transport_suite/mod.rs"]
mod transport_suite;

mod fits;
mod kernels;
mod launches;
mod local;
mod strategies;
mod trials;

fn main() {
    if launches::ran_steps() {
        return;
    }
    let mut trials = trials::Trials::new();
    local::add_to(&mut trials);
    fits::add_to(&mut trials);
    kernels::add_to(&mut trials);
    launches::add_to(&mut trials);
    strategies::add_to(&mut trials);
    trials.run()
}
