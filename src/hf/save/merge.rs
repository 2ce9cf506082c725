//! The adapters of a model, brought to the weights that they are added to.
//!
//! The part of a weight that a rank holds needs its rows of the one factor and its columns of the other. Where the plan
//! or the replicas divide factors otherwise than weights, the ranks that hold them send what others lack: who sends
//! what to whom is a function of what all hold, which each rank computes alike.

use std::collections::HashMap;
use std::ops::Range;

use burn::tensor::{DType, Device};

use super::config::SaveConfig;
use super::held::{HeldAdapter, HeldPart};
use super::own::OwnParam;
use super::plan::HeldParam;
use super::problem::{attempt, together, wrong};
use crate::Error;
use crate::comm::Communicator;
use crate::tensor::PlainTensor;
use crate::tensor_file::{Elements, Loop, Side, copy_strided, row_major};

/// The messages that carry factors.
const TAG: u64 = 1;

/// What the ends of the paths of factors are.
const FACTORS: [&str; 2] = [".lora.a", ".lora.b"];

/// Whether a parameter is a factor of an adapter.
pub(super) fn is_factor(path: &str) -> bool {
    FACTORS.iter().any(|end| path.ends_with(end))
}

/// Demands that adapters are merged, or have a place of their own.
///
/// # Errors
/// [`Error::InvalidArgument`] with the first that has none.
pub(super) fn demand_places(params: &[OwnParam], config: &SaveConfig) -> Result<(), Error> {
    let mapping = &config.mapping;
    let lost = |param: &&OwnParam| {
        param.path.ends_with(FACTORS[0])
            && (mapping.of_model(&param.path).next().is_none() || mapping.keeps(&param.path))
    };
    match params.iter().find(lost) {
        Some(param) if config.merged.is_none() => Err(wrong(format!(
            "the model has adapters, as `{}`: save them by `hf::save_adapter`, or merge them by `with_merged_adapters`",
            param.path
        ))),
        _ => Ok(()),
    }
}

/// Bytes of factors.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct FactorBytes {
    /// That this rank sent.
    pub(super) sent: usize,
    /// That it was sent, which it holds until the model is written.
    pub(super) held: usize,
}

/// Gives the parts of weights that this rank holds their adapters of this `alpha`, and takes the adapters out of the
/// parameters. Collective.
///
/// # Errors
/// On all ranks alike: [`Error::InvalidArgument`] if the ranks do not hold all of an adapter, or one of them fails.
/// Those of the group.
pub(super) fn merge(
    own: &mut Vec<OwnParam>,
    params: &mut Vec<HeldParam>,
    alpha: f64,
    group: &Communicator,
) -> Result<FactorBytes, Error> {
    let places: HashMap<usize, usize> = own.iter().enumerate().map(|(at, param)| (param.place, at)).collect();
    let mut brought = FactorBytes::default();
    // A rank that fails sends zeros from then on, for which others wait.
    let mut outcome = Ok(());
    for AdapterMerge { weight, factors, needs } in plan(params, group.size())? {
        let at = |number: usize| places.get(&params[number].place).copied();
        let parts = factors.map(|factor| at(factor).and_then(|at| own[at].part.as_ref()));
        for (rank, need) in needs.iter().enumerate().filter(|(rank, _)| *rank != group.rank()) {
            for ((need, part), factor) in need.iter().flatten().zip(parts).zip(factors) {
                for (_, ranges) in need.from.iter().filter(|(from, _)| *from == group.rank()) {
                    let bytes = lens(ranges).iter().product::<usize>() * params[factor].dtype.size();
                    let message = attempt(|| cut(part, ranges)).unwrap_or_else(|error| {
                        outcome = outcome.clone().and(Err(error));
                        vec![0; bytes]
                    });
                    brought.sent += message.len();
                    group.send(message, rank, TAG)?;
                }
            }
        }
        let (Some([first, second]), Some(of)) = (&needs[group.rank()], at(weight)) else { continue };
        let Some(device) = own[of].part.as_ref().map(|part| part.value.device()) else { continue };
        let mut take = |which: usize, need: &Need| {
            take(need, parts[which], params[factors[which]].dtype, (&device, group, &mut brought.held))
        };
        let (a, b) = match (take(0, first)?, take(1, second)?) {
            (Ok(a), Ok(b)) => (a, b),
            (Err(error), _) | (_, Err(error)) => {
                outcome = outcome.and(Err(error));
                continue;
            }
        };
        let (rows, rank) = (first.ranges[0].start, first.ranges[1].len());
        let adapter = HeldAdapter { a: (a, rows), b: (b, second.ranges[1].start), scale: alpha / rank as f64 };
        if let Some(part) = &mut own[of].part {
            part.adapter = Some(adapter);
        }
    }
    together(outcome, group)?;
    own.retain(|param| !is_factor(&param.path));
    params.retain(|param| !is_factor(&param.path));
    Ok(brought)
}

