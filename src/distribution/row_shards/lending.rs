//! Exchanges that a replica's own step does not have, and others do.
//!
//! Replicas whose steps use different parameters exchange different groups of them, and one without data none at all.
//! So before a micro-batch, and before a forward alone, all learn whether they exchange the same. If not, they take
//! part in all that any of them does, in one [order](Exchange::in_one_order): lend their rows to what only others
//! gather, and add nothing to what only others reduce.
//!
//! What a replica lends is started right behind the exchange of its own that comes before it, and not waited for until
//! the micro-batch is over. So no replica waits for more than if its own step had everything in it, and stages of a
//! pipeline, whose replicas meet action by action, cannot wait for each other in a circle.

use std::collections::{HashMap, HashSet, VecDeque};

use burn::module::{Module, ParamId};
use burn::tensor::Device;

use super::{HASH, RowShards, hashed};
use crate::Error;
use crate::comm::Pending;
use crate::graph::{graph_error, read_found};
use crate::params::FoundParams;
use crate::partition::{Exchange, Exchanges};
use crate::tensor::PlainTensor;

/// What tells this agreement from other numbers that replicas bring.
const AGREEMENT: u64 = 1;

/// The exchanges of a micro-batch that are not those of this replica's own step.
#[derive(Debug, Default)]
pub(super) struct Lending {
    /// What is to be started still, each with whether the step does it.
    left: VecDeque<(Exchange, bool)>,
    /// This rank's rows of what it lends.
    rows: HashMap<usize, PlainTensor>,
    /// Where they are.
    device: Option<Device>,
    gathers: Vec<Pending<()>>,
    /// Sums of gradients, with the numbers of their parameters.
    sums: Vec<(Vec<usize>, Pending<Vec<PlainTensor>>)>,
}

impl RowShards {
    /// Makes sure before a micro-batch that the replicas exchange the same in it, or has this one take part in what
    /// only others exchange. `own` is what its step does. Collective over the replicas. Of what was `found` in this
    /// rank's part, if it was.
    ///
    /// # Errors
    /// Those of [`Communicator`](crate::comm::Communicator) and of reading parameters.
    pub(crate) fn agree<M: Module>(
        &self,
        local: &M,
        found: Option<&FoundParams>,
        own: &[Vec<Exchange>],
    ) -> Result<(), Error> {
        let Some(all) = self.in_common(Some(own))? else { return Ok(()) };
        let mut left = VecDeque::new();
        for (place, action) in all.into_iter().enumerate() {
            let mut own = own.get(place).into_iter().flatten().peekable();
            left.extend(action.into_iter().map(|exchange| {
                let is_own = own.next_if(|next| **next == exchange).is_some();
                (exchange, is_own)
            }));
        }
        let lent = left.iter().filter(|(_, is_own)| !is_own).map(|(exchange, _)| exchange);
        let lending = self.lending(local, found, lent)?;
        self.lock().lending = Lending { left, ..lending };
        self.lend_until_own()
    }

    /// Takes part in what the others exchange in a micro-batch, on a rank that has none: lends its rows, and brings
    /// gradients of nothing. Returns the sums of the gradients, as [`end_lending`](Self::end_lending).
    ///
    /// # Errors
    /// Those of [`Communicator`](crate::comm::Communicator) and of reading parameters.
    pub(crate) fn take_part<M: Module>(
        &self,
        local: &M,
        found: &FoundParams,
    ) -> Result<Vec<(ParamId, PlainTensor)>, Error> {
        let all: Vec<Exchange> = self.in_common(None)?.into_iter().flatten().flatten().collect();
        drop(self.whole(local, Some(found))?);
        let lending = self.lending(local, Some(found), all.iter())?;
        self.lock().lending = lending;
        let mut sums = Vec::new();
        for exchange in all {
            self.lend(exchange)?;
            sums.extend(self.end_lent()?);
        }
        self.lock().lending = Lending::default();
        Ok(sums)
    }

    /// Ends a micro-batch: waits for what this rank has lent. Returns the sums of the gradients that only others had,
    /// several of a parameter if they had it in several groups.
    ///
    /// # Errors
    /// Those of [`Communicator`](crate::comm::Communicator).
    pub(crate) fn end_lending(&self) -> Result<Vec<(ParamId, PlainTensor)>, Error> {
        let sums = self.end_lent()?;
        match std::mem::take(&mut self.lock().lending).left.is_empty() {
            true => Ok(sums),
            false => Err(graph_error("a step did not exchange what its replicas wait for")),
        }
    }

    /// Runs a forward alone that gathers `own`, of which other replicas may gather something else: as a micro-batch of
    /// a step, of which nothing is reduced. Collective over the replicas.
    ///
    /// # Errors
    /// Those of `run`, and of [`agree`](Self::agree).
    pub(crate) fn forward<M: Module, T>(
        &self,
        local: &M,
        own: &[Vec<Exchange>],
        run: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.lock().lending = Lending::default();
        self.agree(local, None, own)?;
        let outputs = run()?;
        self.end_lending()?;
        Ok(outputs)
    }

