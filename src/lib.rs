#![allow(missing_docs)] // replaced by the lead
pub mod error;
pub mod graph;
