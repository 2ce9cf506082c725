//! How many rows fit, for `--batch auto`.

use burn::tensor::{Device, Int, Tensor};

use crate::args::Args;
use crate::common::fit::{Most, can_be_held, known_to_fit, largest};
use crate::common::program::Failure;
use crate::input::Input;
use crate::model::{Batch, Llama};
use crate::train::adapted;

/// Tokens that are not gone beyond, on a replica: by then a processor is busy, and a step takes long.
const MOST: usize = 8192;

/// The flags with the largest batch that goes through every layer at once, of an epoch at most.
pub fn choose(args: &Args, input: &Input) -> Result<Args, Failure> {
    let sense = ((MOST / args.seq).max(1), format!("{MOST} tokens on a replica"));
    let most = Most::of(sense, (input.data.rows(), "an epoch of --data"), args.axes.dp * args.in_pipeline());
    let batch = |rows: usize| Batch::of_documents(Tensor::<2, Int>::zeros([rows, args.seq + 1], &Device::flex()));
    let make = |device: &Device| adapted(args, device);
    let ways = (&args.strategy, args.axes.ranks);
    let rows = largest(most, (args.fit, "--model"), |bytes, most| match args.recompute {
        // Steps need less then than captured ones, and it is not known how much.
        true => can_be_held(ways, bytes, &make).map(|held| if held { most } else { 0 }),
        false => known_to_fit(ways, (bytes, most), make, batch, Llama::loss),
    })?;
    let args = args.with_rows_at_once(rows);
    args.growth.check_found(args.batch()).and_then(|()| input.check_steps(&args)).map_err(Failure::Refused)?;
    Ok(args)
}
