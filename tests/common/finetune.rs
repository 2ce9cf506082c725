//! The parts of `examples/finetune` that are about the model.

#[path = "../../examples/finetune/directory.rs"]
pub mod directory;
#[path = "../../examples/finetune/generate.rs"]
pub mod generate;
#[path = "../../examples/finetune/lora.rs"]
pub mod lora;
#[path = "../../examples/finetune/model/mod.rs"]
pub mod model;
