//! The server for metrics and probes, which can be left to another agent and taken back.

use std::net::{SocketAddr, TcpListener};

use anyhow::Context;
use hauberk_telemetry::Health;
use prometheus::Registry;
use tokio_util::sync::CancellationToken;

pub(crate) struct Pages {
    listener: TcpListener,
    registries: Vec<Registry>,
    health: Health,
    /// Ends the server that runs.
    open: Option<CancellationToken>,
}

impl Pages {
    /// Listens; does not serve yet.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub(crate) fn listen(
        address: SocketAddr,
        inherited: Option<TcpListener>,
        registries: Vec<Registry>,
        health: Health,
    ) -> anyhow::Result<Self> {
        let same = inherited.filter(|listener| is_at(listener, address));
        let listener = match same {
            Some(listener) => listener,
            None => TcpListener::bind(address)
                .with_context(|| format!("listen for metrics on {address}"))?,
        };
        listener.set_nonblocking(true).context("set up the listener for metrics")?;
        Ok(Self { listener, registries, health, open: None })
    }

    /// Serves, if it does not.
    ///
    /// # Errors
    /// If the system has no more descriptors.
    pub(crate) fn open(&mut self) -> anyhow::Result<()> {
        if self.open.is_some() {
            return Ok(());
        }
        let listener = self.listener.try_clone().context("the listener for metrics")?;
        let listener =
            tokio::net::TcpListener::from_std(listener).context("the listener for metrics")?;
        let closing = CancellationToken::new();
        tokio::spawn(hauberk_telemetry::serve(
            listener,
            self.registries.clone(),
            self.health.clone(),
            closing.clone().cancelled_owned(),
        ));
        self.open = Some(closing);
        Ok(())
    }

    /// Takes no more requests; the listener stays, for whoever has it, too.
    pub(crate) fn close(&mut self) {
        if let Some(closing) = self.open.take() {
            closing.cancel();
        }
    }

    pub(crate) fn listener(&self) -> &TcpListener {
        &self.listener
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.close();
    }
}

/// Whether it listens where it should: the setting may have changed.
fn is_at(listener: &TcpListener, address: SocketAddr) -> bool {
    listener.local_addr().is_ok_and(|at| at == address)
}
