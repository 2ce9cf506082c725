//! `--batch auto`: as many rows as fit.

use burn::tensor::Device;
use burn_parallel::batch::{model_memory, step_memory};
use burn_parallel::prelude::*;

use crate::args::Args;
use crate::common::batch::rows_that_fit;
use crate::text::tensors;
use crate::train::loss;

/// Rows that are not gone beyond, on a replica: by then a processor is busy, and a step takes long.
const MOST: usize = 1024;

/// The flags with the largest batch that goes through every layer at once.
pub fn choose(args: &Args) -> Result<Args, Error> {
    let model = args.model().init(&Device::flex().autodiff());
    let text = vec![0u8; args.seq + 1];
    let memory = |rows| {
        let batch = tensors(&vec![&text[..]; rows], &Device::flex());
        Ok(model_memory(&model, 2) + step_memory(&model, batch, loss)?)
    };
    Ok(args.with_rows_at_once(rows_that_fit(MOST, &args.strategy, args.axes, memory)?))
}
