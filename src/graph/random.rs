//! A counter-based random number generator, of which each rank draws its part.
//!
//! burn draws from one generator of the process, in the order in which operations happen to run: ranks cannot share out
//! such numbers. [`counter_based_rng`] replaces every random operation by one in which each element's number is a
//! function of the seed, the replica, the step, the operation's number and the element's place in the whole tensor: a
//! counter-based generator in the sense of Salmon et al., [Parallel random numbers: as easy as 1, 2,
//! 3](https://doi.org/10.1145/2063384.2063405), here ChaCha with 8 rounds. So a rank draws exactly its part, and a step
//! split in whatever way draws what it draws on one rank.
//!
//! [By rows](RandomSource::draw_rows) the place of a row in the global batch takes the place of replica and
//! micro-batch: then replicas and micro-batches, too, draw what one rank draws on the whole batch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use burn::tensor::{Bytes, DType, Device, Distribution, TensorData, bf16, f16};
use burn_ir::{CustomOpIr, OperationIr, RandomOpIr, ScalarIr};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::custom::CustomOps;
use super::graph_error;
use super::operation::drawn;
use super::step::StepGraph;
use crate::Error;
use crate::tensor::PlainTensor;

/// Id of the custom operation that draws numbers.
const COUNTER_BASED_RNG: &str = "counter_based_rng";

/// Replaces the random operations of a step by such whose numbers depend on nothing but the seed, the step, the number
/// of the operation and the place of the element. Returns how many there were.
///
/// Run it before anything that splits the graph. [`register_counter_based_rng`] says what they do.
pub fn counter_based_rng(graph: &mut StepGraph) -> usize {
    let mut number = 0;
    for op in &mut graph.operations {
        let Some(random) = drawn(op) else { continue };
        *op = Draw::new(number, random).into_operation(random);
        number += 1;
    }
    number as usize
}

/// The seed, the number of the step, and that of the replica or of its rows: what all ranks must have in common to draw
/// common numbers.
///
/// Clones share replica and step.
#[derive(Debug, Clone)]
pub struct RandomSource {
    seed: u64,
    position: Arc<Position>,
}

/// Where in the numbers of a seed a model is.
#[derive(Debug, Default)]
struct Position {
    replica: AtomicU64,
    step: AtomicU64,
    /// Whether numbers go by rows, not by replicas.
    by_rows: AtomicBool,
    /// The place of the first row of the micro-batch in the global batch, from one row to the next, and how many there
    /// are.
    first_row: AtomicU64,
    row_stride: AtomicU64,
    rows: AtomicU64,
    /// Whether any number was drawn.
    drawn: AtomicBool,
}

/// Where the numbers of a step begin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RandomStart {
    step: u64,
    first_row: u64,
}

/// What the numbers that were drawn so far go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RandomUse {
    /// None were drawn.
    Unused,
    /// The number of the replica and of the micro-batch.
    Replicas,
    /// The places of rows in the global batch.
    Rows,
}

impl RandomSource {
    /// Numbers from `seed`, before the first step.
    pub fn new(seed: u64) -> Self {
        Self { seed, position: Arc::default() }
    }

    /// A source of its own with numbers from another seed, at the same step.
    pub(crate) fn with_seed(&self, seed: u64) -> Self {
        let (replica, step) = (AtomicU64::new(self.replica()), AtomicU64::new(self.step()));
        Self { seed, position: Arc::new(Position { replica, step, ..Position::default() }) }
    }

    /// What the numbers follow from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The number of the replica whose numbers are drawn; 0 if it is the only one.
    pub fn replica(&self) -> u64 {
        self.position.replica.load(Ordering::Relaxed)
    }

    /// Draws the numbers of replica number `replica`, which no other draws.
    pub fn set_replica(&self, replica: u64) {
        self.position.replica.store(replica, Ordering::Relaxed);
    }

    /// Goes on to the numbers of the next step.
    pub fn advance(&self) {
        self.position.step.fetch_add(1, Ordering::Relaxed);
    }

    /// Has the micro-batches of a step draw the numbers of rows of the global batch of step number `step`, until
    /// [`set_step`](Self::set_step) or the next call: their rows are number `first`, `first + stride` and so on of it.
    pub fn draw_rows(&self, step: u64, first: u64, stride: u64) {
        self.position.step.store(step, Ordering::Relaxed);
        self.position.first_row.store(first, Ordering::Relaxed);
        self.position.row_stride.store(stride, Ordering::Relaxed);
        self.position.by_rows.store(true, Ordering::Relaxed);
    }

