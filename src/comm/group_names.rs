//! Names of groups that errors know.

/// What the groups are called over which replicas gather the parameters that they divide among themselves.
pub(crate) const GATHERED_PARAMETERS: &str = "parameters";
