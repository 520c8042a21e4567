//! Where the network namespaces of this node's pods are: asked of the container runtime.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use hauberk_core::policy::ProcessSelector;
use hauberk_proto::cri::{
    ListPodSandboxRequest, PodSandboxState, PodSandboxStatusRequest,
    runtime_service_client::RuntimeServiceClient,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::cni::Starting;

/// A runtime that does not answer within this is busy; it is asked again.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The pods' namespaces, as far as they were needed.
pub(super) struct Sandboxes {
    socket: PathBuf,
    /// Where the files of named network namespaces are, as this process sees it.
    netns_dir: PathBuf,
    channel: Option<Channel>,
    /// By the pod's UID.
    paths: HashMap<String, PathBuf>,
    /// Why the runtime could not be asked.
    problem: Option<String>,
    /// What is odd about single ones.
    problems: HashMap<String, String>,
}

impl Sandboxes {
    pub(super) fn new(socket: PathBuf, netns_dir: PathBuf) -> Self {
        Self {
            socket,
            netns_dir,
            channel: None,
            paths: HashMap::new(),
            problem: None,
            problems: HashMap::new(),
        }
    }

    /// Where a pod's namespace is.
    pub(super) fn path(&self, uid: &str) -> anyhow::Result<&Path> {
        match (self.paths.get(uid), self.problem.as_ref().or_else(|| self.problems.get(uid))) {
            (Some(path), _) => Ok(path),
            (None, Some(problem)) => Err(anyhow!("{problem}")),
            (None, None) => Err(anyhow!("the container runtime has no sandbox of this pod yet")),
        }
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
            return;
        }
        let asked = tokio::time::timeout(TIMEOUT, self.ask(uids)).await;
        self.problem = match asked {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_) => Some(format!(
                "the container runtime at {} did not answer within {TIMEOUT:?}",
                self.socket.display()
            )),
        };
        if self.problem.is_some() {
            // It may have been restarted.
            self.channel = None;
        }
    }

    /// The Kubernetes namespaces of all pods of this node, by where their network namespaces are.
    ///
    /// # Errors
    /// If the runtime cannot be asked.
    pub(super) async fn pod_namespaces(&mut self) -> anyhow::Result<HashMap<PathBuf, String>> {
        let asking = async {
            let channel = match &self.channel {
                Some(channel) => channel.clone(),
                None => self.channel.insert(connect(&self.socket).await?).clone(),
            };
            let mut runtime = RuntimeServiceClient::new(channel);
            let listed = runtime
                .list_pod_sandbox(ListPodSandboxRequest {})
                .await
                .map_err(|status| anyhow!("{}", status.message()))?
                .into_inner();
            let mut found = HashMap::new();
            for sandbox in listed.items {
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

    async fn ask(&mut self, uids: &HashSet<String>) -> anyhow::Result<()> {
        let channel = match &self.channel {
            Some(channel) => channel.clone(),
            None => self.channel.insert(connect(&self.socket).await?).clone(),
        };
        let mut runtime = RuntimeServiceClient::new(channel);
        let listed = runtime
            .list_pod_sandbox(ListPodSandboxRequest {})
            .await
            .map_err(|status| anyhow!("{}", status.message()))
            .context("list the pods' sandboxes")?
            .into_inner();
        // A sandbox that was made anew is beside the old one for a while.
        let mut newest: HashMap<String, (i64, String)> = HashMap::new();
        for sandbox in listed.items {
            let ready = sandbox.state() == PodSandboxState::SandboxReady;
            let uid = sandbox.metadata.map(|metadata| metadata.uid).unwrap_or_default();
            if !ready || !uids.contains(&uid) || self.paths.contains_key(&uid) {
                continue;
            }
            let entry = newest.entry(uid).or_default();
            if sandbox.created_at >= entry.0 {
                *entry = (sandbox.created_at, sandbox.id);
            }
        }
        self.problems.clear();
        for (uid, (_, id)) in newest {
            let request = PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: true };
            let asked = runtime.pod_sandbox_status(request).await;
            let found =
                asked.map_err(|status| anyhow!("{}", status.message())).and_then(|status| {
                    let status = status.into_inner();
                    network_namespace(
                        status.info.get("info").map(String::as_str).unwrap_or_default(),
                    )
                });
            // One that is odd, or was taken down meanwhile, is no trouble of the others.
            match found.with_context(|| format!("sandbox {id}")) {
                Ok(name) => drop(self.paths.insert(uid, self.netns_dir.join(name))),
                Err(error) => drop(self.problems.insert(uid, format!("{error:#}"))),
            }
        }
        Ok(())
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
