//! One pass over a parameter, its gradient and its moments.

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Tensor, bf16, f16};
use pulp::NullaryFnOnce;

use super::number::Number;
use crate::tensor::{PlainTensor, vectorized};

/// Elements that are read into local memory, computed, and written back: the compiler then knows that they are apart.
/// Of fewer it unrolls a short rule whole, and takes the elements of a vector from as many blocks; more are copied by
/// calls.
const BLOCK: usize = 128;
/// Elements from which on two threads share the work.
const SPLIT_FROM: usize = 128 * 1024;

/// How an element with `N` moments is updated.
pub(super) trait UpdateRule<const N: usize>: Copy + Send + Sync {
    /// The new value; the moments are changed. To be inlined always.
    fn update<T: Number>(&self, value: T, gradient: T, moments: &mut [T; N]) -> T;
}

/// Whether a parameter is updated here: on the host, with a gradient of its dtype, and moments of its dims. Of others
/// burn knows what to do, or what to say.
pub(super) fn is_here<'a, const D: usize>(
    value: &'a Tensor<D>,
    gradient: &'a Tensor<D>,
    moments: impl IntoIterator<Item = Option<&'a Tensor<D>>>,
) -> bool {
    let known = matches!(value.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16);
    let mut all = [value, gradient].into_iter().chain(moments.into_iter().flatten());
    let here = |tensor: &Tensor<D>| tensor.dims() == value.dims() && is_on_host(tensor);
    known && gradient.dtype() == value.dtype() && all.all(here)
}

fn is_on_host<const D: usize>(tensor: &Tensor<D>) -> bool {
    PlainTensor::from(tensor.clone()).on_flex()
}

/// Updates a parameter that [`is_here`], in place if nothing else holds its memory. Moments that are not there yet
/// begin as zeros. Those of another dtype, as a record may have, become what the parameter is.
pub(super) fn update<const D: usize, const N: usize>(
    value: Tensor<D>,
    gradient: Tensor<D>,
    moments: [Option<Tensor<D>>; N],
    rule: impl UpdateRule<N>,
) -> (Tensor<D>, [Tensor<D>; N]) {
    let (dtype, shape) = (value.dtype(), value.shape());
    let mut value = packed(value);
    let gradient = packed(gradient);
    let mut moments = moments.map(|moment| match moment {
        Some(moment) if moment.dtype() == dtype => packed(moment),
        Some(moment) => packed(moment.cast(dtype)),
        None => FlexTensor::zeros(shape.clone(), dtype),
    });
    match dtype {
        DType::F64 => update_as::<f64, N>(&mut value, &gradient, &mut moments, rule),
        DType::BF16 => update_as::<bf16, N>(&mut value, &gradient, &mut moments, rule),
        DType::F16 => update_as::<f16, N>(&mut value, &gradient, &mut moments, rule),
        _ => update_as::<f32, N>(&mut value, &gradient, &mut moments, rule),
    }
    (tensor(value), moments.map(tensor))
}

/// The elements one behind the other, from the begin of their memory to its end.
fn packed<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    let flex = PlainTensor::from(tensor).into_flex().expect("the tensor was found to be on the host");
    // The tensor itself where it is so already; `flex` ends here, so that it stays the only one.
    flex.to_contiguous()
}

fn tensor<const D: usize>(tensor: FlexTensor) -> Tensor<D> {
    PlainTensor::from_flex(tensor).float().expect("its dims have not changed")
}

fn update_as<T: Number, const N: usize>(
    value: &mut FlexTensor,
    gradient: &FlexTensor,
    moments: &mut [FlexTensor; N],
    rule: impl UpdateRule<N>,
) {
    let moments = moments.each_mut().map(|moment| moment.storage_mut::<T>());
    ParamElements { value: value.storage_mut(), gradient: gradient.storage(), moments, rule }.share_out();
}

/// Elements of a parameter, as many of each.
struct ParamElements<'a, T, R, const N: usize> {
    value: &'a mut [T],
    gradient: &'a [T],
    moments: [&'a mut [T]; N],
    rule: R,
}

impl<T: Number, R: UpdateRule<N>, const N: usize> ParamElements<'_, T, R, N> {
    /// Computes halves on threads of their own, as long as that is worth it. Each element is computed by itself, so the
    /// number of threads changes nothing.
    fn share_out(self) {
        if self.value.len() < SPLIT_FROM || rayon::current_num_threads() == 1 {
            return vectorized(self);
        }
        let ParamElements { value, gradient, moments, rule } = self;
        let half = value.len() / 2;
        let (value, more_value) = value.split_at_mut(half);
        let (gradient, more_gradient) = gradient.split_at(half);
        let mut halves = moments.map(|moment| moment.split_at_mut(half));
        let moments = halves.each_mut().map(|(moment, _)| std::mem::take(moment));
        let more_moments = halves.map(|(_, more)| more);
        rayon::join(
            || ParamElements { value, gradient, moments, rule }.share_out(),
            || ParamElements { value: more_value, gradient: more_gradient, moments: more_moments, rule }.share_out(),
        );
    }

    #[inline(always)]
    fn block(&self, value: &mut [T; BLOCK], gradient: &[T; BLOCK], moments: &mut [[T; BLOCK]; N]) {
        for place in 0..BLOCK {
            let mut of_place = [T::default(); N];
            for moment in 0..N {
                of_place[moment] = moments[moment][place];
            }
            value[place] = self.rule.update(value[place], gradient[place], &mut of_place);
            for moment in 0..N {
                moments[moment][place] = of_place[moment];
            }
        }
    }
}

impl<T: Number, R: UpdateRule<N>, const N: usize> NullaryFnOnce for ParamElements<'_, T, R, N> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        let from = self.value.len() / BLOCK * BLOCK;
        for place in 0..from / BLOCK {
            let at = |slice: &[T]| slice.as_chunks().0[place];
            let (mut value, gradient) = (at(self.value), at(self.gradient));
            let mut moments = self.moments.each_ref().map(|moment| at(moment));
            self.block(&mut value, &gradient, &mut moments);
            self.value.as_chunks_mut().0[place] = value;
            for (moment, own) in self.moments.iter_mut().zip(moments) {
                moment.as_chunks_mut().0[place] = own;
            }
        }
        // The rest, with zeros behind.
        let len = self.value.len() - from;
        let at = |slice: &[T]| {
            let mut block = [T::default(); BLOCK];
            block[..len].copy_from_slice(&slice[from..]);
            block
        };
        let (mut value, gradient) = (at(self.value), at(self.gradient));
        let mut moments = self.moments.each_ref().map(|moment| at(moment));
        self.block(&mut value, &gradient, &mut moments);
        self.value[from..].copy_from_slice(&value[..len]);
        for (moment, own) in self.moments.iter_mut().zip(moments) {
            moment[from..].copy_from_slice(&own[..len]);
        }
    }
}
