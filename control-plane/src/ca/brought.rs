//! A CA that somebody brings, in the shape that cert-manager writes for a `Certificate` with `isCA: true`:
//! `tls.crt` has its certificate, `tls.key` its key, `ca.crt` the root that it leads to, which may be itself.
//!
//! What it needs to be is all checked here, before anything is issued with it, and what cannot work is refused
//! with the entry, what is wrong with it and how to mend it. The key stays here and is written nowhere.

use std::{collections::BTreeMap, sync::Arc};

use hauberk_core::{
    clock::NOT_BEFORE_BACKDATE,
    identity::TrustDomain,
    svid::{SigningFacts, SvidError, check_intermediate, check_root},
    time::Timestamp,
};
use hauberk_tls::sha256;
use rcgen::{CertificateParams, Issuer, KeyPair, PublicKeyData};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use x509_parser::{
    extensions::{GeneralName, GeneralSubtree},
    prelude::{FromDer, X509Certificate},
};
use zeroize::Zeroizing;

use super::{
    authority::{CaError, Maker, Signer},
    own,
};

/// The certificate of the CA, with those between it and the root, if there are any.
pub(crate) const CERTIFICATE: &str = "tls.crt";
/// Its key.
pub(crate) const KEY: &str = "tls.key";
/// The root.
pub(crate) const ROOTS: &str = "ca.crt";

/// Why a CA that was brought is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BroughtError {
    #[error(
        "{0} is missing or empty; it takes tls.crt, tls.key and ca.crt, as cert-manager writes them for a \
         Certificate with isCA: true"
    )]
    Missing(&'static str),
    #[error("{field} is not PEM ({why}); it begins with -----BEGIN CERTIFICATE-----")]
    Pem { field: &'static str, why: String },
    #[error(
        "tls.key has no private key in PEM that is not encrypted ({why}); it begins with -----BEGIN PRIVATE KEY-----, \
         RSA PRIVATE KEY or EC PRIVATE KEY"
    )]
    NoKey { why: String },
    #[error(
        "tls.key is damaged or of a kind that is not accepted; use ECDSA with P-256, P-384 or P-521, Ed25519, or \
         RSA of at least 2048 bits"
    )]
    Key(#[source] rcgen::Error),
    #[error(
        "tls.key is not the key of the first certificate of tls.crt; write both of one issuance, the certificate \
         of the CA first"
    )]
    OtherKey,
    #[error(
        "{field}, certificate {number} ({subject}): it cannot be the certificate of a CA here; issue \
         it anew, for a CA and valid now"
    )]
    Unfit {
        field: &'static str,
        number: usize,
        subject: String,
        #[source]
        source: SvidError,
    },
    #[error("{field}, certificate {number}: it cannot be read; write it anew")]
    Unreadable { field: &'static str, number: usize },
    #[error(
        "{field}, certificate {number} ({subject}): it is of trust domain {found}, not {wanted}; bring a CA of \
         {wanted}, or one that names no trust domain"
    )]
    OtherTrustDomain {
        field: &'static str,
        number: usize,
        subject: String,
        found: String,
        wanted: String,
    },
    #[error(
        "{field}, certificate {number} ({subject}): its name constraints speak of URIs ({names}), which peers \
         cannot compare, so that they would refuse every identity; issue it without them"
    )]
    NameConstraints { field: &'static str, number: usize, subject: String, names: String },
    #[error(
        "{field}, certificate {number} ({subject}): its path length allows {found} CA certificates below it, and \
         there are {needed}; issue it with a path length of {needed} or more, or without one"
    )]
    PathLength { field: &'static str, number: usize, subject: String, found: u32, needed: u32 },
    #[error(
        "tls.crt does not lead to ca.crt: {issuer} issued certificate {number} of tls.crt, and is neither in \
         tls.crt nor in ca.crt; put the root into ca.crt, and what is between into tls.crt"
    )]
    NoIssuer { number: usize, issuer: String },
    #[error(
        "{field}, certificate {number} ({subject}): its subject cannot be written as an issuer; issue it with \
         one value for each part of the name"
    )]
    Name { field: &'static str, number: usize, subject: String },
    #[error("what this CA would issue is not good")]
    Trial(#[source] Box<CaError>),
}

/// A CA that can issue.
pub(crate) struct Brought {
    /// The issuer first, without the root.
    chain: Vec<CertificateDer<'static>>,
    root: CertificateDer<'static>,
    key: Zeroizing<PrivateKeyDer<'static>>,
    work: Work,
    /// The last begin of all of them, and the first end.
    not_before: Timestamp,
    not_after: Timestamp,
    root_not_after: Timestamp,
}

/// What its key signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Intermediates of this program's own.
    Intermediates,
    /// The leaves themselves: its path length allows no CA below it.
    Leaves,
}

