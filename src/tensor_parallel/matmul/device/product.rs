//! Products and their collectives on a device, chunk by chunk.

use std::ops::Range;

use burn::tensor::{Float, Tensor};
use burn_cubecl::kernel::into_contiguous;

use super::view::{dims, multiply, multiply_all, rows, stacked, transposed};
use crate::Error;
use crate::comm::device::{from_device, to_device, with_dims};
use crate::comm::{Communicator, DeviceTensor, Pending, ReduceOp};
use crate::tensor_parallel::matmul::deal::{Deal, total_positions};
use crate::tensor_parallel::matmul::schedule::{Schedule, Size};
use crate::tensor_parallel::matmul::tape::{Form, Job};

pub(super) fn forward(x: DeviceTensor, weight: DeviceTensor, job: &Job) -> Result<(DeviceTensor, DeviceTensor), Error> {
    match job.form {
        Form::Column => Ok((multiply(x.clone(), &weight)?, x)),
        Form::Row => Ok((multiply_sum(&x, &weight, job, None)?.0, x)),
        Form::RowScatter => Ok((multiply_scatter(&x, &weight, job, None)?.0, x)),
        Form::GatherColumn => gather_multiply(x, &weight, job),
    }
}

pub(super) fn backward(
    gradient: DeviceTensor,
    x: DeviceTensor,
    weight: DeviceTensor,
    [wants_x, wants_weight]: [bool; 2],
    job: &Job,
) -> Result<[Option<DeviceTensor>; 2], Error> {
    let turned = transposed(weight);
    let of_weight = |gradient: &DeviceTensor| multiply(transposed(x.clone()), gradient);
    let beside = || of_weight(&gradient);
    let beside: Option<&dyn Fn() -> Result<DeviceTensor, Error>> = if wants_weight { Some(&beside) } else { None };
    let maybe = |gradient: &DeviceTensor| wants_weight.then(|| of_weight(gradient)).transpose();
    match job.form {
        Form::Row => {
            let of_x = wants_x.then(|| multiply(gradient.clone(), &turned)).transpose()?;
            Ok([of_x, maybe(&gradient)?])
        }
        Form::RowScatter => {
            let (of_x, whole) = match wants_x {
                true => gather_multiply(gradient, &turned, job).map(|(of_x, whole)| (Some(of_x), whole))?,
                false => (None, gather(gradient, job.unit, &job.comm)?),
            };
            Ok([of_x, maybe(&whole)?])
        }
        _ if !wants_x => Ok([None, maybe(&gradient)?]),
        Form::Column => multiply_sum(&gradient, &turned, job, beside).map(|(of_x, made)| [Some(of_x), made]),
        Form::GatherColumn => multiply_scatter(&gradient, &turned, job, beside).map(|(of_x, made)| [Some(of_x), made]),
    }
}

type Beside<'a> = Option<&'a dyn Fn() -> Result<DeviceTensor, Error>>;

/// Chunks that travel, or have arrived.
struct Flights {
    background: bool,
    flying: Vec<Pending<DeviceTensor>>,
    arrived: Vec<DeviceTensor>,
}

impl Flights {
    fn new(schedule: Schedule) -> Self {
        Self { background: schedule.background, flying: Vec::new(), arrived: Vec::new() }
    }

    fn start(
        &mut self,
        comm: &Communicator,
        operation: impl FnOnce(&Communicator) -> Result<DeviceTensor, Error> + Send + 'static,
    ) -> Result<(), Error> {
        match self.background {
            true => self.flying.push(comm.start(operation)),
            false => self.arrived.push(operation(comm)?),
        }
        Ok(())
    }

    fn wait(self) -> Result<Vec<DeviceTensor>, Error> {
        let mut arrived = self.arrived;
        for flight in self.flying {
            arrived.push(flight.wait()?);
        }
        Ok(arrived)
    }
}

fn schedule(job: &Job, rows: usize, columns: usize, inner: usize, size: usize, beside: bool) -> Schedule {
    job.schedule(Size { rows, row_bytes: columns * size, row_work: columns * inner, beside, on_device: true })
}

