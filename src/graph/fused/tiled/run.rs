//! Runs attention in tiles, the matrices of the batch split over the threads of the rank, and where they are few their
//! rows.

use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Element};
use burn_ir::{CustomOpIr, TensorIr};
use bytemuck::Pod;
use rayon::prelude::*;

use super::super::block::{BoundKernel, Source, Target};
use super::super::multiply::{Factor, offset};
use super::super::native::{Native, check};
use super::super::run::{BLOCK, SPLIT_FROM};
use super::enters::Enters;
use super::leaves::Leaves;
use super::{Input, Leaving, Narrowing, Tiled};
use crate::error::Error;
use crate::graph::step_memory::StepMemory;
use crate::tensor::{Multiplied, PlainTensor, Pool, Product, Room, Strided};

/// Elements of a tile, of which there are a few: they fit into the second cache. More only where rows are so long that
/// a tile had few. The fewer rows, the less a causal mask leaves of the columns.
const TILE: usize = 4 * 1024;
/// The least and the most rows of a tile.
const ROWS: [usize; 2] = [32, 128];
/// Of fewer matrices the rows are split, each into so many parts that there are about as many parts: whatever the
/// number of threads, so that sums over rows are the same.
const PARTS: usize = 8;

/// What all threads share.
struct Tiles<'a, T> {
    tiled: &'a Tiled,
    inputs: &'a [FlexTensor],
    batch: &'a [usize],
    rows: usize,
    columns: usize,
    /// Rows of a tile.
    height: usize,
    /// Into how many parts the rows of a matrix are split.
    parts: usize,
    entering: Vec<Enters<'a, T>>,
    results: Vec<Leaves<'a, T>>,
    pool: &'a Arc<Pool>,
}

// SAFETY: what is pointed to is written by the thread alone that has this part of this matrix of the batch.
unsafe impl<T: Sync> Sync for Tiles<'_, T> {}

impl Tiled {
    pub(super) fn run(
        &self,
        op: &CustomOpIr,
        inputs: Vec<PlainTensor>,
        memory: &StepMemory,
    ) -> Result<Vec<PlainTensor>, Error> {
        let inputs = inputs.into_iter().map(PlainTensor::into_flex).collect::<Result<Vec<_>, _>>()?;
        let run = if self.kernel.wide { Self::run_as::<f64> } else { Self::run_as::<f32> };
        let results = run(self, op, &inputs, memory)?;
        Ok(results.into_iter().map(PlainTensor::from_flex).collect())
    }

