//! What several test binaries share: models, the training of one device, comparisons.
#![allow(dead_code, reason = "each test binary uses the part that it needs")]

pub mod cases;
pub mod checkpointing;
pub mod dense;
pub mod dir;
pub mod failing;
pub mod fill;
pub mod finetune;
pub mod forwarding;
pub mod heard;
pub mod llama;
pub mod models;
pub mod ports;
pub mod priority;
pub mod products;
pub mod reference;
pub mod rotary;
pub mod shapes;
pub mod store;
