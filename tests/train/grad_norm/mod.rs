//! The gradient norm, and clipping by it, over every axis.

mod by_hand;
mod counted;
mod golden;
pub mod lm;
mod meshes;
mod non_finite;
mod one_device;
