//! What the kernel says of processes: their CPU time, memory, files and threads.

use std::{fs, str::FromStr};

use anyhow::Context;

/// Some figures hold ten thousand connections.
pub(crate) fn raise_file_limit() -> anyhow::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// Ten thousand connections, or as many as a relay may have here, which needs two files for each.
pub(crate) fn many_connections() -> anyhow::Result<usize> {
    use nix::sys::resource::{Resource, getrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(10_000.min(usize::try_from(hard)?.saturating_sub(400) / 2))
}

/// A process and all its children: stunnel, for one, may be several.
fn family(process: u32) -> Vec<u32> {
    let mut all = vec![process];
    let mut next = 0;
    while let Some(parent) = all.get(next).copied() {
        let path = format!("/proc/{parent}/task/{parent}/children");
        let children = fs::read_to_string(path).unwrap_or_default();
        all.extend(children.split_whitespace().filter_map(|text| text.parse::<u32>().ok()));
        next += 1;
    }
    all
}

/// Seconds of CPU, user and kernel, that a process and its children have used.
pub(crate) fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    let mut ticks = 0.0;
    for member in family(process) {
        let stat = fs::read_to_string(format!("/proc/{member}/stat"))
            .with_context(|| format!("process {member} is gone"))?;
        let after_name = stat.rsplit_once(')').context("no process name")?.1;
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        // utime and stime, fields 14 and 15 of proc(5).
        for place in [11, 12] {
            ticks += fields.get(place).context("no times")?.parse::<f64>()?;
        }
    }
    let a_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock")?;
    #[allow(clippy::as_conversions, reason = "a hundred")]
    let a_second = a_second as f64;
    Ok(ticks / a_second)
}

/// User memory of a process and its children that no file stands behind, bytes.
pub(crate) fn memory_bytes(process: u32) -> anyhow::Result<f64> {
    let mut kilobytes = 0.0;
    for member in family(process) {
        kilobytes += status_value::<f64>(member, "RssAnon:")?;
    }
    Ok(kilobytes * 1024.0)
}

/// Threads of a process and its children.
pub(crate) fn threads(process: u32) -> anyhow::Result<usize> {
    family(process).into_iter().map(|member| status_value::<usize>(member, "Threads:")).sum()
}

/// Files that a process and its children have open, sockets among them.
pub(crate) fn open_files(process: u32) -> anyhow::Result<usize> {
    let mut count = 0;
    for member in family(process) {
        let path = format!("/proc/{member}/fd");
        count += fs::read_dir(&path).with_context(|| format!("read {path}"))?.count();
    }
    Ok(count)
}

/// The first word behind a name in proc(5)'s status.
fn status_value<T>(process: u32, name: &str) -> anyhow::Result<T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    let status = fs::read_to_string(format!("/proc/{process}/status"))
        .with_context(|| format!("process {process} is gone"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|line| line.split_whitespace().next());
    Ok(value.with_context(|| format!("process {process} has no {name}"))?.parse()?)
}
