//! The control plane as a program of its own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

fn control_plane() -> Command {
    Command::new(env!("CARGO_BIN_EXE_hauberk-control-plane"))
}

#[test]
fn it_says_how_to_use_it() {
    let output = control_plane().arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && help.starts_with("The Hauberk control plane"), "{help}");
    assert!(help.contains("--trust-domain") && help.contains("--advertise"), "{help}");
}

#[test]
fn a_folder_without_a_ca_is_refused_with_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let output = control_plane()
        .args(["--trust-domain", "example.org", "--listen", "127.0.0.1:0"])
        .args(["--metrics", "127.0.0.1:0", "--ca"])
        .arg(folder.path())
        .arg("--data")
        .arg(folder.path().join("data"))
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{told}");
    assert!(told.contains("(--ca) is not taken up: tls.crt is missing or empty"), "{told}");
    assert!(!folder.path().join("data/ca").exists(), "it made a CA of its own");
}

#[test]
fn it_starts_is_ready_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = control_plane()
        .args(["--trust-domain", "example.org", "--listen", "127.0.0.1:0"])
        .args(["--metrics", "127.0.0.1:0", "--stop-with-stdin", "--data"])
        .arg(folder.path().join("data"))
        .arg("--manifests")
        .arg(folder.path())
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(program.stderr.take().unwrap()).lines().map(Result::unwrap);
    // The end of the log is the end of the program.
    assert!(log.any(|line| line.contains(" ready ")), "it ended before it was ready");
    drop(program.stdin.take());
    assert!(log.any(|line| line.contains("stopping")), "it did not stop in order");
    assert!(program.wait().unwrap().success());
    assert!(folder.path().join("data/store.redb").exists());
}
