//! End-to-end tests: the real programs in network namespaces that each test makes itself. Run as
//! root, or as an ordinary user where the kernel allows user namespaces; what needs more than that
//! says so and fails.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::as_conversions,
    reason = "a test fails by panicking, with the place"
)]

mod attacks;
mod away;
mod capture;
mod clock;
mod command;
mod connect;
mod control_plane;
mod demo;
mod floods;
mod handover;
mod host_connections;
mod hosts;
mod identity;
mod learn;
mod local_edges;
mod manifests;
mod multiplexed;
mod policy;
mod programs;
mod published;
mod relay;
mod restart;
mod sessions;
mod system_calls;
mod systemd;
mod tls;

use std::ffi::OsString;

use libtest_mimic::{Arguments, Failed, Trial};

/// The children of the lab are this very program, as the `hauberk` command.
const AS_HAUBERK: &str = "--as-hauberk";

/// Each test runs three processes of its own; more at once would only wait for each other.
const AT_ONCE: usize = 3;

fn main() -> std::process::ExitCode {
    if demo::is_the_command() {
        return hauberk_cli::main(std::env::args_os());
    }
    let mut arguments = std::env::args_os();
    if arguments.nth(1).is_some_and(|first| first == AS_HAUBERK) {
        let rest: Vec<OsString> = arguments.collect();
        return hauberk_cli::main(std::iter::once(OsString::from("hauberk")).chain(rest));
    }
    if let Err(error) = hauberk_cli::lab::become_root() {
        eprintln!("{error:#}");
        return std::process::ExitCode::FAILURE;
    }
    raise_file_limit();
    own_mounts();
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    let trials = [
        relay::trials(),
        policy::trials(),
        attacks::trials(),
        floods::trials(),
        capture::trials(),
        identity::trials(),
        restart::trials(),
        away::trials(),
        handover::trials(),
        sessions::trials(),
        tls::trials(),
        local_edges::trials(),
        hosts::trials(),
        connect::trials(),
        host_connections::trials(),
        control_plane::trials(),
        clock::trials(),
        manifests::trials(),
        multiplexed::trials(),
        command::trials(),
        learn::trials(),
        demo::trials(),
        programs::trials(),
        published::trials(),
        system_calls::trials(),
        systemd::trials(),
    ]
    .concat_trials();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Some tests hold thousands of connections.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// What a test mounts is seen by this process and its children only, and goes with them.
fn own_mounts() {
    use nix::{mount::MsFlags, sched::CloneFlags};
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
}

trait ConcatTrials {
    fn concat_trials(self) -> Vec<Trial>;
}

impl<const N: usize> ConcatTrials for [Vec<Trial>; N] {
    fn concat_trials(self) -> Vec<Trial> {
        self.into_iter().flatten().collect()
    }
}

/// A test of a name, which fails with the whole chain of an error.
fn trial(name: &str, test: fn() -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || test().map_err(|error| Failed::from(format!("{error:#}"))))
}

/// All tests of a module, by the names of their functions.
#[macro_export]
macro_rules! trials {
    ($($test:ident),+ $(,)?) => {
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$($crate::trial(concat!(module_path!(), "::", stringify!($test)), $test)),+]
        }
    };
}
