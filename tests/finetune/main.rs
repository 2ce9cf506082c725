//! The example `finetune`: its data, and what its user meets.

#[path = "../common"]
mod common {
    pub mod ports;
}
#[allow(dead_code, reason = "the example uses more of it")]
#[path = "../../examples/finetune/data/mod.rs"]
mod data;
#[allow(dead_code, unused_imports, reason = "the example uses more of it")]
#[path = "../../examples/finetune/model/mod.rs"]
mod model;

mod batches;
mod directory;
mod documents;
mod program;
mod refusals;
mod rows;
mod started;
#[cfg(target_os = "linux")]
mod streamed;
#[cfg(unix)]
mod terminal;