/// A certificate and where it stands.
#[derive(Clone)]
struct Placed {
    field: &'static str,
    /// From 1.
    number: usize,
    der: CertificateDer<'static>,
    /// DER.
    subject: Vec<u8>,
    issuer: Vec<u8>,
    /// For people.
    shown: String,
    issuer_shown: String,
}

impl Brought {
    /// Reads and checks the entries of a Secret, or the files of a folder.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(crate) fn read(
        files: &BTreeMap<String, Vec<u8>>,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Arc<Self>, BroughtError> {
        let certificates = Placed::all(files, CERTIFICATE)?;
        let key = private_key(files)?;
        let pair = KeyPair::try_from(&*key).map_err(BroughtError::Key)?;
        let roots = match Placed::all(files, ROOTS) {
            Ok(roots) => roots,
            // As `kubectl create secret tls` writes it: then the root is the last of the chain.
            Err(BroughtError::Missing(_)) => self_issued(&certificates)?,
            Err(error) => return Err(error),
        };
        demand_key(certificates.first(), &pair)?;
        let (chain, roots) = path(certificates, &roots)?;
        let mut facts = Vec::new();
        for placed in &chain {
            facts.push(placed.checked(check_intermediate, trust_domain, now)?);
        }
        // A root that was renewed under its name is there twice: one of them is the one.
        let mut refused = None;
        for root in roots {
            let checked = root.checked(check_root, trust_domain, now);
            let tried = checked.and_then(|root_facts| {
                let key = Zeroizing::new(key.clone_key());
                Self::of(&chain, &facts, &root, &root_facts, &pair, key)
                    .and_then(|brought| brought.tried_out(trust_domain, now))
            });
            match tried {
                Ok(brought) => return Ok(brought),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.unwrap_or(BroughtError::Missing(ROOTS)))
    }

    /// All that is known of it, put together.
    fn of(
        chain: &[Placed],
        facts: &[SigningFacts],
        root: &Placed,
        root_facts: &SigningFacts,
        pair: &KeyPair,
        key: Zeroizing<PrivateKeyDer<'static>>,
    ) -> Result<Self, BroughtError> {
        let placed = || chain.iter().chain([root]);
        let all = || facts.iter().chain([root_facts]);
        let levels: Vec<(&Placed, Option<u32>)> =
            placed().zip(all().map(SigningFacts::path_length)).collect();
        placed().next().unwrap_or(root).demand_name(pair)?;
        let root_not_after = root_facts.not_after();
        Ok(Self {
            chain: chain.iter().map(|placed| placed.der.clone()).collect(),
            root: root.der.clone(),
            key,
            work: work(&levels)?,
            not_before: all().map(SigningFacts::not_before).max().unwrap_or(root_not_after),
            not_after: all().map(SigningFacts::not_after).min().unwrap_or(root_not_after),
            root_not_after,
        })
    }

    fn tried_out(
        self,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Arc<Self>, BroughtError> {
        let brought = Arc::new(self);
        brought
            .signer(trust_domain, now)
            .and_then(|signer| signer.try_out(trust_domain, now))
            .map_err(|error| BroughtError::Trial(Box::new(error)))?;
        Ok(brought)
    }

    pub(crate) fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// From when nobody whose clock is behind refuses it.
    pub(crate) fn settled_from(&self) -> Timestamp {
        self.not_before.saturating_add(NOT_BEFORE_BACKDATE)
    }

    /// When the first of its certificates ends.
    pub(crate) fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// Whether it has no intermediate between it and the leaves.
    pub(super) fn issues_leaves(&self) -> bool {
        self.work == Work::Leaves
    }

    /// What issues with it.
    pub(crate) fn signer(
        self: &Arc<Self>,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Signer, CaError> {
        let certificate = self.chain.first().unwrap_or(&self.root);
        let upper = Issuer::from_ca_cert_der(certificate, KeyPair::try_from(&*self.key)?)?;
        let (issuer, chain, not_after) = match self.work {
            Work::Leaves => (upper, self.chain.clone(), self.not_after),
            Work::Intermediates => {
                let (key, own, not_after) =
                    own::intermediate_under(&upper, trust_domain, self.not_after, now)?;
                let issuer = Issuer::from_ca_cert_der(&own, key)?;
                let chain = std::iter::once(own).chain(self.chain.iter().cloned()).collect();
                (issuer, chain, not_after)
            }
        };
        Ok(Signer {
            maker: Maker::Brought(self.clone()),
            root: self.root.clone(),
            chain,
            issuer,
            root_not_after: self.root_not_after,
            not_after,
            made_at: now,
        })
    }
}

impl Placed {
    /// All certificates of an entry; at least one.
    fn all(
        files: &BTreeMap<String, Vec<u8>>,
        field: &'static str,
    ) -> Result<Vec<Self>, BroughtError> {
        let bytes = entry(files, field)?;
        let read: Result<Vec<CertificateDer<'static>>, _> =
            CertificateDer::pem_slice_iter(bytes).collect();
        let read = read.map_err(|error| BroughtError::Pem { field, why: error.to_string() })?;
        if read.is_empty() {
            return Err(BroughtError::Pem { field, why: "it has no certificate".to_owned() });
        }
        read.into_iter().zip(1..).map(|(der, number)| Self::new(field, number, der)).collect()
    }

    fn new(
        field: &'static str,
        number: usize,
        der: CertificateDer<'static>,
    ) -> Result<Self, BroughtError> {
        let (subject, issuer, shown, issuer_shown) = {
            let (_, certificate) = X509Certificate::from_der(&der)
                .map_err(|_| BroughtError::Unreadable { field, number })?;
            let (subject, issuer) = (certificate.subject(), certificate.issuer());
            let raw = (subject.as_raw().to_vec(), issuer.as_raw().to_vec());
            (raw.0, raw.1, subject.to_string(), issuer.to_string())
        };
        Ok(Self { field, number, der, subject, issuer, shown, issuer_shown })
    }

    /// What it says, if it may be where it is.
    fn checked(
        &self,
        check: impl Fn(&[u8], Timestamp) -> Result<SigningFacts, SvidError>,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<SigningFacts, BroughtError> {
        let (field, number) = (self.field, self.number);
        let subject = || self.shown.clone();
        let facts = check(&self.der, now).map_err(|source| BroughtError::Unfit {
            field,
            number,
            subject: subject(),
            source,
        })?;
        if let Some(found) = facts.trust_domain().filter(|found| *found != trust_domain) {
            return Err(BroughtError::OtherTrustDomain {
                field,
                number,
                subject: subject(),
                found: found.to_string(),
                wanted: trust_domain.to_string(),
            });
        }
        let names = self.uri_constraints()?;
        if !names.is_empty() {
            let (subject, names) = (subject(), names.join(", "));
            return Err(BroughtError::NameConstraints { field, number, subject, names });
        }
        Ok(facts)
    }

    /// What its name constraints say of URIs.
    fn uri_constraints(&self) -> Result<Vec<String>, BroughtError> {
        let unreadable = || BroughtError::Unreadable { field: self.field, number: self.number };
        let (_, certificate) = X509Certificate::from_der(&self.der).map_err(|_| unreadable())?;
        let Some(constraints) = certificate.name_constraints().map_err(|_| unreadable())? else {
            return Ok(Vec::new());
        };
        let permitted = uris("permitted", constraints.value.permitted_subtrees.as_deref());
        let excluded = uris("excluded", constraints.value.excluded_subtrees.as_deref());
        Ok(permitted.into_iter().chain(excluded).collect())
    }

    /// A name is written anew in all that is issued, and whoever verifies that compares it byte by byte.
    fn demand_name(&self, pair: &KeyPair) -> Result<(), BroughtError> {
        let unwritable = || BroughtError::Name {
            field: self.field,
            number: self.number,
            subject: self.shown.clone(),
        };
        let issuer = Issuer::from_ca_cert_der(&self.der, pair).map_err(|_| unwritable())?;
        let issued = CertificateParams::default()
            .signed_by(pair, &issuer)
            .map_err(|error| BroughtError::Trial(Box::new(error.into())))?;
        let (_, issued) = X509Certificate::from_der(issued.der()).map_err(|_| unwritable())?;
        if issued.issuer().as_raw() == self.subject { Ok(()) } else { Err(unwritable()) }
    }
}

fn uris(what: &str, subtrees: Option<&[GeneralSubtree<'_>]>) -> Vec<String> {
    let bases = subtrees.unwrap_or_default().iter().map(|subtree| &subtree.base);
    bases
        .filter_map(|base| match base {
            GeneralName::URI(name) => Some(format!("{what} {name}")),
            GeneralName::OtherName(..)
            | GeneralName::RFC822Name(_)
            | GeneralName::DNSName(_)
            | GeneralName::X400Address(_)
            | GeneralName::DirectoryName(_)
            | GeneralName::EDIPartyName(_)
            | GeneralName::IPAddress(_)
            | GeneralName::RegisteredID(_)
            | GeneralName::Invalid(..) => None,
        })
        .collect()
}

fn entry<'a>(
    files: &'a BTreeMap<String, Vec<u8>>,
    field: &'static str,
) -> Result<&'a [u8], BroughtError> {
    let bytes = files.get(field).map(Vec::as_slice).unwrap_or_default();
    if bytes.trim_ascii().is_empty() { Err(BroughtError::Missing(field)) } else { Ok(bytes) }
}

fn private_key(
    files: &BTreeMap<String, Vec<u8>>,
) -> Result<Zeroizing<PrivateKeyDer<'static>>, BroughtError> {
    PrivateKeyDer::from_pem_slice(entry(files, KEY)?)
        .map(Zeroizing::new)
        // Not what pki-types says: it may show a line of the key.
        .map_err(|error| BroughtError::NoKey {
            why: match error {
                rustls_pki_types::pem::Error::NoItemsFound => "there is none".to_owned(),
                _ => "it is damaged".to_owned(),
            },
        })
}

/// The last certificate, if it has issued itself.
fn self_issued(certificates: &[Placed]) -> Result<Vec<Placed>, BroughtError> {
    match certificates.last() {
        Some(last) if last.subject == last.issuer => Ok(vec![last.clone()]),
        Some(_) | None => Err(BroughtError::Missing(ROOTS)),
    }
}

fn demand_key(first: Option<&Placed>, pair: &KeyPair) -> Result<(), BroughtError> {
    let first = first.ok_or(BroughtError::Missing(CERTIFICATE))?;
    let (_, certificate) = X509Certificate::from_der(&first.der)
        .map_err(|_| BroughtError::Unreadable { field: first.field, number: first.number })?;
    if sha256(certificate.public_key().raw) == sha256(&pair.subject_public_key_info()) {
        Ok(())
    } else {
        Err(BroughtError::OtherKey)
    }
}

/// The way from the first certificate up to a root, without the root, and the roots that may be the one.
fn path(
    certificates: Vec<Placed>,
    roots: &[Placed],
) -> Result<(Vec<Placed>, Vec<Placed>), BroughtError> {
    let mut rest = certificates;
    let mut path = Vec::new();
    if rest.is_empty() {
        return Err(BroughtError::Missing(CERTIFICATE));
    }
    let mut current = rest.remove(0);
    loop {
        if let Some(root) = roots.iter().find(|root| root.der == current.der) {
            return Ok((path, vec![root.clone()]));
        }
        let issuers: Vec<Placed> =
            roots.iter().filter(|root| root.subject == current.issuer).cloned().collect();
        let next = rest.iter().position(|other| other.subject == current.issuer);
        let (number, issuer) = (current.number, current.issuer_shown.clone());
        path.push(current);
        if !issuers.is_empty() {
            return Ok((path, issuers));
        }
        current = rest.remove(next.ok_or(BroughtError::NoIssuer { number, issuer })?);
    }
}

/// What the issuer's key may sign, by the path lengths from it up to the root, which is the last.
fn work(levels: &[(&Placed, Option<u32>)]) -> Result<Work, BroughtError> {
    match (too_long(levels, 1), too_long(levels, 0)) {
        (None, _) => Ok(Work::Intermediates),
        (Some(_), None) => Ok(Work::Leaves),
        (Some(_), Some(error)) => Err(error),
    }
}

/// The first certificate that allows fewer CAs below it than there would be, with so many below the first.
fn too_long(levels: &[(&Placed, Option<u32>)], below: u32) -> Option<BroughtError> {
    levels.iter().zip(below..).find_map(|((placed, allowed), needed)| {
        let found = (*allowed)?;
        (found < needed).then(|| BroughtError::PathLength {
            field: placed.field,
            number: placed.number,
            subject: placed.shown.clone(),
            found,
            needed,
        })
    })
}

#[cfg(test)]
mod tests;
