//! Orders of dims for permutations.

/// The dims `0..rank` in an order that begins with `leading`.
pub(super) fn first<const N: usize>(leading: [usize; N], rank: usize) -> Vec<usize> {
    leading.into_iter().chain((0..rank).filter(|dim| !leading.contains(dim))).collect()
}

/// The order that undoes `order`.
pub(super) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, &dim)| inverse[dim] = place);
    inverse
}
