//! What tests of killed saves share: processes that are this program again, and a directory for what they leave.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::fault::VARIABLE;

/// A directory that is gone when it is dropped.
pub(crate) struct Dir(pub PathBuf);

impl Dir {
    pub fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("burn-parallel-killed-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// This program again, with one of its ignored tests, which ends at a point if one is given.
pub(crate) fn helper(test: &str, kill: Option<&str>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored"]).stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(point) = kill {
        command.env(VARIABLE, point);
    }
    command
}

/// Whether it was killed.
pub(crate) fn killed(mut child: Child) -> bool {
    use std::os::unix::process::ExitStatusExt;
    child.wait().unwrap().signal() == Some(libc::SIGKILL)
}

/// Two helpers as ranks of one world: that of the rank that is to be killed, for which `helper` is told so, and the
/// other.
pub(crate) fn two_ranks(victim: usize, helper: impl Fn(bool) -> Command) -> (Child, Child) {
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port().to_string();
    let start = |rank: usize| {
        let mut command = helper(rank == victim);
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string()).env("WORLD_SIZE", "2");
        command.env("LOCAL_WORLD_SIZE", "2").env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
        command.env("BURN_PARALLEL_TIMEOUT_S", "20").spawn().unwrap()
    };
    (start(victim), start(1 - victim))
}
