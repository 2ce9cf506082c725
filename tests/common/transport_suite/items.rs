//! Elements, and reductions of them that are plain to see.

use std::fmt::Debug;

use burn::tensor::kind::Basic;
use burn::tensor::{Bool, DType, Float, Int, bf16, f16};
use burn_parallel::Error;
use burn_parallel::comm::{Element, ReduceOp, TensorKind};

/// An element type with a reference implementation of the reductions.
pub trait Item: Element + PartialEq + Debug {
    /// The kind of tensor that holds it.
    type Kind: TensorKind + Basic;

    /// A number of no particular meaning, now and then a special one.
    fn any(seed: u64) -> Self;

    /// Bit pattern.
    fn bits(self) -> u64;

    /// The fold in rank order; `None` if the reduction has no meaning.
    fn fold(op: ReduceOp, values: &[Self]) -> Option<Self>;

    /// Equal, or both NaN.
    fn same(self, other: Self) -> bool {
        #[allow(clippy::eq_op, reason = "NaN")]
        let nan = |x: Self| x != x;
        self == other || (nan(self) && nan(other))
    }
}

/// The factor that a rank brings to [`ReduceOp::PreMulSum`].
pub fn factor(rank: usize) -> f64 {
    [0.5, -1.25, 3.0, 0.1, 1.0, 0.0, 7.5, -0.3][rank]
}

/// The op as a rank calls it.
pub fn of_rank(op: ReduceOp, rank: usize) -> ReduceOp {
    if let ReduceOp::PreMulSum(_) = op { ReduceOp::PreMulSum(factor(rank)) } else { op }
}

pub const OPS: [ReduceOp; 6] =
    [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max, ReduceOp::Min, ReduceOp::Product, ReduceOp::PreMulSum(f64::NAN)];

macro_rules! fold_floats {
    ($op:expr, $values:expr, $T:ty) => {{
        let values: Vec<$T> = $values;
        let max = |a: $T, b: $T| if a.is_nan() || b.is_nan() { <$T>::NAN } else { a.max(b) };
        let min = |a: $T, b: $T| if a.is_nan() || b.is_nan() { <$T>::NAN } else { a.min(b) };
        let scaled = values.iter().enumerate().map(|(rank, x)| x * factor(rank) as $T);
        let n = values.len() as $T;
        let values = values.iter().copied();
        match $op {
            ReduceOp::Sum => values.reduce(|a, b| a + b),
            ReduceOp::Mean => values.reduce(|a, b| a + b).map(|sum| sum / n),
            ReduceOp::Max => values.reduce(max),
            ReduceOp::Min => values.reduce(min),
            ReduceOp::Product => values.reduce(|a, b| a * b),
            ReduceOp::PreMulSum(_) => scaled.reduce(|a, b| a + b),
        }
    }};
}

pub fn any_float(seed: u64) -> f64 {
    match seed % 41 {
        0 => f64::NAN,
        1 => f64::INFINITY,
        2 => -0.0,
        _ => (seed % 20011) as f64 / 97.0 - 100.0,
    }
}

macro_rules! items {
    (floats $($F:ident),*; halves $($H:ident),*; integers $($I:ident),*) => {
        $(impl Item for $F {
            type Kind = Float;
            fn any(seed: u64) -> Self { any_float(seed) as $F }
            fn bits(self) -> u64 { self.to_bits().into() }
            fn fold(op: ReduceOp, values: &[Self]) -> Option<Self> { fold_floats!(op, values.to_vec(), $F) }
        })*
        $(impl Item for $H {
            type Kind = Float;
            fn any(seed: u64) -> Self { $H::from_f64(any_float(seed)) }
            fn bits(self) -> u64 { self.to_bits().into() }
            // In f32, rounded once.
            fn fold(op: ReduceOp, values: &[Self]) -> Option<Self> {
                fold_floats!(op, values.iter().map(|x| x.to_f32()).collect(), f32).map($H::from_f32)
            }
        })*
        $(impl Item for $I {
            type Kind = Int;
            fn any(seed: u64) -> Self { if seed % 3 == 0 { seed as $I } else { (seed % 5) as $I } }
            fn bits(self) -> u64 { self as u64 }
            fn fold(op: ReduceOp, values: &[Self]) -> Option<Self> {
                let values = values.iter().copied();
                match op {
                    ReduceOp::Sum => values.reduce($I::wrapping_add),
                    ReduceOp::Max => values.max(),
                    ReduceOp::Min => values.min(),
                    ReduceOp::Product => values.reduce($I::wrapping_mul),
                    ReduceOp::Mean | ReduceOp::PreMulSum(_) => None,
                }
            }
        })*
    };
}
items!(floats f64, f32; halves f16, bf16; integers i64, i32, i16, i8, u64, u32, u16, u8);

