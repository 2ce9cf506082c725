//! How many rows fit, for `--batch auto`.

use burn::tensor::{Device, Int, Tensor};
use burn_parallel::batch::{rows_within, step_memory};
use burn_parallel::prelude::*;

use crate::args::Args;
use crate::common::batch::largest;
use crate::dry_run::Held;
use crate::model::{Batch, Llama};
use crate::train::adapted;

/// Tokens that are not gone beyond, on a replica: by then a processor is busy, and a step takes long.
const MOST: usize = 8192;

/// The flags with the largest batch that goes through every layer at once.
pub fn choose(args: &Args) -> Result<Args, Error> {
    let most = (MOST / args.seq).max(1);
    let rows = largest(most, |bytes, most| match args.axes.pp * args.axes.tp {
        // What a replica needs that is whole is known; the ranks are threads, and share the memory.
        1 => {
            let model = adapted(args, &args.autodiff(&Device::flex()))?;
            let held = Held::of(&model, args);
            rows_within(bytes / args.axes.dp as u64, most, |rows| {
                let tokens = Tensor::<2, Int>::zeros([rows, args.seq + 1], &Device::flex());
                Ok(held.all + 2 * held.trained + step_memory(&model, Batch::of_documents(tokens), Llama::loss)?)
            })
        }
        _ => Ok(most),
    })?;
    Ok(args.with_rows_at_once(rows))
}
