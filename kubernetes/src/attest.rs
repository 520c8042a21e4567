//! Who a projected service account token is: which pod, on which node.

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, UserInfo},
    core::v1::Pod,
};
use kube::{Api, Client, api::PostParams};

/// Names of what the API server says of a token beside its user.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// The pod that a token was made for, read live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttestedPod {
    /// The node that it runs on.
    pub node: String,
    /// `namespace/name`.
    pub pod: String,
    /// Its UID.
    pub uid: String,
}

/// Why a token proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The API server could not be asked.
    #[error("the Kubernetes API could not be asked: {0}")]
    Api(#[from] kube::Error),
    /// The token is none, has ended, or is for another audience.
    #[error("the token is not good for audience {audience:?}: {why}")]
    Token {
        /// The audience that it must be for.
        audience: String,
        /// What the API server says.
        why: String,
    },
    /// It is another service account's.
    #[error("the token is {user}'s, and only {wanted} attests nodes")]
    User {
        /// Whose it is.
        user: String,
        /// Whose it must be.
        wanted: String,
    },
    /// It is not bound to a pod.
    #[error("the token is not bound to a pod: mount it with a projected volume")]
    NoPod,
    /// The pod is gone, or another has its name.
    #[error("the token's pod {0} is gone")]
    Gone(String),
    /// The pod has no node.
    #[error("the token's pod {0} is not on a node")]
    NoNode(String),
}

/// Asks the API server who tokens are.
pub struct Attestor {
    client: Client,
    audience: String,
    namespace: String,
    service_account: String,
}

impl Attestor {
    /// For tokens of `audience` that are those of pods of one service account.
    #[must_use]
    pub fn new(
        client: Client,
        audience: String,
        namespace: String,
        service_account: String,
    ) -> Self {
        Self { client, audience, namespace, service_account }
    }

    /// The pod that a token is.
    ///
    /// # Errors
    /// If the token is not that of a live pod of the service account, for the audience.
    pub async fn attest(&self, token: String) -> Result<AttestedPod, AttestError> {
        let user = self.review(token).await?;
        let wanted = format!("system:serviceaccount:{}:{}", self.namespace, self.service_account);
        let name = user.username.clone().unwrap_or_default();
        if name != wanted {
            return Err(AttestError::User { user: name, wanted });
        }
        let pod_name = extra(&user, POD_NAME).ok_or(AttestError::NoPod)?;
        let uid = extra(&user, POD_UID).ok_or(AttestError::NoPod)?;
        let shown = format!("{}/{pod_name}", self.namespace);
        // Read live: what the token says of its pod was true when it was made.
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let pod = pods.get_opt(&pod_name).await?;
        let pod = pod
            .filter(|pod| pod.metadata.uid.as_deref() == Some(&uid))
            .ok_or_else(|| AttestError::Gone(shown.clone()))?;
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if pod.metadata.deletion_timestamp.is_some()
            || matches!(phase, Some("Succeeded" | "Failed"))
        {
            return Err(AttestError::Gone(shown));
        }
        let spec = pod.spec.unwrap_or_default();
        if spec.service_account_name.as_deref() != Some(&self.service_account) {
            return Err(AttestError::Gone(shown));
        }
        let node = spec.node_name.ok_or_else(|| AttestError::NoNode(shown.clone()))?;
        Ok(AttestedPod { node, pod: shown, uid })
    }

    async fn review(&self, token: String) -> Result<UserInfo, AttestError> {
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let spec =
            TokenReviewSpec { token: Some(token), audiences: Some(vec![self.audience.clone()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let reviewed = reviews.create(&PostParams::default(), &review).await?;
        let refused = |why: String| AttestError::Token { audience: self.audience.clone(), why };
        let status = reviewed.status.unwrap_or_default();
        if status.authenticated != Some(true) {
            return Err(refused(status.error.unwrap_or_else(|| "it is not authentic".to_owned())));
        }
        // An authenticator that knows no audiences answers without any: that is no proof.
        if !status.audiences.unwrap_or_default().contains(&self.audience) {
            return Err(refused("it is for another audience".to_owned()));
        }
        status.user.ok_or_else(|| refused("the API server names no user".to_owned()))
    }
}

fn extra(user: &UserInfo, name: &str) -> Option<String> {
    user.extra.as_ref()?.get(name)?.first().cloned().filter(|text| !text.is_empty())
}
