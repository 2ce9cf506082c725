//! The state of some parameters, out of an optimizer.
//!
//! burn gives out the state of an optimizer as a record, a copy whose fields are private. As a file in memory it tells
//! all names, but is copied twice more on the way. An optimizer that takes a record gets each tensor as it is, by its
//! name. So names are learnt from a file, and from then on an optimizer that only collects takes what they stand for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use burn::module::{ParamGroup, ParamId};
use burn::optim::{DynState, ModuleOptimizer, OptimizerRecord, SgdConfig, StateSink, StateSource};
use burn::tensor::TensorData;
use burn_pack::{Reader, Scalar};

use super::states_only::{States, states_only};
use crate::lock::lock;

/// Bytes of parameters whose state is read out at once, unless one has more: of what burn makes of it there are two
/// copies meanwhile.
const PORTION: usize = 2 << 20;
/// Parameters whose state is read out at once, at most: burn looks through them for each that it forgets.
pub(crate) const MOST_AT_ONCE: usize = 256;

/// The state of a parameter.
#[derive(Debug, Default)]
pub(crate) struct ParamState {
    pub(crate) moments: BTreeMap<String, TensorData>,
    pub(crate) scalars: BTreeMap<String, Scalar>,
}

type ParamStates = HashMap<ParamId, ParamState>;

/// The names that the states of an optimizer's parameters are made of, as far as they are known.
#[derive(Debug, Clone, Default)]
pub(crate) struct StateNames {
    moments: BTreeSet<String>,
    scalars: BTreeSet<String>,
}

impl StateNames {
    /// The states of those of these parameters that have one. Beside them, of what is not known yet two more copies are
    /// held for a moment.
    ///
    /// # Errors
    /// Why burn's record cannot be read.
    pub(crate) fn read(&mut self, state: &ModuleOptimizer, ids: &[ParamId]) -> Result<ParamStates, String> {
        let record = || without(state, ParamGroup::all().exclude(ParamGroup::from_ids(ids.to_vec())));
        if !self.scalars.is_empty()
            && let Some(states) = self.collect(record())
        {
            return Ok(states);
        }
        self.learn(record())
    }

    /// These names.
    pub(crate) fn new(moments: BTreeSet<String>, scalars: BTreeSet<String>) -> Self {
        Self { moments, scalars }
    }

    /// What burn gives to an optimizer as the state of a parameter, by the names that are known.
    pub(crate) fn take(&self, prefix: &str, from: &mut StateSource) -> ParamState {
        let mut state = ParamState::default();
        for name in &self.moments {
            state.moments.extend(from.take_tensor(prefix, name).map(|data| (name.clone(), data)));
        }
        for name in &self.scalars {
            state.scalars.extend(from.take_scalar(prefix, name).map(|scalar| (name.clone(), scalar)));
        }
        state
    }

    /// Takes a record apart; `None` if it has more than the names that are known stand for.
    fn collect(&self, record: OptimizerRecord) -> Option<ParamStates> {
        let (tensors, scalars) = (record.len(), number_of_scalars(&record)?);
        let found = Arc::new(Mutex::new(ParamStates::new()));
        let collector = Collector { names: self.clone(), found: found.clone() };
        drop(states_only(collector).load_record(record));
        let found = std::mem::take(&mut *lock(&found));
        let all = |number: fn(&ParamState) -> usize| found.values().map(number).sum::<usize>();
        let whole = (all(|state| state.moments.len()), all(|state| state.scalars.len())) == (tensors, scalars);
        whole.then_some(found)
    }

    /// Reads a record as a file, and all names in it.
    fn learn(&mut self, record: OptimizerRecord) -> Result<ParamStates, String> {
        let bytes = record.into_bytes().map_err(|why| why.to_string())?;
        let reader = Reader::from_bytes(bytes).map_err(|why| why.to_string())?;
        let mut states = ParamStates::new();
        for (name, scalar) in reader.scalars() {
            let parts = name.split_once('.').and_then(|(id, name)| Some((id.parse::<u64>().ok()?, name)));
            let (id, name) = parts.ok_or_else(|| format!("a number is called `{name}`"))?;
            self.scalars.insert(name.into());
            states.entry(id.into()).or_default().scalars.insert(name.into(), *scalar);
        }
        for tensor in reader.into_tensors().map_err(|why| why.to_string())? {
            let (name, dtype, shape, id, bytes) = tensor.into_parts().map_err(|why| why.to_string())?;
            let id = id.ok_or_else(|| format!("`{name}` is of no parameter"))?;
            let moment = name.split_once('.').map_or(name.as_str(), |(_, moment)| moment);
            self.moments.insert(moment.into());
            let data = TensorData::from_bytes(bytes, shape, dtype);
            states.entry(id.into()).or_default().moments.insert(moment.into(), data);
        }
        Ok(states)
    }
}

