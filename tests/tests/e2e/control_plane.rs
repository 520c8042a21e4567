//! Attacks on the control plane's own port.

use std::{
    io::Read,
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_core::identity::SpiffeId;
use hauberk_tests::mesh::Mesh;
use rustls::ClientConnection;
use rustls_pki_types::ServerName;

use crate::{floods::flood, identity::Forged};

crate::trials!(
    silent_peers_of_the_control_plane_delay_no_agent,
    silent_peers_at_an_agents_own_address_do_not_delay_it,
    strangers_at_an_agents_own_address_do_not_delay_it,
);

/// Where agents reach the control plane.
fn port() -> SocketAddr {
    SocketAddr::new(ipv4(1), 8443)
}

fn silent_peers_of_the_control_plane_delay_no_agent() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let silent = flood(&mesh, "outside", port(), 600, b"")?;
    let since = Instant::now();
    the_agent_comes_back(&mut mesh)?;
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

fn silent_peers_at_an_agents_own_address_do_not_delay_it() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let silent = flood(&mesh, "machine-a", port(), 5_000, &[0x16, 0x03, 0x01, 0x02])?;
    the_agent_comes_back(&mut mesh)?;
    drop(silent);
    Ok(())
}

/// More than one address once had turns for: those without a certificate kept theirs for 20 s.
const STRANGERS: u32 = 400;

fn strangers_at_an_agents_own_address_do_not_delay_it() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let config = Arc::new(Forged::client_config(None, &[b"h2"])?);
    let id = SpiffeId::control_plane(&"example.org".parse()?);
    let name = ServerName::try_from(id.server_name())?;
    let strangers = mesh.namespace("machine-a")?.run(|| -> anyhow::Result<Vec<TcpStream>> {
        (0..STRANGERS)
            .map(|number| {
                let mut stream = TcpStream::connect_timeout(&port(), Duration::from_secs(5))?;
                stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                let mut tls = ClientConnection::new(config.clone(), name.clone())?;
                while tls.is_handshaking() {
                    tls.complete_io(&mut stream).with_context(|| format!("stranger {number}"))?;
                }
                while tls.wants_write() {
                    tls.write_tls(&mut stream)?;
                }
                Ok(stream)
            })
            .collect()
    })??;
    the_agent_comes_back(&mut mesh)?;
    drop(strangers);
    Ok(())
}

/// An agent that starts anew is connected at once.
fn the_agent_comes_back(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.stop("machine-a");
    mesh.wait("the agent's absence", Duration::from_secs(3), |mesh| {
        ensure!(!connected(mesh)?, "it is there");
        Ok(())
    })?;
    mesh.start_agent("machine-a", &[])?;
    mesh.wait("the agent's return", Duration::from_secs(5), |mesh| {
        ensure!(connected(mesh)?, "it is away");
        Ok(())
    })
}

fn connected(mesh: &Mesh) -> anyhow::Result<bool> {
    let status = mesh.status()?;
    let node = status.nodes.iter().find(|node| node.name == "machine-a");
    Ok(node.context("machine-a is not known")?.connected)
}
