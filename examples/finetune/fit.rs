//! How many rows fit, for `--batch auto`.

use burn::tensor::{Device, Int, Tensor};
use burn_parallel::prelude::*;

use crate::args::Args;
use crate::common::batch::{known_to_fit, largest};
use crate::model::{Batch, Llama};
use crate::train::adapted;

/// Tokens that are not gone beyond, on a replica: by then a processor is busy, and a step takes long.
const MOST: usize = 8192;

/// The flags with the largest batch that goes through every layer at once.
pub fn choose(args: &Args) -> Result<Args, Error> {
    let most = (MOST / args.seq).max(1);
    let batch = |rows: usize| Batch::of_documents(Tensor::<2, Int>::zeros([rows, args.seq + 1], &Device::flex()));
    let make = |device: &Device| adapted(args, device);
    let ways = (&args.strategy, args.axes.ranks);
    let rows = largest(most, |bytes, most| match args.recompute {
        // Then steps need less than captured ones.
        true => Ok(most),
        false => known_to_fit(ways, (bytes, most), make, batch, Llama::loss),
    })?;
    Ok(args.with_rows_at_once(rows))
}
