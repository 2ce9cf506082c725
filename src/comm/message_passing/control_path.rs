//! Chooses how the ranks of a group agree: by messages at first, then in shared memory if all can attach to it.
//!
//! This takes no message of its own. With its first commit the group root offers shared memory that it has made; each
//! rank tries to attach, and says in its next call whether it has. All ranks know all calls, so all know whether the
//! third agreement is in shared memory.

use super::call_descriptor::CallDescriptor;
use super::group::Group;
use super::shared_memory::{Address, Rounds, SharedMemory};

#[derive(Debug)]
pub(super) enum ControlPath {
    /// Nothing has been offered so far.
    Undecided,
    /// Shared memory has been offered; this rank's mapping, if it could attach.
    Offered(Option<SharedMemory>),
    Messages,
    /// In the shared memory of the group.
    SharedMemory(Rounds),
}

impl ControlPath {
    pub fn new(shares_memory: bool, size: usize) -> Self {
        if shares_memory && size > 1 { Self::Undecided } else { Self::Messages }
    }

    /// The shared memory that the ranks agree in.
    pub fn shared_memory<'a>(&'a mut self, group: &'a Group) -> Option<(&'a SharedMemory, &'a mut Rounds)> {
        match self {
            Self::SharedMemory(rounds) => Some((group.shared_memory.get()?, rounds)),
            _ => None,
        }
    }

    /// Whether this rank has attached to the offered memory.
    pub fn attached(&self) -> bool {
        matches!(self, Self::Offered(Some(_)))
    }

    /// The address that the group root offers with its commit.
    pub fn offer(&mut self, size: usize) -> Option<Address> {
        if !matches!(self, Self::Undecided) {
            return None;
        }
        let (shared_memory, address) = SharedMemory::new(size).unzip();
        *self = Self::Offered(shared_memory);
        address
    }

    /// Updates the path after an agreement by messages.
    pub fn settle(&mut self, group: &Group, descriptors: &[CallDescriptor], offered: Option<Address>) {
        *self = match (std::mem::replace(self, Self::Messages), offered) {
            (Self::Undecided, Some(address)) => Self::Offered(SharedMemory::open(&address, group.size())),
            // The group root has made it.
            (Self::Offered(shared_memory), Some(_)) => Self::Offered(shared_memory),
            (Self::Offered(Some(mut shared_memory)), None)
                if descriptors.iter().all(|descriptor| descriptor.attached) =>
            {
                shared_memory.all_opened();
                let _ = group.shared_memory.set(shared_memory);
                Self::SharedMemory(Rounds::new(group.rank))
            }
            _ => Self::Messages,
        };
    }
}
