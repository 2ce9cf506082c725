//! Which rank updates a parameter whose update depends on the whole of it.

use std::collections::HashMap;

/// The rank, of so many, that updates each parameter as a whole, by the dims of all parameters in the order in which
/// they became known. Those of equal dims go around the ranks. What is known later changes nothing of what was dealt
/// out before, for the state of an optimizer stays where it is.
pub(crate) fn owners<'a>(dims: impl IntoIterator<Item = &'a [usize]>, ranks: usize) -> Vec<usize> {
    let mut next: HashMap<&[usize], usize> = HashMap::new();
    let deal = |dims: &'a [usize]| {
        // Dims that are met for the first time begin where none of the others did.
        let first = next.len();
        let owner = next.entry(dims).or_insert(first);
        *owner += 1;
        (*owner - 1) % ranks.max(1)
    };
    dims.into_iter().map(deal).collect()
}

#[cfg(test)]
mod tests {
    use super::owners;

    #[test]
    fn equal_parameters_go_around() {
        let block: [&[usize]; 4] = [&[8, 24], &[8, 8], &[8, 32], &[32, 8]];
        let all: Vec<&[usize]> = block.into_iter().cycle().take(32).collect();
        let found = owners(all.iter().copied(), 4);
        for rank in 0..4 {
            assert_eq!(found.iter().filter(|owner| **owner == rank).count(), 8);
            for kind in 0..4 {
                assert_eq!(found.iter().skip(kind).step_by(4).filter(|owner| **owner == rank).count(), 2);
            }
        }
        assert_eq!(owners(all[..5].iter().copied(), 4), found[..5]);
    }
}