    fn run_as<T: Native + Multiplied + Element + Pod>(
        &self,
        op: &CustomOpIr,
        inputs: &[FlexTensor],
        memory: &StepMemory,
    ) -> Result<Vec<FlexTensor>, Error> {
        check::<T>(inputs.iter().map(FlexTensor::dtype).chain(self.leaving.iter().map(|leaving| leaving.dtype)))?;
        let [batch @ .., rows, columns] = &self.kernel.dims[..] else { panic!("tiles have rows and columns") };
        let (rows, columns) = (*rows, *columns);
        let of_product = self.entering.iter().flat_map(|product| [product.left, product.right]);
        let factors: Vec<usize> = of_product.chain(self.leaving.iter().map(|leaving| leaving.other)).collect();
        let natives = inputs
            .iter()
            .enumerate()
            .map(|(place, input)| if factors.contains(&place) { native::<T>(input) } else { input.clone() });
        let natives: Vec<FlexTensor> = natives.collect();
        let entering = self.entering.iter().map(|product| {
            let (left, right) = (&natives[product.left], &natives[product.right]);
            let inner = left.layout().shape().last().copied().unwrap_or(0);
            let factor = |tensor, dims| Factor::<T>::new(tensor, batch, dims);
            let (left, right) = (factor(left, [rows, inner]), factor(right, [inner, columns]));
            Enters { left, right, rows, inner, columns }
        });
        assert_eq!(self.leaving.len(), op.outputs.len(), "an operation has the results of its tiles");
        let pool = memory.pool();
        let room = |(leaving, out): (&Leaving, &TensorIr)| {
            let bytes = leaving.dims.iter().product::<usize>() * size_of::<T>();
            // What is rounded at the end is made somewhere else.
            let room = if leaving.dtype == T::DTYPE { memory.room(out) } else { pool.room(bytes) };
            assert_eq!(room.bytes(), bytes, "a product has room for its elements");
            room
        };
        let rooms: Vec<Room> = self.leaving.iter().zip(&op.outputs).map(room).collect();
        let height = (TILE / columns).clamp(ROWS[0], ROWS[1]).min(rows);
        let number: usize = batch.iter().product();
        let splits = number * rows * columns >= SPLIT_FROM;
        let parts = if splits { parts(number, rows.div_ceil(height)) } else { 1 };
        let sums = self.leaving.iter().map(|leaving| {
            let beside = if leaving.adds_up() { parts - 1 } else { 0 };
            (beside > 0).then(|| pool.room(leaving.dims.iter().product::<usize>() * beside * size_of::<T>()))
        });
        let sums: Vec<Option<Room>> = sums.collect();
        let results = self.leaving.iter().zip(&rooms).zip(&sums).map(|((leaving, room), sums)| {
            let [given @ .., out_rows, out_columns] = &leaving.dims[..] else {
                panic!("a product has rows and columns")
            };
            assert!(given == batch, "a product is of the batch of its factors");
            let [own_rows, own_columns] = if leaving.is_turned { [columns, rows] } else { [rows, columns] };
            let other = match leaving.is_left {
                true => [own_columns, *out_columns],
                false => [*out_rows, own_rows],
            };
            let kept = if leaving.is_left { (*out_rows, own_rows) } else { (*out_columns, own_columns) };
            assert!(kept.0 == kept.1, "a product has the rows and columns of its factors");
            let other = Factor::new(&natives[leaving.other], batch, other);
            let sums = sums.as_ref().map_or(ptr::null_mut(), |sums| sums.pointer().cast());
            Leaves { leaving, other, out: room.pointer().cast(), strides: leaving.strides(), sums }
        });
        let (entering, results) = (entering.collect(), results.collect());
        let tiles = Tiles { tiled: self, inputs, batch, rows, columns, height, parts, entering, results, pool };
        let all = number * parts;
        if splits && rayon::current_num_threads() > 1 {
            let tasks = all.min(4 * rayon::current_num_threads());
            (0..tasks).into_par_iter().for_each(|task| tiles.part(all * task / tasks..all * (task + 1) / tasks));
        } else {
            tiles.part(0..all);
        }
        tiles.results.iter().for_each(|result| result.add_parts(batch, parts));
        drop(tiles);
        let results = self.leaving.iter().zip(rooms).zip(&op.outputs);
        // SAFETY: tiles cover all rows, and so all elements of results.
        Ok(results.map(|((leaving, room), out)| unsafe { leaving.filled::<T>(room, out, memory) }).collect())
    }
}

/// Into how many parts each of so many matrices of so many tiles is split.
fn parts(matrices: usize, tiles: usize) -> usize {
    (PARTS / matrices).clamp(1, tiles)
}

/// A factor in the elements that are computed with.
fn native<T: Native + Element + Pod>(tensor: &FlexTensor) -> FlexTensor {
    if tensor.dtype() == T::DTYPE {
        return tensor.clone();
    }
    let plain = tensor.to_contiguous();
    let layout = plain.layout();
    let mut values = vec![T::default(); layout.num_elements()];
    // SAFETY: the elements lie one after the other.
    unsafe { T::gather(plain.dtype(), plain.bytes().as_ptr(), layout.start_offset() as isize, 1, &mut values) };
    let layout = Layout::contiguous(layout.shape().clone());
    FlexTensor::new(Bytes::from_elems(values), layout, T::DTYPE)
}