    /// Says how many rows the micro-batch has that comes next.
    pub(crate) fn set_rows(&self, rows: usize) {
        self.position.rows.store(rows as u64, Ordering::Relaxed);
    }

    /// Goes on to the numbers of the next micro-batch, behind so many rows.
    pub(crate) fn advance_rows(&self, rows: usize) {
        self.go_to(self.start(), 1, rows);
    }

    /// Where a step begins.
    pub(crate) fn start(&self) -> RandomStart {
        RandomStart { step: self.step(), first_row: self.position.first_row.load(Ordering::Relaxed) }
    }

    /// Goes to a micro-batch of a step, before which there were so many rows of it.
    pub(crate) fn go_to(&self, start: RandomStart, micro_batch: usize, rows_before: usize) {
        match self.by_rows() {
            true => {
                let stride = self.position.row_stride.load(Ordering::Relaxed);
                let row = start.first_row.wrapping_add((rows_before as u64).wrapping_mul(stride));
                self.position.first_row.store(row, Ordering::Relaxed);
            }
            false => self.position.step.store(start.step + micro_batch as u64, Ordering::Relaxed),
        }
    }

    fn by_rows(&self) -> bool {
        self.position.by_rows.load(Ordering::Relaxed)
    }

    /// What the numbers that were drawn so far go by.
    pub(crate) fn used(&self) -> RandomUse {
        match (self.position.drawn.load(Ordering::Relaxed), self.by_rows()) {
            (false, _) => RandomUse::Unused,
            (true, false) => RandomUse::Replicas,
            (true, true) => RandomUse::Rows,
        }
    }

    /// The number of the step.
    pub fn step(&self) -> u64 {
        self.position.step.load(Ordering::Relaxed)
    }

    /// Sets the number of the step, as when training goes on from a checkpoint.
    pub fn set_step(&self, step: u64) {
        self.position.step.store(step, Ordering::Relaxed);
        self.position.by_rows.store(false, Ordering::Relaxed);
    }

    /// Appends the numbers of so many elements of an operation, from a place on: two words for each. The whole of what
    /// it draws has `whole` elements.
    fn draw(&self, operation: u64, whole: u64, place: u64, count: usize, bits: &mut Vec<u64>) {
        self.position.drawn.store(true, Ordering::Relaxed);
        if !self.by_rows() {
            let mut stream = self.stream(operation, self.replica(), place.into());
            return bits.extend((0..count).map(|_| stream.next_u64()));
        }
        let position = &self.position;
        let [first, stride, rows] =
            [&position.first_row, &position.row_stride, &position.rows].map(|number| number.load(Ordering::Relaxed));
        if rows == 0 || !whole.is_multiple_of(rows) {
            // Not of rows: numbers of this micro-batch, which no other has.
            let mut stream = self.stream(operation, NO_REPLICA | first, place.into());
            return bits.extend((0..count).map(|_| stream.next_u64()));
        }
        // The batch is the outermost dim, as far as it can be told.
        let of_row = whole / rows;
        let (mut place, mut left) = (place, count as u64);
        while left > 0 && of_row > 0 {
            let (row, inside) = (place / of_row, place % of_row);
            let run = if stride == 1 { left } else { left.min(of_row - inside) };
            let row = u128::from(first) + u128::from(row) * u128::from(stride);
            let mut stream = self.stream(operation, ALL_ROWS, row * u128::from(of_row) + u128::from(inside));
            bits.extend((0..run).map(|_| stream.next_u64()));
            (place, left) = (place + run, left - run);
        }
    }

