//! Running statistics, as those of batch norms.

use burn::module::Module;

use super::walk::visit_params;

/// Whether a parameter is a running statistic, in which replicas may differ.
pub(crate) fn is_statistic(path: &str) -> bool {
    path.ends_with("running_mean") || path.ends_with("running_var")
}

/// Brings the running statistics of a module up to date. They are shared by all its clones, and what a forward adds to
/// them stays aside until somebody asks for the module in evaluation mode.
pub(crate) fn average_statistics<M: Module>(module: &M) {
    let mut any = false;
    visit_params(module, &mut |param| any |= is_statistic(&param.path()));
    if any {
        drop(module.valid());
    }
}
