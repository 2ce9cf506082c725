//! What replicas exchange while a micro-batch runs, and one order of it for all of them.
//!
//! Replicas whose steps use different parameters, because data or ranks decide which, exchange different groups. Then
//! all take part in everything that any of them exchanges, in one order, in which each finds its own in its own order.

use burn_ir::{CustomOpIr, OperationIr};

use super::sharded::{START_GATHER, START_SCATTER};

/// A collective that [`rewrite`](super::rewrite) puts in, as the ranks run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exchange {
    /// Whether it gathers parameters; else it reduces and scatters their gradients.
    pub(crate) gathers: bool,
    /// The numbers of the parameters.
    pub(crate) numbers: Vec<usize>,
}

/// What a rank exchanges in a micro-batch, by the actions of its schedule: a single one where there is no pipeline. All
/// replicas have as many actions.
pub(crate) type Exchanges = Vec<Vec<Exchange>>;

impl Exchange {
    /// What an operation starts.
    pub(crate) fn of(op: &OperationIr) -> Option<Self> {
        let OperationIr::Custom(op) = op else { return None };
        let gathers = match op.id.as_str() {
            START_GATHER => true,
            START_SCATTER => false,
            _ => return None,
        };
        Some(Self { gathers, numbers: exchanged(op) })
    }

    /// Exchanges as words that travel.
    pub(crate) fn words(exchanges: &[Vec<Self>]) -> Vec<u64> {
        let mut words = Vec::new();
        for action in exchanges {
            words.push(action.len() as u64);
            for Self { gathers, numbers } in action {
                words.extend([u64::from(*gathers), numbers.len() as u64]);
                words.extend(numbers.iter().map(|number| *number as u64));
            }
        }
        words
    }

    /// The exchanges of such words.
    pub(crate) fn of_words(words: &[u64]) -> Exchanges {
        let (mut exchanges, mut words) = (Vec::new(), words.iter());
        while let Some(count) = words.next() {
            let mut action = Vec::new();
            for _ in 0..*count {
                let (Some(gathers), Some(len)) = (words.next(), words.next()) else { break };
                let numbers = words.by_ref().take(*len as usize).map(|number| *number as usize).collect();
                action.push(Self { gathers: *gathers == 1, numbers });
            }
            exchanges.push(action);
        }
        exchanges
    }

    /// One order of all that any of these exchange, action by action: each is found in it in its own order, and of two
    /// of them as little is there twice as can be.
    pub(crate) fn in_one_order(all: Vec<Exchanges>) -> Exchanges {
        let mut all = all.into_iter();
        let first = all.next().unwrap_or_default();
        all.fold(first, |merged, more| {
            let action = |exchanges: &[Vec<Self>], action: usize| exchanges.get(action).cloned().unwrap_or_default();
            let actions = 0..merged.len().max(more.len());
            actions.map(|place| supersequence(&action(&merged, place), &action(&more, place))).collect()
        })
    }
}

/// The numbers of the parameters of an operation that starts or ends an exchange.
pub(crate) fn exchanged(op: &CustomOpIr) -> Vec<usize> {
    let scalars = &op.scalars[..op.scalars.len().saturating_sub(2)];
    scalars.iter().map(|number| number.elem::<u64>() as usize).collect()
}

/// The shortest sequence of which both are found by leaving something out.
fn supersequence(one: &[Exchange], other: &[Exchange]) -> Vec<Exchange> {
    let alike = |(one, other): &(&Exchange, &Exchange)| one == other;
    let begin = one.iter().zip(other).take_while(alike).count();
    let (one, other, head) = (&one[begin..], &other[begin..], &one[..begin]);
    let end = one.iter().rev().zip(other.iter().rev()).take_while(alike).count();
    let (one, other, tail) = (&one[..one.len() - end], &other[..other.len() - end], &one[one.len() - end..]);
    // The length of the longest sequence that is found in both from these places on.
    let mut longest = vec![vec![0u32; other.len() + 1]; one.len() + 1];
    for i in (0..one.len()).rev() {
        for j in (0..other.len()).rev() {
            longest[i][j] = match one[i] == other[j] {
                true => longest[i + 1][j + 1] + 1,
                false => longest[i + 1][j].max(longest[i][j + 1]),
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut between = Vec::new();
    while i < one.len() || j < other.len() {
        if i < one.len() && j < other.len() && one[i] == other[j] {
            between.push(one[i].clone());
            (i, j) = (i + 1, j + 1);
        } else if j == other.len() || i < one.len() && longest[i + 1][j] >= longest[i][j + 1] {
            between.push(one[i].clone());
            i += 1;
        } else {
            between.push(other[j].clone());
            j += 1;
        }
    }
    [head, between.as_slice(), tail].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `a` gathers parameter 0, `A` scatters it, and so on.
    fn sequence(letters: &str) -> Vec<Exchange> {
        let of = |letter: char| Exchange {
            gathers: letter.is_lowercase(),
            numbers: vec![(letter.to_ascii_lowercase() as u8 - b'a') as usize],
        };
        letters.chars().map(of).collect()
    }

    fn is_within(part: &[Exchange], whole: &[Exchange]) -> bool {
        let mut whole = whole.iter();
        part.iter().all(|exchange| whole.any(|found| found == exchange))
    }

    #[test]
    fn one_order_has_everything_of_all_and_nothing_twice_that_need_not_be() {
        for (one, other, most) in [
            ("abcCbBaA", "abcCbBaA", 8),
            ("abccCbBaA", "accCaA", 9),
            ("abbBaA", "accCaA", 9),
            ("", "aaA", 3),
            ("abAB", "baBA", 6),
        ] {
            let (one, other) = (sequence(one), sequence(other));
            let merged = Exchange::in_one_order(vec![vec![one.clone()], vec![other.clone()]]).remove(0);
            assert!(is_within(&one, &merged) && is_within(&other, &merged), "{merged:?}");
            assert_eq!(merged.len(), most, "{merged:?}");
        }
    }

    #[test]
    fn actions_stay_apart_and_words_come_back() {
        let of = |actions: &[&str]| actions.iter().map(|letters| sequence(letters)).collect::<Exchanges>();
        let merged = Exchange::in_one_order(vec![of(&["a", "", "aA"]), of(&["b", "a", ""]), of(&["a", "b", "bB"])]);
        assert_eq!(merged.len(), 3);
        assert!(merged[0].len() == 2 && merged[1].len() == 2 && merged[2].len() == 4, "{merged:?}");
        assert_eq!(Exchange::of_words(&Exchange::words(&merged)), merged);
        assert_eq!(Exchange::of_words(&[]), Exchanges::new());
        assert_eq!(Exchange::in_one_order(Vec::new()), Exchanges::new());
    }
}
