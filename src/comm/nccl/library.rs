//! Checks what NCCL needs before it is called: libcuda, libnccl, a device.
//!
//! cudarc panics at the first call into a library that it cannot load, and burn's CUDA backend panics on its own
//! threads when there is no device. So all of it is checked here, once, in an order in which each check is safe.

use std::fmt;

use cudarc::driver::{result as driver, sys as cuda};
use cudarc::nccl::{result as nccl, sys as nccl_sys};

use crate::Error;

/// The oldest NCCL with everything that is used here: `ncclCommSplit` came with it.
const OLDEST: Version = Version(21800);
/// The oldest CUDA that a driver must do: streams' order of memory, which burn's allocator uses, came with it.
const OLDEST_DRIVER: i32 = 11_020;
/// The first NCCL that lets ranks share a GPU.
const SHARES_DEVICES: Version = Version(23000);

/// A version of NCCL, as NCCL numbers it: `22809` is 2.28.9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 10_000, self.0 / 100 % 100, self.0 % 100)
    }
}

/// The libraries and devices that were found.
#[derive(Debug, Clone)]
pub struct Library {
    /// Version of NCCL.
    pub nccl: Version,
    /// CUDA devices that this process sees.
    pub devices: usize,
}

fn missing<T>(problem: String) -> Result<T, Error> {
    Err(Error::Gpu { problem })
}

/// The number of CUDA devices that this process sees, at least one. NCCL is not asked for.
///
/// # Errors
/// [`Error::Gpu`] naming what is missing: libcuda, a driver that works, a recent enough one, or a device.
pub fn devices() -> Result<usize, Error> {
    // SAFETY: this only tries to load the library.
    if !unsafe { cuda::is_culib_present() } {
        return missing("libcuda was not found: install NVIDIA's driver, or take a CPU device".into());
    }
    if let Err(error) = driver::init() {
        return missing(format!(
            "libcuda cannot be used ({error:?}): is there a GPU, and a driver that fits? Ask `nvidia-smi`"
        ));
    }
    let driver = driver_version()?;
    if driver < OLDEST_DRIVER {
        return missing(format!(
            "the driver is too old: it does CUDA {}.{}, {}.{} or newer is needed; update NVIDIA's driver",
            driver / 1000,
            driver % 1000 / 10,
            OLDEST_DRIVER / 1000,
            OLDEST_DRIVER % 1000 / 10
        ));
    }
    match driver::device::get_count() {
        Ok(count) if count > 0 => Ok(count as usize),
        Ok(_) => missing("libcuda sees no CUDA device: check CUDA_VISIBLE_DEVICES and `nvidia-smi`".into()),
        Err(error) => missing(format!("libcuda cannot count its devices ({error:?}): ask `nvidia-smi`")),
    }
}

/// The newest CUDA that the driver does, as CUDA numbers it: `12040` is 12.4.
fn driver_version() -> Result<i32, Error> {
    let mut version = 0;
    // SAFETY: libcuda is there; `version` is a local.
    match unsafe { cuda::cuDriverGetVersion(&mut version) }.result() {
        Ok(()) => Ok(version),
        Err(error) => missing(format!("libcuda does not tell its version ({error:?}): reinstall NVIDIA's driver")),
    }
}

/// Finds the libraries and devices.
///
/// # Errors
/// [`Error::Gpu`] naming what is missing: as of [`devices`], and libnccl or a recent enough one.
pub fn library() -> Result<Library, Error> {
    let devices = devices()?;
    // SAFETY: this only tries to load the library.
    if !unsafe { nccl_sys::is_culib_present() } {
        return missing(
            "libnccl.so was not found: install NCCL. Debian's package and NVIDIA's wheels ship libnccl.so.2 only; a link of \
             the name libnccl.so to it, in a folder of LD_LIBRARY_PATH, will do"
                .into(),
        );
    }
    let version = nccl::get_nccl_version().map_err(|error| Error::Gpu {
        problem: format!("NCCL does not tell its version ({:?}): is libnccl.so damaged?", error.0),
    })?;
    let nccl = Version(version.unsigned_abs());
    if nccl < OLDEST {
        return missing(format!("NCCL {nccl} is too old: version {OLDEST} or newer is needed"));
    }
    Ok(Library { nccl, devices })
}

impl Library {
    /// Whether several ranks may use one GPU: from NCCL 2.30 on, with `NCCL_MULTI_RANK_GPU_ENABLE=1`.
    pub fn shares_devices(&self) -> bool {
        self.nccl >= SHARES_DEVICES && std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some_and(|on| on != "0")
    }

    /// An identity of this device, unique over all machines.
    pub(super) fn device_identity(self, index: usize) -> Result<(Self, [u64; 2]), Error> {
        if index >= self.devices {
            let devices = self.devices;
            return Err(Error::Gpu {
                problem: format!("there is no CUDA device {index}: this process sees {devices}, counted from 0"),
            });
        }
        let uuid = driver::device::get(index as i32).and_then(driver::device::get_uuid).map_err(|error| {
            Error::Gpu { problem: format!("CUDA device {index} cannot be asked for its identity ({error:?})") }
        })?;
        let bytes: [u8; 16] = uuid.bytes.map(|byte| byte as u8);
        let [low, high] =
            [0, 8].map(|from| bytes[from..from + 8].iter().fold(0, |word, byte| word << 8 | u64::from(*byte)));
        Ok((self, [low, high]))
    }
}
