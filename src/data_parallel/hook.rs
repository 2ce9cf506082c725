//! Gradient hooks: tells a listener of the gradient of every parameter of an unmodified module as soon as backward has
//! it.
//!
//! Each trainable parameter carries a burn [`Reparameterization`] that leaves its value as it is, but puts an operation
//! into the graph at every use of the parameter ([`Param::val`]). When backward comes to that operation, the gradient
//! of this use is complete.
//!
//! burn runs backward by descending *order* of the nodes, the longest distance from a leaf. An operation right behind a
//! leaf would have order 1 and be the last to run, all of them together at the very end of backward. So the operation
//! has a second parent, an untracked tensor whose node has the order that is wanted: the `k`-th use of a forward gets
//! order `k * STRIDE`. Then the uses are visited in reverse, each about when the layers behind it are done: earlier
//! would be wrong and cannot be (an operation runs after all that depends on it), later costs only overlap.
//!
//! Any backward whose graph has a parameter in it comes to its hooks: one without the replica, or that of another
//! replica. The hooks hand gradients to the listener while the backward of their own replica runs on the thread
//! ([`listening`]); to any other backward they are the identity.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy, NoCheckpointing};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor, Flex, GradientCheckpointingStrategy,
};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Shape, Tensor};

use crate::graph::same_buffer;
use crate::tensor::{PlainTensor, with_backend};

/// Operations between two uses that keep the hook of the earlier one from running too late: more than a transformer
/// block has one behind the other between its weights.
const STRIDE: usize = 32;

/// Orders above this all share one anchor, so that endless forwards without a backward cost no memory.
const HIGHEST_ORDER: usize = 1 << 15;

/// Is told of uses and gradients of parameters.
pub(crate) trait GradientListener: Send + Sync {
    /// A use of parameter `param` enters the graph. Returns its number among the uses since the last backward.
    fn used(&self, param: usize) -> usize;

    /// The gradient of one use of parameter `param` is complete.
    fn arrived(&self, param: usize, gradient: PlainTensor);

    /// A use of parameter `param` was part of a backward that is none of this listener's.
    fn passed(&self, param: usize);
}

/// The hooks of one wrapped model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HookGroup(u64);

impl HookGroup {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

thread_local! {
    /// The hooks whose backward runs on this thread.
    static LISTENING: Cell<Option<HookGroup>> = const { Cell::new(None) };
}

/// Runs the backward of the model with these hooks: they hand its gradients to their listener.
pub(super) fn listening<T>(hooks: HookGroup, backward: impl FnOnce() -> T) -> T {
    /// Puts back what was there, also after a panic.
    struct Restore(Option<HookGroup>);
    impl Drop for Restore {
        fn drop(&mut self) {
            LISTENING.set(self.0);
        }
    }
    let _restore = Restore(LISTENING.replace(Some(hooks)));
    backward()
}

#[derive(Clone)]
pub(super) struct Listener(Weak<dyn GradientListener>);

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

/// The reparameterization that listens. Without its listener it does nothing.
#[derive(Module, Debug)]
pub(super) struct GradientHook {
    #[module(skip)]
    listener: Listener,
    #[module(skip)]
    hooks: HookGroup,
    #[module(skip)]
    param: usize,
}

impl Reparameterization for GradientHook {
    const NAME: &'static str = "gradient_hook";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if !base.is_require_grad() {
            return base;
        }
        let Some(listener) = self.listener.0.upgrade() else { return base };
        let order = (listener.used(self.param) * STRIDE).min(HIGHEST_ORDER);
        let arrival = GradientArrival { listener: self.listener.clone(), hooks: self.hooks, param: self.param };
        let Some(strategy) = base.gradient_checkpointing_strategy() else { return base };
        with_backend!(base.device().inner(), B => match strategy {
            GradientCheckpointingStrategy::Disabled => listen::<D, B, NoCheckpointing>(base, order, arrival),
            GradientCheckpointingStrategy::Balanced => listen::<D, B, BalancedCheckpointing>(base, order, arrival),
        }, otherwise base)
    }
}

/// Attaches a [`GradientHook`] to every parameter that the listener knows.
pub(super) struct AttachHooks<'a> {
    listener: Listener,
    hooks: HookGroup,
    numbers: &'a HashMap<ParamId, usize>,
}

impl<'a> AttachHooks<'a> {
    /// `numbers` are those by which the listener calls the parameters.
    pub fn new<L: GradientListener + 'static>(
        listener: &Arc<L>,
        hooks: HookGroup,
        numbers: &'a HashMap<ParamId, usize>,
    ) -> Self {
        let listener = Arc::downgrade(listener) as Weak<dyn GradientListener>;
        Self { listener: Listener(listener), hooks, numbers }
    }
}

impl Reparameterizer for AttachHooks<'_> {
    type Reparam = GradientHook;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<GradientHook>) {
        let number = self.numbers.get(&param.id).copied();
        (param, number.map(|param| GradientHook { listener: self.listener.clone(), hooks: self.hooks, param }))
    }
}

/// The module without its hooks. If it has other reparameterizations too, adapters above all, it stays as it is: burn
/// takes all of them away or none.
pub(super) fn detach<M: Module>(module: M) -> M {
    let mut found = Reparameterizations { hooks: false, others: false };
    module.visit(&mut found);
    match found {
        Reparameterizations { hooks: true, others: false } => module.materialize().map(&mut Retie(HashMap::new())),
        _ => module,
    }
}