impl Item for bool {
    type Kind = Bool;

    fn any(seed: u64) -> Self {
        seed.is_multiple_of(2)
    }

    fn bits(self) -> u64 {
        self.into()
    }

    fn fold(op: ReduceOp, values: &[Self]) -> Option<Self> {
        match op {
            ReduceOp::Max => Some(values.contains(&true)),
            ReduceOp::Min => Some(!values.contains(&false)),
            _ => None,
        }
    }
}

/// Calls a generic function for every element type.
macro_rules! for_every_item {
    ($f:ident ( $($argument:expr),* )) => {{
        $f::<f64>($($argument),*)?; $f::<f32>($($argument),*)?; $f::<f16>($($argument),*)?; $f::<bf16>($($argument),*)?;
        $f::<i64>($($argument),*)?; $f::<i32>($($argument),*)?; $f::<i16>($($argument),*)?; $f::<i8>($($argument),*)?;
        $f::<u64>($($argument),*)?; $f::<u32>($($argument),*)?; $f::<u16>($($argument),*)?; $f::<u8>($($argument),*)?;
        $f::<bool>($($argument),*)?;
    }};
}
pub(crate) use for_every_item;

/// A number that depends on all of these (splitmix64).
pub fn mix(seed: u64, rank: usize, place: usize) -> u64 {
    let x =
        seed ^ (rank as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (place as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 30)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Places after which the numbers of a rank repeat themselves, so that few are computed, which takes long where it
/// isn't optimised. A prime: no window, share or buffer is a multiple of it, so numbers in a wrong place are wrong.
const PERIOD: usize = 4099;

/// Repeats a period, or the part of one, up to this length.
fn repeated<E: Item>(mut period: Vec<E>, len: usize) -> Vec<E> {
    while period.len() < len {
        // Whole periods, until the last copy.
        period.extend_from_within(..period.len().min(len - period.len()));
    }
    period
}

/// What `rank` brings.
pub fn input<E: Item>(seed: u64, rank: usize, len: usize) -> Vec<E> {
    repeated((0..len.min(PERIOD)).map(|place| E::any(mix(seed, rank, place))).collect(), len)
}

/// The reduction over the ranks; `None` if it has no meaning.
pub fn reduced<E: Item>(seed: u64, size: usize, len: usize, op: ReduceOp) -> Option<Vec<E>> {
    E::fold(op, &[E::default()])?;
    let computed = len.min(PERIOD);
    let inputs: Vec<Vec<E>> = (0..size).map(|rank| input(seed, rank, computed)).collect();
    let mut values = Vec::with_capacity(size);
    let at = |place| {
        values.clear();
        values.extend(inputs.iter().map(|input| input[place]));
        E::fold(op, &values)
    };
    Some(repeated((0..computed).map(at).collect::<Option<_>>()?, len))
}

#[track_caller]
pub fn equal<E: Item>(found: &[E], expected: &[E], what: impl Debug) {
    // SAFETY: elements are plain numbers, of which all bytes are initialised.
    let bytes = |slice: &[E]| unsafe { std::slice::from_raw_parts(slice.as_ptr().cast::<u8>(), size_of_val(slice)) };
    // As a rule the bytes are the same, which is found out quickly. A NaN may have others.
    let same = bytes(found) == bytes(expected)
        || found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| a.same(*b));
    assert!(same, "{what:?} of {:?}: {found:?} instead of {expected:?}", E::DTYPE);
}

#[track_caller]
pub fn refused<R: Debug>(result: Result<R, Error>, refused_op: ReduceOp, refused_dtype: DType) {
    match result {
        Err(Error::UnsupportedReduction { op, dtype, .. }) => {
            assert_eq!((format!("{op:?}"), dtype), (format!("{refused_op:?}"), refused_dtype));
        }
        other => panic!("{refused_op:?} of {refused_dtype:?} gave {other:?}"),
    }
}
