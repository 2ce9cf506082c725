//! The loops of fused kernels: one operation over the elements of a block, compiled into vectors.

use half::{bf16, f16};

use super::functions::Float;

/// What an operation reads: an element for each of the output's, or one for all.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a, T> {
    Each(&'a [T]),
    One(T),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Unary {
    Copy,
    Neg,
    Abs,
    Square,
    Sqrt,
    Recip,
    RecipSquare,
    Exp,
    Log,
    Log1p,
    Tanh,
    Erf,
    Relu,
    Sigmoid,
    Gelu,
    ClampMin(f64),
    ClampMax(f64),
    Clamp(f64, f64),
    Powf(f64),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Equal,
    NotEqual,
    Greater,
    GreaterEqual,
    Lower,
    LowerEqual,
    /// The first, where the second is no false; the number there.
    MaskFill(f64),
    /// Of an output, and the gradient.
    ReluBackward,
    /// Of an output, and the gradient.
    SigmoidBackward,
    /// Of an input, and the gradient.
    GeluBackward,
}

/// What a loop makes of the elements of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowReduction {
    Sum,
    Mean,
    Max,
}

#[inline(always)]
fn each<T: Copy>(out: &mut [T], x: &[T], f: impl Fn(T) -> T) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = f(*x);
    }
}

#[inline(always)]
fn both<T: Copy>(out: &mut [T], a: Operand<'_, T>, b: Operand<'_, T>, f: impl Fn(T, T) -> T) {
    match (a, b) {
        (Operand::Each(a), Operand::Each(b)) => {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                *out = f(*a, *b);
            }
        }
        (Operand::Each(a), Operand::One(b)) => {
            for (out, a) in out.iter_mut().zip(a) {
                *out = f(*a, b);
            }
        }
        (Operand::One(a), Operand::Each(b)) => {
            for (out, b) in out.iter_mut().zip(b) {
                *out = f(a, *b);
            }
        }
        (Operand::One(a), Operand::One(b)) => out.fill(f(a, b)),
    }
}

#[inline(always)]
fn sigmoid<T: Float>(x: T) -> T {
    let (zero, one) = (T::from_f64(0.0), T::from_f64(1.0));
    let e = x.abs().neg().exp();
    let above = if x >= zero { one } else { e };
    if x.is_nan() { x } else { above.div(one.add(e)) }
}

#[inline(always)]
pub(super) fn unary<T: Float>(op: Unary, out: &mut [T], x: &[T]) {
    let [zero, one, half] = [0.0, 1.0, 0.5].map(T::from_f64);
    match op {
        Unary::Copy => out.copy_from_slice(x),
        Unary::Neg => each(out, x, T::neg),
        Unary::Abs => each(out, x, T::abs),
        Unary::Square => each(out, x, |x| x.mul(x)),
        Unary::Sqrt => each(out, x, T::sqrt),
        Unary::Recip => each(out, x, |x| one.div(x)),
        Unary::RecipSquare => each(out, x, |x| one.div(x.mul(x))),
        Unary::Exp => each(out, x, T::exp),
        Unary::Log => each(out, x, T::log),
        Unary::Log1p => each(out, x, T::log1p),
        Unary::Tanh => each(out, x, T::tanh),
        Unary::Erf => each(out, x, T::erf),
        Unary::Relu => each(out, x, |x| if x.is_nan() || x > zero { x } else { zero }),
        Unary::Sigmoid => each(out, x, sigmoid),
        Unary::Gelu => each(out, x, |x| half.mul(x).mul(x.twice_normal())),
        Unary::ClampMin(least) => {
            let least = T::from_f64(least);
            each(out, x, |x| if x.is_nan() || x > least { x } else { least });
        }
        Unary::ClampMax(most) => {
            let most = T::from_f64(most);
            each(out, x, |x| if x.is_nan() || x < most { x } else { most });
        }
        Unary::Clamp(least, most) => {
            let (least, most) = (T::from_f64(least), T::from_f64(most));
            each(out, x, |x| {
                let x = if x < least { least } else { x };
                if x > most { most } else { x }
            });
        }
        Unary::Powf(exponent) => {
            let exponent = T::from_f64(exponent);
            each(out, x, |x| x.powf(exponent));
        }
    }
}

