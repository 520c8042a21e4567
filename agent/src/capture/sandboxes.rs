//! Where the network namespaces of this node's pods are: asked of the container runtime, and kept on disk for when it does
//! not answer.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use hauberk_core::policy::ProcessSelector;
use hauberk_proto::cri::{
    ListPodSandboxRequest, PodSandbox, PodSandboxFilter, PodSandboxState, PodSandboxStateValue,
    PodSandboxStatusRequest, runtime_service_client::RuntimeServiceClient,
};
use hauberk_tls::files::{read_private, write_private};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, task::JoinSet};
use tonic::transport::{Channel, Endpoint};

use crate::cni::Starting;

/// A runtime that does not answer within this is busy; it is asked again.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The longest answer that is taken, in bytes: what a kubelet takes. Pods' annotations are in it.
const LONGEST: usize = 16 * 1024 * 1024;

/// The label with which a kubelet names the pod of a sandbox.
const POD_UID: &str = "io.kubernetes.pod.uid";

type Runtime = RuntimeServiceClient<Channel>;

/// The pods' namespaces, as far as they were needed.
pub(super) struct Sandboxes {
    socket: PathBuf,
    /// Where the files of named network namespaces are, as this process sees it.
    netns_dir: PathBuf,
    channel: Option<Channel>,
    /// By the pod's UID.
    paths: HashMap<String, PathBuf>,
    /// Those of the agent before, as names of files below `netns_dir`: for as long as the runtime does not answer.
    kept: BTreeMap<String, String>,
    /// Where they are kept.
    file: PathBuf,
    /// Why the runtime could not be asked.
    problem: Option<String>,
    /// What is odd about single ones.
    problems: HashMap<String, String>,
}

impl Sandboxes {
    /// With what the agent before kept in `file`.
    pub(super) fn new(socket: PathBuf, netns_dir: PathBuf, file: PathBuf) -> Self {
        let kept = load(&file).unwrap_or_else(|error| {
            // The runtime knows as well, when it answers.
            tracing::warn!(error = format!("{error:#}"), "where pods were is not known");
            BTreeMap::new()
        });
        Self {
            socket,
            netns_dir,
            channel: None,
            paths: HashMap::new(),
            kept,
            file,
            problem: None,
            problems: HashMap::new(),
        }
    }

    /// Where a pod's namespace is.
    pub(super) fn path(&self, uid: &str) -> anyhow::Result<PathBuf> {
        if let Some(path) = self.paths.get(uid) {
            return Ok(path.clone());
        }
        // Also of a sandbox that is not ready any more: its containers may run on.
        if let Some(path) = self.kept_path(uid) {
            return Ok(path);
        }
        match self.problem.as_ref().or_else(|| self.problems.get(uid)) {
            Some(problem) => Err(anyhow!("{problem}")),
            None => Err(anyhow!("the container runtime has no sandbox of this pod yet")),
        }
    }

    fn kept_path(&self, uid: &str) -> Option<PathBuf> {
        let path = self.kept.get(uid).map(|name| self.netns_dir.join(name))?;
        path.exists().then_some(path)
    }

    /// Why the runtime could not be asked about pods, if it could not.
    pub(super) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Asks the runtime, if anything of these pods is not known or not there any more. Of those that are
    /// starting it does not know yet, and need not be asked.
    pub(super) async fn look_up(&mut self, uids: &HashSet<String>, starting: &Starting) {
        self.paths.retain(|uid, path| uids.contains(uid) && path.exists());
        for uid in uids {
            if let Some(path) = starting.path(uid) {
                self.paths.insert(uid.clone(), path);
            }
        }
        if uids.iter().all(|uid| self.paths.contains_key(uid)) {
            self.problem = None;
            self.keep(uids);
            return;
        }
        self.problem =
            self.ask(uids).await.err().map(|error| {
                format!("the container runtime at {}: {error:#}", self.socket.display())
            });
        if self.problem.is_some() {
            // It may have been restarted.
            self.channel = None;
        } else {
            self.keep(uids);
        }
    }

