//! Few patterns for many paths.

use std::collections::BTreeMap;

use super::Plan;
use crate::layout::Layout;

/// What the same parameter of all repeated layers is called: numbers in the path become `*`.
pub(crate) fn like(path: &str) -> String {
    let name = |part: &str| if part.parse::<usize>().is_ok() { "*".to_owned() } else { part.to_owned() };
    path.split('.').map(name).collect::<Vec<_>>().join(".")
}

/// A plan that gives exactly these layouts to these paths, with a pattern for like paths where they agree.
pub(crate) fn concise(layouts: &[(String, Layout)]) -> Plan {
    let mut by_pattern: BTreeMap<String, Vec<&(String, Layout)>> = BTreeMap::new();
    for named in layouts {
        by_pattern.entry(like(&named.0)).or_default().push(named);
    }
    let rule = |plan: Plan, pattern: &str, layout: Layout| match layout {
        Layout::Sharded(dim) => plan.shard(pattern, dim),
        _ => plan,
    };
    let mut plan = Plan::new();
    for (pattern, named) in &by_pattern {
        let layout = named[0].1;
        if named.iter().all(|(_, other)| *other == layout) {
            plan = rule(plan, pattern, layout);
        } else {
            plan = named.iter().fold(plan, |plan, (path, layout)| rule(plan, path, *layout));
        }
    }
    match layouts.iter().all(|(path, layout)| plan.layout(path) == *layout) {
        true => plan,
        // A `*` took in something else.
        false => layouts.iter().fold(Plan::new(), |plan, (path, layout)| rule(plan, path, *layout)),
    }
}
