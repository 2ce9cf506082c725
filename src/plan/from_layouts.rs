//! Makes a plan with few patterns of a layout for each parameter.

use std::collections::BTreeMap;

use super::Plan;
use crate::layout::Layout;

/// What the same parameter of all repeated layers is called: numbers in the path become `*`.
pub(crate) fn like(path: &str) -> String {
    let name = |part: &str| if part.parse::<usize>().is_ok() { "*".to_owned() } else { part.to_owned() };
    path.split('.').map(name).collect::<Vec<_>>().join(".")
}

/// A parameter by its path and dims, and the layout that it is to have.
type Named = (String, Vec<usize>, Layout);

/// A plan that gives exactly these layouts to the parameters of these paths and dims over `degree` ranks, with a
/// pattern for like paths where they agree. What the degree does not divide is padded.
pub(crate) fn from_layouts(layouts: &[Named], degree: usize) -> Plan {
    // The layout, and whether it needs padding.
    let said = |(_, dims, layout): &Named| match layout {
        Layout::Sharded(dim) => (*layout, dims.get(*dim).is_some_and(|size| !size.is_multiple_of(degree))),
        _ => (*layout, false),
    };
    let rule = |plan: Plan, pattern: &str, said: (Layout, bool)| match said {
        (Layout::Sharded(dim), false) => plan.shard(pattern, dim),
        (Layout::Sharded(dim), true) => plan.shard_padded(pattern, dim),
        _ => plan,
    };
    let mut by_pattern: BTreeMap<String, Vec<&Named>> = BTreeMap::new();
    for named in layouts {
        by_pattern.entry(like(&named.0)).or_default().push(named);
    }
    let mut plan = Plan::new();
    for (pattern, named) in &by_pattern {
        let first = said(named[0]);
        if named.iter().all(|other| said(other) == first) {
            plan = rule(plan, pattern, first);
        } else {
            plan = named.iter().fold(plan, |plan, named| rule(plan, &named.0, said(named)));
        }
    }
    match layouts.iter().all(|named| (plan.layout(&named.0), plan.own.pads(&named.0)) == said(named)) {
        true => plan,
        // A `*` took in something else.
        false => layouts.iter().fold(Plan::new(), |plan, named| rule(plan, &named.0, said(named))),
    }
}
