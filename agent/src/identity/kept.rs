//! What survives a restart: keys with their certificates, one private file each, key and
//! certificate always of one piece.

use std::path::{Path, PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use hauberk_tls::{
    PrivateKey,
    files::{FileError, read_private, write_private},
};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

/// A key, its certificate chain and the roots it came with.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kept {
    /// For the node: where the control plane is, and who we are. Empty for workloads.
    #[serde(default)]
    pub(crate) control_plane: String,
    #[serde(default)]
    pub(crate) node: String,
    #[serde(default)]
    pub(crate) trust_domain: String,
    key: String,
    chain: Vec<String>,
    bundle: Vec<String>,
}

/// A file of the data folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is damaged", .path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Kept {
    pub(crate) fn new(key: &PrivateKey, chain: &[Vec<u8>], bundle: &[Vec<u8>]) -> Self {
        let encode = |list: &[Vec<u8>]| list.iter().map(|der| STANDARD.encode(der)).collect();
        Self {
            control_plane: String::new(),
            node: String::new(),
            trust_domain: String::new(),
            key: STANDARD.encode(key.pkcs8()),
            chain: encode(chain),
            bundle: encode(bundle),
        }
    }

    pub(crate) fn load(path: &Path) -> Result<Option<Self>, KeptError> {
        let Some(bytes) = read_private(path)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|source| damaged(path, source))
    }

    pub(crate) fn save(&self, path: &Path) -> Result<(), KeptError> {
        let bytes = serde_json::to_vec(self).map_err(|source| damaged(path, source))?;
        Ok(write_private(path, &bytes)?)
    }

    pub(crate) fn key(&self, path: &Path) -> Result<PrivateKey, KeptError> {
        let der = STANDARD.decode(&self.key).map_err(|source| damaged(path, source))?;
        Ok(PrivateKey::from_pkcs8(der))
    }

    pub(crate) fn chain(&self, path: &Path) -> Result<Vec<CertificateDer<'static>>, KeptError> {
        certificates(&self.chain, path)
    }

    pub(crate) fn bundle(&self, path: &Path) -> Result<Vec<CertificateDer<'static>>, KeptError> {
        certificates(&self.bundle, path)
    }
}

fn certificates(list: &[String], path: &Path) -> Result<Vec<CertificateDer<'static>>, KeptError> {
    list.iter()
        .map(|text| STANDARD.decode(text).map(CertificateDer::from))
        .collect::<Result<_, _>>()
        .map_err(|source| damaged(path, source))
}

fn damaged(path: &Path, source: impl std::error::Error + Send + Sync + 'static) -> KeptError {
    KeptError::Damaged { path: path.to_owned(), source: Box::new(source) }
}
