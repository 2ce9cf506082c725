//! Initial values of a slice of a parameter, equal to those of the whole parameter at every degree.
//!
//! burn's initializers draw a whole tensor from one stream of numbers. Here every element has numbers of its own, a
//! function of a seed, of the parameter and of the element's place in the whole: the generator is SplitMix64 (Steele,
//! Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), whose `k`-th number is a hash of `seed +
//! k * gamma`. So a layer starts the same at every degree, and no rank makes more than its slice.

use std::f64::consts::TAU;
use std::ops::Range;

use burn::module::{Param, ParamId};
use burn::nn::{Initializer, Linear};
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};

use crate::Error;
use crate::comm::Communicator;

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The seed that all ranks of the group begin with: rank 0's, which draws one from burn's generator if none is given.
///
/// # Errors
/// Those of [`Communicator`].
pub(super) fn agreed_seed(seed: Option<u64>, group: &Communicator) -> Result<u64, Error> {
    let own = match (seed, group.rank()) {
        (Some(seed), _) => seed,
        (None, 0) => drawn_seed(),
        (None, _) => 0,
    };
    if group.size() == 1 {
        return Ok(own);
    }
    Ok(group.broadcast(vec![own], 0)?[0])
}

fn drawn_seed() -> u64 {
    let pieces = Tensor::<1>::random([4], Distribution::Uniform(0.0, 65536.0), &Device::flex());
    let pieces: Tensor<1, Int> = pieces.int();
    pieces.into_data().iter::<u64>().fold(0, |seed, piece| (seed << 16) | (piece & 0xffff))
}

/// The seed of a part of what has this seed.
pub(super) fn branch(seed: u64, part: u64) -> u64 {
    mix(seed ^ mix(part.wrapping_add(1).wrapping_mul(GAMMA)))
}

/// The finalizer of SplitMix64.
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What an initializer draws each element from.
#[derive(Debug, Clone, Copy)]
enum DrawnFrom {
    Constant(f64),
    Uniform { low: f64, high: f64 },
    Normal { mean: f64, std: f64 },
}

impl DrawnFrom {
    /// By burn's formulae, with the fans of the whole parameter.
    fn new(operation: &'static str, initializer: &Initializer, fans: Option<[usize; 2]>) -> Result<Self, Error> {
        let even = |bound: f64| Self::Uniform { low: -bound, high: bound };
        let around_0 = |std: f64| Self::Normal { mean: 0.0, std };
        let known = || {
            let problem = "this initializer needs a fan-in and a fan-out, which a table of embeddings does not have; take \
                           `Initializer::Normal` or `Uniform`";
            fans.ok_or_else(|| Error::invalid(operation, problem))
        };
        let kaiming = |fan_out_only: bool| known().map(|fans| 1.0 / (fans[usize::from(fan_out_only)] as f64).sqrt());
        let xavier = || known().map(|[fan_in, fan_out]| (2.0 / (fan_in + fan_out) as f64).sqrt());
        let root = 3f64.sqrt();
        Ok(match initializer {
            Initializer::Constant { value } => Self::Constant(*value),
            Initializer::Ones => Self::Constant(1.0),
            Initializer::Zeros => Self::Constant(0.0),
            Initializer::Uniform { min, max } => Self::Uniform { low: *min, high: *max },
            Initializer::Normal { mean, std } => Self::Normal { mean: *mean, std: *std },
            Initializer::KaimingUniform { gain, fan_out_only } => even(root * gain * kaiming(*fan_out_only)?),
            Initializer::KaimingNormal { gain, fan_out_only } => around_0(gain * kaiming(*fan_out_only)?),
            Initializer::XavierUniform { gain } => even(root * gain * xavier()?),
            Initializer::XavierNormal { gain } => around_0(gain * xavier()?),
            Initializer::Orthogonal { .. } => {
                let problem = "an orthogonal matrix is made as a whole, and no rank may hold it; take another initializer, \
                               or make a burn layer and cut it with `init_from`";
                return Err(Error::invalid(operation, problem));
            }
        })
    }

    /// The element at a place of the whole.
    fn at(self, seed: u64, place: u64) -> f64 {
        let number = |k: u64| {
            let bits = mix(seed.wrapping_add(place.wrapping_mul(2).wrapping_add(k + 1).wrapping_mul(GAMMA)));
            (bits >> 11) as f64 / (1u64 << 53) as f64
        };
        match self {
            Self::Constant(value) => value,
            Self::Uniform { low, high } => low + (high - low) * number(0),
            // Box-Muller; 1 - u lies in (0, 1].
            Self::Normal { mean, std } => mean + std * (-2.0 * (1.0 - number(0)).ln()).sqrt() * (TAU * number(1)).cos(),
        }
    }

    /// A lazy parameter: rows and columns of a matrix of `width` columns.
    fn matrix(
        self,
        seed: u64,
        rows: Range<usize>,
        columns: Range<usize>,
        width: usize,
        device: &Device,
    ) -> Param<Tensor<2>> {
        let dims = [rows.len(), columns.len()];
        let make = move |device: &Device, require_grad: bool| {
            let places = rows.flat_map(|row| columns.clone().map(move |column| row * width + column));
            let values = places.map(|place| self.at(seed, place as u64) as f32).collect::<Vec<_>>();
            Tensor::from_data(TensorData::new(values, dims), device).set_require_grad(require_grad)
        };
        Param::uninitialized(ParamId::new(), make, device.clone(), true, dims.into())
    }

    fn vector(self, seed: u64, range: Range<usize>, device: &Device) -> Param<Tensor<1>> {
        let dims = [range.len()];
        let make = move |device: &Device, require_grad: bool| {
            let values = range.map(|place| self.at(seed, place as u64) as f32).collect::<Vec<_>>();
            Tensor::from_data(TensorData::new(values, dims), device).set_require_grad(require_grad)
        };
        Param::uninitialized(ParamId::new(), make, device.clone(), true, dims.into())
    }
}

/// A linear layer that does not exist as a whole: its dims, and how it begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blueprint<'a> {
    pub operation: &'static str,
    pub d_input: usize,
    pub d_output: usize,
    pub bias: bool,
    pub initializer: &'a Initializer,
    pub seed: u64,
}

impl Blueprint<'_> {
    /// Some columns of the weight, with their biases.
    pub fn columns(&self, own: Range<usize>, device: &Device) -> Result<Linear, Error> {
        self.slice(0..self.d_input, own.clone(), own, device)
    }

    /// Some rows of the weight, with all biases.
    pub fn rows(&self, own: Range<usize>, device: &Device) -> Result<Linear, Error> {
        self.slice(own, 0..self.d_output, 0..self.d_output, device)
    }

    fn slice(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        biases: Range<usize>,
        device: &Device,
    ) -> Result<Linear, Error> {
        let draw = DrawnFrom::new(self.operation, self.initializer, Some([self.d_input, self.d_output]))?;
        let weight = draw.matrix(branch(self.seed, 0), rows, columns, self.d_output, device);
        let bias = self.bias.then(|| draw.vector(branch(self.seed, 1), biases, device));
        Ok(Linear { weight, bias })
    }
}

/// Some rows of a table of embeddings.
pub(super) fn table(
    operation: &'static str,
    initializer: &Initializer,
    seed: u64,
    rows: Range<usize>,
    width: usize,
    device: &Device,
) -> Result<Param<Tensor<2>>, Error> {
    Ok(DrawnFrom::new(operation, initializer, None)?.matrix(branch(seed, 0), rows, 0..width, width, device))
}
