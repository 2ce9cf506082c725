//! Hands averaged gradients to burn's optimizers.

use burn::optim::GradientsParams;

use super::reducer::Reducer;
use super::reduction::Reduced;
use crate::Error;
use crate::params::FoundParams;

/// Hands the reduced gradients to burn, on the devices of their parameters.
///
/// # Errors
/// [`Error::Graph`] if a gradient has another rank than its parameter.
pub(crate) fn register(
    reducer: &Reducer,
    reduced: &mut Reduced,
    params: &FoundParams,
) -> Result<GradientsParams, Error> {
    let known = reducer.known();
    let (grads, outcome) = params.put_gradients(&mut |param| {
        let gradient = reduced.gradients.remove(known.indices.get(&param.id())?)?;
        let gradient = gradient.moved_to(&param.device().inner());
        if let Some(norm) = &mut reduced.norm {
            norm.gradients.insert(param.id(), gradient.clone());
        }
        Some(gradient)
    });
    outcome.map(|()| grads)
}
