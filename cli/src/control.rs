//! The way to the control plane: its local socket, or the cluster that it is in.

use std::{
    future::Future,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use hauberk_control_plane::app::OPERATOR_PORT;
use hauberk_kubernetes::Access;
use hauberk_proto::v1::operator_client::OperatorClient;
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

/// Where a control plane on this machine listens, unless it is told otherwise.
const USUAL_SOCKET: &str = "/var/lib/hauberk/control-plane/operator.sock";

/// A big mesh has a long status.
const LONGEST_ANSWER: usize = 256 * 1024 * 1024;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Whom to ask.
#[derive(Clone, clap::Args)]
pub(crate) struct Way {
    /// The operator socket of a control plane on this machine, in its data folder. Without it: the usual
    /// one, if it is there, else the cluster of the kubeconfig.
    #[arg(long, env = "HAUBERK_SOCKET", value_name = "FILE")]
    pub(crate) socket: Option<PathBuf>,

    /// The namespace of the mesh, in a cluster.
    #[arg(
        long,
        env = "HAUBERK_KUBE_NAMESPACE",
        value_name = "NAME",
        default_value = "hauberk-system"
    )]
    kube_namespace: String,

    /// The context of the kubeconfig, if it is not the current one.
    #[arg(long, env = "HAUBERK_KUBE_CONTEXT", value_name = "NAME", conflicts_with = "socket")]
    kube_context: Option<String>,
}

pub(crate) type Client = OperatorClient<Channel>;

impl Way {
    /// Every replica of the control plane; at least one.
    pub(crate) async fn clients(&self) -> anyhow::Result<Vec<Client>> {
        let usual = Path::new(USUAL_SOCKET);
        let socket = match &self.socket {
            Some(socket) => Some(socket.as_path()),
            None => (self.kube_context.is_none() && usual.exists()).then_some(usual),
        };
        if let Some(socket) = socket {
            return Ok(vec![client(connect(socket).await?)]);
        }
        let access =
            Access::infer(self.kube_context.as_deref(), &self.kube_namespace).await.with_context(
                || format!("there is no control plane on this machine ({USUAL_SOCKET}); give --socket, or set KUBECONFIG \
                     to ask that of a cluster"),
            )?;
        let mut clients = Vec::new();
        for pod in access.control_planes().await? {
            clients.push(client(forwarded(access.clone(), pod).await?));
        }
        Ok(clients)
    }
}

fn client(channel: Channel) -> Client {
    OperatorClient::new(channel).max_decoding_message_size(LONGEST_ANSWER)
}

/// Does some work with the clients.
pub(crate) fn run<T, F>(work: F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// The answer, or what the control plane says against it.
pub(crate) fn answer<T>(outcome: Result<tonic::Response<T>, tonic::Status>) -> anyhow::Result<T> {
    match outcome {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => bail!("{}", status.message()),
    }
}

async fn forwarded(access: Access, pod: String) -> anyhow::Result<Channel> {
    let shown = pod.clone();
    Endpoint::from_static("http://operator.hauberk.internal")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let (access, pod) = (access.clone(), pod.clone());
            async move { access.forward(&pod, OPERATOR_PORT).await.map(TokioIo::new) }
        }))
        .await
        .map_err(|error| {
            anyhow::anyhow!(
                "no connection to the control plane's pod {shown} ({}); it takes the permission to create \
                 pods/portforward in its namespace",
                innermost(&error)
            )
        })
}

pub(crate) async fn connect(socket: &Path) -> anyhow::Result<Channel> {
    let path = socket.to_owned();
    Endpoint::from_static("http://operator.hauberk.internal")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        // tonic's own texts say the same thing twice.
        .map_err(|error| {
            anyhow::anyhow!(
                "no control plane answers on {} ({}); run this on its machine, as its user, or \
                 give --socket",
                socket.display(),
                innermost(&error)
            )
        })
}

fn innermost(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), innermost)
}
