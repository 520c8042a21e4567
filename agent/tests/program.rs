//! The agent as a program of its own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

use std::process::Command;

fn agent() -> Command {
    Command::new(env!("CARGO_BIN_EXE_hauberk-agent"))
}

#[test]
fn it_says_how_to_use_it() {
    let output = agent().arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && help.starts_with("The Hauberk agent"), "{help}");
    assert!(help.contains("--join-token") && help.contains("cleanup"), "{help}");
}

#[test]
fn without_a_token_it_says_how_to_get_one() {
    let data = tempfile::tempdir().unwrap();
    let output = agent()
        .args(["--metrics", "127.0.0.1:0", "--data"])
        .arg(data.path().join("data"))
        .env_remove("HAUBERK_JOIN_TOKEN")
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("error: this machine has not joined"), "{told}");
    assert!(told.contains("--join-token TOKEN (`hauberk token create`"), "{told}");
}