#[inline(always)]
pub(super) fn binary<T: Float>(op: Binary, out: &mut [T], a: Operand<'_, T>, b: Operand<'_, T>) {
    let [zero, one, half] = [0.0, 1.0, 0.5].map(T::from_f64);
    let truth = |is: bool| if is { one } else { zero };
    match op {
        Binary::Add => both(out, a, b, T::add),
        Binary::Sub => both(out, a, b, T::sub),
        Binary::Mul => both(out, a, b, T::mul),
        Binary::Div => both(out, a, b, T::div),
        Binary::Equal => both(out, a, b, |a, b| truth(a == b)),
        Binary::NotEqual => both(out, a, b, |a, b| truth(a != b)),
        Binary::Greater => both(out, a, b, |a, b| truth(a > b)),
        Binary::GreaterEqual => both(out, a, b, |a, b| truth(a >= b)),
        Binary::Lower => both(out, a, b, |a, b| truth(a < b)),
        Binary::LowerEqual => both(out, a, b, |a, b| truth(a <= b)),
        Binary::MaskFill(value) => {
            let value = T::from_f64(value);
            both(out, a, b, |x, mask| if mask != zero { value } else { x });
        }
        Binary::ReluBackward => both(out, a, b, |y, grad| if y.is_nan() || y > zero { grad } else { zero }),
        Binary::SigmoidBackward => both(out, a, b, |y, grad| grad.mul(y).mul(one.sub(y))),
        Binary::GeluBackward => {
            let scale = one.div(T::from_f64(2.0).mul(T::from_f64(std::f64::consts::PI)).sqrt());
            both(out, a, b, |x, grad| {
                let cdf = half.mul(x.twice_normal());
                let pdf = scale.mul(half.neg().mul(x).mul(x).exp());
                grad.mul(cdf.add(x.mul(pdf)))
            });
        }
    }
}

/// `out[i]` is `a[i]` where the mask is not zero, else `b[i]`.
#[inline(always)]
pub(super) fn choose<T: Float>(out: &mut [T], mask: &[T], a: &[T], b: &[T]) {
    let zero = T::from_f64(0.0);
    for (((out, mask), a), b) in out.iter_mut().zip(mask).zip(a).zip(b) {
        *out = if *mask != zero { *a } else { *b };
    }
}

/// How many sums a sum is made of, so that it is one of vectors.
const LANES: usize = 32;

#[inline(always)]
fn fold<T: Float>(x: &[T], start: T, f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [start; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = f(*lane, *x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = f(*lane, *x);
    }
    across(lanes, f)
}

/// Halves onto each other. A function of its own: as a part of the loop before it, it would have the compiler keep the
/// sums in pieces.
#[inline(never)]
fn across<T: Float>(mut lanes: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = f(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}

/// One number of the elements of a row.
#[inline(always)]
pub(super) fn reduce<T: Float>(op: RowReduction, x: &[T]) -> T {
    let larger = |a: T, b: T| if b > a || b.is_nan() { b } else { a };
    match op {
        RowReduction::Sum => fold(x, T::default(), T::add),
        RowReduction::Mean => fold(x, T::default(), T::add).div(T::from_f64(x.len() as f64)),
        RowReduction::Max => fold(x, T::from_f64(f64::NEG_INFINITY), larger),
    }
}

/// The first place of a number in a row, or of an element that is no number; 0 if there is none.
#[inline(always)]
pub(super) fn place_of<T: Float>(x: &[T], of: T) -> usize {
    let is = |x: T| (x == of) | x.is_nan();
    for (number, chunk) in x.chunks(LANES).enumerate() {
        // All of a chunk at once, in vectors.
        let mut any = false;
        for x in chunk {
            any |= is(*x);
        }
        if any {
            return number * LANES + chunk.iter().position(|x| is(*x)).unwrap_or_default();
        }
    }
    0
}

/// Adds rows of `width` elements to `sums`.
#[inline(always)]
pub(super) fn add_rows<T: Float>(sums: &mut [T], x: &[T], width: usize) {
    for row in x.chunks_exact(width.max(1)) {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum = sum.add(*x);
        }
    }
}

/// Rounds to what a `bf16` holds.
#[inline(always)]
pub(super) fn round_to_bf16(x: &mut [f32]) {
    for x in x {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
        // A NaN must not become an infinity.
        *x = if x.is_nan() { f32::from_bits((bits | 0x0040_0000) & 0xffff_0000) } else { f32::from_bits(rounded) };
    }
}

/// Rounds to what an `f16` holds.
#[inline(always)]
pub(super) fn round_to_f16(x: &mut [f32]) {
    for x in x {
        *x = f16::from_f32(*x).to_f32();
    }
}

/// An element of a tensor in memory.
pub(super) trait Stored<T>: Copy + Send + Sync + 'static {
    fn load(self) -> T;
    fn store(value: T) -> Self;
}

macro_rules! stored {
    ($($stored:ty as $float:ty: |$x:ident| $load:expr, |$y:ident| $store:expr;)*) => {$(
        impl Stored<$float> for $stored {
            #[inline(always)]
            fn load(self) -> $float {
                let $x = self;
                $load
            }
            #[inline(always)]
            fn store($y: $float) -> Self {
                $store
            }
        }
    )*};
}
stored! {
    f32 as f32: |x| x, |y| y;
    f64 as f64: |x| x, |y| y;
    bf16 as f32: |x| f32::from_bits(u32::from(x.to_bits()) << 16), |y| bf16::from_f32(y);
    f16 as f32: |x| x.to_f32(), |y| f16::from_f32(y);
    u8 as f32: |x| f32::from(u8::from(x != 0)), |y| u8::from(y != 0.0);
    u8 as f64: |x| f64::from(u8::from(x != 0)), |y| u8::from(y != 0.0);
    i64 as f32: |x| x as f32, |y| y as i64;
    i32 as f32: |x| x as f32, |y| y as i32;
    i64 as f64: |x| x as f64, |y| y as i64;
    i32 as f64: |x| x.into(), |y| y as i32;
}
