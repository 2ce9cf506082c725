//! A language model of the Llama family (Llama 2 and 3, Qwen 2, 2.5 and 3, Mistral, SmolLM2) as anyone would write it
//! with `burn::nn`: these files know nothing of ranks. The fields have the names of Python's `transformers`.

mod attention;
mod autocast;
mod batch;
mod config;
mod llama;
mod rope;

pub use autocast::Autocast;
pub use batch::{Batch, whole_rows};
pub use config::LlamaConfig;
pub use llama::Llama;
pub use rope::{Rope, Scaling};
