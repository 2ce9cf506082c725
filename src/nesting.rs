//! Checks the order in which wrappers are put around each other: tensor parallelism, then pipeline parallelism, then
//! data parallelism.
//!
//! A wrapper is a module itself, so the traits that wrap any module would wrap it again. Where the type is known, a
//! method of the wrapper of the same name stands before that of the trait, and does not compile ([`Unwrapped`]). In
//! code that is generic over the module, wrappers are found when the module is visited, wherever in it they are.

use std::cell::Cell;

use burn::module::{Module, ModuleVisitor};

use crate::Error;

thread_local! {
    /// While a module is searched: the first wrapper that was met.
    static SEARCH: Cell<Option<Option<&'static str>>> = const { Cell::new(None) };
}

/// Says that a wrapper is visited.
pub(crate) fn visited(wrapper: &'static str) {
    if SEARCH.get() == Some(None) {
        SEARCH.set(Some(Some(wrapper)));
    }
}

/// Demands that no part of a module is wrapped already.
///
/// # Errors
/// [`Error::Nesting`] if one is.
pub(crate) fn check<M: Module>(module: &M, operation: &'static str) -> Result<(), Error> {
    match wrapper(module) {
        Some(wrapper) => Err(Error::Nesting { operation, wrapper }),
        None => Ok(()),
    }
}

/// The wrapper that a module is, or holds, of which a rank may have parts alone: what compares whole models has no use
/// for it.
pub(crate) fn wrapper<M: Module>(module: &M) -> Option<&'static str> {
    struct VisitAll;
    impl ModuleVisitor for VisitAll {}
    SEARCH.set(Some(None));
    module.visit(&mut VisitAll);
    SEARCH.take().flatten()
}

/// A module that is not wrapped yet. No wrapper is one.
#[diagnostic::on_unimplemented(
    message = "this model is wrapped already, and cannot be wrapped in this order",
    label = "wrapped already",
    note = "split it first, then cut it, then replicate it: `.tensor_parallel(..)?.pipeline_parallel(..)?.data_parallel(..)?`, \
            each at most once"
)]
pub trait Unwrapped {}

/// Gives a wrapper methods that stand before those of the traits, and do not compile.
macro_rules! refuse_wrapping {
    ($wrapper:ident: $($method:ident),+) => {
        impl<M> $wrapper<M> {
            $(
                #[doc(hidden)]
                pub fn $method<A, B>(self, _: A, _: B) -> !
                where
                    Self: $crate::nesting::Unwrapped,
                {
                    unreachable!("no wrapper is `Unwrapped`")
                }
            )+
        }
    };
}
pub(crate) use refuse_wrapping;
