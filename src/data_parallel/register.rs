//! Hands averaged gradients to burn's optimizers.

use burn::module::Module;
use burn::optim::GradientsParams;

use super::reducer::Reducer;
use super::reduction::Reduced;
use crate::Error;
use crate::params::put_gradients;

/// Hands the reduced gradients to burn, on the devices of their parameters.
///
/// # Errors
/// [`Error::Graph`] if a gradient has another rank than its parameter.
pub(crate) fn register<M: Module>(
    reducer: &Reducer,
    reduced: &mut Reduced,
    module: &M,
) -> Result<GradientsParams, Error> {
    let known = reducer.known();
    let (grads, outcome) = put_gradients(module, &mut |id, device| {
        let gradient = reduced.gradients.remove(known.indices.get(&id)?)?;
        Some(gradient.moved_to(&device))
    });
    outcome.map(|()| grads)
}
