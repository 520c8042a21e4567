//! Hauberk in a real cluster: installed with Helm, with pods on two nodes. Run as root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::as_conversions,
    reason = "a test fails by panicking, with the place"
)]

mod admission;
mod agents;
mod authority;
mod control_plane;
mod install;
mod learn;
mod network_policies;
mod older;
mod outage;
mod owners;
mod plugin;
mod pods;
mod policy;
mod replicas;
mod services;
mod stolen;
mod transitions;
mod trouble;
mod uninstall;
mod upgrade;

use std::{
    ffi::OsString,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Instant,
};

use hauberk_kubernetes_tests::Cluster;
use libtest_mimic::{Arguments, Failed, Trial};

/// What the image runs is this very program, as the `hauberk` command.
const AS_HAUBERK: &str = "--as-hauberk";

/// The name by which it is a plugin of `kubectl`.
const PLUGIN: &[u8] = b"/kubectl-hauberk";

/// Started by the first test that needs it.
type Shared = Arc<Mutex<Option<Arc<Cluster>>>>;

/// A test in that cluster.
type Test = fn(&Cluster) -> anyhow::Result<()>;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if arguments.next().is_some_and(|program| program.as_encoded_bytes().ends_with(PLUGIN)) {
        return hauberk_cli::main(std::env::args_os());
    }
    if arguments.next().is_some_and(|first| first == AS_HAUBERK) {
        let rest: Vec<OsString> = arguments.collect();
        return hauberk_cli::main(std::iter::once(OsString::from("hauberk")).chain(rest));
    }
    let mut arguments = Arguments::from_args();
    // Each one changes the cluster that the next one finds.
    arguments.test_threads = Some(1);
    let shared: Shared = Arc::default();
    let tests = [
        install::TESTS,
        policy::TESTS,
        admission::TESTS,
        owners::TESTS,
        services::TESTS,
        learn::TESTS,
        replicas::TESTS,
        pods::TESTS,
        plugin::TESTS,
        upgrade::TESTS,
        network_policies::TESTS,
        stolen::TESTS,
        transitions::TESTS,
        older::TESTS,
        trouble::TESTS,
        outage::TESTS,
        uninstall::TESTS,
    ]
    .concat();
    let mut trials: Vec<Trial> = tests
        .into_iter()
        .map(|(name, test)| {
            let shared = Arc::clone(&shared);
            trial(name, move || cluster(&shared).and_then(|cluster| test(&cluster)))
        })
        .collect();
    trials.extend(authority::TESTS.iter().map(|&(name, test)| {
        let shared = Arc::clone(&shared);
        trial(name, move || {
            // Each has a cluster of its own, and nobody needs two at a time.
            drop(shared.lock().unwrap().take());
            test(&authority::start()?)
        })
    }));
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(shared.lock().unwrap().take());
    conclusion.exit_code()
}

fn trial(name: &str, test: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let started = Instant::now();
        let result = test();
        eprintln!("{:.1} s", started.elapsed().as_secs_f64());
        result.map_err(|error| Failed::from(format!("{error:#}")))
    })
}

fn cluster(shared: &Shared) -> anyhow::Result<Arc<Cluster>> {
    let mut shared = shared.lock().unwrap();
    if let Some(cluster) = &*shared {
        return Ok(Arc::clone(cluster));
    }
    let cluster = Arc::new(install::start()?);
    policy::place(&cluster)?;
    pods::place(&cluster)?;
    Ok(Arc::clone(shared.insert(cluster)))
}
