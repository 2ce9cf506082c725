//! The backends of the devices that steps run on.

use burn::tensor::Device;

/// Runs `$body` with `$B` bound to the backend of a device without autodiff, or evaluates `$otherwise` if this crate
/// knows none.
macro_rules! with_backend {
    ($device:expr, $B:ident => $body:expr, otherwise $otherwise:expr) => {
        match $device.as_dispatch() {
            burn::backend::DispatchDevice::Flex(_) => {
                type $B = burn::backend::Flex;
                $body
            }
            #[cfg(feature = "cubecl")]
            burn::backend::DispatchDevice::Cube(_) => {
                type $B = burn::backend::Cube;
                $body
            }
            #[allow(unreachable_patterns)]
            _ => $otherwise,
        }
    };
}
pub(crate) use with_backend;

/// Demands a device that steps can run on. What is wrong with another is said, to be put into an error.
pub(crate) fn check_device(device: &Device) -> Result<(), String> {
    with_backend!(device, B => { let _ = std::marker::PhantomData::<B>; Ok(()) }, otherwise Err(format!(
        "{device:?} is not a device that steps run on: they run on Device::flex(), and, with the feature `cuda` or `wgpu` of \
         burn-parallel, on those of burn's CubeCL backends"
    )))
}
