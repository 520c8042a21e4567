//! What the running kernel may lack, by its version. A distribution may have added it to an older one, which is why nothing
//! is refused for that: what really fails says so where it is used.

use std::{fs, io};

/// Something that came with a version.
#[derive(Debug, PartialEq, Eq)]
pub struct Feature {
    /// The version.
    pub since: (u32, u32),
    /// What it is.
    pub what: &'static str,
    /// What does not work without it, and what to do.
    pub without: &'static str,
}

/// Those that kernels in use may lack, the newest first.
const FEATURES: [Feature; 3] = [
    Feature {
        since: (5, 13),
        what: "the match `socket cgroupv2` of nftables",
        without: "a workload that is told by its cgroup is not captured: tell it by its user or its network namespace",
    },
    Feature {
        since: (5, 10),
        what: "comments of nftables' tables",
        without: "no workload is captured: boot a newer kernel",
    },
    Feature {
        since: (5, 9),
        what: "`reject` in the `prerouting` hook of nftables",
        without: "no workload is captured: boot a newer kernel",
    },
];

/// The release of the running kernel, such as `6.1.0-28-amd64`.
///
/// # Errors
/// If `/proc` is not there.
pub fn release() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

/// What a kernel of this release lacks; nothing if the release does not begin with a version.
#[must_use]
pub fn lacks(release: &str) -> Option<Vec<&'static Feature>> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some(FEATURES.iter().filter(|feature| version < feature.since).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    #[test]
    fn an_older_kernel_lacks_what_came_later() {
        let lacks = |release| {
            let lacks = lacks(release)?;
            Some(lacks.iter().map(|feature| feature.since).collect::<Vec<_>>())
        };
        for release in ["6.18.0", "6.1.0-28-amd64", "5.13.0", "10.0"] {
            assert_eq!(lacks(release), Some(vec![]), "{release}");
        }
        assert_eq!(lacks("5.10.0-28-amd64"), Some(vec![(5, 13)]));
        assert_eq!(lacks("5.9.16"), Some(vec![(5, 13), (5, 10)]));
        assert_eq!(lacks("4.19.0+"), Some(vec![(5, 13), (5, 10), (5, 9)]));
        for release in ["", "six", "6", "6.x"] {
            assert_eq!(lacks(release), None, "{release}");
        }
    }

    #[test]
    fn the_running_kernel_is_known() {
        assert_eq!(lacks(&release().unwrap()), Some(vec![]), "of the kernel that runs the tests");
    }
}
