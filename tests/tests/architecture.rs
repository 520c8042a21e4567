//! The arrows between the crates, and what each may touch.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// The dependencies of each crate of ours, without those of its tests.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--locked"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let normal = package["dependencies"].as_array().unwrap().iter();
            let normal = normal.filter(|dependency| dependency["kind"].is_null());
            (text(&package["name"]), normal.map(|dependency| text(&dependency["name"])).collect())
        })
        .collect()
}

#[test]
fn our_crates_depend_on_each_other_only_along_the_arrows() {
    let arrows: [(&str, &[&str]); 8] = [
        ("core", &[]),
        ("linux", &[]),
        ("telemetry", &[]),
        ("proto", &["core"]),
        ("tls", &["core"]),
        ("agent", &["core", "linux", "proto", "telemetry", "tls"]),
        ("control-plane", &["core", "proto", "telemetry", "tls"]),
        ("cli", &["agent", "control-plane", "core", "linux", "proto", "telemetry"]),
    ];
    let all = dependencies();
    for (name, allowed) in arrows {
        let allowed: BTreeSet<String> =
            allowed.iter().map(|name| format!("hauberk-{name}")).collect();
        let ours: BTreeSet<String> = all[&format!("hauberk-{name}")]
            .iter()
            .filter(|dependency| dependency.starts_with("hauberk-"))
            .cloned()
            .collect();
        let stray: Vec<_> = ours.difference(&allowed).collect();
        assert!(stray.is_empty(), "hauberk-{name} must not see {stray:?}; see ARCHITECTURE.md");
    }
}

#[test]
fn the_core_has_no_runtime_no_tls_no_log_and_no_chance() {
    let banned = [
        ("tokio", "decisions wait for nothing"),
        ("rustls", "TLS is the business of hauberk-tls"),
        ("tonic", "the wire is the business of hauberk-proto"),
        ("tracing", "refusals come out as values"),
        ("prometheus", "refusals come out as values"),
        ("rand", "chance comes in as an argument"),
        ("getrandom", "chance comes in as an argument"),
        ("nix", "the core does no IO"),
    ];
    let core = &dependencies()["hauberk-core"];
    for (name, reason) in banned {
        assert!(!core.contains(name), "hauberk-core must not use {name}: {reason}");
    }
}

/// Every Rust file below a folder, with its text.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    assert!(!found.is_empty(), "{} has no sources", folder.display());
    found
}

/// Where a text may stand, and nowhere else in our programs.
fn only_in(needle: &str, allowed: &[&str], reason: &str) {
    let root = root();
    let mut seen = false;
    for name in ["core", "proto", "tls", "telemetry", "linux", "agent", "control-plane", "cli"] {
        for (path, text) in sources(&root.join(name).join("src")) {
            if !text.contains(needle) {
                continue;
            }
            let path = path.strip_prefix(&root).unwrap().display().to_string();
            assert!(allowed.contains(&path.as_str()), "{needle} stands in {path}: {reason}");
            seen = true;
        }
    }
    assert!(seen || allowed.is_empty(), "{needle} stands nowhere: is the name still right?");
}

#[test]
fn only_the_verifier_vouches_for_a_chain() {
    only_in(
        "assert_signature_path_checked",
        &["core/src/svid.rs", "tls/src/verify.rs"],
        "a proven identity comes only out of a verified chain",
    );
}

#[test]
fn only_the_decision_makes_a_permit() {
    only_in("Ok(Permit {", &["agent/src/authorize.rs"], "nothing is forwarded without a decision");
}

#[test]
fn tls_configurations_are_made_in_one_place() {
    for builder in ["ServerConfig::builder", "ClientConfig::builder"] {
        only_in(builder, &["tls/src/config.rs"], "TLS 1.3, mutual, without resumption, everywhere");
    }
}

#[test]
fn the_core_reads_no_clock() {
    for (path, text) in sources(&root().join("core/src")) {
        for clock in ["SystemTime::now", "Instant::now", "Timestamp::now"] {
            assert!(!text.contains(clock), "{} reads a clock: {clock}", path.display());
        }
    }
}

#[test]
fn unsafe_code_stands_in_one_file_at_most() {
    only_in("allow(unsafe_code", &["linux/src/sys.rs"], "everything else is safe Rust");
}
