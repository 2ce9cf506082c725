//! Text from a model whose weights stay where they are.

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::model::{Llama, whole_rows};

/// The model sees rows of this many tokens, or twice, four times, .. as many: each length is captured once.
const SHORTEST: usize = 32;

/// How a text is continued.
#[derive(Debug, Clone)]
pub struct Continuation {
    /// The most tokens that are added.
    pub length: usize,
    /// The most tokens of the whole text: what the model was made for.
    pub longest: usize,
    /// Tokens that end the text. They are not part of what is given.
    pub ends: Vec<u32>,
    /// 0 always takes the likeliest token, 1 draws from what the model says, and between lie more careful draws.
    pub temperature: f64,
    /// What is drawn from.
    pub seed: u64,
    /// How many rows the model takes at least: the micro-batches of a pipeline, else 1.
    pub rows: usize,
}

/// Continues the tokens of `prompt`. Collective over all ranks, which pass the same; the first of them chooses each
/// token for all, so that all end together.
///
/// # Errors
/// If there is nothing to continue, or the prompt is too long; those of [`forward_with`](ParallelModule::forward_with).
pub fn generate(
    model: &Parallel<Llama>,
    device: &Device,
    prompt: &[u32],
    config: &Continuation,
) -> Result<Vec<u32>, Error> {
    let longest = config.longest;
    if prompt.is_empty() || prompt.len() > longest {
        let tokens = prompt.len();
        return Err(Error::user(format!(
            "a prompt has 1 to {longest} tokens, as many as the model takes, not {tokens}"
        )));
    }
    let world = model.mesh().all();
    let mut random = ChaCha8Rng::seed_from_u64(config.seed);
    let mut text = prompt.to_vec();
    while text.len() < longest.min(prompt.len() + config.length) {
        let logits = next(model, device, &text, config)?;
        let chosen = world.broadcast(vec![choose(&logits, config.temperature, &mut random)], 0)?;
        if chosen.iter().any(|token| config.ends.contains(token)) {
            break;
        }
        text.extend(chosen);
    }
    Ok(text.split_off(prompt.len()))
}

/// To how many tokens a text of so many is padded.
pub fn padded(tokens: usize) -> usize {
    tokens.next_power_of_two().max(SHORTEST)
}

/// The logits of the token behind a text.
fn next(model: &Parallel<Llama>, device: &Device, text: &[u32], config: &Continuation) -> Result<Vec<f32>, Error> {
    let (rows, length) = (config.rows, padded(text.len()));
    // What is behind the text is not seen by it.
    let padded = text.iter().map(|token| i64::from(*token)).chain(std::iter::repeat_n(0, length - text.len()));
    let padded: Vec<i64> = padded.collect();
    let ints = |values: Vec<i64>| {
        Tensor::<2, Int>::from_data(TensorData::new(values.repeat(rows), [rows, values.len()]), device)
    };
    let (positions, documents) = whole_rows([rows, length], device);
    let inputs = (ints(padded), positions, documents, ints(vec![text.len() as i64 - 1]));
    let logits: Tensor<2> = model.forward_with(inputs, |model, (tokens, positions, documents, last)| {
        model.next(tokens, positions, documents, last)
    })?;
    logits.narrow(0, 0, 1).into_data().try_to_vec::<f32>().map_err(Error::user)
}

fn choose(logits: &[f32], temperature: f64, random: &mut ChaCha8Rng) -> u32 {
    let likeliest = logits
        .iter()
        .copied()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |best, (token, logit)| if logit > best.1 { (token, logit) } else { best });
    if temperature == 0.0 {
        return likeliest.0 as u32;
    }
    let weight = |logit: f32| (f64::from(logit - likeliest.1) / temperature).exp();
    let mut left = random.random::<f64>() * logits.iter().map(|logit| weight(*logit)).sum::<f64>();
    for (token, logit) in logits.iter().enumerate() {
        left -= weight(*logit);
        if left < 0.0 {
            return token as u32;
        }
    }
    likeliest.0 as u32
}
