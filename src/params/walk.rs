//! One way to visit the parameters of any module: what each of them is, without making it.

use burn::backend::{DispatchTensor, GradientCheckpointingStrategy};
use burn::module::{Flag, Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Device, Int, Tensor};

use super::leaf::LazyParam;
use super::shard::is_shard;

/// Visits every float, int and bool parameter, running statistics included, in the order of the module. Nothing is
/// made: a lazy parameter stays lazy unless its [value](ParamRef::value) is asked for.
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

/// A parameter of a module, and where it is.
#[derive(Clone, Copy)]
pub(crate) struct ParamRef<'a> {
    param: &'a dyn AnyParam,
    path: &'a ModulePath,
    is_shard: bool,
}

impl ParamRef<'_> {
    /// Whether these are the rows of a parameter, for which the one stands that was visited before.
    pub(crate) fn is_shard(&self) -> bool {
        self.is_shard
    }

    pub(crate) fn id(&self) -> ParamId {
        self.param.id()
    }

    /// Its path, as in `layers.0.weight`.
    pub(crate) fn path(&self) -> String {
        self.path.text()
    }

    /// The modules that it is in, and its own place in the last of them.
    pub(crate) fn module_path(&self) -> &ModulePath {
        self.path
    }

    pub(crate) fn is_float(&self) -> bool {
        self.param.is_float()
    }

    pub(crate) fn is_lazy(&self) -> bool {
        !self.param.is_initialized()
    }

    pub(crate) fn dims(&self) -> Vec<usize> {
        self.param.dims()
    }

    /// Its dtype. An int or bool that is lazy has that of its device.
    pub(crate) fn dtype(&self) -> DType {
        self.param.dtype()
    }

    /// Whether it requires a gradient.
    pub(crate) fn is_trained(&self) -> bool {
        self.param.is_trained()
    }

    /// Whether training mode makes it require a gradient, also on a device without autodiff.
    pub(crate) fn trains(&self) -> bool {
        self.param.trains()
    }

    /// Its device, with autodiff if it has that.
    pub(crate) fn device(&self) -> Device {
        self.param.device()
    }

    /// How its operations take part in gradient checkpointing; `None` without autodiff.
    pub(crate) fn checkpointing(&self) -> Option<GradientCheckpointingStrategy> {
        self.param.checkpointing()
    }

    /// Its value as the module uses it. Makes it if it is lazy.
    pub(crate) fn value(&self) -> DispatchTensor {
        self.param.value()
    }

    /// Its value before any reparameterization. Makes it if it is lazy.
    pub(crate) fn base(&self) -> DispatchTensor {
        self.param.base()
    }
}

trait AnyParam {
    fn id(&self) -> ParamId;
    fn is_initialized(&self) -> bool;
    fn dims(&self) -> Vec<usize>;
    fn dtype(&self) -> DType;
    fn device(&self) -> Device;
    fn value(&self) -> DispatchTensor;
    fn base(&self) -> DispatchTensor;

    fn is_float(&self) -> bool {
        false
    }

    fn is_trained(&self) -> bool {
        false
    }

    fn trains(&self) -> bool {
        false
    }

    fn checkpointing(&self) -> Option<GradientCheckpointingStrategy> {
        None
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

/// What all kinds of parameters have in common.
macro_rules! common {
    () => {
        fn id(&self) -> ParamId {
            self.id
        }

        fn is_initialized(&self) -> bool {
            Param::is_initialized(self)
        }

        fn dims(&self) -> Vec<usize> {
            self.lazy_shape().to_vec()
        }

        fn device(&self) -> Device {
            if Param::is_initialized(self) { Param::base(self).device() } else { self.lazy_device() }
        }

        fn value(&self) -> DispatchTensor {
            self.val().into_dispatch()
        }

        fn base(&self) -> DispatchTensor {
            Param::base(self).into_dispatch()
        }
    };
}

impl<const D: usize> AnyParam for Param<Tensor<D>> {
    common!();

    fn is_float(&self) -> bool {
        true
    }

    fn dtype(&self) -> DType {
        match Param::is_initialized(self) {
            true => Param::base(self).dtype(),
            false => LazyParam::of(self).placeholder.base().dtype(),
        }
    }

    fn is_trained(&self) -> bool {
        if Param::is_initialized(self) { Param::base(self).is_require_grad() } else { LazyParam::of(self).trained }
    }

    fn trains(&self) -> bool {
        match Param::is_initialized(self) {
            true if Param::base(self).is_autodiff() => Param::base(self).is_require_grad(),
            true => self.clone().train().is_require_grad(),
            false => LazyParam::of(self).trained,
        }
    }

    fn checkpointing(&self) -> Option<GradientCheckpointingStrategy> {
        let one = if Param::is_initialized(self) { Param::base(self) } else { LazyParam::of(self).placeholder.base() };
        one.gradient_checkpointing_strategy()
    }
}

impl<const D: usize> AnyParam for Param<Tensor<D, Int>> {
    common!();

    fn dtype(&self) -> DType {
        match Param::is_initialized(self) {
            true => Param::base(self).dtype(),
            false => self.lazy_device().settings().int_dtype.into(),
        }
    }
}

impl<const D: usize> AnyParam for Param<Tensor<D, Bool>> {
    common!();

    fn dtype(&self) -> DType {
        match Param::is_initialized(self) {
            true => Param::base(self).dtype(),
            false => self.lazy_device().settings().bool_dtype.into(),
        }
    }
}
