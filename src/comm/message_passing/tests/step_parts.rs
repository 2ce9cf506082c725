//! Ranks that exchange messages, in different parts of a step.

use super::{MemoryNetwork, TestWorld};
use crate::Error;
use crate::comm::StepPart;

#[test]
fn ranks_in_different_parts_of_a_step_do_not_match() {
    let world = TestWorld::new(2, 0..2, MemoryNetwork::default());
    let same = world.run(|comm| comm.all_gather_agreed(vec![comm.rank() as u64], StepPart::Norm.of(3)));
    assert!(same.into_iter().all(|all| all.unwrap() == [0, 1]));
    let part = [StepPart::Norm, StepPart::Update];
    for error in world.run(|comm| comm.all_gather_agreed(vec![0u64], part[comm.rank()].of(3)).unwrap_err()) {
        let said = error.to_string();
        assert!(matches!(error, Error::Mismatch { .. }), "{said}");
        assert!(said.contains("(the norm of step 3)") && said.contains("(the update of step 3)"), "{said}");
    }
}
