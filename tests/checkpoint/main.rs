//! Checkpoints: from any mesh to any mesh, or not at all; and directories of Hugging Face.

#[path = "../common/mod.rs"]
mod common;

mod alike;
mod background;
mod beside_rows;
mod damage;
mod dropout;
mod edges;
mod fickle;
mod hf;
mod keep;
mod meshes;
mod net;
mod optimizers;
mod precision;
mod python;
mod reads;
mod room;
mod sealed;
mod somebody;
mod strict;
mod tied;
mod two_runs;
mod wrong_json;

use crate::common::dir::Dir;
