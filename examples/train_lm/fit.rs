//! How many rows fit, for `--batch auto`.

use burn::tensor::Device;

use crate::args::Args;
use crate::common::fit::{Most, known_to_fit, largest};
use crate::common::program::Failure;
use crate::text::{Text, tensors};
use crate::train::loss;

/// Rows that are not gone beyond, on a replica: by then a processor is busy, and a step takes long.
const MOST: usize = 1024;

/// The flags with the largest batch that goes through every layer at once, of the whole text at most.
pub fn choose(args: &Args, text: &Text) -> Result<Args, Failure> {
    let sense = (MOST, format!("{MOST} on a replica"));
    // For one row in each micro-batch.
    let each = args.with_rows_at_once(1).batch;
    let most = Most::of(sense, (text.rows_apart() as u64, "the text"), each);
    let row = vec![0u8; args.seq + 1];
    let batch = |rows: usize| tensors(&vec![&row[..]; rows], &Device::flex());
    let ways = (&args.strategy, args.axes.ranks);
    let make = |device: &Device| Ok(args.model().init(device));
    let smaller = "--layers, --d-model";
    let rows = largest(most, (args.fit, smaller), |bytes, most| known_to_fit(ways, (bytes, most), make, batch, loss))?;
    let args = args.with_rows_at_once(rows);
    args.growth.check_found(args.batch).map_err(Failure::Refused)?;
    Ok(args)
}
