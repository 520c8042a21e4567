//! Which replica of the control plane does what only one may do.

use std::time::Duration;

use kube::Client;
use kube_lease_manager::{LeaseCreateMode, LeaseManagerBuilder};
use tokio::sync::watch;

/// The Lease.
const LEASE: &str = "hauberk-control-plane";

/// A leader that says nothing for this long is none any more, in seconds.
const DURATION: u64 = 15;

/// How long before that it says something, in seconds.
const GRACE: u64 = 5;

/// When the lease cannot be taken part in, it is tried again after this.
const RETRY: Duration = Duration::from_secs(5);

/// Takes part in the election until the program ends; the receiver tells whether this replica leads.
#[must_use]
pub fn election(client: Client, namespace: String, replica: String) -> watch::Receiver<bool> {
    let (sender, leads) = watch::channel(false);
    tokio::spawn(async move {
        loop {
            if let Err(error) = take_part(&client, &namespace, &replica, &sender).await {
                tracing::warn!(%error, "the election of a leader failed, it is tried again");
            }
            sender.send_replace(false);
            tokio::time::sleep(RETRY).await;
        }
    });
    leads
}

async fn take_part(
    client: &Client,
    namespace: &str,
    replica: &str,
    sender: &watch::Sender<bool>,
) -> Result<(), kube_lease_manager::LeaseManagerError> {
    let manager = LeaseManagerBuilder::new(client.clone(), LEASE)
        .with_namespace(namespace)
        .with_identity(replica)
        .with_field_manager(replica)
        .with_create_mode(LeaseCreateMode::AutoCreate)
        .with_duration(DURATION)
        .with_grace(GRACE)
        .build()
        .await?;
    let (mut leads, task) = manager.watch().await;
    while leads.changed().await.is_ok() {
        let now = *leads.borrow_and_update();
        tracing::info!(leads = now, "the leader of the control plane's replicas");
        sender.send_replace(now);
    }
    if let Ok(Err(error)) = task.await {
        return Err(error);
    }
    Ok(())
}
