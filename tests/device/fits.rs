//! What a device has no room for is found out by trying it.

use burn::module::{Module, Param};
use burn::prelude::*;
use burn_parallel::batch::{Trial, largest_that_fits, try_step};
use burn_parallel::prelude::*;

use super::trials::{Trials, gpu};

pub fn add_to(trials: &mut Trials) {
    trials.add("what_is_beyond_a_buffer_does_not_fit", what_is_beyond_a_buffer_does_not_fit);
}

/// A weight of two rows, of which a batch has copies.
#[derive(Module, Debug)]
struct Copies {
    weight: Param<Tensor<2>>,
}

const WIDTH: usize = 4096;

/// No buffer that a shader sees has more than 4 GiB, whatever the memory of the device.
const BEYOND: usize = (4 << 30) / (2 * 4 * WIDTH) + 1024;

impl Copies {
    fn loss(&self, copies: usize) -> Tensor<1> {
        self.weight.val().repeat_dim(0, copies).powi_scalar(2).mean()
    }
}

/// What was not computed, for want of a buffer, is taken for that, and not for numbers.
fn what_is_beyond_a_buffer_does_not_fit() {
    let model = Copies { weight: Param::from_tensor(Tensor::ones([2, WIDTH], &gpu().autodiff())) };
    let tried = |copies: usize| try_step(&model, copies, |model: &Copies, copies| model.loss(copies));
    assert_eq!(tried(3), Trial::Fits);
    let Trial::TooLarge(said) = tried(BEYOND) else { panic!("a tensor of more than 4 GiB fits") };
    assert!(!said.is_empty());
    // Nothing of it stays, and the largest number is found.
    let fit = launch::threads(1).run(|rank| {
        largest_that_fits(BEYOND, &rank, |copies| match copies {
            // Between them lies what takes long, and what other machines have memory for.
            0..=8 | BEYOND => Ok(tried(copies)),
            _ => Ok(Trial::TooLarge("not tried".into())),
        })
    });
    assert_eq!(fit.unwrap()[0].rows, 8);
    let gradients = model.loss(3).backward();
    let gradient = model.weight.val().grad(&gradients).unwrap().into_data().try_into_vec::<f32>().unwrap();
    assert!(gradient.iter().all(|value| (value - 1.0 / WIDTH as f32).abs() < 1e-9), "{:?}", &gradient[..4]);
}