    fn stream(&self, operation: u64, replica: u64, place: u128) -> ChaCha8Rng {
        let mut key = [0; 32];
        for (word, value) in [self.seed, self.step(), operation, replica].into_iter().enumerate() {
            key[word * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
        let mut stream = ChaCha8Rng::from_seed(key);
        stream.set_word_pos(2 * place);
        stream
    }
}

/// In the place of a replica's number: the rows of all of them, and a micro-batch of none.
const ALL_ROWS: u64 = u64::MAX;
const NO_REPLICA: u64 = 1 << 63;

/// Registers the operation that [`counter_based_rng`] puts into a graph. `source` says which step it is.
pub fn register_counter_based_rng(ops: &mut CustomOps, source: &RandomSource) {
    let source = source.clone();
    ops.register_maker(COUNTER_BASED_RNG, move |op, _, device| {
        let [out] = op.outputs.as_slice() else {
            return Err(graph_error(format!("custom operation `{}` makes one tensor", op.id)));
        };
        let draw = Draw::of(op).ok_or_else(|| graph_error(format!("custom operation `{}` lacks scalars", op.id)))?;
        let bits = draw.bits(out.shape.as_slice(), &source);
        Ok(vec![draw.tensor(bits, out.shape.to_vec(), out.dtype, device)?])
    });
}

/// Whether an operation draws such numbers.
pub(crate) fn is_counter_based_rng(op: &OperationIr) -> bool {
    matches!(op, OperationIr::Custom(op) if op.id == COUNTER_BASED_RNG)
}

/// Has an operation draw from `offset` on along a dim of what it drew before.
pub(crate) fn draw_from(op: &mut OperationIr, dim: usize, offset: usize) {
    if let OperationIr::Custom(op) = op
        && op.id == COUNTER_BASED_RNG
        && let Some(mut draw) = Draw::of(op)
    {
        draw.first += offset as u64 * draw.strides.get(dim).copied().unwrap_or(0);
        op.scalars = draw.scalars();
    }
}

/// Has an operation, whose output has several dims in place of one, of these sizes, draw the same numbers.
pub(crate) fn draw_apart(op: &mut OperationIr, at: usize, factors: &[usize]) {
    if let OperationIr::Custom(op) = op
        && op.id == COUNTER_BASED_RNG
        && let Some(mut draw) = Draw::of(op)
        && let Some(stride) = draw.strides.get(at).copied()
    {
        let inner = |factor: usize| factors[factor + 1..].iter().product::<usize>() as u64;
        draw.strides.splice(at..=at, (0..factors.len()).map(|factor| stride * inner(factor)));
        op.scalars = draw.scalars();
    }
}

/// What a random operation says: its number, the distribution, and which places of the whole tensor it draws for.
///
/// Element `(i, j, ..)` has place `first + i * strides[0] + j * strides[1] + ..`.
struct Draw {
    operation: u64,
    distribution: Distribution,
    /// The elements of the whole tensor.
    whole: u64,
    strides: Vec<u64>,
    first: u64,
}

impl Draw {
    fn new(operation: u64, random: &RandomOpIr) -> Self {
        let dims = random.out.shape.as_slice();
        let strides = (0..dims.len()).map(|dim| dims[dim + 1..].iter().product::<usize>() as u64).collect();
        let whole = dims.iter().product::<usize>() as u64;
        Self { operation, distribution: random.distribution, whole, strides, first: 0 }
    }

    fn into_operation(self, random: &RandomOpIr) -> OperationIr {
        let out = random.out.clone();
        OperationIr::Custom(CustomOpIr::with_scalars(COUNTER_BASED_RNG, &[], &[out], self.scalars()))
    }

    fn scalars(&self) -> Vec<ScalarIr> {
        let (kind, a, b) = match self.distribution {
            Distribution::Default => (0, 0.0, 1.0),
            Distribution::Bernoulli(p) => (1, p, 0.0),
            Distribution::Uniform(low, high) => (2, low, high),
            Distribution::Normal(mean, deviation) => (3, mean, deviation),
        };
        let [operation, kind, whole] = [self.operation, kind, self.whole].map(ScalarIr::UInt);
        let head = [operation, kind, ScalarIr::Float(a), ScalarIr::Float(b), whole];
        // The last is each rank's own.
        let places = self.strides.iter().chain([&self.first]).map(|place| ScalarIr::UInt(*place));
        head.into_iter().chain(places).collect()
    }

    fn of(op: &CustomOpIr) -> Option<Self> {
        let [operation, kind, a, b, whole, strides @ .., first] = op.scalars.as_slice() else { return None };
        let (a, b) = (a.elem::<f64>(), b.elem::<f64>());
        let distribution = match kind.elem::<u64>() {
            0 => Distribution::Default,
            1 => Distribution::Bernoulli(a),
            2 => Distribution::Uniform(a, b),
            _ => Distribution::Normal(a, b),
        };
        let strides = strides.iter().map(|stride| stride.elem()).collect();
        Some(Self { operation: operation.elem(), distribution, whole: whole.elem(), strides, first: first.elem() })
    }

    /// 64 random bits for each element, in the order of the local tensor.
    fn bits(&self, dims: &[usize], source: &RandomSource) -> Vec<u64> {
        let count: usize = dims.iter().product();
        let mut bits = Vec::with_capacity(count);
        // Elements whose places follow each other come from one stream.
        let mut run = 1;
        let mut dense = dims.len();
        while dense > 0 && (self.strides[dense - 1] == run as u64 || dims[dense - 1] == 1) {
            dense -= 1;
            run *= dims[dense];
        }
        let runs = count.checked_div(run).unwrap_or(0);
        for number in 0..runs {
            let (mut rest, mut place) = (number, self.first);
            for dim in (0..dense).rev() {
                place += (rest % dims[dim]) as u64 * self.strides[dim];
                rest /= dims[dim];
            }
            source.draw(self.operation, self.whole, place, run, &mut bits);
        }
        bits
    }

    fn tensor(&self, bits: Vec<u64>, dims: Vec<usize>, dtype: DType, device: &Device) -> Result<PlainTensor, Error> {
        let floats = || bits.iter().map(|bits| self.float(*bits));
        let ints = || bits.iter().map(|bits| self.int(*bits));
        let bytes = match dtype {
            DType::F64 => Bytes::from_elems(floats().collect::<Vec<f64>>()),
            DType::F32 => Bytes::from_elems(floats().map(|x| self.below_high(x as f32)).collect::<Vec<f32>>()),
            DType::F16 => Bytes::from_elems(floats().map(f16::from_f64).collect::<Vec<f16>>()),
            DType::BF16 => Bytes::from_elems(floats().map(bf16::from_f64).collect::<Vec<bf16>>()),
            DType::I64 => Bytes::from_elems(ints().collect::<Vec<i64>>()),
            DType::I32 => Bytes::from_elems(ints().map(|x| x as i32).collect::<Vec<i32>>()),
            DType::I16 => Bytes::from_elems(ints().map(|x| x as i16).collect::<Vec<i16>>()),
            DType::I8 => Bytes::from_elems(ints().map(|x| x as i8).collect::<Vec<i8>>()),
            DType::U64 => Bytes::from_elems(ints().map(|x| x as u64).collect::<Vec<u64>>()),
            DType::U32 => Bytes::from_elems(ints().map(|x| x as u32).collect::<Vec<u32>>()),
            DType::U16 => Bytes::from_elems(ints().map(|x| x as u16).collect::<Vec<u16>>()),
            DType::U8 => Bytes::from_elems(ints().map(|x| x as u8).collect::<Vec<u8>>()),
            _ => return Err(graph_error(format!("random numbers cannot be drawn as {dtype:?}"))),
        };
        Ok(PlainTensor::from_data(TensorData::from_bytes(bytes, dims, dtype), device))
    }

    fn float(&self, bits: u64) -> f64 {
        let unit = (bits >> 11) as f64 / (1u64 << 53) as f64;
        match self.distribution {
            Distribution::Default => unit,
            Distribution::Bernoulli(p) => f64::from(u8::from(unit < p)),
            Distribution::Uniform(low, high) => low + unit * (high - low),
            // Box and Muller, of which the cosine is enough.
            Distribution::Normal(mean, deviation) => {
                let radius = ((bits >> 32) as f64 + 0.5) / (1u64 << 32) as f64;
                let angle = (bits as u32) as f64 / (1u64 << 32) as f64;
                mean + deviation * (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
            }
        }
    }

    /// Rounding must not reach the excluded end of a range.
    fn below_high(&self, x: f32) -> f32 {
        let high = match self.distribution {
            Distribution::Default => 1.0,
            Distribution::Uniform(low, high) if high > low => high as f32,
            _ => return x,
        };
        if x < high { x } else { high.next_down() }
    }

    fn int(&self, bits: u64) -> i64 {
        match self.distribution {
            Distribution::Default => bits as i64,
            Distribution::Uniform(low, high) => {
                let (low, high) = (low as i64, high as i64);
                let span = high.wrapping_sub(low).max(1) as u64;
                low.wrapping_add(((u128::from(bits) * u128::from(span)) >> 64) as i64)
            }
            _ => self.float(bits) as i64,
        }
    }
}