/// An adapter of which some rank needs something, by the numbers of its parameters.
struct AdapterMerge {
    weight: usize,
    factors: [usize; 2],
    /// What each rank needs of both factors, if it holds a part of the weight.
    needs: Vec<Option<[Need; 2]>>,
}

/// What a rank needs of a factor.
struct Need {
    ranges: Vec<Range<usize>>,
    /// Who has what of it.
    from: Vec<(usize, Vec<Range<usize>>)>,
}

fn plan(params: &[HeldParam], ranks: usize) -> Result<Vec<AdapterMerge>, Error> {
    let numbers: HashMap<&str, usize> =
        params.iter().enumerate().map(|(number, param)| (param.path.as_str(), number)).collect();
    let mut merges = Vec::new();
    for (a, param) in params.iter().enumerate() {
        let Some(base) = param.path.strip_suffix(FACTORS[0]) else { continue };
        // What is not written needs no adapter.
        let Some(weight) = numbers.get(base).copied() else { continue };
        let Some(b) = numbers.get(format!("{base}{}", FACTORS[1]).as_str()).copied() else {
            return Err(wrong(format!("the adapter of `{base}` has a first factor and no second")));
        };
        let factors = [a, b].map(|factor| &params[factor]);
        let (whole, [first, second]) = (&params[weight].dims, factors.map(|factor| factor.dims.as_slice()));
        let &[inputs, outputs] = whole.as_slice() else {
            return Err(wrong(format!(
                "`{base}` has dims {whole:?} and an adapter, which is merged into two dims only"
            )));
        };
        let rank = first.last().copied().unwrap_or(0);
        if first != [inputs, rank] || second != [rank, outputs] {
            let problem =
                format!("the adapter of `{base}` of dims {whole:?} has factors of dims {first:?} and {second:?}");
            return Err(wrong(problem));
        }
        let mut needs: Vec<Option<[Need; 2]>> = (0..ranks).map(|_| None).collect();
        for (ranges, holders) in &params[weight].parts {
            let [rows, columns] = ranges.as_slice() else { continue };
            for holder in holders {
                needs[*holder] = Some([
                    Need::new(vec![rows.clone(), 0..rank], factors[0], *holder)?,
                    Need::new(vec![0..rank, columns.clone()], factors[1], *holder)?,
                ]);
            }
        }
        merges.push(AdapterMerge { weight, factors: [a, b], needs });
    }
    Ok(merges)
}

impl Need {
    /// What `rank` needs comes from itself if it has it, or else from the others that have it in turn.
    fn new(ranges: Vec<Range<usize>>, factor: &HeldParam, rank: usize) -> Result<Self, Error> {
        let mut from = Vec::new();
        for (held, holders) in &factor.parts {
            let both: Vec<Range<usize>> =
                ranges.iter().zip(held).map(|(a, b)| a.start.max(b.start)..a.end.min(b.end)).collect();
            if both.iter().all(|range| range.start < range.end) {
                let own = holders.contains(&rank).then_some(rank);
                from.push((own.unwrap_or(holders[rank % holders.len()]), both));
            }
        }
        let elements = |ranges: &[Range<usize>]| ranges.iter().map(ExactSizeIterator::len).product::<usize>();
        let there: usize = from.iter().map(|(_, ranges)| elements(ranges)).sum();
        if there != elements(&ranges) {
            return Err(wrong(format!(
                "the ranks hold {there} of the {} elements of `{}` at {ranges:?}, by which rank {rank} would merge its weight",
                elements(&ranges),
                factor.path
            )));
        }
        Ok(Self { ranges, from })
    }
}

