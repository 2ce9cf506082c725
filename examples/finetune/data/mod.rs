//! What the model is trained on: from a file to batches.
//!
//! A file is looked through once, which checks every line and finds out how long its documents are; from then on only
//! their places are in memory ([`source`]). A [`document`] is a text, a prompt with its completion, or a conversation
//! as the model's chat [`template`] writes it. Documents are packed into rows ([`packing`]), which are numbered through
//! all epochs ([`set`]), and become tensors ([`row`]).

pub mod document;
pub mod packing;
pub mod row;
pub mod set;
pub mod source;
pub mod template;
pub mod tokenizer;
