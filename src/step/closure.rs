//! The closures of steps, and their identity in the cache of captured steps.

use std::any::TypeId;

use super::loss::Loss;

/// What tells one closure from another: where it is written, and whether it has values of its own beside that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClosureIdentity {
    /// Closures written in different places are of different types.
    closure: TypeId,
    /// A function pointer is such a value too: two functions have one type of pointer.
    captures: bool,
}

impl ClosureIdentity {
    pub fn of<F>() -> Self {
        Self { closure: typeid::of::<F>(), captures: size_of::<F>() != 0 }
    }

    /// Whether it may compute something else than at the last call: what it captured may have changed.
    pub fn captures(&self) -> bool {
        self.captures
    }
}

/// The closure of a step, whatever it returns.
pub struct StepFn<'a, M, I> {
    pub identity: ClosureIdentity,
    call: &'a mut dyn FnMut(&M, I) -> Loss,
}

impl<'a, M, I> StepFn<'a, M, I> {
    /// `call` calls the user's closure, which is of type `F`.
    pub fn new<F>(call: &'a mut dyn FnMut(&M, I) -> Loss) -> Self {
        Self { identity: ClosureIdentity::of::<F>(), call }
    }

    pub fn call(&mut self, model: &M, inputs: I) -> Loss {
        (self.call)(model, inputs)
    }

    /// The same closure once more.
    pub fn again(&mut self) -> StepFn<'_, M, I> {
        StepFn { identity: self.identity, call: self.call }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity<F: Fn(f32) -> f32>(_: F) -> ClosureIdentity {
        ClosureIdentity::of::<F>()
    }

    #[test]
    fn function_pointers_and_captures_are_values() {
        let by = 2.0;
        assert!(!identity(|x| x * 2.0).captures());
        assert!(!identity(f32::sqrt).captures());
        assert!(identity(f32::sqrt as fn(f32) -> f32).captures());
        assert!(identity(move |x| x * by).captures());
        let nested = |x| x + 1.0;
        assert!(!identity(move |x| nested(x) * 2.0).captures());
    }
}
