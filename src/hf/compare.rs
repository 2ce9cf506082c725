//! A dry run: what of a directory is what of a model.

use std::collections::BTreeSet;
use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Int, Tensor};

use super::mapped::find;
use super::mapping::Mapping;
use super::relation::swapped;
use super::weights::Weights;
use crate::Error;
use crate::nesting;

/// Which tensors of a directory are which parameters of a model under a mapping. Prints as a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Parameters that fit, in the order of the model.
    pub matched: Vec<Match>,
    /// Parameters whose tensors make other dims.
    pub unfit: Vec<Unfit>,
    /// Parameters that have no tensors, each with a hint, or nothing.
    pub missing: Vec<(String, String)>,
    /// Parameters that keep their values.
    pub kept: Vec<String>,
    /// Tensors that are no parameter.
    pub left: Vec<String>,
}

/// A parameter that is made of tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// The parameter.
    pub path: String,
    /// Its dims.
    pub dims: Vec<usize>,
    /// The tensors.
    pub tensors: Vec<String>,
}

/// A parameter whose tensors make other dims than it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// The parameter.
    pub path: String,
    /// Its dims.
    pub dims: Vec<usize>,
    /// The tensors.
    pub tensors: Vec<String>,
    /// What is wrong, and what may help.
    pub problem: String,
}

impl Comparison {
    /// Whether every parameter that is not to be kept has what it needs; tensors may be left.
    pub fn fits(&self) -> bool {
        self.unfit.is_empty() && self.missing.is_empty()
    }
}

/// Compares a directory with a model that is not wrapped yet. Nothing is read, and no parameter made.
///
/// # Errors
/// [`Error::InvalidArgument`] if a rule of the mapping can fit no model, or if the model is wrapped, so that a rank may
/// hold parts of its parameters alone.
pub fn compare<M: Module>(model: &M, weights: &Weights, mapping: &Mapping) -> Result<Comparison, Error> {
    mapping.check()?;
    if let Some(wrapper) = nesting::wrapper(model) {
        let problem = format!(
            "the model is, or holds, a `{wrapper}`, of which a rank may have parts: compare it before it is wrapped; `load` of what it is \
             wrapped in compares each part with the directory"
        );
        return Err(Error::invalid("hf::compare", problem));
    }
    let mut params = Params::default();
    model.visit(&mut params);
    let mut comparison = Comparison::default();
    let mut used = BTreeSet::new();
    let mut without = Vec::new();
    for (path, dims) in params.found {
        if mapping.keeps(&path) {
            comparison.kept.push(path);
            continue;
        }
        let named = |path: &str| {
            let filled = mapping.of_model(path).map(|(_, filled, _)| filled);
            filled
                .map(|filled| filled.files)
                .find(|files| files.iter().all(|name| weights.has(name)))
                .unwrap_or_default()
        };
        match find(weights, mapping, &path) {
            Ok(None) => without.push((path, dims)),
            Ok(Some(found)) if found.dims() == dims => {
                let tensors: Vec<String> = found.relation.files.iter().map(|file| file.name.clone()).collect();
                used.extend(tensors.iter().cloned());
                comparison.matched.push(Match { path, dims, tensors });
            }
            Ok(Some(found)) => {
                let tensors = named(&path);
                used.extend(tensors.iter().cloned());
                let problem = difference(&dims, found.dims(), found.relation.transposed);
                comparison.unfit.push(Unfit { path, dims, tensors, problem });
            }
            Err(error) => {
                let tensors = named(&path);
                used.extend(tensors.iter().cloned());
                comparison.unfit.push(Unfit { path, dims, tensors, problem: error.to_string() });
            }
        }
    }
    comparison.left = weights.names().filter(|name| !used.contains(*name)).map(Into::into).collect();
    for (path, dims) in without {
        let hint = hint(&path, &dims, weights, &comparison.left);
        comparison.missing.push((path, hint));
    }
    Ok(comparison)
}

fn difference(dims: &[usize], found: &[usize], transposed: bool) -> String {
    let hint = match (dims == swapped(found, true), transposed) {
        (true, false) => ": transposed? Add `.transposed()` to its rule",
        (true, true) => ": its rule says `transposed`, and it seems not to be",
        (false, _)
            if dims.len() == found.len() && dims.iter().product::<usize>() == found.iter().product::<usize>() =>
        {
            ": the same elements in another order?"
        }
        _ => "",
    };
    format!("has dims {dims:?} in the model and {found:?} in the directory{hint}")
}

/// The tensor that is left and looks most like a parameter.
fn hint(path: &str, dims: &[usize], weights: &Weights, left: &[String]) -> String {
    let words = |name: &str| name.split(['.', '_']).map(str::to_lowercase).collect::<BTreeSet<_>>();
    let own = words(path);
    let alike = |name: &&String| words(name).intersection(&own).count();
    let fits = |name: &&String| weights.tensor_dims(name).is_some_and(|of| of == dims || swapped(of, true) == dims);
    let best = left.iter().filter(fits).max_by_key(|name| (alike(name), std::cmp::Reverse(name.len())));
    match best.filter(|name| alike(name) > 0) {
        Some(name) if weights.tensor_dims(name) == Some(dims) => format!("`{name}` is left and has its dims"),
        Some(name) => format!("`{name}` is left and has its dims transposed"),
        None => String::new(),
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { matched, unfit, missing, kept, left } = self;
        for Match { path, dims, tensors } in matched {
            writeln!(f, "{path} {dims:?} is {}", tensors.join(", "))?;
        }
        for Unfit { path, tensors, problem, .. } in unfit {
            writeln!(f, "does not fit: {path} of {}: {problem}", tensors.join(", "))?;
        }
        for (path, hint) in missing {
            let hint = if hint.is_empty() { String::new() } else { format!(": {hint}") };
            writeln!(f, "missing: {path}{hint}")?;
        }
        for path in kept {
            writeln!(f, "kept: {path}")?;
        }
        for name in left {
            writeln!(f, "left: {name}")?;
        }
        write!(
            f,
            "{} parameters fit, {} do not, {} are missing, {} are kept; {} tensors are left",
            matched.len(),
            unfit.len(),
            missing.len(),
            kept.len(),
            left.len()
        )
    }
}

/// Paths and dims in the order of the module; what two paths share, once.
#[derive(Default)]
struct Params {
    found: Vec<(String, Vec<usize>)>,
    seen: BTreeSet<u64>,
    path: Vec<String>,
}

impl Params {
    fn add(&mut self, id: u64, dims: Vec<usize>) {
        if self.seen.insert(id) {
            self.found.push((self.path.join("."), dims));
        }
    }
}

impl ModuleVisitor for Params {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.add(param.id.val(), param.lazy_shape().to_vec());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.add(param.id.val(), param.lazy_shape().to_vec());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.add(param.id.val(), param.lazy_shape().to_vec());
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}