    /// Writes down where they are, if that has changed. What was kept of a pod that is still there stays until it is known
    /// better.
    fn keep(&mut self, uids: &HashSet<String>) {
        let name = |path: PathBuf| path.file_name()?.to_str().map(str::to_owned);
        let known = |uid: &String| self.paths.get(uid).cloned().or_else(|| self.kept_path(uid));
        let found: BTreeMap<String, String> =
            uids.iter().filter_map(|uid| Some((uid.clone(), name(known(uid)?)?))).collect();
        if found == self.kept {
            return;
        }
        let written = serde_json::to_vec_pretty(&found)
            .context("write it as JSON")
            .and_then(|text| write_private(&self.file, &text).map_err(Into::into));
        match written {
            Ok(()) => self.kept = found,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "where pods are could not be kept");
            }
        }
    }

    /// The Kubernetes namespaces of all pods of this node, by where their network namespaces are.
    ///
    /// # Errors
    /// If the runtime cannot be asked.
    pub(super) async fn pod_namespaces(&mut self) -> anyhow::Result<HashMap<PathBuf, String>> {
        let asking = async {
            let mut runtime = self.runtime().await?;
            let mut found = HashMap::new();
            // Also those that are not ready: their containers may run on.
            for sandbox in list(&mut runtime, PodSandboxFilter::default()).await? {
                let request = PodSandboxStatusRequest { pod_sandbox_id: sandbox.id, verbose: true };
                let status = runtime
                    .pod_sandbox_status(request)
                    .await
                    .map_err(|status| anyhow!("{}", status.message()))?
                    .into_inner();
                let info = status.info.get("info").map(String::as_str).unwrap_or_default();
                // One in the host's network has no namespace of its own.
                if let Ok(name) = network_namespace(info) {
                    let namespace = sandbox.metadata.map(|metadata| metadata.namespace);
                    found.insert(self.netns_dir.join(name), namespace.unwrap_or_default());
                }
            }
            Ok(found)
        };
        tokio::time::timeout(TIMEOUT, asking)
            .await
            .unwrap_or_else(|_| {
                Err(anyhow!("the container runtime did not answer within {TIMEOUT:?}"))
            })
            .with_context(|| format!("ask the container runtime at {}", self.socket.display()))
    }

    async fn runtime(&mut self) -> anyhow::Result<Runtime> {
        let channel = match &self.channel {
            Some(channel) => channel.clone(),
            None => self.channel.insert(connect(&self.socket).await?).clone(),
        };
        Ok(RuntimeServiceClient::new(channel).max_decoding_message_size(LONGEST))
    }

    /// About each pod by itself: what others have in their annotations makes no answer too long, and one whose sandbox is odd,
    /// or was taken down meanwhile, is no trouble of the others.
    async fn ask(&mut self, uids: &HashSet<String>) -> anyhow::Result<()> {
        let mut runtime = in_time(self.runtime()).await?;
        self.problems.clear();
        let mut asking = JoinSet::new();
        for uid in uids.iter().filter(|uid| !self.paths.contains_key(*uid)) {
            let listed = in_time(list(&mut runtime, ready_of(uid))).await;
            // A sandbox that was made anew is beside the old one for a while.
            let newest = newest_ready(listed.context("list the pods' sandboxes")?, uid);
            let Some(id) = newest else { continue };
            let (mut runtime, uid) = (runtime.clone(), uid.clone());
            asking.spawn(async move {
                let found = in_time(namespace_of(&mut runtime, &id)).await;
                (uid, found.with_context(|| format!("sandbox {id}")))
            });
        }
        while let Some(asked) = asking.join_next().await {
            match asked.context("ask about a sandbox")? {
                (uid, Ok(name)) => drop(self.paths.insert(uid, self.netns_dir.join(name))),
                (uid, Err(error)) => drop(self.problems.insert(uid, format!("{error:#}"))),
            }
        }
        Ok(())
    }
}

/// What comes of it within the time that a runtime has for an answer.
async fn in_time<T>(asking: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let asked = tokio::time::timeout(TIMEOUT, asking).await;
    asked.unwrap_or_else(|_| Err(anyhow!("no answer within {TIMEOUT:?}")))
}

/// Selects the sandboxes of a pod that are ready.
fn ready_of(uid: &str) -> PodSandboxFilter {
    let state = PodSandboxStateValue { state: PodSandboxState::SandboxReady.into() };
    let label_selector = [(POD_UID.to_owned(), uid.to_owned())].into();
    PodSandboxFilter { state: Some(state), label_selector }
}

