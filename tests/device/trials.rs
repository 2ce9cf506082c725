//! Tests on a GPU, or on what Vulkan offers in its place. Without any such device they are reported as ignored.

use std::panic::catch_unwind;

use burn::tensor::{Device, DeviceKind, Tensor};
use libtest_mimic::{Arguments, Trial};

use crate::common::priority::ranks_come_last;

pub fn gpu() -> Device {
    Device::wgpu(DeviceKind::DefaultDevice)
}

/// The tests of a binary.
pub struct Trials {
    found: bool,
    trials: Vec<Trial>,
}

impl Trials {
    pub fn new() -> Self {
        // burn panics where there is no device.
        let found = catch_unwind(|| Tensor::<1>::ones([1], &gpu()).into_data()).is_ok();
        Self { found, trials: Vec::new() }
    }

    pub fn add(&mut self, name: &str, test: impl FnOnce() + Send + 'static) {
        let test = move || {
            test();
            Ok(())
        };
        self.trials.push(Trial::test(name, test).with_ignored_flag(!self.found));
    }

    pub fn run(self) -> ! {
        ranks_come_last();
        libtest_mimic::run(&Arguments::from_args(), self.trials).exit()
    }
}
