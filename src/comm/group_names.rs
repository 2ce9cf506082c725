//! Names of groups that errors know.

/// What the groups are called over which replicas gather the parameters that they divide among themselves; how the
/// names begin of others that only such replicas have.
pub(crate) const GATHERED_PARAMETERS: &str = "parameters";