/// The name of a sandbox's network namespace.
async fn namespace_of(runtime: &mut Runtime, id: &str) -> anyhow::Result<String> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
    let asked = runtime.pod_sandbox_status(request).await;
    let status = asked.map_err(|status| anyhow!("{}", status.message()))?.into_inner();
    network_namespace(status.info.get("info").map(String::as_str).unwrap_or_default())
}

/// The sandboxes that a filter selects.
async fn list(runtime: &mut Runtime, filter: PodSandboxFilter) -> anyhow::Result<Vec<PodSandbox>> {
    let listed = runtime.list_pod_sandbox(ListPodSandboxRequest { filter: Some(filter) }).await;
    let listed = listed.map_err(|status| anyhow!("{}", status.message()))?;
    Ok(listed.into_inner().items)
}

/// The newest of a pod's sandboxes, whatever else a runtime has listed.
fn newest_ready(listed: Vec<PodSandbox>, uid: &str) -> Option<String> {
    let ready = listed.into_iter().filter(|sandbox| {
        sandbox.state() == PodSandboxState::SandboxReady
            && sandbox.metadata.as_ref().is_some_and(|metadata| metadata.uid == uid)
    });
    ready.max_by_key(|sandbox| sandbox.created_at).map(|sandbox| sandbox.id)
}

/// What was kept.
///
/// # Errors
/// If it is not as it was written.
fn load(file: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let Some(text) = read_private(file)? else { return Ok(BTreeMap::new()) };
    let damaged = || format!("{} is damaged", file.display());
    let kept: BTreeMap<String, String> = serde_json::from_slice(&text).with_context(damaged)?;
    match kept.values().find(|name| !ProcessSelector::is_network_namespace(name)) {
        None => Ok(kept),
        Some(name) => {
            Err(anyhow!("{name:?} is the name of no network namespace")).with_context(damaged)
        }
    }
}

