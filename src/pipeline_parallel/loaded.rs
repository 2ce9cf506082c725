//! What a pipeline was loaded from before it was known which stages share a parameter.

use burn::module::{Module, ParamId};

use crate::params::{self, ParamSlice, SliceSource};

/// Sources, in the order in which the model was loaded from them. They are read once more when the model is cut, of
/// which it is known then what else this rank needs.
#[derive(Default)]
pub(super) struct LoadedFrom(Vec<Box<dyn SliceSource + Send>>);

impl LoadedFrom {
    /// The model was loaded from this one after the others.
    pub(super) fn add(&mut self, source: &dyn SliceSource) {
        match source.for_later() {
            Some(source) => self.0.push(source),
            // What the others have is no longer what the model has.
            None => self.0.clear(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives parameters of which this rank has nothing yet what it `needs` of them. If that cannot be read, the model
    /// stays as it is.
    pub(super) fn read<M: Module>(mut self, model: M, needs: &dyn Fn(ParamId) -> Option<ParamSlice>) -> M {
        let mut sources = self.0.iter_mut();
        let read = sources.try_fold(model.clone(), |model, source| params::load(model, source.as_mut(), needs));
        read.unwrap_or_else(|why| {
            log::warn!("what stages of a pipeline share is sent, since it cannot be read again: {why}");
            model
        })
    }
}
