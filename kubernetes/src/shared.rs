//! What the replicas of the control plane share, in objects of its own namespace: the CA's root, what
//! agents trust and for how long, and which revision the state has. The CA that somebody brings is read here,
//! too, and never written.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hauberk_core::time::Timestamp;
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::fmt::rfc2822::DateTimeParser,
};
use kube::{
    Api, Client,
    api::{GetParams, PostParams},
    client::Body,
    core::Request,
};
use serde::{Deserialize, Serialize};

/// The Secret with the CA's root.
const CA_SECRET: &str = "hauberk-ca";

/// The Secret with what is known of the roots that agents trust, and for how long each is needed. A Secret, since
/// whoever could write it could have any root trusted.
const ROOTS: &str = "hauberk-roots";

/// The key in it.
const ROOTS_KEY: &str = "roots.json";

/// The ConfigMap with the roots that agents trust.
const TRUST_BUNDLE: &str = "hauberk-trust-bundle";

/// The key in it.
const TRUST_BUNDLE_KEY: &str = "roots.pem";

/// The ConfigMap with the number of the state in force.
const STATE: &str = "hauberk-state";

/// The key in it.
const REVISION: &str = "revision";

/// How often one tries to agree while others write, too.
const ATTEMPTS: usize = 8;

/// The objects of one namespace.
#[derive(Clone)]
pub struct Shared {
    client: Client,
    namespace: String,
    /// The newest of what the replicas agreed on, as far as this one knows.
    known: Arc<Mutex<Known>>,
}

/// What outlives the ConfigMap that the replicas agree in.
#[derive(Debug, Default)]
struct Known {
    epoch: u64,
    seen: BTreeMap<String, u64>,
}

impl Known {
    fn learn(&mut self, epoch: u64, kept: &Kept) {
        self.epoch = self.epoch.max(epoch);
        for (kind, version) in &kept.seen {
            let known = self.seen.entry(kind.clone()).or_default();
            *known = (*known).max(*version);
        }
    }

    /// What stands in for one that was deleted: a replica that is behind does not begin anew.
    fn beginning(&self) -> Kept {
        Kept { epoch: self.epoch.saturating_add(1), seen: self.seen.clone(), ..Kept::default() }
    }
}

/// What is known of the roots, as it is kept.
#[derive(Clone)]
pub struct KeptRoots {
    /// It itself; this crate does not read it.
    pub bytes: Vec<u8>,
    /// The version that the next write takes the place of, where there are any.
    pub version: Option<String>,
}

impl fmt::Debug for KeptRoots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // There may be a key in the bytes.
        f.debug_struct("KeptRoots").field("version", &self.version).finish_non_exhaustive()
    }
}

/// The roots that agents are told of, as they are published.
#[derive(Debug)]
pub struct PublishedRoots(ConfigMap);

impl PublishedRoots {
    /// They themselves; empty if there are none.
    #[must_use]
    pub fn pem(&self) -> &str {
        let data = self.0.data.as_ref();
        data.and_then(|data| data.get(TRUST_BUNDLE_KEY)).map_or("", String::as_str)
    }
}

/// Why something could not be shared.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The API server refused, or could not be asked.
    #[error("{what} in namespace {namespace}")]
    Api {
        /// What was tried.
        what: &'static str,
        /// Where.
        namespace: String,
        /// Why it failed.
        #[source]
        source: Box<kube::Error>,
    },
    /// An object has not what it should.
    #[error("{object} in namespace {namespace} is damaged: {why}")]
    Damaged {
        /// Which.
        object: &'static str,
        /// Where.
        namespace: String,
        /// What is wrong.
        why: String,
    },
}

/// The number that a state has for all replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agreement {
    /// This one.
    Revision {
        /// When the numbering began, in seconds since the Unix epoch.
        epoch: u64,
        /// From 1.
        revision: u64,
    },
    /// Another replica has seen more of these kinds already: this state is old, and must not be given out.
    Behind(Vec<String>),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// At least this, if the object itself is not younger: clocks may have been set back since.
    /// The version before knows none.
    #[serde(default, skip_serializing_if = "is_zero")]
    epoch: u64,
    number: u64,
    state_hash: String,
    /// What whoever wrote this had seen of each kind.
    seen: BTreeMap<String, u64>,
}

impl Kept {
    /// Of which kinds somebody with these eyes does not know as much.
    fn missing_in(&self, seen: &BTreeMap<String, u64>) -> Vec<String> {
        let newer = self.seen.iter().filter(|(kind, version)| seen.get(*kind) < Some(*version));
        newer.map(|(kind, _)| kind.clone()).collect()
    }
}