struct Reparameterizations {
    hooks: bool,
    others: bool,
}

impl ModuleVisitor for Reparameterizations {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == "Reparameterization" {
            *(if name == GradientHook::NAME { &mut self.hooks } else { &mut self.others }) = true;
        }
    }
}

/// Parameters that are in several places become one leaf again.
struct Retie(HashMap<ParamId, Box<dyn Any>>);

impl ModuleMapper for Retie {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_initialized() {
            return param;
        }
        let (id, value, mapper) = param.consume();
        let known = self.0.get(&id).and_then(|known| known.downcast_ref::<Tensor<D>>());
        let one = match known {
            Some(leaf) if same_buffer(&leaf.clone().into(), &value.clone().into()) => leaf.clone(),
            _ => value,
        };
        self.0.entry(id).or_insert_with(|| Box::new(one.clone()));
        Param::from_mapped_value(id, one, mapper)
    }
}

/// Where the gradient of one use of a parameter goes.
#[derive(Debug, Clone)]
pub(super) struct GradientArrival {
    listener: Listener,
    hooks: HookGroup,
    param: usize,
}

impl GradientArrival {
    /// A use enters the graph: where its gradient goes, and the order that the operation behind the parameter is to
    /// have.
    pub fn of_use<L: GradientListener + 'static>(listener: &Arc<L>, hooks: HookGroup, param: usize) -> (Self, usize) {
        let order = (listener.used(param) * STRIDE).min(HIGHEST_ORDER);
        let listener = Listener(Arc::downgrade(listener) as Weak<dyn GradientListener>);
        (Self { listener, hooks, param }, order)
    }

    /// Hands the gradient to the listener, if the backward of its own replica runs on this thread; else it is thrown
    /// away.
    pub fn deliver(self, gradient: PlainTensor) {
        let Some(listener) = self.listener.0.upgrade() else { return };
        match LISTENING.get() == Some(self.hooks) {
            true => listener.arrived(self.param, gradient),
            false => listener.passed(self.param),
        }
    }
}

/// The identity whose backward tells the listener, and does not hand the gradient on: the listener has it now. In the
/// backward of somebody else it hands the gradient on.
#[derive(Debug)]
struct Listen;

impl<B: Backend> Backward<B, 2> for Listen
where
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = GradientArrival;

    fn backward(self, ops: Ops<GradientArrival, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let GradientArrival { listener, hooks, param } = ops.state;
        let listener = listener.0.upgrade();
        if LISTENING.get() == Some(hooks)
            && let Some(listener) = listener
        {
            return listener.arrived(param, PlainTensor::from_float::<B>(gradient));
        }
        // Another's backward, or the wrapper has gone while its graph lived on: burn's own way.
        listener.inspect(|listener| listener.passed(param));
        let [parameter, _anchor] = ops.parents;
        if let Some(parameter) = parameter {
            grads.register::<B>(parameter.id, gradient);
        }
    }
}

fn listen<const D: usize, B: Backend, C: CheckpointStrategy>(
    x: Tensor<D>,
    order: usize,
    arrival: GradientArrival,
) -> Tensor<D>
where
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B, C>>,
{
    let tracked =
        <DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::try_into_backend(x.clone().into_dispatch());
    let Ok(BackendTensor::Float(tracked)) = tracked else { return x };
    drop(x);
    let (value, parameter) = tracked.into_parts();
    let nodes = [parameter, anchor(order).node()];
    let output = match Backward::<B, 2>::prepare::<C>(Listen, nodes).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(arrival, value),
        OpsKind::UnTracked(prepared) => prepared.finish(value),
    };
    Tensor::from_dispatch(<DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::from_backend(
        BackendTensor::Float(output),
    ))
}

/// An operation of no effect that adds 1 to the order of a node. Nodes know nothing of devices: those of Flex do for
/// all.
#[derive(Debug)]
struct Deepen;

impl Backward<Flex, 1> for Deepen {
    type State = ();

    fn backward(self, _: Ops<(), 1>, _: &mut Gradients, _: &mut Checkpointer) {}
}

pub(super) type Anchor = FloatTensor<Autodiff<Flex>>;

/// Untracked tensors by the order of their nodes, and the end of the chain they were cut from.
#[derive(Default)]
struct Anchors {
    known: HashMap<usize, Anchor>,
    tip: Option<(usize, Anchor)>,
}

thread_local! {
    static ANCHORS: RefCell<Anchors> = RefCell::default();
}

/// An untracked tensor whose node has exactly this order.
pub(super) fn anchor(order: usize) -> Anchor {
    ANCHORS.with_borrow_mut(|anchors| {
        if let Some(anchor) = anchors.known.get(&order) {
            return anchor.clone();
        }
        let root = || (0, Anchor::new(FlexTensor::zeros(Shape::from(vec![1]), DType::F32)));
        let (reached, mut tensor) = anchors.tip.take().filter(|(reached, _)| *reached <= order).unwrap_or_else(root);
        for _ in reached..order {
            let (value, node) = tensor.into_parts();
            tensor = match Deepen.prepare::<NoCheckpointing>([node]).compute_bound().stateful() {
                OpsKind::UnTracked(prepared) => prepared.finish(value),
                OpsKind::Tracked(prepared) => prepared.finish((), value),
            };
        }
        anchors.known.insert(order, tensor.clone());
        anchors.tip = Some((order, tensor.clone()));
        tensor
    })
}
