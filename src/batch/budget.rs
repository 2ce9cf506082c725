//! How much memory the system lets a process have.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Error;

/// The memory that this process can still take without being killed or refused: what the system says is available, and
/// what is left within the limits of the control groups that it is in (v1 and v2, as containers and batch systems set
/// them) and within its own (`ulimit -v`, `ulimit -d`). All ranks of a machine share it.
///
/// A system that overcommits memory refuses no allocation: it kills when pages are touched. So what must not be tried
/// has to be known before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBudget {
    /// Bytes.
    pub bytes: u64,
    /// What sets the limit: `MemAvailable`, `RLIMIT_DATA`, `RLIMIT_AS`, or the directory of a control group.
    pub limit: String,
}

impl MemoryBudget {
    /// Asks the system, which is Linux.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it says nothing.
    pub fn of_system() -> Result<Self, Error> {
        let root = Path::new("/");
        let own = of_limits(&read(&root.join("proc/self/status")).unwrap_or_default());
        let system = Self::under(root);
        own.into_iter().chain(system.clone().ok()).min_by_key(|budget| budget.bytes).map_or(system, Ok)
    }

    fn under(root: &Path) -> Result<Self, Error> {
        let available = read(&root.join("proc/meminfo")).and_then(|text| field(&text, "MemAvailable:"));
        let available = available.map(|kib| Self { bytes: kib.saturating_mul(1024), limit: "MemAvailable".into() });
        available.into_iter().chain(of_groups(root)).min_by_key(|budget| budget.bytes).ok_or_else(|| {
            let problem =
                "neither /proc/meminfo nor control groups say how much memory there is: give a number of rows instead";
            Error::invalid("MemoryBudget", problem)
        })
    }
}

/// What is left within the limits of this process, which has so much as its status says.
#[cfg(target_os = "linux")]
fn of_limits(status: &str) -> Vec<MemoryBudget> {
    let left = |(resource, limit, used): (_, &str, &str)| {
        let mut most = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `most` is a valid `rlimit`, which the call fills.
        let known = unsafe { libc::getrlimit(resource, &mut most) } == 0 && most.rlim_cur != libc::RLIM_INFINITY;
        let used = field(status, used)?.saturating_mul(1024);
        known.then(|| MemoryBudget { bytes: most.rlim_cur.saturating_sub(used), limit: limit.into() })
    };
    let limits = [(libc::RLIMIT_DATA, "RLIMIT_DATA", "VmData:"), (libc::RLIMIT_AS, "RLIMIT_AS", "VmSize:")];
    limits.into_iter().filter_map(left).collect()
}

#[cfg(not(target_os = "linux"))]
fn of_limits(_: &str) -> Vec<MemoryBudget> {
    Vec::new()
}

/// What is left within the control groups of this process, and those around them.
fn of_groups(root: &Path) -> Vec<MemoryBudget> {
    let mut budgets = Vec::new();
    for line in read(&root.join("proc/self/cgroup")).unwrap_or_default().lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (mount, files) = match controllers {
            "" => ("sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file"]),
            _ if controllers.split(',').any(|controller| controller == "memory") => {
                ("sys/fs/cgroup/memory", ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"])
            }
            _ => continue,
        };
        let mount = root.join(mount);
        // In a container the path may be that of the host, of which only the mounted part is here.
        let mut directory: PathBuf = mount.join(group.trim_start_matches('/'));
        loop {
            budgets.extend(of_group(&directory, files));
            if directory == mount || !directory.pop() {
                break;
            }
        }
    }
    budgets
}

fn of_group(directory: &Path, [limit, used, cached]: [&str; 3]) -> Option<MemoryBudget> {
    let number = |file: &str| read(&directory.join(file))?.trim().parse::<u64>().ok();
    // Without a limit it is `max`, or a number that no machine has.
    let limit = number(limit).filter(|limit| *limit < 1 << 60)?;
    // Files that were read and are not in use go first.
    let reclaimed = read(&directory.join("memory.stat")).and_then(|text| field(&text, cached)).unwrap_or(0);
    let bytes = limit.saturating_sub(number(used)?.saturating_sub(reclaimed));
    Some(MemoryBudget { bytes, limit: directory.display().to_string() })
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The number after a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()?.parse().ok())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Root(PathBuf);

    impl Root {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("burn-parallel-budget-{name}-{}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(root)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n");

    #[test]
    fn the_tightest_limit_counts() {
        let root = Root::new("plain", &[MEMINFO, ("proc/self/cgroup", "0::/\n")]);
        let found = MemoryBudget::under(&root.0).unwrap();
        assert_eq!(found, MemoryBudget { bytes: 4000 << 10, limit: "MemAvailable".into() });
        // Version 2: the parent has the limit, and half of what is used are files.
        let group = "sys/fs/cgroup/job";
        let root = Root::new(
            "v2",
            &[
                MEMINFO,
                ("proc/self/cgroup", "0::/job/step\n"),
                ("sys/fs/cgroup/job/step/memory.max", "max\n"),
                ("sys/fs/cgroup/job/step/memory.current", "5\n"),
                ("sys/fs/cgroup/job/memory.max", "3000\n"),
                ("sys/fs/cgroup/job/memory.current", "2000\n"),
                ("sys/fs/cgroup/job/memory.stat", "anon 7\ninactive_file 1000\n"),
            ],
        );
        let found = MemoryBudget::under(&root.0).unwrap();
        assert_eq!(found, MemoryBudget { bytes: 2000, limit: root.0.join(group).display().to_string() });
        // Version 1, in a container that sees its own group at the root.
        let root = Root::new(
            "v1",
            &[
                MEMINFO,
                ("proc/self/cgroup", "4:cpu:/x\n3:memory:/docker/abc\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "600\n"),
                ("sys/fs/cgroup/memory/memory.usage_in_bytes", "700\n"),
            ],
        );
        assert_eq!(MemoryBudget::under(&root.0).unwrap().bytes, 0);
        let problem = MemoryBudget::under(&root.0.join("nowhere")).unwrap_err().to_string();
        assert!(problem.contains("give a number"), "{problem}");
    }
}
