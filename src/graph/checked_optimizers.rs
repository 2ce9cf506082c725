//! The optimizers that were found to suit a model.
//!
//! burn gives an optimizer no identity, and another may come to be where one was: in the same variable, or with a state
//! that was loaded since. So one that is met again is recognised by its place and by the layout of its state of one
//! parameter, its *witness*: an optimizer that has not stepped yet has none, and one of another kind, or with the state
//! of other parameters, has another.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::ParamId;

use crate::Error;
use crate::comm::lock::lock;

/// The state that an optimizer has of a parameter: the names of what it keeps, with the dims of tensors.
pub type StateLayout = Vec<(String, Vec<usize>)>;

/// Where the witness is not in host memory, and has to be read back, how many steps one look is for.
const DEVICE_EVERY: u64 = 16;

/// The optimizers that were found to suit a model, by where they are in memory.
#[derive(Debug, Clone, Default)]
pub struct CheckedOptimizers(Arc<Mutex<HashMap<usize, Checked>>>);

/// A parameter by whose state an optimizer is recognised.
#[derive(Debug, Clone)]
pub struct Witness {
    pub id: ParamId,
    /// Whether its state is in host memory.
    pub on_host: bool,
}

/// What is known of an optimizer.
#[derive(Debug, Default)]
struct Checked {
    /// By what it is recognised, and how often it was met.
    witness: Option<(Witness, StateLayout, u64)>,
    /// The parameters whose updates were looked at.
    params: HashSet<ParamId>,
    /// Those whose update depends on the whole of them.
    whole: Arc<HashSet<ParamId>>,
}

impl CheckedOptimizers {
    /// Whether the optimizer at this address is the one that was [remembered](Self::remember); `layout` is that of its
    /// state of a parameter now. If not, whatever was known of one at this address is forgotten.
    pub fn is_known(&self, address: usize, layout: impl FnOnce(ParamId) -> StateLayout) -> bool {
        let mut known = self.lock();
        let witness = known.get_mut(&address).and_then(|checked| checked.witness.as_mut());
        let same = witness.is_some_and(|(witness, before, met)| {
            *met += 1;
            !witness.on_host && !met.is_multiple_of(DEVICE_EVERY) || layout(witness.id) == *before
        });
        if !same {
            known.remove(&address);
        }
        same
    }

    /// Remembers an optimizer that suits the model, by the layout of its state of a parameter after its step. One that
    /// keeps nothing of it is not recognised, and looked at again the next time.
    pub fn remember(&self, address: usize, witness: Witness, layout: StateLayout) {
        if !layout.is_empty() {
            self.lock().entry(address).or_default().witness = Some((witness, layout, 0));
        }
    }

    /// The parameters whose update by the optimizer at this address depends on the whole of them, as `find` finds them
    /// out, which is asked where there are `params` that it was not asked for.
    ///
    /// # Errors
    /// Those of `find`.
    pub fn whole(
        &self,
        address: usize,
        params: &HashSet<ParamId>,
        find: impl FnOnce() -> Result<HashSet<ParamId>, Error>,
    ) -> Result<Arc<HashSet<ParamId>>, Error> {
        if let Some(whole) = self.known_whole(address, params) {
            return Ok(whole);
        }
        let found = find()?;
        let mut known = self.lock();
        let checked = known.entry(address).or_default();
        // Steps need not have gradients of the same parameters.
        checked.params.extend(params);
        checked.whole = Arc::new(checked.whole.union(&found).copied().collect());
        Ok(checked.whole.clone())
    }

    /// What [`whole`](Self::whole) has found out, if it was asked for all of `params`.
    pub fn known_whole(&self, address: usize, params: &HashSet<ParamId>) -> Option<Arc<HashSet<ParamId>>> {
        self.lock().get(&address).filter(|known| known.params.is_superset(params)).map(|known| known.whole.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Checked>> {
        lock(&self.0)
    }
}
