//! Names of groups that errors know.

/// What the groups are called over which replicas gather the parameters that they divide among themselves; how the
/// names begin of others that only such replicas have.
pub(crate) const GATHERED_PARAMETERS: &str = "parameters";

/// What the groups are called over which such replicas gather what they say that they want, where they may use
/// different parameters.
pub(crate) const WANTED_PARAMETERS: &str = "wanted_parameters";