/// Parts of a list of parameters whose state is read out at once; `bytes` are those of a parameter.
pub(crate) fn portions<T>(mut params: &[T], bytes: impl Fn(&T) -> usize) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let mut sum = 0;
        let more = |param: &&T| {
            sum += bytes(param);
            sum <= PORTION
        };
        let (portion, behind) =
            params.split_at_checked(params.iter().take_while(more).count().clamp(1, MOST_AT_ONCE))?;
        params = behind;
        Some(portion)
    })
}

/// Whether an optimizer has a state of parameters other than these.
///
/// # Errors
/// Why burn's record cannot be read.
pub(crate) fn has_others(state: &ModuleOptimizer, ids: Vec<ParamId>) -> Result<bool, String> {
    let record = without(state, ParamGroup::from_ids(ids));
    if let Some(scalars) = number_of_scalars(&record) {
        return Ok(!record.is_empty() || scalars > 0);
    }
    StateNames::default().learn(record).map(|states| !states.is_empty())
}

/// The record of an optimizer, but for the parameters of a group.
///
/// burn copies the state of all parameters at once. A new group makes an optimizer forget its parameters: here a clone,
/// which shares the tensors.
pub(crate) fn without(state: &ModuleOptimizer, forgotten: ParamGroup) -> OptimizerRecord {
    state.clone().with_group(forgotten, SgdConfig::new().build(), None).to_record()
}

/// How many numbers a record has, which burn says in its debug text alone.
fn number_of_scalars(record: &OptimizerRecord) -> Option<usize> {
    let text = format!("{record:?}");
    let (_, behind) = text.split_once("num_scalars: ")?;
    behind.split(|digit: char| !digit.is_ascii_digit()).next()?.parse().ok()
}

/// Takes the states of a record for others.
struct Collector {
    names: StateNames,
    found: Arc<Mutex<ParamStates>>,
}

impl States for Collector {
    fn give(&self, _: &str, _: &mut StateSink) {}

    fn take(&self, _: usize, id: &str, from: &mut StateSource) -> Option<DynState> {
        let param = id.parse::<u64>().ok()?;
        let state = self.names.take(id, from);
        lock(&self.found).insert(param.into(), state);
        None
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{AdafactorConfig, AdamWConfig, GradientsParams, ModuleOptimizer};
    use burn::tensor::{Device, Tensor};

    use super::{MOST_AT_ONCE as MOST, PORTION, StateNames, has_others, portions};

    #[test]
    fn what_is_known_by_name_is_what_a_file_has() {
        let device = Device::flex().autodiff();
        let model: Linear = LinearConfig::new(4, 3).init(&device);
        let ids = [model.weight.id, model.bias.as_ref().unwrap().id];
        let optimizers: [ModuleOptimizer; 2] =
            [AdamWConfig::new().with_amsgrad(true).init(), AdafactorConfig::new().init()];
        for mut optimizer in optimizers {
            let loss = model.forward(Tensor::<2>::ones([2, 4], &device)).powi_scalar(2).sum();
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            optimizer.step(0.1, model.clone(), gradients);
            let mut names = StateNames::default();
            let first = names.read(&optimizer, &ids[..1]).unwrap();
            assert_eq!(first.keys().collect::<Vec<_>>(), [&ids[0]]);
            let again = names.collect(super::without(&optimizer, burn::module::ParamGroup::from_ids(vec![ids[1]])));
            let again = again.expect("all names are known");
            assert_eq!(again[&ids[0]].moments, first[&ids[0]].moments);
            assert_eq!(again[&ids[0]].scalars, first[&ids[0]].scalars);
            // Names that are missing are noticed, and learnt.
            let mut fewer = StateNames { scalars: names.scalars.iter().take(1).cloned().collect(), ..names.clone() };
            assert_eq!(fewer.read(&optimizer, &ids).unwrap().len(), 2);
            assert_eq!(fewer.scalars, names.scalars);
            assert!(has_others(&optimizer, vec![ids[0]]).unwrap());
            assert!(!has_others(&optimizer, ids.to_vec()).unwrap());
            assert!(names.read(&optimizer, &[]).unwrap().is_empty());
        }
    }

    #[test]
    fn portions_are_small_or_of_one_parameter() {
        let of = |sizes: &[usize]| portions(sizes, |size| *size).map(<[usize]>::len).collect::<Vec<_>>();
        assert!(of(&[]).is_empty());
        assert_eq!(of(&[PORTION, 1, PORTION - 1, 1, 2 * PORTION, 3]), [1, 2, 1, 1, 1]);
        assert_eq!(of(&[0; 600]), [MOST, MOST, 600 - 2 * MOST]);
    }
}
