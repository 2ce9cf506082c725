//! A temporary directory.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A directory that is gone when it is dropped.
pub struct Dir(PathBuf);

impl Dir {
    pub fn fresh() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("burn-parallel-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
