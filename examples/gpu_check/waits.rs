//! Where the host waits in a collective on a device, piece by piece: burn's threads of the device, and the other ranks.
//!
//! A call waits once for the thread of burn's fusion, which knows the tensor's buffer, once for the other ranks, and
//! once for the thread of the device, which knows where the buffer lies. The last two are asked for together.

use std::sync::mpsc::sync_channel;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use burn_cubecl::{Cube, CubeBackend};
use burn_parallel::prelude::*;
use cubecl_common::device::{DeviceId, DeviceService};
use cubecl_common::device_handle::DeviceHandle;
use cubecl_server::runtime::Runtime;

use crate::device::Choice;
use crate::report::{Figures, Shortfall, figure};

/// Microseconds of each piece.
pub fn figures(choice: Choice, ranks: usize) -> Result<Figures, Shortfall> {
    let device = choice.open(0)?;
    let found = launch::threads(ranks).run(|rank| match choice {
        Choice::Cuda => one_rank::<<cubecl::cuda::CudaRuntime as Runtime>::Server>(&rank, &device),
        #[cfg(feature = "wgpu")]
        Choice::Wgpu => one_rank::<<cubecl::wgpu::WgpuRuntime as Runtime>::Server>(&rank, &device),
        _ => Ok(None),
    })?;
    let none = || Shortfall::Skipped(format!("burn has no threads of its own for {choice}"));
    let found = found.into_iter().collect::<Option<Vec<_>>>().ok_or_else(none)?;
    let slowest = |piece: usize| found.iter().map(|pieces| pieces[piece]).fold(0.0, f64::max) * 1e6;
    let names = ["fusion's thread", "device's thread", "ranks meet", "one after the other", "together"];
    Ok(names.into_iter().enumerate().map(|(piece, name)| figure(name, slowest(piece), "us")).collect())
}

fn one_rank<S: DeviceService>(rank: &Rank, device: &Device) -> Result<Option<[f64; 5]>, Error> {
    let ones = Tensor::<1>::ones([1024], device);
    let fused = ones.try_into_primitive::<Cube>().map_err(|problem| Error::user(format!("{problem:?}")))?;
    let fusion = fused.client.clone();
    let tensor = fusion.resolve_tensor_float::<CubeBackend>(fused);
    let id: DeviceId = tensor.client.service_id().device;
    let server = DeviceHandle::<S>::new(id);
    let failed = |problem| Error::user(format!("{problem:?}"));
    let asks_fusion = || fusion.run(|| ()).map_err(failed);
    let asks_device = || server.submit_blocking(|_| ()).map_err(failed);
    let together = || {
        let (sender, answer) = sync_channel(1);
        server.submit(move |_| {
            let _ = sender.send(());
        });
        server.flush_queue();
        rank.barrier()?;
        answer.recv().map_err(Error::user)
    };
    let in_turn = || rank.barrier().and_then(|()| asks_device());
    let mut best = [f64::INFINITY; 5];
    for _ in 0..8 {
        let pieces: [&dyn Fn() -> Result<(), Error>; 5] =
            [&asks_fusion, &asks_device, &|| rank.barrier(), &in_turn, &together];
        for (best, piece) in best.iter_mut().zip(pieces) {
            const TIMES: usize = 500;
            rank.barrier()?;
            let began = Instant::now();
            (0..TIMES).try_for_each(|_| piece())?;
            *best = best.min(began.elapsed().as_secs_f64() / TIMES as f64);
        }
    }
    Ok(Some(best))
}
