//! One way to visit the parameters of any module: what each of them is, without making it.

use std::ops::Deref;

use burn::module::{Flag, Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Int, Tensor};

use super::any_param::AnyParam;
use super::shard::is_shard;

/// Visits every float, int and bool parameter, running statistics included, in the order of the module. Nothing is
/// made: a lazy parameter stays lazy unless its [value](AnyParam::value) is asked for.
pub(crate) fn visit_params<M: Module>(module: &M, visit: &mut dyn FnMut(ParamRef<'_>)) {
    visit_params_and_flags(module, visit, &mut |_, _| {});
}

/// As [`visit_params`], with the training flags of the module, at the places where they are.
pub(crate) fn visit_params_and_flags<M: Module>(
    module: &M,
    visit: &mut dyn FnMut(ParamRef<'_>),
    flag: &mut dyn FnMut(&Param<Flag>, &ModulePath),
) {
    module.visit(&mut Walk { path: ModulePath::default(), enters_shard: false, visit, flag });
}

/// As [`visit_params`], of the float parameters alone.
pub(crate) fn visit_floats<M: Module>(module: &M, visit: &mut dyn FnMut(ParamRef<'_>)) {
    visit_params(module, &mut |param| {
        if param.is_float() {
            visit(param);
        }
    });
}

/// The path of the parameter that a visitor meets after so many others.
pub(crate) fn path_at<M: Module>(module: &M, place: usize) -> String {
    let (mut next, mut path) = (0, String::new());
    visit_params(module, &mut |param| {
        if next == place {
            path = param.path();
        }
        next += 1;
    });
    path
}

/// A parameter of a module, and where it is.
#[derive(Clone, Copy)]
pub(crate) struct ParamRef<'a> {
    param: &'a (dyn AnyParam + 'static),
    path: &'a ModulePath,
    is_shard: bool,
}

impl ParamRef<'_> {
    /// Whether these are the rows of a parameter, for which the one stands that was visited before.
    pub(crate) fn is_shard(&self) -> bool {
        self.is_shard
    }

    /// Its path, as in `layers.0.weight`.
    pub(crate) fn path(&self) -> String {
        self.path.text()
    }

    /// The modules that it is in, and its own place in the last of them.
    pub(crate) fn module_path(&self) -> &ModulePath {
        self.path
    }
}

impl Deref for ParamRef<'_> {
    type Target = dyn AnyParam;

    fn deref(&self) -> &Self::Target {
        self.param
    }
}

/// Names and types of the modules that a visitor is in. Entering and leaving modules takes no new memory once it has
/// been as deep.
#[derive(Debug, Clone, Default)]
pub(crate) struct ModulePath {
    places: Vec<(String, String)>,
    depth: usize,
}

impl ModulePath {
    pub(crate) fn enter(&mut self, name: &str, container: &str) {
        if self.depth == self.places.len() {
            self.places.push((String::new(), String::new()));
        }
        let (last, holder) = &mut self.places[self.depth];
        last.clear();
        last.push_str(name);
        holder.clear();
        holder.push_str(container);
        self.depth += 1;
    }

    pub(crate) fn exit(&mut self) {
        self.depth = self.depth.saturating_sub(1);
    }

    /// From the outermost module to the innermost: name and type, as in `Struct:Linear`.
    pub(crate) fn places(&self) -> &[(String, String)] {
        &self.places[..self.depth]
    }

    /// As in `layers.0.weight`.
    pub(crate) fn text(&self) -> String {
        self.places().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(".")
    }

    /// The type that holds what is visited.
    pub(crate) fn holder(&self) -> &str {
        self.places().last().map_or("", |(_, container)| container)
    }
}

struct Walk<'a> {
    path: ModulePath,
    /// Whether rows come next.
    enters_shard: bool,
    visit: &'a mut dyn FnMut(ParamRef<'_>),
    flag: &'a mut dyn FnMut(&Param<Flag>, &ModulePath),
}

impl ModuleVisitor for Walk<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let is_shard = std::mem::take(&mut self.enters_shard);
        (self.visit)(ParamRef { param, path: &self.path, is_shard });
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        (self.visit)(ParamRef { param, path: &self.path, is_shard: false });
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        (self.visit)(ParamRef { param, path: &self.path, is_shard: false });
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        (self.flag)(flag, &self.path);
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        match is_shard(name, container) {
            true => self.enters_shard = true,
            false => self.path.enter(name, container),
        }
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.exit();
        }
    }
}