impl<T: Native + Multiplied + Element + Pod> Tiles<'_, T> {
    /// Some parts of matrices of the batch, whose results nobody else writes.
    fn part(&self, parts: Range<usize>) {
        let (kernel, of_tile) = (&self.tiled.kernel, self.height * self.columns);
        let tiles = self.entering.len() + self.results.len().max(kernel.outputs.len());
        let turned: usize = self.entering.iter().map(Enters::turned).sum();
        let room = self.pool.room((tiles * of_tile + turned) * size_of::<T>());
        let tile = |number: usize| room.pointer().cast::<T>().wrapping_add(number * of_tile);
        let mut rights: Vec<Strided<T>> = Vec::new();
        let sources = self.tiled.inputs.iter().zip(&kernel.inputs).map(|(input, extent)| match *input {
            Input::Given(given) => Source { direct: false, ..kernel.source::<T>(&self.inputs[given], *extent) },
            Input::Product(product) => Source {
                base: tile(product).cast_const().cast(),
                dtype: T::DTYPE,
                direct: true,
                offset: 0,
                strides: Vec::new(),
                still: false,
            },
        });
        let targets = (0..kernel.outputs.len()).map(|output| Target {
            base: tile(self.entering.len() + output).cast(),
            direct: kernel.writes_at_once(output),
        });
        let (places, scratch) = kernel.places(BLOCK.max(self.columns));
        let mut running = BoundKernel {
            kernel,
            sources: sources.collect(),
            targets: targets.collect(),
            sums: Vec::new(),
            start: 0,
            rows: 0,
            columns: self.columns,
            height: 1,
            width: self.columns,
            places,
            scratch,
            unexpected: AtomicBool::new(false),
        };
        let of_matrix = self.rows.div_ceil(self.height);
        for place in parts {
            let (number, part) = (place / self.parts, place % self.parts);
            if rights.is_empty() || part == 0 {
                rights = self.rights(number, tile(tiles));
            }
            let mut begins = true;
            // From the end, where a causal mask leaves all columns, so that there are no zeros to add to.
            for tile in (of_matrix * part / self.parts..of_matrix * (part + 1) / self.parts).rev() {
                let first = tile * self.height;
                let rows = first..self.rows.min(first + self.height);
                let needed = self.needed(&running, number, rows.clone());
                for columns in [needed, self.columns] {
                    if begins && columns < self.columns {
                        self.clear(number, part);
                        begins = false;
                    }
                    if self.tile(&mut running, &rights, [number, part], rows.clone(), columns, begins) {
                        break;
                    }
                }
                begins = false;
            }
        }
    }

    /// The right factors of one of the batch, with room for those that are put the right way round.
    fn rights(&self, number: usize, mut room: *mut T) -> Vec<Strided<T>> {
        let right = |enters: &Enters<'_, T>| {
            let own = room;
            room = room.wrapping_add(enters.turned());
            // SAFETY: the caller has room for all, which this thread alone has.
            unsafe { enters.right(number, self.batch, own) }
        };
        self.entering.iter().map(right).collect()
    }

    /// Sets all sums of a part to 0.
    fn clear(&self, number: usize, part: usize) {
        for result in self.results.iter().filter(|result| result.leaving.adds_up()) {
            result.clear(result.matrix(number, self.batch, part, self.parts));
        }
    }

    /// How many columns some rows of a matrix need.
    fn needed(&self, running: &BoundKernel<'_, T>, number: usize, rows: Range<usize>) -> usize {
        let masks = self.tiled.narrowing.iter().flat_map(|narrowing| &narrowing.masks);
        let sources = masks.map(|mask| &running.sources[*mask]);
        let needed = sources.filter(|source| matches!(source.dtype, DType::Bool(_))).map(|source| {
            let batch = offset(number, self.batch, &source.strides);
            // SAFETY: the mask can be broadcast to what the kernel runs over, which has these rows.
            unsafe { Narrowing::columns(source, batch, rows.clone(), self.columns) }
        });
        let needed = needed.min().unwrap_or(self.columns);
        // Whole vectors.
        self.columns.min(needed.next_multiple_of(32))
    }

    /// Some rows of a matrix, with its first columns; false, and nothing done, if others count too.
    ///
    /// Where it `begins`, sums begin with it.
    fn tile(
        &self,
        running: &mut BoundKernel<'_, T>,
        rights: &[Strided<T>],
        [number, part]: [usize; 2],
        rows: Range<usize>,
        columns: usize,
        begins: bool,
    ) -> bool {
        let (first, height) = (rows.start, rows.len());
        let of = |tile: *mut T| Strided { first: tile.cast_const(), row: columns as isize, column: 1 };
        let product =
            |[rows, columns, inner]: [usize; 3], left, right, adds| Product { rows, inner, columns, left, right, adds };
        for (entering, (enters, right)) in self.entering.iter().zip(rights).enumerate() {
            let out = self.tile_of(running, entering);
            let left = enters.left.of(number, self.batch).below(first);
            // SAFETY: the factors have these rows and columns, and the tile has room for as many.
            unsafe { product([height, columns, enters.inner], left, *right, false).write_to(of(out)) };
            let dtype = self.tiled.entering[entering].dtype;
            if dtype != T::DTYPE {
                // SAFETY: the tile has just been written.
                T::round(unsafe { std::slice::from_raw_parts_mut(out, height * columns) }, dtype);
            }
        }
        running.start = number * self.rows + first;
        running.rows = running.start + height;
        (running.columns, running.width) = (columns, columns);
        running.height = (BLOCK / columns).clamp(1, height);
        *running.unexpected.get_mut() = false;
        running.part(0, 0..height.div_ceil(running.height));
        if columns < self.columns && running.unexpected.load(Ordering::Relaxed) {
            return false;
        }
        for result in &self.results {
            let leaving = result.leaving;
            let own = of(running.targets[leaving.result].base.cast());
            let (own, [own_rows, own_columns]) = match leaving.is_turned {
                true => (own.turned(), [columns, height]),
                false => (own, [height, columns]),
            };
            let other = result.other.of(number, self.batch);
            let out = result.matrix(number, self.batch, part, self.parts);
            let [.., out_rows, out_columns] = leaving.dims[..] else { continue };
            // Where the rows of the kernel are, beside those of which all are there.
            let (out, other) = match (leaving.is_left, leaving.is_turned) {
                (true, false) => (out.below(first), other),
                (true, true) => (out, other.below(first)),
                (false, false) => (out, other.turned().below(first).turned()),
                (false, true) => (out.turned().below(first).turned(), other),
            };
            let adds = leaving.adds_up() && !begins;
            let product = match leaving.is_left {
                true => product([own_rows, out_columns, own_columns], own, other, adds),
                false => product([out_rows, own_columns, own_rows], other, own, adds),
            };
            // SAFETY: the factors have these rows and columns, as has the result, which only this thread writes.
            unsafe { product.write_to(out) };
        }
        true
    }

    /// The tile of a product that enters.
    fn tile_of(&self, running: &BoundKernel<'_, T>, product: usize) -> *mut T {
        let is = |input: &Input| matches!(input, Input::Product(other) if *other == product);
        let input = self.tiled.inputs.iter().position(is);
        input.map_or(ptr::null_mut(), |input| running.sources[input].base.cast_mut().cast())
    }
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn rows_of_few_matrices_are_split() {
        assert_eq!([parts(1, 20), parts(3, 20), parts(4, 20), parts(5, 20), parts(64, 20)], [8, 2, 2, 1, 1]);
        assert_eq!([parts(1, 3), parts(2, 1)], [3, 1]);
    }
}
