//! What is written where: a pure function of what the ranks hold, which each of them computes alike.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::rc::Rc;

use burn::tensor::DType;

use super::config::SaveConfig;
use super::problem::wrong;
use crate::Error;
use crate::hf::relation::Relation;
use crate::hf::rule::Filled;
use crate::tensor_file::{NewFile, NewTensor};

/// A parameter, and who holds what of it.
#[derive(Debug, Clone)]
pub(super) struct HeldParam {
    /// Its number in the order of the model, of which some may be left out.
    pub(super) place: usize,
    pub(super) path: String,
    pub(super) dims: Vec<usize>,
    pub(super) dtype: DType,
    /// Parts that make up the whole, each with the ranks that hold it.
    pub(super) parts: Vec<(Vec<Range<usize>>, Vec<usize>)>,
}

/// A tensor to be written.
#[derive(Debug)]
pub(super) struct PlannedTensor {
    pub(super) name: String,
    pub(super) dims: Vec<usize>,
    pub(super) dtype: DType,
    pub(super) relation: Rc<Relation>,
    /// Which of the relation's tensors it is.
    pub(super) place: usize,
    /// The relation's parameters by their numbers.
    pub(super) params: Rc<Vec<usize>>,
    /// Which file it is in, and where in that it begins.
    pub(super) file: usize,
    pub(super) start: u64,
}

impl PlannedTensor {
    pub(super) fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    pub(super) fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }
}

#[derive(Debug)]
pub(super) struct SavePlan {
    pub(super) tensors: Vec<PlannedTensor>,
    /// Names and headers of the files.
    pub(super) files: Vec<(String, NewFile)>,
}

impl SavePlan {
    /// The dtype of all floats, if they have one.
    pub(super) fn float_dtype(&self) -> Option<DType> {
        let mut dtypes = self.tensors.iter().map(|tensor| tensor.dtype).filter(DType::is_float);
        let first = dtypes.next()?;
        dtypes.all(|dtype| dtype == first).then_some(first)
    }

    /// `stem` is the name of the files before their number.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if no rule fits a parameter, if two would be one tensor, if one of those that make up
    /// a tensor is missing, or if no rank holds a part; [`Error::UnsupportedDType`].
    pub(super) fn new(params: &[HeldParam], stem: &str, config: &SaveConfig) -> Result<Self, Error> {
        let mut tensors = relate(params, config)?;
        let new_tensors: Vec<NewTensor> = tensors
            .iter()
            .map(|of| NewTensor { name: of.name.clone(), dtype: of.dtype, dims: of.dims.clone() })
            .collect();
        let (mut shards, mut size): (Vec<Vec<usize>>, u64) = (vec![Vec::new()], 0);
        for (place, tensor) in new_tensors.iter().enumerate() {
            let more = tensor.size() as u64;
            if let Some(last) =
                shards.last_mut().filter(|last| last.is_empty() || size.saturating_add(more) <= config.shard_bytes)
            {
                last.push(place);
                size = size.saturating_add(more);
            } else {
                shards.push(vec![place]);
                size = more;
            }
        }
        let metadata = BTreeMap::from([("format".into(), "pt".into())]);
        let mut files = Vec::new();
        for (number, shard) in shards.iter().enumerate() {
            let of: Vec<NewTensor> = shard.iter().map(|place| new_tensors[*place].clone()).collect();
            let new_file = NewFile::new(&of, &metadata)?;
            for (place, start) in shard.iter().zip(&new_file.starts) {
                (tensors[*place].file, tensors[*place].start) = (number, *start);
            }
            let name = match shards.len() {
                1 => format!("{stem}.safetensors"),
                count => format!("{stem}-{:05}-of-{count:05}.safetensors", number + 1),
            };
            files.push((name, new_file));
        }
        Ok(Self { tensors, files })
    }
}

/// The tensors that the parameters are written as.
fn relate(params: &[HeldParam], config: &SaveConfig) -> Result<Vec<PlannedTensor>, Error> {
    let mapping = &config.mapping;
    mapping.check()?;
    let numbers: HashMap<&str, usize> =
        params.iter().enumerate().map(|(at, param)| (param.path.as_str(), at)).collect();
    let mut tensors: Vec<PlannedTensor> = Vec::new();
    let mut done: HashMap<String, Filled> = HashMap::new();
    for param in params.iter().filter(|param| !mapping.keeps(&param.path)) {
        let path = &param.path;
        let Some((rule, filled, _)) = mapping.of_model(path).next() else {
            let problem = format!(
                "no rule of the mapping fits parameter `{path}`: add one, or leave the parameter out by `Mapping::keep`"
            );
            return Err(wrong(problem));
        };
        let mut of = Vec::new();
        for model in &filled.models {
            let found = numbers.get(model.as_str()).copied().ok_or_else(|| {
                let file = &filled.files[0];
                wrong(format!(
                    "tensor `{file}` is made of parameters `{}`, and the model has no `{model}`",
                    filled.models.join("`, `")
                ))
            })?;
            of.push(found);
        }
        let first = &filled.files[0];
        if let Some(before) = done.get(first) {
            match *before == filled {
                true => continue,
                false => {
                    let problem =
                        format!("parameters `{}` and `{path}` would both be tensor `{first}`", before.models[0]);
                    return Err(wrong(problem));
                }
            }
        }
        for file in &filled.files {
            if let Some(before) = done.insert(file.clone(), filled.clone()) {
                return Err(wrong(format!(
                    "parameters `{}` and `{path}` would both be tensor `{file}`",
                    before.models[0]
                )));
            }
        }
        let dims: Vec<Vec<usize>> = of.iter().map(|param| params[*param].dims.clone()).collect();
        let relation = Relation::of_models(rule, &filled, &dims)
            .map_err(|problem| wrong(format!("parameter `{path}`: {problem}")))?;
        let dtype = match config.dtype {
            Some(dtype) if of.iter().all(|param| params[*param].dtype.is_float()) => dtype,
            _ => param.dtype,
        };
        let (relation, of) = (Rc::new(relation), Rc::new(of));
        for (place, file) in relation.files.iter().enumerate() {
            let (name, dims, relation, params) = (file.name.clone(), file.dims.clone(), relation.clone(), of.clone());
            tensors.push(PlannedTensor { name, dims, dtype, relation, place, params, file: 0, start: 0 });
        }
    }
    for param in params.iter().filter(|param| !mapping.keeps(&param.path)) {
        let held: usize = param.parts.iter().map(|(ranges, _)| ranges.iter().map(Range::len).product::<usize>()).sum();
        let all: usize = param.dims.iter().product();
        if held != all {
            return Err(wrong(format!("parameter `{}` has {all} elements, and the ranks hold {held}", param.path)));
        }
    }
    Ok(tensors)
}
