//! How many rows fit, for `--batch auto`.

use burn::tensor::Device;
use burn_parallel::batch::{model_memory, rows_within, step_memory};
use burn_parallel::prelude::*;

use crate::args::Args;
use crate::common::batch::largest;
use crate::text::tensors;
use crate::train::loss;

/// Rows that are not gone beyond, on a replica: by then a processor is busy, and a step takes long.
const MOST: usize = 1024;

/// The flags with the largest batch that goes through every layer at once.
pub fn choose(args: &Args) -> Result<Args, Error> {
    let rows = largest(MOST, |bytes, most| match args.axes.pp * args.axes.tp {
        // What a replica needs that is whole is known; the ranks are threads, and share the memory.
        1 => {
            let model = args.model().init(&Device::flex().autodiff());
            let held = model_memory(&model, 2);
            let text = vec![0u8; args.seq + 1];
            rows_within(bytes / args.axes.dp as u64, most, |rows| {
                let batch = tensors(&vec![&text[..]; rows], &Device::flex());
                Ok(held + step_memory(&model, batch, loss)?)
            })
        }
        _ => Ok(most),
    })?;
    Ok(args.with_rows_at_once(rows))
}
