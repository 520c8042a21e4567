//! The way to the control plane in a cluster, for people: through the Kubernetes API, with their kubeconfig.

use std::io;

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config, ResourceExt,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::io::{AsyncRead, AsyncWrite};

/// The control plane's pods.
const CONTROL_PLANE: &str =
    "app.kubernetes.io/name=hauberk,app.kubernetes.io/component=control-plane";

/// Why there is no way.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// There is no kubeconfig, or it is damaged.
    #[error("no cluster is known: {0}")]
    NoCluster(String),
    /// The API server refused, or could not be asked.
    #[error("the Kubernetes API: {0}")]
    Api(#[source] Box<kube::Error>),
    /// No pod of the control plane is ready.
    #[error(
        "no pod of the control plane is ready in namespace {0}; install it, or name its namespace with \
         --kube-namespace"
    )]
    NoControlPlane(String),
}

/// A cluster, and the namespace of the mesh in it.
#[derive(Clone)]
pub struct Access {
    client: Client,
    namespace: String,
}

impl Access {
    /// The cluster of a context of the user's kubeconfig, or of its current one, or the one that this process
    /// runs in.
    ///
    /// # Errors
    /// If there is none.
    pub async fn infer(context: Option<&str>, namespace: &str) -> Result<Self, AccessError> {
        let config = match context {
            None => {
                Config::infer().await.map_err(|error| AccessError::NoCluster(error.to_string()))
            }
            Some(context) => {
                let options =
                    KubeConfigOptions { context: Some(context.to_owned()), ..Default::default() };
                let read =
                    async { Config::from_custom_kubeconfig(Kubeconfig::read()?, &options).await };
                read.await.map_err(|error| AccessError::NoCluster(error.to_string()))
            }
        }?;
        let client = Client::try_from(config).map_err(|error| AccessError::Api(Box::new(error)))?;
        Ok(Self { client, namespace: namespace.to_owned() })
    }

    /// The pods of the control plane that are ready; at least one.
    ///
    /// # Errors
    /// If there is none, or the API server cannot be asked.
    pub async fn control_planes(&self) -> Result<Vec<String>, AccessError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let found = pods
            .list(&ListParams::default().labels(CONTROL_PLANE))
            .await
            .map_err(|error| AccessError::Api(Box::new(error)))?;
        let ready: Vec<String> =
            found.into_iter().filter(is_ready).map(|pod| pod.name_any()).collect();
        if ready.is_empty() {
            return Err(AccessError::NoControlPlane(self.namespace.clone()));
        }
        Ok(ready)
    }

    /// A connection to a port of a pod.
    ///
    /// # Errors
    /// If the API server makes none.
    pub async fn forward(
        &self,
        pod: &str,
        port: u16,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut forwarder = pods.portforward(pod, &[port]).await.map_err(io::Error::other)?;
        let stream = forwarder.take_stream(port).ok_or_else(|| io::Error::other("no stream"))?;
        tokio::spawn(async move {
            // Its errors are those of the stream.
            drop(forwarder.join().await);
        });
        Ok(stream)
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    pod.metadata.deletion_timestamp.is_none() && ready.any(|condition| condition.status == "True")
}
