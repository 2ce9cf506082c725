//! The gradient norm, and clipping by it, over every axis.

mod by_hand;
mod counted;
mod golden;
pub mod lm;
mod meshes;
mod non_finite;
mod one_device;

/// Demands a number within a fraction of the expected one.
#[track_caller]
fn close(what: &str, expected: f64, found: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance * expected, "{what}: {found}, not {expected}");
}
