//! A machine whose clock is wrong, while all others are right.

use std::{ffi::OsString, fs, net::TcpListener, path::PathBuf, process::Command};

use anyhow::{Context, ensure};
use hauberk_tests::mesh::{Mesh, PATIENCE};
use serde_json::Value;

use crate::restart::carries;

crate::trials!(a_clock_that_is_behind_refuses_no_fresh_certificate_and_is_reported);

/// What the clock of machine-b is off by, in seconds.
const OFF: f64 = -90.0;

/// Preloaded into a program, it moves that program's wall clock.
const MOVED_CLOCK: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    long failed = syscall(SYS_clock_gettime, clock, time);
    const char *offset = getenv("CLOCK_OFFSET_SECONDS");
    if (!failed && clock == CLOCK_REALTIME && offset) time->tv_sec += atol(offset);
    return failed;
}
"#;

fn moved_clock(mesh: &Mesh) -> anyhow::Result<PathBuf> {
    let (source, library) = (mesh.folder().join("clock.c"), mesh.folder().join("clock.so"));
    fs::write(&source, MOVED_CLOCK)?;
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
    let output = compiler.output().context("run cc; ./test installs what the tests need")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(library)
}

/// The serial and the end of a workload's certificate.
fn serial(mesh: &Mesh, workload: &str) -> anyhow::Result<String> {
    let status = mesh.status()?;
    let found = status.workloads.into_iter().find(|known| known.workload == workload);
    Ok(found.context("it is not registered")?.serial)
}

/// Waits until both ends have another certificate, and a connection passes.
fn carries_after_a_renewal(mesh: &Mesh, listener: &TcpListener) -> anyhow::Result<()> {
    let ends = ["shop/checkout", "payments/ledger"];
    let before = ends.map(|workload| serial(mesh, workload).unwrap_or_default());
    mesh.wait("the renewals", PATIENCE, |mesh| {
        for (workload, before) in ends.iter().zip(&before) {
            ensure!(serial(mesh, workload)? != *before, "{workload} has the same certificate");
        }
        Ok(())
    })?;
    mesh.wait("a connection on fresh certificates", PATIENCE, |mesh| carries(mesh, listener))
        .with_context(|| mesh.logs())
}

fn a_clock_that_is_behind_refuses_no_fresh_certificate_and_is_reported() -> anyhow::Result<()> {
    // Certificates are renewed every few seconds: each is fresh.
    let mut mesh = Mesh::start_with(&["--workload-certificate-lifetime=10s"])?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let fine = mesh.ask(&["check"])?;
    ensure!(fine.status.success(), "{}", String::from_utf8_lossy(&fine.stdout));

    let library = moved_clock(&mesh)?;
    mesh.stop("machine-b");
    mesh.start_agent_with(
        "machine-b",
        &[],
        &[
            ("LD_PRELOAD", library.into_os_string()),
            ("CLOCK_OFFSET_SECONDS", OsString::from(OFF.to_string())),
        ],
    )?;
    for _ in 0..2 {
        carries_after_a_renewal(&mesh, &listener)?;
    }

    let output = mesh.ask(&["check"])?;
    let text = String::from_utf8(output.stdout)?;
    let (begin, end) = ("the clock of node machine-b is ", " s behind the control plane's");
    let told = text.split_once(begin).and_then(|(_, rest)| rest.split_once(end));
    let (seconds, _) = told.with_context(|| text.clone())?;
    // A tenth or two go to the way there and back.
    ensure!((seconds.parse::<f64>()? + OFF).abs() < 1.0, "{text}");
    ensure!(!text.contains("machine-a") && output.status.code() == Some(1), "{text}");
    let status = String::from_utf8(mesh.ask(&["status"])?.stdout)?;
    ensure!(status.contains("clock: node machine-b is "), "{status}");
    let json: Value = serde_json::from_slice(&mesh.ask(&["status", "-o", "json"])?.stdout)?;
    let skew = |name: &str| {
        let nodes = json["nodes"].as_array()?;
        nodes.iter().find(|node| node["name"] == name)?["clock_skew_ms"].as_f64()
    };
    for (machine, off) in [("machine-a", 0.0), ("machine-b", OFF)] {
        let status = skew(machine).with_context(|| json.to_string())? / 1000.0;
        let metric = mesh.metric(machine, "hauberk_clock_skew_seconds", &[])?;
        for told in [status, metric] {
            ensure!((told - off).abs() < 1.0, "{machine}: {told} s");
        }
    }
    Ok(())
}
