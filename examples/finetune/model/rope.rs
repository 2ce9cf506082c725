//! By how much rotary positions turn, as `rope_parameters` of `config.json` says, or `rope_theta` and `rope_scaling` of
//! older ones.

use std::f64::consts::PI;

use serde_json::Value;

/// Rotary positions: pair `i` of a head turns by `frequencies[i]` from one token to the next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// The base: pair `i` of `n` turns by `theta^(-i / n)`, before it is scaled.
    pub theta: f64,
    /// How that was changed for longer texts.
    pub scaling: Scaling,
}

/// How the frequencies of a model were changed for longer texts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// All are divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1: those that turn fewer than `low` times within `original` tokens are divided by `factor`, those that
    /// turn more than `high` times are kept, and what is between is between.
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
    /// YaRN (arXiv:2309.00071): as Llama 3's, but the way from one to the other is straight in the number of the pair,
    /// and goes from whole pairs if `truncate`; cosine and sine are multiplied by `attention`.
    Yarn { factor: f64, slow: f64, fast: f64, original: f64, attention: f64, truncate: bool },
}

impl Rope {
    /// Reads what a `config.json` says.
    ///
    /// # Errors
    /// What is missing, makes no sense, or is not known here.
    pub fn from_config(config: &Value) -> Result<Self, String> {
        // An empty table says nothing.
        let table = |key: &str| match &config[key] {
            Value::Null => Ok(None),
            Value::Object(table) if table.is_empty() => Ok(None),
            Value::Object(_) => Ok(Some(&config[key])),
            other => Err(format!("`{key}` is {other}, not a table")),
        };
        let (name, said) = match (table("rope_scaling")?, table("rope_parameters")?) {
            (Some(old), _) => ("rope_scaling", old),
            (None, Some(new)) => ("rope_parameters", new),
            (None, None) => ("rope_parameters", &Value::Null),
        };
        if let Some(layers) = ["full_attention", "sliding_attention"].into_iter().find(|key| said[key].is_object()) {
            return Err(format!(
                "`{name}` has a table `{layers}`: positions that differ between layers are not supported"
            ));
        }
        let number = |key: &str| match &said[key] {
            Value::Null => Ok(None),
            value => match value.as_f64().filter(|x| *x > 0.0) {
                Some(x) => Ok(Some(x)),
                None => Err(format!("`{key}` of `{name}` is {value}, not a number above 0")),
            },
        };
        let needed = |key: &str| number(key)?.ok_or(format!("`{key}` is missing in `{name}`"));
        for part in [&said["partial_rotary_factor"], &config["partial_rotary_factor"]] {
            if !part.is_null() && part.as_f64() != Some(1.0) {
                return Err(format!(
                    "`partial_rotary_factor` is {part}: heads of which a part is turned are not supported"
                ));
            }
        }
        let theta = match (number("rope_theta")?, &config["rope_theta"]) {
            (Some(theta), _) => theta,
            (None, Value::Null) => 10_000.0,
            (None, theta) => match theta.as_f64().filter(|theta| *theta > 0.0) {
                Some(theta) => theta,
                None => return Err(format!("`rope_theta` is {theta}, not a number above 0")),
            },
        };
        let longest = config["max_position_embeddings"].as_f64();
        let original = || match number("original_max_position_embeddings")?.or(longest) {
            Some(original) => Ok(original),
            None => Err(format!("`original_max_position_embeddings` is missing in `{name}`")),
        };
        let kind = said["rope_type"].as_str().or(said["type"].as_str()).unwrap_or("default");
        let scaling = match kind {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: needed("factor")? },
            "llama3" => {
                let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
                if low >= high {
                    return Err(format!(
                        "`low_freq_factor` of `{name}` is {low}, not below `high_freq_factor`, {high}"
                    ));
                }
                Scaling::Llama3 { factor: needed("factor")?, low, high, original: original()? }
            }
            "yarn" => {
                let original = original()?;
                let factor = match (number("factor")?, longest) {
                    (Some(factor), _) => factor,
                    (None, Some(longest)) => longest / original,
                    (None, None) => needed("factor")?,
                };
                let scale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
                let inferred = match (number("mscale")?, number("mscale_all_dim")?) {
                    (Some(one), Some(all)) => scale(one) / scale(all),
                    _ => scale(1.0),
                };
                Scaling::Yarn {
                    factor,
                    slow: number("beta_slow")?.unwrap_or(1.0),
                    fast: number("beta_fast")?.unwrap_or(32.0),
                    original,
                    attention: number("attention_factor")?.unwrap_or(inferred),
                    truncate: said["truncate"].as_bool().unwrap_or(true),
                }
            }
            _ => {
                return Err(format!(
                    "`{name}` has the type `{kind}`, and only default, linear, llama3 and yarn are supported"
                ));
            }
        };
        Ok(Self { theta, scaling })
    }

    /// By how many radians each pair of a head of `size` turns from one token to the next.
    pub fn frequencies(&self, size: usize) -> Vec<f32> {
        let pairs = size / 2;
        let turned = |pair: usize| self.theta.powf(-(pair as f64) / pairs as f64);
        (0..pairs).map(|pair| self.scaled(pair, turned(pair), size) as f32).collect()
    }

    /// What cosine and sine are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            Scaling::Yarn { attention, .. } => attention,
            _ => 1.0,
        }
    }

    fn scaled(&self, pair: usize, frequency: f64, size: usize) -> f64 {
        // `kept` is 1 where the frequency stays, 0 where it is divided.
        let between = |kept: f64, factor: f64| frequency * kept + frequency / factor * (1.0 - kept);
        match self.scaling {
            Scaling::None => frequency,
            Scaling::Linear { factor } => frequency / factor,
            Scaling::Llama3 { factor, low, high, original } => {
                let turns = original * frequency / (2.0 * PI);
                between(((turns - low) / (high - low)).clamp(0.0, 1.0), factor)
            }
            Scaling::Yarn { factor, slow, fast, original, truncate, .. } => {
                // The pair that turns so many times within the original length.
                let pair_of = |turns: f64| size as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut first, mut last) = (pair_of(fast), pair_of(slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                let (first, mut last) = (first.max(0.0), last.min(size as f64 - 1.0));
                if first == last {
                    last += 0.001;
                }
                between(1.0 - ((pair as f64 - first) / (last - first)).clamp(0.0, 1.0), factor)
            }
        }
    }
}
