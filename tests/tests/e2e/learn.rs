//! From audited traffic to policies that allow it: `hauberk learn`.

use std::{fs, process::Output};

use anyhow::{Context, ensure};
use hauberk_core::{manifest::parse, policy::Object};
use hauberk_tests::mesh::{Mesh, PATIENCE, is};
use serde_json::Value;

use crate::{
    policy::{expect_refused, open, still_carries},
    restart::carries,
};

crate::trials!(
    what_was_seen_is_allowed_once_it_is_learned_and_nothing_else,
    an_edge_outlives_the_control_plane_that_was_told_of_it,
    only_a_named_namespace_is_learned_and_outside_is_told,
);

fn text(output: &Output) -> anyhow::Result<String> {
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout.clone())?)
}

/// The policies of an answer, as the control plane reads them.
fn policies(text: &str) -> anyhow::Result<Vec<String>> {
    let objects = parse("learned.yaml", text)
        .map_err(|errors| anyhow::anyhow!("not a manifest: {errors:?}\n{text}"))?;
    let names = objects.into_iter().map(|object| match object.value {
        Object::AccessPolicy(policy) => Ok(policy.name.to_string()),
        other => Err(anyhow::anyhow!("{other:?}")),
    });
    names.collect()
}

/// The mesh's ledger without a policy and only audited; with the manifest that enforces it again.
fn audited() -> anyhow::Result<(Mesh, String)> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    mesh.remove_manifest("ledger.yaml")?;
    let without = mesh.wait_revision(before)?;
    let enforced = fs::read_to_string(mesh.manifests().join("workloads.yaml"))?;
    let (others, ledger) = enforced.rsplit_once("  ports: ").context("the ledger stands last")?;
    mesh.write_manifest("workloads.yaml", &format!("{others}  mode: Audit\n  ports: {ledger}"))?;
    mesh.wait_revision(without)?;
    Ok((mesh, enforced))
}

/// What is learned, once this is part of it.
fn learned(mesh: &Mesh, arguments: &[&str], part: &str) -> anyhow::Result<String> {
    let mut found = String::new();
    mesh.wait("what was seen", PATIENCE, |mesh| {
        found = text(&mesh.ask(&[["learn"].as_slice(), arguments].concat())?)?;
        ensure!(found.contains(part), "no {part:?} in\n{found}");
        Ok(())
    })?;
    Ok(found)
}

const CHECKOUT: &str = "from: [{serviceAccount: {namespace: shop, name: checkout}}]";
const WEB: &str = "from: [{serviceAccount: {namespace: shop, name: web}}]";

fn what_was_seen_is_allowed_once_it_is_learned_and_nothing_else() -> anyhow::Result<()> {
    let (mesh, enforced) = audited()?;
    let before = mesh.wait_revision(0)?;
    let nothing = mesh.ask(&["learn"])?;
    ensure!(policies(&text(&nothing)?)?.is_empty(), "{nothing:?}");
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    // In clear: no policy can allow that.
    still_carries(&mut open(&mesh, &listener, "outside")?)?;
    // Nobody answers there: that is no connection to learn from.
    expect_refused(mesh.connect("web", mesh.ledger(5432)))?;

    learned(&mesh, &[], "10.77.0.99 -> payments/ledger:8080: 1 connection")?;
    let found = learned(&mesh, &[], CHECKOUT)?;
    ensure!(policies(&found)? == ["payments/learned-ledger"], "{found}");
    for part in ["    ports: [8080]\n", "  # 1 connection, at 2", "# NO POLICY CAN ALLOW THESE"] {
        ensure!(found.contains(part), "no {part:?} in\n{found}");
    }
    ensure!(!found.contains("name: web") && !found.contains("NOT COMPLETE"), "{found}");

    mesh.write_manifest("learned.yaml", &found)?;
    let allowed = mesh.wait_revision(before)?;
    mesh.write_manifest("workloads.yaml", &enforced)?;
    mesh.wait_revision(allowed)?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
    expect_refused(mesh.connect("checkout", mesh.ledger(5432)))?;

    // Tries are not learned, unless somebody says so; and then beside what is there.
    let denied = learned(&mesh, &["--include-denied"], WEB)?;
    ensure!(policies(&denied)? == ["payments/learned-ledger-2"], "{denied}");
    let output = mesh.ask(&["learn"])?;
    ensure!(policies(&text(&output)?)?.is_empty(), "{output:?}");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    for part in ["that policies allow by now, left out: 1", "--include-denied"] {
        ensure!(told.contains(part), "no {part:?} in\n{told}");
    }
    Ok(())
}

fn an_edge_outlives_the_control_plane_that_was_told_of_it() -> anyhow::Result<()> {
    let (mut mesh, _) = audited()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    learned(&mesh, &[], CHECKOUT)?;
    mesh.stop("control-plane");
    mesh.restart_control_plane()?;
    let found = learned(&mesh, &[], CHECKOUT)?;
    ensure!(found.contains("  # 1 connection, at 2"), "{found}");
    // An agent begins anew; what it told is not forgotten, and counts go on.
    mesh.stop("machine-b");
    mesh.start_agent("machine-b", &[])?;
    ensure!(policies(&text(&mesh.ask(&["learn"])?)?)?.len() == 1, "it was forgotten");
    mesh.wait("the agent", PATIENCE, |mesh| carries(mesh, &listener))?;
    learned(&mesh, &[], " connections, the last at 2")?;
    Ok(())
}

fn only_a_named_namespace_is_learned_and_outside_is_told() -> anyhow::Result<()> {
    let (mesh, _) = audited()?;
    let before = mesh.wait_revision(0)?;
    // The caller is audited as well, so that it may leave the mesh.
    let manifests = fs::read_to_string(mesh.manifests().join("workloads.yaml"))?;
    let checkout = "serviceAccount: checkout\n";
    ensure!(manifests.contains(checkout), "{manifests}");
    let manifests = manifests.replace(checkout, &format!("{checkout}  mode: Audit\n"));
    mesh.write_manifest("workloads.yaml", &manifests)?;
    mesh.wait_revision(before)?;
    let outside = std::net::SocketAddr::from(([10, 77, 0, 99], 8080));
    let abroad = mesh.listen("outside", outside)?;
    still_carries(&mut open(&mesh, &abroad, "checkout")?)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;

    let found = learned(&mesh, &["-n", "payments"], CHECKOUT)?;
    ensure!(!found.contains("10.77.0.99"), "{found}");
    let line = "#   shop/checkout -> 10.77.0.99:8080: 1 connection";
    let found = learned(&mesh, &["--namespace", "shop"], line)?;
    ensure!(policies(&found)?.is_empty(), "{found}");
    let old = text(&mesh.ask(&["learn", "--since", "0s"])?)?;
    ensure!(policies(&old)?.is_empty(), "{old}");
    let value: Value = serde_json::from_slice(&mesh.ask(&["learn", "-o", "json"])?.stdout)?;
    let policy = &value["policies"][0];
    ensure!(is(&policy["metadata"], "name", "learned-ledger"), "{value}");
    let edges = value["edges"].as_array().context("no edges")?;
    let fates: Vec<&str> = edges.iter().filter_map(|edge| edge["fate"].as_str()).collect();
    ensure!(fates == ["learned", "outside"], "{value}");
    Ok(())
}
