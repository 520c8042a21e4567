//! Where it is kept what is known of the roots, and where agents without an identity are told of them.

use std::{path::PathBuf, time::Duration};

use anyhow::bail;
use hauberk_core::time::Timestamp;
use hauberk_kubernetes::{KeptRoots, PublishedRoots};
use hauberk_tls::files::{read_private, write_private};
use zeroize::Zeroizing;

use crate::ca::Roots;

/// An API server that does not answer within this is away, and the intermediate and the own certificate have to
/// be renewed all the same.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where it is kept what is known of the roots.
pub(crate) enum Keep {
    /// There is only one, for as long as this program runs.
    Nowhere,
    /// In a private file.
    File(PathBuf),
    /// Where all replicas find it.
    Cluster(hauberk_kubernetes::Shared),
}

impl Keep {
    /// What time it is there, if there is another clock than the one here, and it tells.
    pub(super) async fn time(&self) -> anyhow::Result<Option<Timestamp>> {
        match self {
            Self::Nowhere | Self::File(_) => Ok(None),
            Self::Cluster(shared) => in_time(shared.time()).await,
        }
    }

    pub(super) async fn kept(&self) -> anyhow::Result<Option<KeptRoots>> {
        match self {
            Self::Nowhere => Ok(None),
            Self::File(path) => {
                Ok(read_private(path)?.map(|bytes| KeptRoots { bytes, version: None }))
            }
            Self::Cluster(shared) => in_time(shared.roots()).await,
        }
    }

    /// Returns whether nobody else has written meanwhile.
    pub(super) async fn write(
        &self,
        roots: &Roots,
        kept: Option<KeptRoots>,
    ) -> anyhow::Result<bool> {
        let bytes = Zeroizing::new(roots.write()?);
        match self {
            Self::Nowhere => Ok(true),
            Self::File(path) => {
                write_private(path, &bytes)?;
                Ok(true)
            }
            Self::Cluster(shared) => in_time(shared.keep_roots(&bytes, kept.as_ref())).await,
        }
    }

    pub(super) async fn published(&self) -> anyhow::Result<Option<PublishedRoots>> {
        match self {
            Self::Nowhere | Self::File(_) => Ok(None),
            Self::Cluster(shared) => in_time(shared.published_roots()).await,
        }
    }

    /// Publishes in place of what was read. Returns whether nobody else has meanwhile.
    pub(super) async fn publish(
        &self,
        pem: &str,
        read: Option<PublishedRoots>,
    ) -> anyhow::Result<bool> {
        match self {
            Self::Nowhere | Self::File(_) => Ok(true),
            Self::Cluster(shared) => in_time(shared.publish_roots(pem, read)).await,
        }
    }
}

pub(super) async fn in_time<T>(
    asked: impl Future<Output = Result<T, hauberk_kubernetes::SharedError>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(answer) => Ok(answer?),
        Err(_) => bail!("the Kubernetes API did not answer within {} s", PATIENCE.as_secs()),
    }
}