async fn connect(socket: &Path) -> anyhow::Result<Channel> {
    let path = socket.to_owned();
    Endpoint::from_static("http://runtime.invalid")
        .connect_timeout(TIMEOUT)
        .connect_with_connector(tower::service_fn(move |_: tonic::transport::Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .with_context(|| format!("connect to the container runtime at {}", socket.display()))
}

/// The name of the network namespace in what a runtime says of a sandbox. Only the name: the runtime's
/// paths are those of the host.
fn network_namespace(info: &str) -> anyhow::Result<String> {
    let info: serde_json::Value =
        serde_json::from_str(info).context("the runtime's answer is not JSON")?;
    let namespaces = info.pointer("/runtimeSpec/linux/namespaces").and_then(|list| list.as_array());
    let path = namespaces
        .into_iter()
        .flatten()
        .find(|namespace| namespace.get("type").is_some_and(|kind| kind == "network"))
        .and_then(|namespace| namespace.get("path")?.as_str())
        .context("the runtime names no network namespace")?;
    netns_file(path)
}

/// The name of a network namespace's file, of a path on the host.
pub(crate) fn netns_file(path: &str) -> anyhow::Result<String> {
    ["/run/netns/", "/var/run/netns/"]
        .into_iter()
        .find_map(|folder| path.strip_prefix(folder))
        .filter(|name| ProcessSelector::is_network_namespace(name))
        .map(str::to_owned)
        .with_context(|| format!("the network namespace {path:?} is not in /run/netns"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    /// A folder with one network namespace, as far as its name is concerned.
    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir(folder.path().join("netns")).unwrap();
            std::fs::write(folder.path().join("netns/cni-1"), "").unwrap();
            Self(folder)
        }

        fn file(&self) -> PathBuf {
            self.0.path().join("sandboxes.json")
        }

        /// Of an agent that starts, beside a runtime that is not there.
        fn sandboxes(&self) -> Sandboxes {
            let at = |name: &str| self.0.path().join(name);
            Sandboxes::new(at("runtime.sock"), at("netns"), self.file())
        }
    }

    fn uids(of: &[&str]) -> HashSet<String> {
        of.iter().map(|uid| (*uid).to_owned()).collect()
    }

    #[tokio::test]
    async fn what_was_known_is_taken_from_disk_while_the_runtime_does_not_answer() {
        let place = Place::new();
        let mut before = place.sandboxes();
        let path = place.0.path().join("netns/cni-1");
        before.paths.insert("pod-1".to_owned(), path.clone());
        before.look_up(&uids(&["pod-1"]), &Starting::default()).await;
        assert_eq!(before.problem(), None);

        let mut after = place.sandboxes();
        after.look_up(&uids(&["pod-1", "pod-2"]), &Starting::default()).await;
        assert!(after.problem().is_some_and(|problem| problem.contains("runtime.sock")));
        assert_eq!(after.path("pod-1").unwrap(), path);
        assert!(after.path("pod-2").unwrap_err().to_string().contains("runtime.sock"));
        // Nothing of it is forgotten meanwhile, nor when the runtime has no sandbox that is ready; and what is gone is not
        // given out.
        assert_eq!(place.sandboxes().kept.len(), 1);
        after.problem = None;
        assert_eq!(after.path("pod-1").unwrap(), path);
        after.keep(&uids(&["pod-1"]));
        assert_eq!(place.sandboxes().kept.len(), 1);
        std::fs::remove_file(&path).unwrap();
        assert!(after.path("pod-1").is_err());
    }

    #[tokio::test]
    async fn what_is_known_from_elsewhere_needs_no_runtime_and_pods_that_left_are_not_kept() {
        let place = Place::new();
        let mut sandboxes = place.sandboxes();
        let path = place.0.path().join("netns/cni-1");
        sandboxes.paths.insert("pod-1".to_owned(), path);
        sandboxes.look_up(&uids(&["pod-1"]), &Starting::default()).await;
        assert_eq!(place.sandboxes().kept, [("pod-1".to_owned(), "cni-1".to_owned())].into());
        sandboxes.look_up(&uids(&[]), &Starting::default()).await;
        assert!(place.sandboxes().kept.is_empty());
    }

    #[test]
    fn a_file_that_is_damaged_is_not_used() {
        let place = Place::new();
        for text in ["", "[]", r#"{"pod-1": "../cni-1"}"#, r#"{"pod-1": 7}"#] {
            write_private(&place.file(), text.as_bytes()).unwrap();
            assert!(load(&place.file()).is_err(), "{text}");
            assert!(place.sandboxes().kept.is_empty());
        }
    }

    #[test]
    fn of_a_pods_sandboxes_the_newest_that_is_ready_counts() {
        let sandbox = |id: &str, uid: &str, created_at: i64, state: PodSandboxState| PodSandbox {
            id: id.to_owned(),
            metadata: Some(hauberk_proto::cri::PodSandboxMetadata {
                uid: uid.to_owned(),
                ..Default::default()
            }),
            state: state.into(),
            created_at,
        };
        let listed = vec![
            sandbox("old", "pod-1", 1, PodSandboxState::SandboxReady),
            sandbox("new", "pod-1", 2, PodSandboxState::SandboxReady),
            sandbox("over", "pod-1", 3, PodSandboxState::SandboxNotready),
            sandbox("other", "pod-2", 4, PodSandboxState::SandboxReady),
        ];
        assert_eq!(newest_ready(listed, "pod-1").as_deref(), Some("new"));
        assert_eq!(newest_ready(Vec::new(), "pod-1"), None);
    }

    fn info(namespaces: &str) -> String {
        format!(r#"{{"pid": 7, "runtimeSpec": {{"linux": {{"namespaces": {namespaces}}}}}}}"#)
    }

    #[test]
    fn the_namespace_is_found_by_its_name_below_run_netns_only() {
        for folder in ["/run/netns", "/var/run/netns"] {
            let listed =
                format!(r#"[{{"type": "ipc"}}, {{"type": "network", "path": "{folder}/cni-1"}}]"#);
            assert_eq!(network_namespace(&info(&listed)).unwrap(), "cni-1");
        }
        for wrong in [
            r#"[{"type": "network", "path": "/proc/7/ns/net"}]"#,
            r#"[{"type": "network", "path": "/run/netns/.."}]"#,
            r#"[{"type": "network"}]"#,
            "[]",
            "7",
        ] {
            assert!(network_namespace(&info(wrong)).is_err(), "{wrong}");
        }
        assert!(network_namespace("").is_err());
    }
}
