//! The settings of a world, over any transport.

use std::sync::Arc;
use std::time::Duration;

use burn::config::Config;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Time-out when `BURN_PARALLEL_TIMEOUT_S` does not say otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

/// A longer time-out is as good as none, and times worked out from it must not overflow.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The time-out, bounded.
pub(crate) fn bounded(timeout: Duration) -> Duration {
    timeout.min(LONGEST_TIMEOUT)
}

/// The settings of a world, over any transport. In a file `timeout_s`, in seconds, and `name`; what is left out is as
/// [`from_env`](Self::from_env) has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WorldText", into = "WorldText")]
pub struct WorldConfig {
    pub(crate) timeout: Duration,
    pub(crate) name: Arc<str>,
}

impl Config for WorldConfig {}

/// The settings of a world in a file.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct WorldText {
    timeout_s: Option<f64>,
    name: Option<String>,
}

impl TryFrom<WorldText> for WorldConfig {
    type Error = Error;

    fn try_from(WorldText { timeout_s, name }: WorldText) -> Result<Self, Error> {
        let config = match timeout_s {
            Some(seconds) => {
                let wrong =
                    || Error::invalid("WorldConfig", format!("`timeout_s` is {seconds}; it must be {EXPECTED}"));
                Self { timeout: bounded(seconds_of(seconds).ok_or_else(wrong)?), name: NAME.into() }
            }
            None => Self::from_env()?,
        };
        Ok(name.iter().fold(config, |config, name| config.with_name(name)))
    }
}

impl From<WorldConfig> for WorldText {
    fn from(WorldConfig { timeout, name }: WorldConfig) -> Self {
        Self { timeout_s: Some(timeout.as_secs_f64()), name: Some(name.as_ref().into()) }
    }
}

/// The name of the group of all ranks.
const NAME: &str = "world";

/// What a time-out must be that is given in seconds.
const EXPECTED: &str = "a positive number of seconds, less than 1.8e19";

fn seconds_of(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok().filter(|timeout| !timeout.is_zero())
}

impl WorldConfig {
    /// The default: group name `world`, and the time-out of the environment variable `BURN_PARALLEL_TIMEOUT_S`
    /// (seconds, fractions allowed), or 300 s.
    ///
    /// # Errors
    /// [`Error::Environment`] if the variable is not a positive number.
    pub fn from_env() -> Result<Self, Error> {
        const VARIABLE: &str = "BURN_PARALLEL_TIMEOUT_S";
        let timeout = match std::env::var_os(VARIABLE) {
            None => DEFAULT_TIMEOUT,
            Some(value) => {
                let value = value.to_string_lossy().into_owned();
                match value.trim().parse().ok().and_then(seconds_of) {
                    Some(timeout) => timeout,
                    None => return Err(Error::Environment { variable: VARIABLE, value, expected: EXPECTED }),
                }
            }
        };
        Ok(Self { timeout: bounded(timeout), name: NAME.into() })
    }

    /// Sets how long any wait may last before the whole world fails with [`Error::Timeout`]. It must not be 0, which is
    /// an error when the world is made; more than 100 years are 100 years.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = bounded(timeout);
        self
    }

    /// Refuses settings that no world can work with.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.timeout.is_zero() {
            false => Ok(()),
            true => Err(Error::invalid(
                "timeout",
                "0 s is no time-out: no rank could wait for another; give `timeout` or `with_timeout` a positive one, or set \
                 BURN_PARALLEL_TIMEOUT_S",
            )),
        }
    }

    /// How long any wait may last.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Sets the name by which errors call the group.
    pub fn with_name(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }
}
