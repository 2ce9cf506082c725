//! Several tensors times a number, in place.
//!
//! The rows of small gradients are views of one buffer, in which a collective has brought them. Each alone shares its
//! memory with the others, so what changes it makes memory anew, while the buffer stays until its last view is gone:
//! for a moment, or where it goes back to a pool until the next step, everything is held twice.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::Shape;

use super::PlainTensor;

impl PlainTensor {
    /// Float tensors times a number: in place those whose memory nobody holds but they, if they are at least half of
    /// it. Without a change if the number is 1.
    ///
    /// # Panics
    /// If one is a tensor of another kind.
    pub(crate) fn scale_all(tensors: Vec<Self>, factor: f64) -> Vec<Self> {
        if factor == 1.0 {
            return tensors;
        }
        let mut scaled: Vec<Option<Self>> = Vec::new();
        let mut by_holder: BTreeMap<usize, Vec<(usize, FlexTensor)>> = BTreeMap::new();
        for (place, tensor) in tensors.into_iter().enumerate() {
            if !tensor.on_flex() || tensor.elements() == 0 {
                scaled.push(Some(tensor.scale(factor)));
                continue;
            }
            let Ok(view) = tensor.into_flex() else { unreachable!("the tensor is in host memory") };
            by_holder.entry(Arc::as_ptr(&view.data_arc()).addr()).or_default().push((place, view));
            scaled.push(None);
        }
        for views in by_holder.into_values() {
            let (places, views): (Vec<usize>, Vec<FlexTensor>) = views.into_iter().unzip();
            for (place, view) in places.into_iter().zip(scale_views(views, factor)) {
                scaled[place] = Some(view);
            }
        }
        scaled.into_iter().flatten().collect()
    }
}

/// Tensors of one memory times a number.
fn scale_views(mut views: Vec<FlexTensor>, factor: f64) -> Vec<PlainTensor> {
    let holders = views.first().map_or(0, |view| Arc::strong_count(&view.data_arc()) - 1);
    let same_dtype = views.windows(2).all(|two| two[0].dtype() == two[1].dtype());
    let layouts: Vec<Layout> = views.iter().map(|view| view.layout().clone()).collect();
    let theirs: usize = layouts.iter().map(Layout::num_elements).sum();
    let elements = views.first().map_or(0, |view| view.bytes().len() / view.dtype().size());
    match views.pop() {
        // With what lies between them, which is nobody's.
        Some(last) if holders == layouts.len() && same_dtype && 2 * theirs >= elements => {
            drop(views);
            let all = last.with_layout(Layout::contiguous(Shape::from(vec![elements])));
            let Ok(all) = PlainTensor::from_flex(all).scale(factor).into_flex() else {
                unreachable!("the tensor is in host memory")
            };
            layouts.into_iter().map(|layout| PlainTensor::from_flex(all.clone().with_layout(layout))).collect()
        }
        last => views.into_iter().chain(last).map(|view| PlainTensor::from_flex(view).scale(factor)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, TensorData};

    use super::*;

    fn numbers(count: usize, dtype: DType) -> PlainTensor {
        let values: Vec<f32> = (0..count).map(|number| number as f32).collect();
        PlainTensor::from_data(TensorData::new(values, [count]).convert_dtype(dtype), &Device::flex())
    }

    fn values(tensor: &PlainTensor) -> Vec<f32> {
        tensor.clone().into_data().unwrap().convert::<f32>().try_to_vec().unwrap()
    }

    fn place(tensor: &PlainTensor) -> usize {
        let tensor = tensor.clone().into_flex().unwrap();
        tensor.bytes().as_ptr().addr() + tensor.layout().start_offset() * tensor.dtype().size()
    }

    #[test]
    fn views_that_share_memory_with_nobody_else_stay_where_they_are() {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let whole = numbers(12, dtype);
            let alone = numbers(3, dtype);
            // Of a part nobody has anything.
            let views = vec![
                whole.clone().narrow(0, 6..12).reshape([2, 3]),
                alone,
                whole.clone().narrow(0, 0..2),
                whole.clone().narrow(0, 2..4),
            ];
            drop(whole);
            let places: Vec<usize> = views.iter().map(place).collect();
            let scaled = PlainTensor::scale_all(views, 0.5);
            assert_eq!(scaled.iter().map(place).collect::<Vec<_>>(), places, "{dtype:?}");
            let found: Vec<Vec<f32>> = scaled.iter().map(values).collect();
            assert_eq!(
                found,
                [vec![3.0, 3.5, 4.0, 4.5, 5.0, 5.5], vec![0.0, 0.5, 1.0], vec![0.0, 0.5], vec![1.0, 1.5]]
            );
            assert_eq!(scaled[0].shape().to_vec(), [2, 3]);
        }
    }

    /// A few elements of a large memory would keep all of it, and have all of it multiplied.
    #[test]
    fn a_small_part_of_a_memory_leaves_it() {
        let part = numbers(100, DType::F32).narrow(0, 2..4);
        let scaled = PlainTensor::scale_all(vec![part], 2.0).remove(0);
        assert_eq!((values(&scaled), scaled.into_flex().unwrap().bytes().len()), (vec![4.0, 6.0], 8));
    }

    #[test]
    fn what_others_hold_is_not_changed() {
        let whole = numbers(4, DType::F32);
        let views = vec![whole.clone().narrow(0, 0..2), whole.clone().narrow(0, 2..4)];
        let scaled = PlainTensor::scale_all(views, 2.0);
        assert_eq!(values(&whole), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(scaled.iter().flat_map(values).collect::<Vec<_>>(), [0.0, 2.0, 4.0, 6.0]);
        let twice = vec![whole.clone(), whole];
        let twice = PlainTensor::scale_all(twice, 2.0);
        assert_eq!(twice.iter().map(values).collect::<Vec<_>>(), [[0.0, 2.0, 4.0, 6.0]; 2]);
    }
}