/// `sum over r of left_r * right_r`, and what `beside` enqueues behind the last chunk.
fn multiply_sum(
    left: &DeviceTensor,
    right: &DeviceTensor,
    job: &Job,
    beside: Beside<'_>,
) -> Result<(DeviceTensor, Option<DeviceTensor>), Error> {
    let ([m, inner], [_, columns]) = (dims(left), dims(right));
    let schedule = schedule(job, m, columns, inner, left.dtype.size(), beside.is_some());
    let mut flights = Flights::new(schedule);
    for chunk in schedule.cut(m) {
        let partial = multiply(rows(left, chunk), right)?;
        flights.start(&job.comm, move |comm| {
            to_device(comm.all_reduce(from_device::<2, Float>(partial), ReduceOp::Sum)?)
        })?;
    }
    let made = beside.map(|make| make()).transpose()?;
    Ok((stacked(flights.wait()?)?, made))
}

/// This rank's positions of that sum.
fn multiply_scatter(
    left: &DeviceTensor,
    right: &DeviceTensor,
    job: &Job,
    beside: Beside<'_>,
) -> Result<(DeviceTensor, Option<DeviceTensor>), Error> {
    let ([m, inner], [_, columns]) = (dims(left), dims(right));
    let schedule = schedule(job, m, columns, inner, left.dtype.size(), beside.is_some());
    let deal = Deal::new(m / job.unit, job.comm.size(), job.comm.rank(), schedule);
    let mut flights = Flights::new(schedule);
    for chunk in 0..schedule.chunks {
        let partial = match schedule.chunks {
            1 => multiply(left.clone(), right)?,
            _ => multiply_all(deal.of_all(chunk).map(|slot| rows(left, by(slot, job.unit))).collect(), right)?,
        };
        let (positions, own, unit) = (deal.total(chunk), deal.of_own(chunk).len(), job.unit);
        flights.start(&job.comm, move |comm| {
            let partial = with_dims(into_contiguous(partial), vec![positions, unit * columns]);
            let own_rows = to_device(comm.reduce_scatter(from_device::<2, Float>(partial), ReduceOp::Sum)?)?;
            Ok(with_dims(own_rows, vec![own * unit, columns]))
        })?;
    }
    let made = beside.map(|make| make()).transpose()?;
    Ok((stacked(flights.wait()?)?, made))
}

/// `[left_0, .., left_(n-1)] * right`, and the gathered left factor.
fn gather_multiply(left: DeviceTensor, right: &DeviceTensor, job: &Job) -> Result<(DeviceTensor, DeviceTensor), Error> {
    let ([own_rows, inner], [_, columns]) = (dims(&left), dims(right));
    let (unit, rank, size) = (job.unit, job.comm.rank(), job.comm.size());
    let positions = total_positions(own_rows / unit, job)?;
    let schedule = schedule(job, positions * unit, inner, columns, left.dtype.size(), true);
    if !schedule.background {
        let whole = gather(left, unit, &job.comm)?;
        return Ok((multiply(whole.clone(), right)?, whole));
    }
    let deal = Deal::new(positions, size, rank, schedule);
    let left = into_contiguous(left);
    let mut flights = Flights::new(schedule);
    for chunk in 0..schedule.chunks {
        let brought = rows(&left, by(deal.within_own(chunk), unit));
        flights.start(&job.comm, move |comm| gather(brought, unit, comm))?;
    }
    // What this rank has needs no waiting.
    let own = multiply(left.clone(), right)?;
    let (mut slots, mut made) = (vec![Vec::new(); size], vec![Vec::new(); size]);
    for (chunk, flight) in flights.flying.into_iter().enumerate() {
        let gathered = flight.wait()?;
        let mut from = 0;
        for (of, slot) in deal.of_all(chunk).enumerate() {
            let here = by(from..from + slot.len(), unit);
            from += slot.len();
            if of != rank && !here.is_empty() {
                let slot = rows(&gathered, here);
                made[of].push(multiply(slot.clone(), right)?);
                slots[of].push(slot);
            }
        }
    }
    made[rank] = vec![own];
    slots[rank] = vec![left];
    let all = |of_ranks: Vec<Vec<DeviceTensor>>| stacked(of_ranks.into_iter().flatten().collect());
    Ok((all(made)?, all(slots)?))
}

/// `[left_0, .., left_(n-1)]`.
fn gather(left: DeviceTensor, unit: usize, comm: &Communicator) -> Result<DeviceTensor, Error> {
    let [own_rows, width] = dims(&left);
    let brought = with_dims(into_contiguous(left), vec![own_rows / unit, unit * width]);
    let whole: Tensor<2> = comm.all_gather(from_device::<2, Float>(brought))?;
    let positions = whole.dims()[0];
    Ok(with_dims(to_device(whole)?, vec![positions * unit, width]))
}

/// The rows of positions.
fn by(positions: Range<usize>, unit: usize) -> Range<usize> {
    positions.start * unit..positions.end * unit
}
