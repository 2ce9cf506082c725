//! The kernels. They read and write any float and compute in `f32`.

use cubecl::prelude::*;

use crate::tensor_parallel::activation::Activation;

/// Units that share a row.
pub const UNITS: u32 = 256;

const HALVINGS: u32 = UNITS.ilog2();

const ROOT_TWO_OVER_PI: f32 = 0.797_884_6;
const ROOT_HALF: f32 = core::f32::consts::FRAC_1_SQRT_2;
/// `1 / sqrt(2 pi)`.
const DENSITY: f32 = 0.398_942_3;
const CUBIC: f32 = 0.044_715;

/// Kernels are told an activation by a number.
pub fn number(activation: Activation) -> u32 {
    match activation {
        Activation::Identity => 0,
        Activation::Relu => 1,
        Activation::Gelu => 2,
        Activation::GeluApproximate => 3,
    }
}

/// `y = activation(x + bias)`.
#[cube(launch)]
pub fn bias_activation<F: Float>(
    x: &Tensor<F>,
    bias: &Tensor<F>,
    y: &mut Tensor<F>,
    #[comptime] activation: u32,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= y.len() {
        terminate!();
    }
    let columns = bias.len();
    let sum = f32::cast_from(x[ABSOLUTE_POS]) + f32::cast_from(bias[ABSOLUTE_POS % columns]);
    y[ABSOLUTE_POS] = F::cast_from(activate::<f32>(sum, activation));
}

#[cube]
fn activate<C: Float>(sum: C, #[comptime] activation: u32) -> C {
    if comptime!(activation == 1) {
        select(sum < C::new(0.0), C::new(0.0), sum)
    } else if comptime!(activation == 2) {
        C::new(0.5) * sum * (C::new(1.0) + C::erf(sum * C::new(ROOT_HALF)))
    } else if comptime!(activation == 3) {
        let inner = C::new(ROOT_TWO_OVER_PI) * (sum + C::new(CUBIC) * sum * sum * sum);
        C::new(0.5) * sum * (C::new(1.0) + C::tanh(inner))
    } else {
        sum
    }
}

/// `dx = dy activation'(x + bias)`.
#[cube(launch)]
pub fn bias_activation_gradient<F: Float>(
    x: &Tensor<F>,
    bias: &Tensor<F>,
    dy: &Tensor<F>,
    dx: &mut Tensor<F>,
    #[comptime] activation: u32,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= dx.len() {
        terminate!();
    }
    let columns = bias.len();
    let sum = f32::cast_from(x[ABSOLUTE_POS]) + f32::cast_from(bias[ABSOLUTE_POS % columns]);
    dx[ABSOLUTE_POS] = F::cast_from(f32::cast_from(dy[ABSOLUTE_POS]) * slope::<f32>(sum, activation));
}

#[cube]
fn slope<C: Float>(sum: C, #[comptime] activation: u32) -> C {
    if comptime!(activation == 1) {
        select(sum > C::new(0.0), C::new(1.0), C::new(0.0))
    } else if comptime!(activation == 2) {
        let share = C::new(0.5) * (C::new(1.0) + C::erf(sum * C::new(ROOT_HALF)));
        share + sum * C::new(DENSITY) * C::exp(C::new(-0.5) * sum * sum)
    } else if comptime!(activation == 3) {
        let tanh = C::tanh(C::new(ROOT_TWO_OVER_PI) * (sum + C::new(CUBIC) * sum * sum * sum));
        let inner = C::new(ROOT_TWO_OVER_PI) * (C::new(1.0) + C::new(3.0 * CUBIC) * sum * sum);
        C::new(0.5) * (C::new(1.0) + tanh) + C::new(0.5) * sum * (C::new(1.0) - tanh * tanh) * inner
    } else {
        C::new(1.0)
    }
}

/// The largest, or the sum, of what the units of a cube have.
#[cube]
fn over_units(mine: f32, #[comptime] largest: bool) -> f32 {
    let unit = UNIT_POS as usize;
    let mut shared = Shared::new_slice(UNITS as usize);
    shared[unit] = mine;
    sync_cube();
    #[unroll]
    for halving in 0..HALVINGS {
        let half = comptime!(UNITS >> (halving + 1));
        if UNIT_POS < half {
            let other = shared[unit + half as usize];
            let own = shared[unit];
            if comptime!(largest) {
                shared[unit] = select(other > own, other, own);
            } else {
                shared[unit] = own + other;
            }
        }
        sync_cube();
    }
    shared[0]
}

/// The largest of every row of `[rows, columns]`. A cube has a row; cubes behind the last do the last again.
#[cube(launch)]
pub fn row_max<F: Float>(z: &Tensor<F>, most: &mut Tensor<f32>, #[define(F)] _dtype: ElemType) {
    let columns = z.shape(1);
    let row = clamp_max(CUBE_POS, z.shape(0) - 1);
    let unit = UNIT_POS as usize;
    let mut best = f32::cast_from(z[row * columns]);
    let mut column = unit;
    while column < columns {
        let next = f32::cast_from(z[row * columns + column]);
        best = select(next > best, next, best);
        column += UNITS as usize;
    }
    let best = over_units(best, true);
    if UNIT_POS == 0 {
        most[row] = best;
    }
}

/// Of every row the sum of `exp(z - most)`, and `z - most` of the target, if its column (not negative) is here: `[rows,
/// 2]`.
#[cube(launch)]
pub fn row_sums<F: Float>(
    z: &Tensor<F>,
    most: &Tensor<f32>,
    targets: &Tensor<i32>,
    sums: &mut Tensor<f32>,
    #[define(F)] _dtype: ElemType,
) {
    let columns = z.shape(1);
    let row = clamp_max(CUBE_POS, z.shape(0) - 1);
    let unit = UNIT_POS as usize;
    let highest = most[row];
    let mut total = f32::new(0.0);
    let mut column = unit;
    while column < columns {
        total += f32::exp(f32::cast_from(z[row * columns + column]) - highest);
        column += UNITS as usize;
    }
    let total = over_units(total, false);
    if UNIT_POS == 0 {
        let target = targets[row];
        sums[row * 2] = total;
        let mut score = f32::new(0.0);
        if target >= 0 {
            score = f32::cast_from(z[row * columns + target as usize]) - highest;
        }
        sums[row * 2 + 1] = score;
    }
}

/// `dz = (exp(z - most) / sum - [the column is the target]) dloss`.
#[cube(launch)]
pub fn loss_gradient<F: Float>(
    z: &Tensor<F>,
    most: &Tensor<f32>,
    sums: &Tensor<f32>,
    targets: &Tensor<i32>,
    dloss: &Tensor<f32>,
    dz: &mut Tensor<F>,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= dz.len() {
        terminate!();
    }
    let columns = dz.shape(1);
    let row = ABSOLUTE_POS / columns;
    let column = ABSOLUTE_POS % columns;
    let share = f32::exp(f32::cast_from(z[ABSOLUTE_POS]) - most[row]) / sums[row * 2];
    let hit = select(targets[row] == column as i32, f32::new(1.0), f32::new(0.0));
    dz[ABSOLUTE_POS] = F::cast_from((share - hit) * dloss[row]);
}
