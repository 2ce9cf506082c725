//! Hugging Face directories: what fine-tuners have on disk, and hand on.
//!
//! [`open`] maps the tensors of a directory, a [`Mapping`] says which of them are which parameters of a burn model, and
//! [`load`](crate::train::ParallelModule::load) reads each rank's slices, whatever the model is spread over.
//! [`compare`] tells beforehand what fits.

mod adapter;
mod compare;
mod index;
mod mapped;
mod mapping;
mod merged;
mod pattern;
mod presets;
mod read;
mod relation;
mod rule;
mod save;
mod save_adapter;
mod weights;

pub use adapter::{Adapter, AdapterConfig};
pub use compare::{Comparison, Match, Unfit, compare};
pub use mapped::Mapped;
pub use mapping::Mapping;
pub use merged::Merged;
pub use rule::{Names, Rule};
pub use save::{SaveConfig, SavedDirectory, save};
pub use save_adapter::save_adapter;
pub use weights::{Weights, open};
