//! Tells by which of burn's optimizers a module is mapped: burn calls no hook of a module before an update.

use crate::Error;
use crate::error::throw;

/// What is in the names of the mappers by which a `ModuleOptimizer` and `LBFGS` update modules, and of the visitors of
/// the latter.
const BY_PARAMETER: &str = "ModuleOptimizerMapper";
const AT_ONCE: &str = "::lbfgs::";

/// Whether a mapper is that of one of burn's optimizers.
pub(crate) fn is_optimizer<Mapper>() -> bool {
    let name = std::any::type_name::<Mapper>();
    name.contains(BY_PARAMETER) || name.contains(AT_ONCE)
}

/// Refuses an optimizer that looks at all parameters at once.
///
/// # Panics
/// If the mapper or visitor is that of `LBFGS`: on each rank it would see other parameters, and make another update of
/// them. There is no other way out of a mapper. The run ends with [`Error::Optimizer`].
pub(crate) fn refuse_at_once<Mapper>(wrapper: &str) {
    if std::any::type_name::<Mapper>().contains(AT_ONCE) {
        let problem = format!(
            "burn's LBFGS looks at all parameters at once, of which each rank has its own with `{wrapper}`: take another optimizer, \
             or LBFGS with replicas alone, whose sharding is \"none\""
        );
        throw(Error::Optimizer { problem });
    }
}