impl Shared {
    /// In the namespace of this control plane.
    #[must_use]
    pub fn new(client: Client, namespace: String) -> Self {
        Self { client, namespace, known: Arc::default() }
    }

    /// What time it is at the API server, in whole seconds; nothing if it does not tell.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub async fn time(&self) -> Result<Option<Timestamp>, SharedError> {
        let failed = self.failed("ask the API server for its time");
        let request = Request::new("").get("version", &GetParams::default());
        let request = request.map_err(|error| failed(kube::Error::BuildRequest(error)))?;
        // Every answer has it, that it is forbidden, too.
        let answer = self.client.send(request.map(Body::from)).await.map_err(failed)?;
        let date = answer.headers().get("date").and_then(|date| read_date(date.as_bytes()));
        // Read to its end, so that the next question finds the connection open.
        drop(answer.into_body().collect_bytes().await);
        Ok(date)
    }

    /// The CA's files, if another replica, or this one in an earlier life, has made them.
    ///
    /// # Errors
    /// If the Secret cannot be read.
    pub async fn ca(&self) -> Result<Option<BTreeMap<String, Vec<u8>>>, SharedError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let secret =
            secrets.get_opt(CA_SECRET).await.map_err(self.failed("read Secret hauberk-ca"))?;
        let Some(secret) = secret else { return Ok(None) };
        let files = secret.data.unwrap_or_default();
        if files.is_empty() {
            let why =
                "it is empty; restore it, or delete it to begin a new trust domain".to_owned();
            let namespace = self.namespace.clone();
            return Err(SharedError::Damaged { object: "Secret hauberk-ca", namespace, why });
        }
        Ok(Some(files.into_iter().map(|(name, bytes)| (name, bytes.0)).collect()))
    }

    /// The entries of a Secret in this namespace with a CA that somebody brings; nothing if there is no such
    /// Secret.
    ///
    /// # Errors
    /// If the Secret cannot be read.
    pub async fn brought_ca(
        &self,
        name: &str,
    ) -> Result<Option<BTreeMap<String, Vec<u8>>>, SharedError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let found = secrets.get_opt(name).await.map_err(self.failed("read the CA's Secret"))?;
        let entries = |secret: Secret| secret.data.unwrap_or_default().into_iter();
        Ok(found.map(|secret| entries(secret).map(|(name, bytes)| (name, bytes.0)).collect()))
    }

    /// What is known of the roots, if it has been written.
    ///
    /// # Errors
    /// If the Secret cannot be read.
    pub async fn roots(&self) -> Result<Option<KeptRoots>, SharedError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let failed = self.failed("read Secret hauberk-roots");
        let Some(secret) = secrets.get_opt(ROOTS).await.map_err(failed)? else { return Ok(None) };
        let bytes = secret.data.unwrap_or_default().remove(ROOTS_KEY);
        // One without it is damaged: empty bytes are nothing that could be read.
        let bytes = bytes.map(|bytes| bytes.0).unwrap_or_default();
        Ok(Some(KeptRoots { bytes, version: secret.metadata.resource_version }))
    }

    /// Writes what is known of the roots in place of what was read. Returns whether it is kept: nobody else
    /// has written meanwhile.
    ///
    /// # Errors
    /// If the Secret cannot be written.
    pub async fn keep_roots(
        &self,
        bytes: &[u8],
        read: Option<&KeptRoots>,
    ) -> Result<bool, SharedError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let version = read.and_then(|read| read.version.clone());
        let secret = Secret {
            metadata: ObjectMeta { resource_version: version, ..self.named(ROOTS) },
            data: Some(BTreeMap::from([(ROOTS_KEY.to_owned(), ByteString(bytes.to_vec()))])),
            type_: Some("hauberk.dev/roots".to_owned()),
            ..Secret::default()
        };
        let written = match read {
            Some(_) => secrets.replace(ROOTS, &PostParams::default(), &secret).await,
            None => secrets.create(&PostParams::default(), &secret).await,
        };
        match written {
            Ok(_) => Ok(true),
            Err(error) if is_conflict(&error) || is_gone(&error) => Ok(false),
            Err(error) => Err(self.failed("write Secret hauberk-roots")(error)),
        }
    }

    /// The roots that agents are told of, if they have been told of any.
    ///
    /// # Errors
    /// If the ConfigMap cannot be read.
    pub async fn published_roots(&self) -> Result<Option<PublishedRoots>, SharedError> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let failed = self.failed("read ConfigMap hauberk-trust-bundle");
        Ok(maps.get_opt(TRUST_BUNDLE).await.map_err(failed)?.map(PublishedRoots))
    }

    /// Keeps the CA's files, unless another replica was first. Returns whether these are kept.
    ///
    /// # Errors
    /// If the Secret cannot be written.
    pub async fn keep_ca(&self, files: BTreeMap<String, Vec<u8>>) -> Result<bool, SharedError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let secret = Secret {
            metadata: self.named(CA_SECRET),
            // Nobody replaces the root of a mesh by mistake.
            immutable: Some(true),
            data: Some(files.into_iter().map(|(name, bytes)| (name, ByteString(bytes))).collect()),
            type_: Some("hauberk.dev/ca".to_owned()),
            ..Secret::default()
        };
        match secrets.create(&PostParams::default(), &secret).await {
            Ok(_) => Ok(true),
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(self.failed("create Secret hauberk-ca")(error)),
        }
    }

    /// Writes the roots that agents are told of in place of what was read. Returns whether they are published:
    /// nobody else has written meanwhile.
    ///
    /// # Errors
    /// If the ConfigMap cannot be written.
    pub async fn publish_roots(
        &self,
        pem: &str,
        read: Option<PublishedRoots>,
    ) -> Result<bool, SharedError> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let data = BTreeMap::from([(TRUST_BUNDLE_KEY.to_owned(), pem.to_owned())]);
        let written = match read {
            // It has the version that was read.
            Some(PublishedRoots(map)) => {
                let map = ConfigMap { data: Some(data), ..map };
                maps.replace(TRUST_BUNDLE, &PostParams::default(), &map).await
            }
            None => {
                let map = ConfigMap {
                    metadata: self.named(TRUST_BUNDLE),
                    data: Some(data),
                    ..ConfigMap::default()
                };
                maps.create(&PostParams::default(), &map).await
            }
        };
        match written {
            Ok(_) => Ok(true),
            Err(error) if is_conflict(&error) || is_gone(&error) => Ok(false),
            Err(error) => Err(self.failed("write ConfigMap hauberk-trust-bundle")(error)),
        }
    }

    /// Which number a state has: the one it has already, or the next, if this replica has seen all that
    /// led to the present one.
    ///
    /// # Errors
    /// If the ConfigMap cannot be read or written.
    pub async fn agree(
        &self,
        state_hash: &str,
        seen: &BTreeMap<String, u64>,
    ) -> Result<Agreement, SharedError> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        for _ in 0..ATTEMPTS {
            let found =
                maps.get_opt(STATE).await.map_err(self.failed("read ConfigMap hauberk-state"))?;
            let kept = match &found {
                None => self.known().beginning(),
                Some(map) => {
                    let (epoch, kept) = self.read_state(map)?;
                    let known = self.known().epoch;
                    if epoch < known {
                        // As after a backup was restored, or a clock was set back: agents would refuse it.
                        Kept { epoch: known.saturating_add(1), number: 0, ..kept }
                    } else if kept.state_hash == state_hash {
                        return Ok(Agreement::Revision { epoch, revision: kept.number });
                    } else {
                        kept
                    }
                }
            };
            let missing = kept.missing_in(seen);
            if !missing.is_empty() {
                return Ok(Agreement::Behind(missing));
            }
            let next = Kept {
                epoch: kept.epoch,
                number: kept.number.saturating_add(1),
                state_hash: state_hash.to_owned(),
                seen: seen.clone(),
            };
            let text = serde_json::to_string(&next).unwrap_or_default();
            let mut map = found.unwrap_or_default();
            let exists = map.metadata.resource_version.is_some();
            if !exists {
                map.metadata = self.named(STATE);
            }
            map.data = Some(BTreeMap::from([(REVISION.to_owned(), text)]));
            let written = if exists {
                maps.replace(STATE, &PostParams::default(), &map).await
            } else {
                maps.create(&PostParams::default(), &map).await
            };
            match written {
                Ok(map) => {
                    let (epoch, _) = self.read_state(&map)?;
                    return Ok(Agreement::Revision { epoch, revision: next.number });
                }
                // Another replica was faster: look what it says.
                Err(error) if is_conflict(&error) => {}
                Err(error) => return Err(self.failed("write ConfigMap hauberk-state")(error)),
            }
        }
        // The others are faster: what they say comes in the next look.
        Ok(Agreement::Behind(Vec::new()))
    }

    /// When the numbering of the replicas' revisions began, in seconds since the Unix epoch; nothing if it has not.
    ///
    /// # Errors
    /// If the ConfigMap cannot be read.
    pub async fn epoch(&self) -> Result<Option<u64>, SharedError> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let found =
            maps.get_opt(STATE).await.map_err(self.failed("read ConfigMap hauberk-state"))?;
        found.map(|map| self.read_state(&map).map(|(epoch, _)| epoch)).transpose()
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// With its epoch: one that is made anew, in a new installation or after it was lost, is younger than all that was
    /// there before.
    fn read_state(&self, map: &ConfigMap) -> Result<(u64, Kept), SharedError> {
        let text = map.data.as_ref().and_then(|data| data.get(REVISION));
        let damaged = |why: String| SharedError::Damaged {
            object: "ConfigMap hauberk-state",
            namespace: self.namespace.clone(),
            why,
        };
        let text = text.ok_or_else(|| damaged(format!("it has no {REVISION}")))?;
        let kept: Kept = serde_json::from_str(text).map_err(|error| damaged(error.to_string()))?;
        let created = map.metadata.creation_timestamp.as_ref();
        let created = created.and_then(|time| u64::try_from(time.0.as_second()).ok());
        let created =
            created.ok_or_else(|| damaged("it has no time of its creation".to_owned()))?;
        let epoch = created.max(kept.epoch);
        self.known().learn(epoch, &kept);
        Ok((epoch, kept))
    }

    fn named(&self, name: &str) -> ObjectMeta {
        let labels = [
            ("app.kubernetes.io/name", "hauberk"),
            ("app.kubernetes.io/component", "control-plane"),
        ];
        ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(self.namespace.clone()),
            labels: Some(
                labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().collect(),
            ),
            ..ObjectMeta::default()
        }
    }

    fn failed(&self, what: &'static str) -> impl Fn(kube::Error) -> SharedError {
        let namespace = self.namespace.clone();
        move |error| SharedError::Api {
            what,
            namespace: namespace.clone(),
            source: Box::new(error),
        }
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The date of an answer: RFC 9110, section 5.6.7.
fn read_date(text: &[u8]) -> Option<Timestamp> {
    let date = DateTimeParser::new().parse_timestamp(text).ok()?;
    Some(Timestamp::from_unix_seconds(date.as_second()))
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

/// It was there when it was read.
fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_may_only_follow_one_that_it_knows_all_of() {
        let eyes = |list: &[(&str, u64)]| -> BTreeMap<String, u64> {
            list.iter().map(|(kind, version)| ((*kind).to_owned(), *version)).collect()
        };
        let kept = Kept { number: 3, seen: eyes(&[("Pod", 9), ("Node", 4)]), ..Kept::default() };
        for (seen, missing) in [
            (eyes(&[("Pod", 9), ("Node", 4)]), vec![]),
            (eyes(&[("Pod", 10), ("Node", 4), ("Service", 1)]), vec![]),
            (eyes(&[("Pod", 10), ("Node", 3)]), vec!["Node"]),
            (eyes(&[("Pod", 10)]), vec!["Node"]),
            (eyes(&[]), vec!["Node", "Pod"]),
        ] {
            assert_eq!(kept.missing_in(&seen), missing, "{seen:?}");
        }
        assert!(Kept::default().missing_in(&eyes(&[])).is_empty());

        // Also if somebody deletes what they agreed in.
        let mut known = Known::default();
        assert!(known.beginning().missing_in(&eyes(&[])).is_empty(), "a new installation");
        known.learn(1_000, &kept);
        known.learn(900, &Kept { seen: eyes(&[("Pod", 7), ("Service", 2)]), ..Kept::default() });
        let beginning = known.beginning();
        assert_eq!((beginning.epoch, beginning.number), (1_001, 0));
        assert_eq!(beginning.seen, eyes(&[("Pod", 9), ("Node", 4), ("Service", 2)]));
    }

    #[test]
    fn the_date_of_an_answer_is_read_or_there_is_none() {
        let wanted: Option<Timestamp> = "2026-07-01T12:00:09Z".parse().ok();
        assert!(wanted.is_some());
        assert_eq!(read_date(b"Wed, 01 Jul 2026 12:00:09 GMT"), wanted);
        for text in ["", "now", "2026-07-01T12:00:09Z", "Wed, 01 Jul 2026"] {
            assert_eq!(read_date(text.as_bytes()), None, "{text}");
        }
    }
}
