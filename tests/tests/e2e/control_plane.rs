//! Attacks on the control plane's own port.

use std::{
    io::Read,
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_tests::mesh::Mesh;

crate::trials!(silent_peers_of_the_control_plane_delay_no_agent);

/// More than one address gets turns for.
const SILENT: usize = 600;

fn silent_peers_of_the_control_plane_delay_no_agent() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let port = SocketAddr::new(ipv4(1), 8443);
    let silent = (0..SILENT)
        .map(|_| mesh.connect("outside", port))
        .collect::<anyhow::Result<Vec<TcpStream>>>()?;
    let since = Instant::now();
    mesh.stop("machine-a");
    mesh.wait("the agent's absence", Duration::from_secs(3), |mesh| {
        ensure!(!connected(mesh)?, "it is there");
        Ok(())
    })?;
    mesh.start_agent("machine-a", &[])?;
    mesh.wait("the agent's return", Duration::from_secs(5), |mesh| {
        ensure!(connected(mesh)?, "it is away");
        Ok(())
    })?;
    // While the flood was there: whoever says nothing is given up after ten seconds.
    ensure!(since.elapsed() < Duration::from_secs(10), "the test took too long to mean anything");
    for mut stream in silent {
        stream.set_read_timeout(Some(Duration::from_secs(25)))?;
        match stream.read(&mut [0]) {
            Ok(0) => {}
            // Given up with a reset.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Ok(_) => bail!("a silent peer was answered"),
            Err(error) => return Err(error).context("a silent peer is not given up"),
        }
    }
    Ok(())
}

fn connected(mesh: &Mesh) -> anyhow::Result<bool> {
    let status = mesh.status()?;
    let node = status.nodes.iter().find(|node| node.name == "machine-a");
    Ok(node.context("machine-a is not known")?.connected)
}
