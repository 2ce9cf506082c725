//! The address and port of rank 0, from the environment.

use std::collections::BTreeMap;

use super::invalid::invalid;
use crate::Error;

/// What MASTER_ADDR and MASTER_PORT say.
pub(super) fn named(variables: &BTreeMap<String, String>) -> Result<Option<(String, u16)>, Error> {
    match (variables.get("MASTER_ADDR"), variables.get("MASTER_PORT")) {
        (None, None) => Ok(None),
        (Some(_), None) => invalid("MASTER_ADDR is set and MASTER_PORT is missing"),
        (None, Some(_)) => invalid("MASTER_PORT is set and MASTER_ADDR is missing"),
        (Some(address), _) if address.trim().is_empty() => invalid("MASTER_ADDR is empty"),
        (Some(address), Some(port)) => match port.trim().parse() {
            Ok(0) | Err(_) => invalid(format!("MASTER_PORT={port:?} is not a port: a number from 1 to 65535")),
            Ok(number) => Ok(Some((address.trim().to_owned(), beside_torchrun(number, variables)))),
        },
    }
}

/// torchrun's own store may listen at the port that it names: then the ranks meet at the next.
fn beside_torchrun(port: u16, variables: &BTreeMap<String, String>) -> u16 {
    let taken = variables.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    match taken {
        true => port.checked_add(1).unwrap_or(port - 1),
        false => port,
    }
}

/// The first node of the step, and a port that all its ranks compute the same way.
pub(super) fn of_slurm(variables: &BTreeMap<String, String>) -> Option<(String, u16)> {
    let nodes = variables.get("SLURM_STEP_NODELIST").or_else(|| variables.get("SLURM_JOB_NODELIST"))?;
    let job: u64 = variables.get("SLURM_JOB_ID")?.parse().ok()?;
    Some((first_node(nodes)?, 20_000 + (job % 20_000) as u16))
}

/// The first of a list like `gpu[07-09,12],login1`.
fn first_node(nodes: &str) -> Option<String> {
    let first = match (nodes.find('['), nodes.find(',')) {
        (Some(bracket), comma) if comma.is_none_or(|comma| bracket < comma) => {
            let (name, rest) = nodes.split_at(bracket);
            let (inside, after) = rest[1..].split_once(']')?;
            let number = inside.split([',', '-']).next()?;
            format!("{name}{number}{}", after.split(',').next()?)
        }
        _ => nodes.split(',').next()?.to_owned(),
    };
    (!first.is_empty()).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::first_node;

    #[test]
    fn the_first_node_of_a_list() {
        let lists = [
            ("n1", Some("n1")),
            ("n1,n2", Some("n1")),
            ("gpu[07-09,12],x", Some("gpu07")),
            ("gpu[3,5]", Some("gpu3")),
            ("a,gpu[3,5]", Some("a")),
            ("r[1-2]-ib,x", Some("r1-ib")),
            ("", None),
            ("gpu[3", None),
        ];
        for (list, first) in lists {
            assert_eq!(first_node(list).as_deref(), first, "{list}");
        }
    }
}
