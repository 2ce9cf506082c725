//! Stand-ins for libcuda and libnccl, built with the C compiler: they answer questions and carry nothing, so what runs over them
//! shows which calls the library makes, and nothing of a GPU.

#![allow(dead_code, reason = "each test binary uses the part that it needs")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder with both libraries, made of a source in `tests/stand_ins`; it goes when this is dropped.
pub struct StandIns(PathBuf);

impl StandIns {
    /// # Errors
    /// Why they cannot be built, in words.
    pub fn build(source: &str) -> Result<Self, String> {
        let folder = std::env::temp_dir().join(format!("burn-parallel-{source}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        let built = Self(folder);
        let library = built.0.join("libcuda.so.1");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_ins").join(source);
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).args([&library, &source]);
        let output = compiler.output().map_err(|error| format!("cc: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        std::fs::copy(&library, built.0.join("libnccl.so")).map_err(|error| error.to_string())?;
        Ok(built)
    }

    /// Where they lie.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// This program once more, on a machine with so many devices as it seems to it.
    pub fn again(&self, devices: usize) -> std::io::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.env("LD_LIBRARY_PATH", &self.0).env("STAND_IN_DEVICES", devices.to_string());
        Ok(command)
    }
}

impl Drop for StandIns {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