    /// The step has started an exchange: starts those of others that come behind it.
    pub(super) fn has_started(&self, own: &Exchange) -> Result<(), Error> {
        let expected = self.lock().lending.left.pop_front();
        match expected {
            None => Ok(()),
            Some((exchange, true)) if exchange == *own => self.lend_until_own(),
            Some(_) => Err(graph_error("a step exchanges something else than it has told its replicas")),
        }
    }

    /// What all replicas exchange in a micro-batch, if some of them do not exchange the same.
    fn in_common(&self, own: Option<&[Vec<Exchange>]>) -> Result<Option<Exchanges>, Error> {
        let words = own.map(Exchange::words).unwrap_or_default();
        let digest = words.iter().fold(HASH, |hash, word| hashed(hash, *word));
        let head = vec![u64::from(own.is_some()), words.len() as u64, digest];
        let heads = self.replicas.all_gather_agreed(head, AGREEMENT)?;
        let heads: Vec<&[u64]> = heads.chunks_exact(3).collect();
        // The first replica of those that exchange the same.
        let mut firsts: Vec<usize> = Vec::new();
        for (rank, head) in heads.iter().enumerate().filter(|(_, head)| head[0] == 1) {
            if firsts.iter().all(|first| heads[*first] != *head) {
                firsts.push(rank);
            }
        }
        if firsts.len() <= 1 && heads.iter().all(|head| head[0] == 1) {
            return Ok(None);
        }
        let told = |first: usize| {
            let mine = if first == self.replicas.rank() { words.clone() } else { vec![0; heads[first][1] as usize] };
            Ok(Exchange::of_words(&self.replicas.broadcast(mine, first)?))
        };
        Ok(Some(Exchange::in_one_order(firsts.into_iter().map(told).collect::<Result<_, Error>>()?)))
    }

    /// What this rank needs to take part in such exchanges.
    fn lending<'a, M: Module>(
        &self,
        local: &M,
        found: Option<&FoundParams>,
        exchanges: impl Iterator<Item = &'a Exchange>,
    ) -> Result<Lending, Error> {
        let numbers = exchanges.filter(|exchange| exchange.gathers).flat_map(|exchange| &exchange.numbers);
        let numbers: HashSet<usize> = numbers.copied().filter(|number| *number < self.params.len()).collect();
        let params = match found {
            Some(found) => found,
            None => &FoundParams::of(local),
        };
        let mut values = read_found(params, local, &numbers.iter().map(|number| self.params[*number].id).collect())?;
        let of = |number: usize| Some((number, values.remove(&self.params[number].id)?));
        let rows = numbers.into_iter().filter_map(of).collect();
        let device = params.one_device(local, "a step")?.unwrap_or_else(Device::flex);
        Ok(Lending { rows, device: Some(device), ..Lending::default() })
    }

    /// Starts what others exchange before the next that the step does.
    fn lend_until_own(&self) -> Result<(), Error> {
        loop {
            let next = self.lock().lending.left.pop_front_if(|(_, is_own)| !*is_own);
            let Some((exchange, _)) = next else { return Ok(()) };
            self.lend(exchange)?;
        }
    }

    /// Starts an exchange of others.
    fn lend(&self, Exchange { gathers, numbers }: Exchange) -> Result<(), Error> {
        let bundle = self.bundle(&numbers)?;
        let mut step = self.lock();
        let lending = &mut step.lending;
        if gathers {
            let rows = numbers.iter().filter_map(|number| lending.rows.get(number).cloned()).collect();
            let pending = self.comms.parameters().start(move |comm| bundle.gather(rows, comm).map(drop));
            lending.gathers.push(pending);
            return Ok(());
        }
        let device = lending.device.clone().unwrap_or_else(Device::flex);
        let nothing = numbers.iter().filter_map(|number| self.params.get(*number));
        let nothing: Vec<_> = nothing.map(|param| (param.rows.dims().to_vec(), param.dtype)).collect();
        let copies = self.comms.copies().cloned();
        let pending = self.comms.gradients().start(move |comm| {
            let zeros = nothing.into_iter().map(|(dims, dtype)| PlainTensor::zeros(dims, dtype.into(), &device));
            bundle.reduce(zeros.collect(), 0.0, (comm, copies.as_ref()))
        });
        lending.sums.push((numbers, pending));
        Ok(())
    }

    /// Waits for what was started.
    fn end_lent(&self) -> Result<Vec<(ParamId, PlainTensor)>, Error> {
        let (gathers, sums) = {
            let mut step = self.lock();
            (std::mem::take(&mut step.lending.gathers), std::mem::take(&mut step.lending.sums))
        };
        gathers.into_iter().try_for_each(|gather| self.waiting(|| gather.wait()))?;
        let mut given = Vec::new();
        for (numbers, sums) in sums {
            let ids = numbers.into_iter().map(|number| self.params[number].id);
            given.extend(ids.zip(self.waiting(|| sums.wait())?));
        }
        Ok(given)
    }
}
