//! What becomes of the mesh when its manifests vanish: an empty mount, a sync that failed.

use std::{fs, time::Duration};

use anyhow::{Context, ensure};
use hauberk_tests::mesh::{Mesh, PATIENCE};

use crate::{policy::expect_reset, restart::carries};

crate::trials!(manifests_that_all_vanish_open_no_port_until_it_is_confirmed);

/// What `hauberk check` finds, as text, once it says `wanted`.
fn finds(mesh: &Mesh, wanted: &str) -> anyhow::Result<()> {
    mesh.wait("the finding", PATIENCE, |mesh| {
        let output = mesh.ask(&["check"])?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(text.contains(wanted) && output.status.code() == Some(1), "{text}");
        Ok(())
    })
}

fn manifests_that_all_vanish_open_no_port_until_it_is_confirmed() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let revision = mesh.status()?.revision;
    for file in fs::read_dir(mesh.manifests())? {
        fs::remove_file(file?.path())?;
    }
    let lost = "the folder has no workload any more, and the last good manifests have 3 workloads";
    finds(&mesh, lost)?;
    let status = String::from_utf8(mesh.ask(&["status"])?.stdout)?;
    ensure!(status.contains(&format!("manifest error: {lost}")), "{status}");
    for restarted in [false, true] {
        if restarted {
            mesh.stop("control-plane");
            mesh.restart_control_plane()?;
            mesh.wait_revision(revision - 1)?;
            finds(&mesh, lost)?;
        }
        ensure!(mesh.status()?.revision == revision, "another state is in force");
        expect_reset(mesh.connect("outside", mesh.ledger(8080)))?;
        mesh.wait("the allowed connection", PATIENCE, |mesh| carries(mesh, &listener))?;
    }

    mesh.stop("control-plane");
    mesh.start_control_plane(&["--allow-empty"])?;
    let output = mesh.ask(&["check"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    listener.set_nonblocking(true)?;
    mesh.wait("a connection that nothing captures", Duration::from_secs(30), |mesh| {
        let client = mesh.connect("outside", mesh.ledger(8080))?;
        let (_, from) = listener.accept().context("it is not accepted")?;
        ensure!(from == client.local_addr()?, "{from} is another connection");
        Ok(())
    })
}
