//! Stand-ins for libcuda and libnccl, built with the C compiler: they answer questions and carry nothing, so what runs
//! over them shows which calls the library makes, and nothing of a GPU.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// A folder with both libraries, made of a source beside this file; it goes when this is dropped.
pub struct StandIns(PathBuf);

/// The stand-ins, or why they cannot be built, in words.
pub type Built = Result<Arc<StandIns>, String>;

/// The folders of the libraries; the second has NCCL under the only name by which packages ship it.
const LIBRARIES: [(&str, &str); 3] = [("cuda", "libcuda.so.1"), ("versioned", "libnccl.so.2"), ("nccl", "libnccl.so")];

impl StandIns {
    pub fn build(source: &str) -> Built {
        let folder = std::env::temp_dir().join(format!("burn-parallel-{source}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        let built = Arc::new(Self(folder));
        let library = built.0.join("built.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl").join(source);
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).args([&library, &source]);
        let output = compiler.output().map_err(|error| format!("cc: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        for (folder, name) in LIBRARIES {
            let folder = built.0.join(folder);
            std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
            std::fs::copy(&library, folder.join(name)).map_err(|error| error.to_string())?;
        }
        Ok(built)
    }

    /// What `LD_LIBRARY_PATH` must be for the libraries in these folders to be found.
    pub fn only(&self, folders: &[&str]) -> OsString {
        std::env::join_paths(folders.iter().map(|folder| self.0.join(folder))).expect("no separator in the path")
    }

    /// What `LD_LIBRARY_PATH` must be for both libraries to be found.
    pub fn both(&self) -> OsString {
        self.only(&["cuda", "nccl"])
    }

    /// This program once more, on a machine with so many devices as it seems to it.
    pub fn again(&self, devices: usize) -> std::io::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.env("LD_LIBRARY_PATH", self.both()).env("STAND_IN_DEVICES", devices.to_string());
        Ok(command)
    }
}

impl Drop for StandIns {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
