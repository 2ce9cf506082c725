//! The arithmetic of elements, each operation rounded as burn rounds it on the host.

use burn::tensor::{Element, bf16, f16};

/// An element of a parameter.
pub(super) trait Number: Element + bytemuck::Pod + Default + PartialOrd + Send + Sync {
    /// A number as burn gives it to an operation on these elements.
    fn of(number: f64) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn sqrt(self) -> Self;
}

macro_rules! wide {
    ($($float:ty),*) => {$(
        impl Number for $float {
            #[inline(always)]
            fn of(number: f64) -> Self {
                number as $float
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self - other
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn div(self, other: Self) -> Self {
                self / other
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$float>::sqrt(self)
            }
        }
    )*};
}
wide!(f32, f64);

/// Computed in `f32`, and rounded after each operation.
macro_rules! narrow {
    ($($float:ty),*) => {$(
        impl Number for $float {
            #[inline(always)]
            fn of(number: f64) -> Self {
                Self::from_f32(number as f32)
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                Self::from_f32(self.to_f32() + other.to_f32())
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                Self::from_f32(self.to_f32() - other.to_f32())
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                Self::from_f32(self.to_f32() * other.to_f32())
            }
            #[inline(always)]
            fn div(self, other: Self) -> Self {
                Self::from_f32(self.to_f32() / other.to_f32())
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                Self::from_f32(self.to_f32().sqrt())
            }
        }
    )*};
}
narrow!(bf16, f16);
