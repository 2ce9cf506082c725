//! How many rows fit, for `--batch auto`.

use burn::tensor::Device;
use burn_parallel::prelude::*;

use crate::args::Args;
use crate::common::batch::{known_to_fit, largest};
use crate::text::tensors;
use crate::train::loss;

/// Rows that are not gone beyond, on a replica: by then a processor is busy, and a step takes long.
const MOST: usize = 1024;

/// The flags with the largest batch that goes through every layer at once.
pub fn choose(args: &Args) -> Result<Args, Error> {
    let text = vec![0u8; args.seq + 1];
    let batch = |rows: usize| tensors(&vec![&text[..]; rows], &Device::flex());
    let ways = (&args.strategy, args.axes.ranks);
    let make = |device: &Device| Ok(args.model().init(device));
    let rows = largest(MOST, |bytes, most| known_to_fit(ways, (bytes, most), make, batch, loss))?;
    Ok(args.with_rows_at_once(rows))
}
