//! How the API server comes to the admission webhook. Its configuration is installed with the mesh; what is not
//! known then, the CA and the path, is filled in.

use k8s_openapi::{
    ByteString,
    api::admissionregistration::v1::{ValidatingWebhook, ValidatingWebhookConfiguration},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;

/// The configuration.
const CONFIGURATION: &str = "hauberk-control-plane";

/// The one webhook in it.
const WEBHOOK: &str = "warnings.hauberk.dev";

/// What is filled in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Registration {
    /// The root of the webhook's certificate, PEM; empty if the API server has not been told.
    pub ca_bundle: Vec<u8>,
    /// Where the API server asks.
    pub path: Option<String>,
}

/// What the API server has been told; nothing if there is no configuration.
///
/// # Errors
/// If the API server refuses, or cannot be asked.
pub async fn registration(client: &Client) -> Result<Option<Registration>, kube::Error> {
    let api: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let webhooks = api.get_opt(CONFIGURATION).await?.and_then(|found| found.webhooks);
    let mut webhooks = webhooks.into_iter().flatten();
    Ok(webhooks.find(|webhook| webhook.name == WEBHOOK).map(read))
}

fn read(webhook: ValidatingWebhook) -> Registration {
    let config = webhook.client_config;
    Registration {
        ca_bundle: config.ca_bundle.map(|bundle| bundle.0).unwrap_or_default(),
        path: config.service.and_then(|service| service.path),
    }
}

/// Tells the API server. Makes no configuration: one that was deleted a moment ago stays deleted.
///
/// # Errors
/// If the API server refuses, or cannot be asked, or there is no configuration.
pub async fn register(client: &Client, told: &Registration) -> Result<(), kube::Error> {
    let api: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let patch = json!({"webhooks": [{
        "name": WEBHOOK,
        "clientConfig": {
            "caBundle": ByteString(told.ca_bundle.clone()),
            "service": {"path": told.path},
        },
    }]});
    // Merged into what is there; a patch that is applied would make an object that is not.
    api.patch(CONFIGURATION, &PatchParams::default(), &Patch::Strategic(patch)).await?;
    Ok(())
}
