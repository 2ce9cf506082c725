//! Products and their collectives on a device, chunk by chunk.
//!
//! Left factors are brought into an order in which positions come first: a view where nothing stands before them.

use std::ops::Range;

use burn::tensor::{Float, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::permute;

use super::view::{add, dims, multiply, multiply_all, rows, stacked, transposed};
use crate::Error;
use crate::collective_matmul::chunk_plan::{ChunkPlan, total_positions};
use crate::collective_matmul::schedule::{ChunkSchedule, Size};
use crate::collective_matmul::{PendingProduct, ProductCall};
use crate::comm::device::{from_device, to_device, with_dims};
use crate::comm::{Communicator, DeviceTensor, Pending, ReduceOp};

/// Chunks that travel, or have arrived.
struct RunningChunks {
    background: bool,
    in_flight: Vec<Pending<DeviceTensor>>,
    arrived: Vec<DeviceTensor>,
}

impl RunningChunks {
    fn new(schedule: ChunkSchedule) -> Self {
        Self { background: schedule.background, in_flight: Vec::new(), arrived: Vec::new() }
    }

    fn start(
        &mut self,
        comm: &Communicator,
        operation: impl FnOnce(&Communicator) -> Result<DeviceTensor, Error> + Send + 'static,
    ) -> Result<(), Error> {
        match self.background {
            true => self.in_flight.push(comm.start(operation)),
            false => self.arrived.push(operation(comm)?),
        }
        Ok(())
    }

    /// All chunks, one behind the other.
    fn together(self) -> Result<PendingProduct<DeviceTensor>, Error> {
        let Self { background, in_flight, arrived } = self;
        match background {
            false => stacked(arrived).map(PendingProduct::Ready),
            true => Ok(PendingProduct::Running(Box::new(move || {
                stacked(in_flight.into_iter().map(Pending::wait).collect::<Result<Vec<_>, _>>()?)
            }))),
        }
    }
}

/// A left factor as a matrix of rows, positions first, and what it takes to bring products back.
struct RowMatrix {
    /// Its dims, of which `dim` has the positions.
    dims: Vec<usize>,
    dim: usize,
    matrix: DeviceTensor,
}

impl RowMatrix {
    fn of(left: DeviceTensor, dim: usize) -> Self {
        let dims = left.meta.shape().to_vec();
        let features = dims[dims.len() - 1];
        let count = dims[..dims.len() - 1].iter().product();
        // A matrix is taken as it lies.
        let matrix = match (dim, dims.len()) {
            (0, 2) => left,
            (0, _) => with_dims(into_contiguous(left), vec![count, features]),
            _ => {
                let order: Vec<usize> = [dim].into_iter().chain(0..dim).chain(dim + 1..dims.len()).collect();
                with_dims(into_contiguous(permute(left, &order)), vec![count, features])
            }
        };
        Self { dims, dim, matrix }
    }

    fn positions(&self) -> usize {
        self.dims[self.dim]
    }

    /// Rows of a position.
    fn unit(&self) -> usize {
        let without = |(place, size): (usize, &usize)| if place == self.dim { 1 } else { *size };
        self.dims[..self.dims.len() - 1].iter().enumerate().map(without).product()
    }

    /// A matrix of the rows of so many positions, of any columns, under the dims.
    fn back(&self, positions: usize) -> impl Fn(DeviceTensor) -> DeviceTensor + Send + use<> {
        let (mut dims, dim) = (self.dims.clone(), self.dim);
        dims.remove(dim);
        dims.insert(0, positions);
        move |made| {
            let mut dims = dims.clone();
            if let Some(last) = dims.last_mut() {
                *last = self::dims(&made)[1];
            }
            let order: Vec<usize> = (1..=dim).chain([0]).chain(dim + 1..dims.len()).collect();
            permute(with_dims(into_contiguous(made), dims), &order)
        }
    }
}

/// A right factor as a matrix.
fn matrix(right: DeviceTensor) -> DeviceTensor {
    let dims = right.meta.shape().to_vec();
    match dims.as_slice() {
        [_, _] => right,
        [.., rows, columns] => {
            let (rows, columns) = (*rows, *columns);
            // The dims before are 1: what is left of a view of them is one.
            let strides = right.meta.strides();
            let is_transposed = rows > 1 && columns > 1 && strides[dims.len() - 2] < strides[dims.len() - 1];
            match is_transposed {
                true => {
                    let order: Vec<usize> = (0..dims.len() - 2).chain([dims.len() - 1, dims.len() - 2]).collect();
                    transposed(with_dims(into_contiguous(permute(right, &order)), vec![columns, rows]))
                }
                false => with_dims(into_contiguous(right), vec![rows, columns]),
            }
        }
        _ => right,
    }
}

fn schedule(
    call: &ProductCall,
    [rows, across, split]: [usize; 3],
    size: usize,
    beside: bool,
) -> Result<ChunkSchedule, Error> {
    call.schedule(Size { rows, row_bytes: across * size, across, split, beside, on_device: true })
}

/// Pairs of factors whose products are added up.
struct Terms(Vec<[DeviceTensor; 2]>);

impl Terms {
    fn columns(&self) -> usize {
        self.0.first().map_or(0, |[_, right]| dims(right)[1])
    }

    /// Features of all left factors.
    fn features(&self) -> usize {
        self.0.iter().map(|[_, right]| dims(right)[0]).sum()
    }

    /// The sum of what is made of each pair.
    fn add_up(
        &self,
        make: impl Fn(&DeviceTensor, &DeviceTensor) -> Result<DeviceTensor, Error>,
    ) -> Result<DeviceTensor, Error> {
        let mut sum = None;
        for [left, right] in &self.0 {
            let next = make(left, right)?;
            sum = Some(match sum {
                None => next,
                Some(sum) => add(sum, next),
            });
        }
        sum.ok_or_else(|| Error::invalid("a sharded product", "a sum of no products"))
    }
}

pub(super) fn sum(
    terms: Vec<[DeviceTensor; 2]>,
    call: &ProductCall,
    beside: bool,
) -> Result<PendingProduct<DeviceTensor>, Error> {
    let first = &terms.first().ok_or_else(|| call.no_terms())?[0];
    let (size, first) = (first.dtype.size(), RowMatrix::of(first.clone(), 0));
    let back = first.back(first.positions());
    let terms = Terms(terms.into_iter().map(|[left, right]| [RowMatrix::of(left, 0).matrix, matrix(right)]).collect());
    let (m, columns) = (dims(&terms.0[0][0])[0], terms.columns());
    let schedule = schedule(call, [m, columns, terms.features()], size, beside)?;
    let mut running = RunningChunks::new(schedule);
    for chunk in schedule.cut(m) {
        let partial = terms.add_up(|left, right| multiply(rows(left, chunk.clone()), right))?;
        running.start(&call.comm, move |comm| {
            to_device(comm.all_reduce(from_device::<2, Float>(partial), ReduceOp::Sum)?)
        })?;
    }
    Ok(running.together()?.map(back))
}

pub(super) fn scatter(
    terms: Vec<[DeviceTensor; 2]>,
    call: &ProductCall,
    beside: bool,
) -> Result<PendingProduct<DeviceTensor>, Error> {
    let first = RowMatrix::of(terms.first().ok_or_else(|| call.no_terms())?[0].clone(), call.dim);
    let (size, positions, unit) = (first.matrix.dtype.size(), first.positions(), first.unit());
    let terms =
        Terms(terms.into_iter().map(|[left, right]| [RowMatrix::of(left, call.dim).matrix, matrix(right)]).collect());
    let columns = terms.columns();
    let schedule = schedule(call, [positions * unit, columns, terms.features()], size, beside)?;
    let plan = ChunkPlan::new(positions, call.comm.size(), call.comm.rank(), schedule);
    let mut running = RunningChunks::new(schedule);
    for chunk in 0..schedule.chunks {
        let partial = terms.add_up(|left, right| match schedule.chunks {
            1 => multiply(left.clone(), right),
            _ => multiply_all(plan.of_all(chunk).map(|slot| rows(left, by(slot, unit))).collect(), right),
        })?;
        let (positions, own) = (plan.total(chunk), plan.of_own(chunk).len());
        running.start(&call.comm, move |comm| {
            let partial = with_dims(into_contiguous(partial), vec![positions, unit * columns]);
            let own_rows = to_device(comm.reduce_scatter(from_device::<2, Float>(partial), ReduceOp::Sum)?)?;
            Ok(with_dims(own_rows, vec![own * unit, columns]))
        })?;
    }
    Ok(running.together()?.map(first.back(plan.own())))
}

pub(super) fn gather(
    left: DeviceTensor,
    rights: Vec<DeviceTensor>,
    call: &ProductCall,
) -> Result<(Vec<DeviceTensor>, DeviceTensor), Error> {
    let rights: Vec<DeviceTensor> = rights.into_iter().map(matrix).collect();
    let left = RowMatrix::of(left, call.dim);
    let (own, unit) = (left.positions(), left.unit());
    let (rank, size) = (call.comm.rank(), call.comm.size());
    let [_, inner] = dims(&left.matrix);
    let positions = total_positions(own, call)?;
    let back = left.back(positions);
    let split = rights.iter().map(|right| dims(right)[1]).sum();
    let schedule = schedule(call, [positions * unit, inner, split], left.matrix.dtype.size(), true)?;
    if !schedule.background {
        let whole = whole(left.matrix, own, unit, &call.comm)?;
        let made = rights.iter().map(|right| multiply(whole.clone(), right).map(&back)).collect::<Result<_, _>>()?;
        return Ok((made, back(whole)));
    }
    let plan = ChunkPlan::new(positions, size, rank, schedule);
    let left = into_contiguous(left.matrix);
    let mut running = RunningChunks::new(schedule);
    for chunk in 0..schedule.chunks {
        let within = plan.within_own(chunk);
        let (count, brought) = (within.len(), rows(&left, by(within, unit)));
        running.start(&call.comm, move |comm| whole(brought, count, unit, comm))?;
    }
    // What this rank has needs no waiting.
    let own = rights.iter().map(|right| multiply(left.clone(), right)).collect::<Result<Vec<_>, _>>()?;
    // Of each rank its rows, and of each right factor what becomes of them.
    let mut slots = vec![Vec::new(); size];
    let mut made = vec![vec![Vec::new(); size]; rights.len()];
    for (chunk, flight) in running.in_flight.into_iter().enumerate() {
        let gathered = flight.wait()?;
        let mut from = 0;
        for (of, slot) in plan.of_all(chunk).enumerate() {
            let here = by(from..from + slot.len(), unit);
            from += slot.len();
            if of != rank && !here.is_empty() {
                let slot = rows(&gathered, here);
                for (right, made) in rights.iter().zip(&mut made) {
                    made[of].push(multiply(slot.clone(), right)?);
                }
                slots[of].push(slot);
            }
        }
    }
    for (made, own) in made.iter_mut().zip(own) {
        made[rank] = vec![own];
    }
    slots[rank] = vec![left];
    let all = |of_ranks: Vec<Vec<DeviceTensor>>| stacked(of_ranks.into_iter().flatten().collect()).map(&back);
    Ok((made.into_iter().map(all).collect::<Result<_, _>>()?, all(slots)?))
}

/// `[left_0, .., left_(n-1)]`, of `own` positions on this rank.
fn whole(left: DeviceTensor, own: usize, unit: usize, comm: &Communicator) -> Result<DeviceTensor, Error> {
    let [_, width] = dims(&left);
    let brought = with_dims(into_contiguous(left), vec![own, unit * width]);
    let whole: Tensor<2> = comm.all_gather(from_device::<2, Float>(brought))?;
    let positions = whole.dims()[0];
    Ok(with_dims(to_device(whole)?, vec![positions * unit, width]))
}

pub(super) fn multiply_own(left: DeviceTensor, right: DeviceTensor) -> Result<DeviceTensor, Error> {
    let left = RowMatrix::of(left, 0);
    multiply(left.matrix.clone(), &matrix(right)).map(left.back(left.positions()))
}

/// `left^T right`, summed over all rows.
pub(super) fn multiply_rows(left: DeviceTensor, right: DeviceTensor) -> Result<DeviceTensor, Error> {
    multiply(transposed(RowMatrix::of(left, 0).matrix), &RowMatrix::of(right, 0).matrix)
}

/// The rows of positions.
fn by(positions: Range<usize>, unit: usize) -> Range<usize> {
    positions.start * unit..positions.end * unit
}
