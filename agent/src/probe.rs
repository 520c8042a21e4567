//! Whether a control plane answers as its agents need it: asked for once, without any identity.

use std::{path::Path, time::Duration};

use anyhow::bail;
use hauberk_proto::v1::{self, enrollment_client::EnrollmentClient};
use tokio::time::Instant;
use tonic::Code;

use crate::identity::{ControlPlane, explain, roots};

/// Between two tries.
const PAUSE: Duration = Duration::from_secs(1);

/// Tries until a control plane under one of the roots of the file answers at `address`.
///
/// # Errors
/// If the file has no roots, or with the last try's error when the time is over.
pub async fn control_plane(
    address: &str,
    trust_bundle: &Path,
    patience: Duration,
) -> anyhow::Result<()> {
    let roots = roots(trust_bundle)?;
    if roots.is_empty() {
        bail!("{} has no certificate", trust_bundle.display());
    }
    let until = Instant::now() + patience;
    loop {
        let mut last = None;
        for root in &roots {
            match ask(address, hauberk_tls::sha256(root)).await {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        if Instant::now() + PAUSE > until
            && let Some(error) = last
        {
            return Err(error);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Renewing without a certificate is refused before anything else is looked at: the refusal shows that name,
/// network, TLS, root and service are right, and nothing is changed by it.
async fn ask(address: &str, root_sha256: [u8; 32]) -> anyhow::Result<()> {
    let control_plane = ControlPlane::pinned(address.to_owned(), root_sha256)?.unprivileged();
    let answer = EnrollmentClient::new(control_plane.channel())
        .renew_node(v1::RenewNodeRequest::default())
        .await;
    match answer {
        Ok(_) => bail!("the control plane at {address} renews for somebody without a certificate"),
        Err(status) if status.code() == Code::Unauthenticated => Ok(()),
        Err(status) => Err(explain(&status)),
    }
}
