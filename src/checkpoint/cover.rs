//! Whether slices make up a tensor: each element in one of them.

use std::collections::HashSet;
use std::ops::Range;

/// Cells that are looked at for one tensor at most. As many slices as ranks make as many cells or few more.
const MOST: usize = 1 << 22;

/// Demands that slices are within a tensor of these dims, do not overlap and leave nothing out.
///
/// # Errors
/// What is wrong, with the slices.
pub(super) fn check(dims: &[usize], slices: &[&[Range<usize>]]) -> Result<(), String> {
    for slice in slices {
        let fits = slice.len() == dims.len()
            && slice.iter().zip(dims).all(|(range, size)| range.start < range.end && range.end <= *size);
        if !fits {
            return Err(format!("slice {slice:?} is not within dims {dims:?}"));
        }
    }
    if dims.contains(&0) {
        return Ok(());
    }
    // The boundaries of all slices divide the tensor into cells, of which a slice has some.
    let bounds: Vec<Vec<usize>> = (0..dims.len())
        .map(|dim| {
            let mut bounds: Vec<usize> = slices.iter().flat_map(|slice| [slice[dim].start, slice[dim].end]).collect();
            bounds.extend([0, dims[dim]]);
            bounds.sort_unstable();
            bounds.dedup();
            bounds
        })
        .collect();
    let mut seen: HashSet<Vec<usize>> = HashSet::new();
    for slice in slices {
        let mut cells: Vec<Vec<usize>> = vec![Vec::new()];
        for (dim, range) in slice.iter().enumerate() {
            let starts: Vec<usize> = bounds[dim].iter().copied().filter(|at| range.contains(at)).collect();
            if cells.len().saturating_mul(starts.len()).saturating_add(seen.len()) > MOST {
                return Err(format!("its {} slices divide it into more than {MOST} cells", slices.len()));
            }
            cells = cells
                .iter()
                .flat_map(|cell| starts.iter().map(move |start| cell.iter().copied().chain([*start]).collect()))
                .collect();
        }
        for cell in cells {
            if !seen.insert(cell.clone()) {
                return Err(format!("slice {slice:?} overlaps with another at {cell:?}"));
            }
        }
    }
    let all = bounds.iter().map(|bounds| bounds.len() - 1).try_fold(1usize, |product, len| product.checked_mul(len));
    if all != Some(seen.len()) {
        return Err(format!("its slices leave some of dims {dims:?} out: {}", missing(&bounds, &seen)));
    }
    Ok(())
}

/// A cell that nobody has.
fn missing(bounds: &[Vec<usize>], seen: &HashSet<Vec<usize>>) -> String {
    let mut cell = vec![0; bounds.len()];
    // No more than one cell more than there are is looked at.
    for _ in 0..=seen.len() {
        let at: Vec<usize> = cell.iter().zip(bounds).map(|(index, bounds)| bounds[*index]).collect();
        if !seen.contains(&at) {
            let ranges: Vec<Range<usize>> =
                cell.iter().zip(bounds).map(|(index, bounds)| bounds[*index]..bounds[index + 1]).collect();
            return format!("{ranges:?}");
        }
        for dim in (0..cell.len()).rev() {
            cell[dim] += 1;
            if cell[dim] + 1 < bounds[dim].len() {
                break;
            }
            cell[dim] = 0;
        }
    }
    "the rest".into()
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn what_makes_up_a_tensor() {
        assert_eq!(check(&[], &[&[]]), Ok(()));
        assert_eq!(check(&[0, 3], &[]), Ok(()));
        assert_eq!(check(&[4, 6], &[&[0..2, 0..6], &[2..4, 0..3], &[2..4, 3..6]]), Ok(()));
        let refused = |dims: &[usize], slices: &[&[std::ops::Range<usize>]], words: &str| {
            let said = check(dims, slices).unwrap_err();
            assert!(said.contains(words), "{said}");
        };
        refused(&[], &[], "leave some of dims [] out");
        refused(&[], &[&[], &[]], "overlaps");
        refused(&[4], &[&[0..2], &[1..4]], "slice [1..4] overlaps with another at [1]");
        refused(&[4], &[&[0..2], &[3..4]], "leave some of dims [4] out: [2..3]");
        refused(&[4, 6], &[&[0..4, 0..3]], "[0..4, 3..6]");
        refused(&[4], &[&[0..5]], "not within");
        refused(&[4], &[&[2..2], &[0..4]], "not within");
        refused(&[4, 1], &[&[0..4]], "not within");
        refused(&[usize::MAX, usize::MAX], &[&[0..1, 0..1]], "out: [0..1, 1..");
    }

    #[test]
    fn many_cells_are_refused_in_time() {
        let slices: Vec<Vec<std::ops::Range<usize>>> = (0..4000).map(|at| vec![0..at + 1, at..4000]).collect();
        let slices: Vec<&[std::ops::Range<usize>]> = slices.iter().map(Vec::as_slice).collect();
        assert!(check(&[4000, 4000], &slices).is_err());
    }
}
