//! The arrows between the crates, and what each may touch.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// The crates that programs are made of; each is in the folder of its name.
const OURS: [&str; 10] = [
    "core",
    "proto",
    "tls",
    "telemetry",
    "linux",
    "kubernetes",
    "cni",
    "agent",
    "control-plane",
    "cli",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn metadata(arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--locked"])
        .args(arguments)
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// The dependencies of each crate of ours, without those of its tests.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata(&["--no-deps"]);
    let packages = list(&metadata["packages"]).iter();
    packages
        .map(|package| {
            let normal = list(&package["dependencies"]).iter();
            let normal = normal.filter(|dependency| dependency["kind"].is_null());
            let names = normal.map(|dependency| text(&dependency["name"]).to_owned());
            (text(&package["name"]).to_owned(), names.collect())
        })
        .collect()
}

/// Everything that is linked into a crate, however far down, each with the way to it. What only
/// builds or tests something is not.
fn linked_into(name: &str) -> BTreeMap<String, String> {
    // For one platform, as others' crates need not be on this machine.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let metadata = metadata(&["--filter-platform", &platform]);
    let packages = list(&metadata["packages"]).iter();
    let names: BTreeMap<&str, &str> =
        packages.map(|package| (text(&package["id"]), text(&package["name"]))).collect();
    let nodes = list(&metadata["resolve"]["nodes"]).iter();
    let nodes: BTreeMap<&str, &Value> = nodes.map(|node| (text(&node["id"]), node)).collect();
    let (start, _) = names.iter().find(|(_, found)| **found == name).unwrap();
    let mut ways: BTreeMap<&str, String> = BTreeMap::from([(*start, name.to_owned())]);
    let mut open = vec![*start];
    while let Some(id) = open.pop() {
        for dependency in list(&nodes[id]["deps"]) {
            let mut kinds = list(&dependency["dep_kinds"]).iter();
            let id_below = text(&dependency["pkg"]);
            if kinds.any(|kind| kind["kind"].is_null()) && !ways.contains_key(id_below) {
                ways.insert(id_below, format!("{} > {}", ways[id], names[id_below]));
                open.push(id_below);
            }
        }
    }
    ways.into_iter().map(|(id, way)| (names[id].to_owned(), way)).collect()
}

/// What a crate of ours may see of the others, and why no more.
fn sees_only(name: &str, allowed: &[&str], reason: &str) {
    let all = dependencies();
    let stray: Vec<&str> = all[name]
        .iter()
        .filter_map(|dependency| dependency.strip_prefix("hauberk-"))
        .filter(|dependency| !allowed.contains(dependency))
        .collect();
    assert!(stray.is_empty(), "{name} must not see {stray:?}: {reason}; see ARCHITECTURE.md");
}

#[test]
fn the_core_sees_no_crate_of_ours() {
    sees_only("hauberk-core", &[], "decisions are the bottom, so that everybody can share them");
}

#[test]
fn the_wire_format_sees_only_the_core() {
    sees_only("hauberk-proto", &["core"], "it translates for the core and acts on nothing");
}

#[test]
fn tls_sees_only_the_core() {
    sees_only("hauberk-tls", &["core"], "it proves who a peer is and knows no wire format");
}

#[test]
fn telemetry_sees_no_crate_of_ours() {
    sees_only("hauberk-telemetry", &[], "it tells what it is given and decides nothing");
}

#[test]
fn linux_sees_no_crate_of_ours() {
    sees_only("hauberk-linux", &[], "the kernel's networking knows neither TLS nor policy");
}

#[test]
fn the_agent_does_not_see_the_control_plane() {
    let allowed = ["cni", "core", "linux", "proto", "telemetry", "tls"];
    sees_only("hauberk-agent", &allowed, "the two programs meet on the wire only");
}

#[test]
fn the_control_plane_does_not_see_the_agent() {
    let allowed = ["core", "kubernetes", "proto", "telemetry", "tls"];
    let reason = "the two programs meet on the wire only, and it touches no kernel networking";
    sees_only("hauberk-control-plane", &allowed, reason);
}

#[test]
fn nothing_but_tests_and_benchmark_sees_the_command() {
    let allowed = ["agent", "control-plane", "core", "kubernetes", "linux", "proto", "telemetry"];
    sees_only("hauberk-cli", &allowed, "it runs the programs and leaves TLS to them");
    for (name, dependencies) in dependencies() {
        let may =
            ["hauberk-tests", "hauberk-kubernetes-tests", "hauberk-bench"].contains(&name.as_str());
        assert!(
            may || !dependencies.contains("hauberk-cli"),
            "{name} must not see hauberk-cli: the command is the top"
        );
    }
}

#[test]
fn the_kubernetes_api_is_seen_through_one_crate_that_sees_only_the_core() {
    sees_only("hauberk-kubernetes", &["core"], "it tells what the API server says");
    for (name, dependencies) in dependencies() {
        let through = name == "hauberk-kubernetes" || !dependencies.contains("kube");
        assert!(through, "{name} must not see kube: hauberk-kubernetes is the way to it");
    }
}

#[test]
fn the_cni_plugin_sees_no_crate_of_ours() {
    sees_only("hauberk-cni", &[], "it is started for every pod and asks the agent for everything");
}

#[test]
fn every_crate_has_its_arrows_here() {
    let known: BTreeSet<String> = OURS
        .iter()
        .chain(&["proto-generate", "tests", "kubernetes-tests", "bench"])
        .map(|name| format!("hauberk-{name}"))
        .collect();
    let all: BTreeSet<String> = dependencies().into_keys().collect();
    assert_eq!(all, known, "a crate came or went: say here what it may see");
    let generator = "it writes the wire format's code and needs none of it";
    sees_only("hauberk-proto-generate", &[], generator);
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
        ("mio", "the core does no IO"),
        ("socket2", "the core does no IO"),
    ];
    let linked = linked_into("hauberk-core");
    let direct = &dependencies()["hauberk-core"];
    assert!(linked.len() > direct.len() + 1, "only the direct ones were found: {linked:?}");
    for name in direct {
        assert!(linked.contains_key(name), "{name} was not found: {linked:?}");
    }
    for (name, reason) in banned {
        let way = linked.get(name);
        assert_eq!(way, None, "hauberk-core must not use {name}, however far down: {reason}");
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

/// A text stands in exactly these files of our programs.
fn only_in(needle: &str, allowed: &[&str], reason: &str) {
    let root = root();
    let mut seen = BTreeSet::new();
    for name in OURS {
        for (path, text) in sources(&root.join(name).join("src")) {
            if !text.contains(needle) {
                continue;
            }
            let path = path.strip_prefix(&root).unwrap().display().to_string();
            assert!(allowed.contains(&path.as_str()), "{needle} stands in {path}: {reason}");
            seen.insert(path);
        }
    }
    for path in allowed {
        assert!(seen.contains(*path), "{needle} no longer stands in {path}: is the name right?");
    }
}

#[test]
fn only_the_verifier_vouches_for_a_chain() {
    only_in(
        "assert_signature_path_checked",
        &["core/src/svid.rs", "tls/src/verify.rs"],
        "a proven identity comes only out of a verified chain",
    );
    let core = fs::read_to_string(root().join("core/src/svid.rs")).unwrap();
    let stands = core.matches("assert_signature_path_checked").count();
    assert_eq!(stands, 1, "core/src/svid.rs defines it, and must not call it");
}

#[test]
fn only_the_decision_makes_a_permit() {
    only_in("Permit {", &["agent/src/authorize.rs"], "nothing is forwarded without a decision");
    for made in ["Pass(Why", " Pass {"] {
        let reason = "nothing passes without the mesh but by the rules of audit and probes";
        only_in(made, &["agent/src/authorize.rs"], reason);
    }
}

#[test]
fn tls_configurations_are_made_in_one_place() {
    for builder in ["ServerConfig::builder", "ClientConfig::builder"] {
        let reason = "TLS 1.3 without resumption everywhere, and mutual within the mesh";
        only_in(builder, &["tls/src/config.rs"], reason);
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
fn unsafe_code_stands_in_one_file() {
    let reason = "everything else is safe Rust";
    for needle in ["unsafe {", "allow(unsafe_code"] {
        only_in(needle, &["linux/src/sys.rs"], reason);
    }
    for needle in ["unsafe fn", "unsafe impl", "unsafe extern", "expect(unsafe_code"] {
        only_in(needle, &[], reason);
    }
}

#[test]
fn every_crate_keeps_the_lints_of_the_workspace() {
    for package in list(&metadata(&["--no-deps"])["packages"]) {
        let (name, path) = (text(&package["name"]), text(&package["manifest_path"]));
        let manifest = fs::read_to_string(path).unwrap();
        assert!(
            manifest.contains("[lints]\nworkspace = true"),
            "{name} drops the workspace's lints, which forbid unsafe code: {path}"
        );
    }
}