/// What this rank needs of a factor, of which it may hold a part itself; `held` counts the bytes that it was sent. The
/// outer error is that of the group; with the inner one, of this rank, all messages have been taken as well.
fn take(
    need: &Need,
    part: Option<&HeldPart>,
    dtype: DType,
    (device, group, held): (&Device, &Communicator, &mut usize),
) -> Result<Result<PlainTensor, Error>, Error> {
    if let [(from, ranges)] = need.from.as_slice()
        && *from == group.rank()
    {
        // What is there as a whole is not copied.
        return Ok(attempt(|| within(part, ranges)));
    }
    let lens = lens(&need.ranges);
    let strides = row_major(&lens);
    let mut elements = Elements::zeros(lens.iter().product(), dtype);
    let mut outcome = Ok(());
    for (from, ranges) in &need.from {
        let message = match *from == group.rank() {
            true => attempt(|| cut(part, ranges)),
            false => Ok(group.recv(*from, TAG)?),
        };
        let starts = ranges.iter().zip(&need.ranges).zip(&strides);
        let start = starts.map(|((range, all), stride)| (range.start - all.start) * *stride as usize).sum();
        outcome = outcome.and_then(|()| {
            let message = message?;
            let sides = (&message[..], Side { start: 0, dtype });
            copy(sides, &row_major(&self::lens(ranges)), (elements.bytes_mut(), start), &strides, ranges)
        });
    }
    let data = elements.into_data(lens, dtype);
    *held += data.as_bytes().len();
    Ok(outcome.and_then(|()| attempt(|| Ok(PlainTensor::from_data(data, device)))))
}

/// What this rank holds in these ranges of the whole, as bytes in their order.
fn cut(part: Option<&HeldPart>, ranges: &[Range<usize>]) -> Result<Vec<u8>, Error> {
    let value = within(part, ranges)?.into_flex()?;
    let (dtype, layout, lens) = (value.dtype(), value.layout(), lens(ranges));
    let mut bytes = vec![0; lens.iter().product::<usize>() * dtype.size()];
    let from = (value.bytes(), Side { start: layout.start_offset(), dtype });
    copy(from, layout.strides(), (&mut bytes, 0), &row_major(&lens), ranges)?;
    Ok(bytes)
}

fn within(part: Option<&HeldPart>, ranges: &[Range<usize>]) -> Result<PlainTensor, Error> {
    let Some(HeldPart { value, ranges: held, .. }) = part else {
        return Err(wrong("a factor of an adapter is missing on the rank that is to give it".into()));
    };
    let dims = ranges.iter().zip(held).enumerate();
    Ok(dims.fold(value.clone(), |value, (dim, (range, held))| {
        value.narrow(dim, range.start - held.start..range.end - held.start)
    }))
}

/// Copies elements of one dtype in these ranges.
fn copy(
    from: (&[u8], Side),
    from_strides: &[isize],
    (to, start): (&mut [u8], usize),
    to_strides: &[isize],
    ranges: &[Range<usize>],
) -> Result<(), Error> {
    let sides = from_strides.iter().zip(to_strides);
    let loops: Vec<Loop> =
        ranges.iter().zip(sides).map(|(range, (from, to))| Loop { len: range.len(), from: *from, to: *to }).collect();
    let to = (to, Side { start, dtype: from.1.dtype });
    copy_strided(from, to, &loops)
}

fn lens(ranges: &[Range<usize>]) -> Vec<usize> {
    ranges.iter().map(ExactSizeIterator::len).collect()
}
