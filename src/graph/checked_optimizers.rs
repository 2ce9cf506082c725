//! The optimizers that were found to suit a model.
//!
//! burn gives an optimizer no identity, and another may come to be where one was: in the same variable, of another
//! kind, or with a state that was loaded since. So one that is met again is recognised by what it consists of: where
//! its groups are, the map of its states with the seed that each map draws, and how it clips. That moves with it, and
//! whatever is put in its place, or made of it by a method that takes it, differs in it. (On all ranks alike: what is
//! new to one of them is looked at together.)

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use burn::grad_clipping::GradientClipping;
use burn::module::ParamId;
use burn::optim::ModuleOptimizer;

use super::updates::Updates;
use crate::Error;
use crate::lock::lock;

/// What burn's optimizer consists of: a vector, and a map, which has four words and a seed.
const WORDS: usize = 3 + 5;

/// Which optimizer it is, until somebody changes it.
#[derive(Debug, Clone, Copy)]
pub struct OptimizerIdentity {
    address: usize,
    /// `None` if burn has changed what it consists of: then it is not recognised.
    words: Option<[u64; WORDS]>,
    /// By its norm or by value, and the bits of the most. It is set where the words stay.
    clipping: Option<(bool, u32)>,
}

impl OptimizerIdentity {
    pub fn of(optim: &ModuleOptimizer) -> Self {
        const KNOWN: bool = size_of::<ModuleOptimizer>() == size_of::<[u64; WORDS]>()
            && align_of::<ModuleOptimizer>() == align_of::<[u64; WORDS]>()
            && size_of::<usize>() == size_of::<u64>();
        let place = std::ptr::from_ref(optim);
        // SAFETY: it is as large and aligned as the words that burn 0.22 makes it of, so there is nothing between them
        // that was never written; any bits are numbers.
        let words = KNOWN.then(|| unsafe { place.cast::<[u64; WORDS]>().read() });
        let clipping = optim.grad_clipping().map(|clipping| match clipping {
            GradientClipping::Norm(most) => (true, most.to_bits()),
            GradientClipping::Value(most) => (false, most.to_bits()),
        });
        Self { address: place.addr(), words, clipping }
    }

    /// Whether it is the same optimizer, wherever it is now.
    fn is(self, other: Self) -> bool {
        self.words.is_some() && (self.words, self.clipping) == (other.words, other.clipping)
    }
}

/// The optimizers that were found to suit a model, by where they are in memory, and what they were called with.
#[derive(Debug, Clone, Default)]
pub struct CheckedOptimizers {
    known: Arc<Mutex<HashMap<usize, Checked>>>,
    updates: Updates,
}

/// What is known of an optimizer.
#[derive(Debug, Default)]
struct Checked {
    /// What it was after its last step here.
    identity: Option<OptimizerIdentity>,
    /// The parameters whose updates were looked at.
    params: HashSet<ParamId>,
    /// Those whose update depends on the whole of them.
    whole: Arc<HashSet<ParamId>>,
}

impl Checked {
    fn is(&self, identity: OptimizerIdentity) -> bool {
        self.identity.is_some_and(|known| known.is(identity))
    }
}

impl CheckedOptimizers {
    /// Whether this is the optimizer that was [remembered](Self::remember). If not, whatever was known of one at its
    /// place is forgotten.
    pub fn is_known(&self, optim: &ModuleOptimizer) -> bool {
        let (identity, mut known) = (OptimizerIdentity::of(optim), self.lock());
        let found = known.iter().find_map(|(address, checked)| checked.is(identity).then_some(*address));
        // What was at its place is there no longer.
        let moved = found.filter(|address| *address != identity.address).and_then(|address| known.remove(&address));
        if found.is_none() || moved.is_some() {
            known.remove(&identity.address);
        }
        known.extend(moved.map(|checked| (identity.address, checked)));
        found.is_some()
    }

    /// Remembers an optimizer that suits the model, after its step.
    pub fn remember(&self, optim: &ModuleOptimizer) {
        let identity = OptimizerIdentity::of(optim);
        self.lock().entry(identity.address).or_default().identity = Some(identity);
    }

    /// The parameters whose update by the optimizer, which was asked for by [`is_known`](Self::is_known), depends on
    /// the whole of them, as `find` finds them out, which is asked where there are `params` that it was not asked for.
    ///
    /// # Errors
    /// Those of `find`.
    pub fn whole(
        &self,
        optim: &ModuleOptimizer,
        params: &HashSet<ParamId>,
        find: impl FnOnce() -> Result<HashSet<ParamId>, Error>,
    ) -> Result<Arc<HashSet<ParamId>>, Error> {
        let address = OptimizerIdentity::of(optim).address;
        if let Some(known) = self.lock().get(&address).filter(|known| known.params.is_superset(params)) {
            return Ok(known.whole.clone());
        }
        let found = find()?;
        let mut known = self.lock();
        let checked = known.entry(address).or_default();
        // Steps need not have gradients of the same parameters.
        checked.params.extend(params);
        checked.whole = Arc::new(checked.whole.union(&found).copied().collect());
        Ok(checked.whole.clone())
    }

    /// What [`whole`](Self::whole) has found out, if this is the optimizer that was remembered, and it was asked for
    /// all of `params`.
    pub fn known_whole(&self, optim: &ModuleOptimizer, params: &HashSet<ParamId>) -> Option<Arc<HashSet<ParamId>>> {
        let (identity, known) = (OptimizerIdentity::of(optim), self.lock());
        let found = known.values().find(|known| known.is(identity));
        found.filter(|known| known.params.is_superset(params)).map(|known| known.whole.clone())
    }

    /// The updates that the model has had.
    pub fn updates(&self) -> &Updates {
        &self.updates
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Checked>> {
        lock(&self.known)
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::LinearConfig;
    use burn::optim::{AdamWConfig, GradientsParams, SgdConfig};
    use burn::tensor::{Device, Tensor};

    use super::*;

    /// burn's optimizer consists of what is said here: else each step would look at it anew.
    #[test]
    fn an_optimizer_is_recognised_until_it_is_changed() {
        let device = Device::flex().autodiff();
        let mut model = LinearConfig::new(3, 2).init(&device);
        let (checked, mut optim) = (CheckedOptimizers::default(), AdamWConfig::new().init());
        let mut step = |optim: &mut ModuleOptimizer| {
            let loss = model.forward(Tensor::<2>::ones([4, 3], &device)).mean();
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            model = optim.step(0.1, model.clone(), grads);
        };
        for known in [false, true, true] {
            assert_eq!(checked.is_known(&optim), known);
            step(&mut optim);
            checked.remember(&optim);
        }
        type Change = fn(ModuleOptimizer) -> ModuleOptimizer;
        let moved = Box::new(optim);
        assert!(checked.is_known(&moved));
        optim = *moved;
        let changes: [Change; 5] = [
            |optim| optim.with_grad_clipping(GradientClipping::Norm(1.0)),
            |optim| AdamWConfig::new().init().load_record(optim.to_record()),
            |optim| {
                let record = optim.to_record();
                optim.load_record(record)
            },
            |optim| optim.with_group(burn::module::ParamGroup::from_ids(vec![]), SgdConfig::new().build(), None),
            |optim| optim.clone(),
        ];
        for change in changes {
            assert!(checked.is_known(&optim));
            optim = change(optim);
            assert!(!checked.is_known(&optim));
            step(&mut optim);
            checked.remember(&optim);
        }
    }
}
