//! Which parameters are gathered together.

use std::sync::Arc;

use burn::tensor::DType;

/// What of a parameter says which group it is in.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub path: Arc<str>,
    pub bytes: usize,
    pub dtype: DType,
    pub trained: bool,
}

/// A group of less is joined with the one before it.
const SMALL_BYTES: usize = 64 << 10;

/// So much joins a group at most: many small blocks are not to be whole all at once.
const JOINED_BYTES: usize = 1 << 20;

/// Divides parameters, given in the order of the module, into groups that are gathered together: those of a block, of
/// one dtype, all trained or all frozen. A block is the path up to its first number (`encoder.layers.3`), or the first
/// name of a path without one. A group of fewer than 64 KiB joins the one before it, if that goes with it, up to
/// 1 MiB of them.
///
/// Numbers in the groups are places in `members`.
pub(crate) fn groups(members: &[Member]) -> Vec<Vec<usize>> {
    let mut found: Vec<Vec<usize>> = Vec::new();
    for (place, member) in members.iter().enumerate() {
        let same = |group: &&mut Vec<usize>| {
            let other = &members[group[0]];
            block(&other.path) == block(&member.path) && goes_with(other, member)
        };
        match found.iter_mut().find(same) {
            Some(group) => group.push(place),
            None => found.push(vec![place]),
        }
    }
    let bytes = |group: &[usize]| group.iter().map(|place| members[*place].bytes).sum::<usize>();
    // Each with the bytes that have joined it.
    let mut joined: Vec<(Vec<usize>, usize)> = Vec::new();
    for group in found {
        let more = bytes(&group);
        match joined.iter_mut().rev().find(|(before, _)| goes_with(&members[before[0]], &members[group[0]])) {
            Some((before, less)) if more < SMALL_BYTES && *less + more <= JOINED_BYTES => {
                before.extend(group);
                *less += more;
            }
            _ => joined.push((group, 0)),
        }
    }
    joined.into_iter().map(|(group, _)| group).collect()
}

fn goes_with(one: &Member, other: &Member) -> bool {
    one.dtype == other.dtype && one.trained == other.trained
}

/// The block of a path.
fn block(path: &str) -> &str {
    let mut end = 0;
    for name in path.split('.') {
        end += name.len();
        if name.bytes().all(|byte| byte.is_ascii_digit()) && !name.is_empty() {
            return &path[..end];
        }
        end += 1;
    }
    path.split('.').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(path: &str, kib: usize, trained: bool) -> Member {
        Member { path: path.into(), bytes: kib << 10, dtype: DType::F32, trained }
    }

    #[test]
    fn blocks_are_groups() {
        let members = [
            member("embedding.weight", 500, true),
            member("layers.0.attention.query.weight", 100, true),
            member("layers.0.attention.query.lora.a", 1, true),
            member("layers.1.attention.query.weight", 100, true),
            member("layers.1.norm.gamma", 1, true),
            member("norm.gamma", 1, true),
            member("head.weight", 500, true),
        ];
        assert_eq!(groups(&members), [vec![0], vec![1, 2], vec![3, 4, 5], vec![6]]);
    }

    /// What is small joins a large block as well, but not without end.
    #[test]
    fn many_small_blocks_are_several_groups() {
        let small = (0..100).map(|number| member(&format!("layers.{number}.weight"), 60, true));
        let members: Vec<Member> = std::iter::once(member("embedding.weight", 5000, true)).chain(small).collect();
        let joined = 1024 / 60;
        let sizes: Vec<usize> = groups(&members).iter().map(Vec::len).collect();
        assert_eq!(sizes[..2], [joined + 1; 2]);
        assert_eq!((sizes.len(), sizes.iter().sum::<usize>()), (100usize.div_ceil(joined + 1), 101));
    }

    #[test]
    fn dtypes_and_frozen_parameters_are_apart() {
        let half = Member { dtype: DType::BF16, ..member("layers.0.c", 100, true) };
        let members =
            [member("layers.0.a", 100, true), member("layers.0.b", 100, false), half, member("layers.0.d", 1, false)];
        assert_eq!(groups(&members), [vec![0], vec![1, 3], vec![2]]);
    }

    #[test]
    fn blocks_are_named_by_their_first_number() {
        assert_eq!(block("encoder.layers.12.mha.query.weight"), "encoder.layers.12");
        assert_eq!(block("fc1.weight"), "fc1");
        assert_eq!(block("weight"), "weight");
        assert_eq!(block("3.weight"), "3");
    }
}
