//! Whether another agent has taken this one's place.

use tokio::sync::watch;

/// Whether another agent has taken this one's place: for as long as this is so, that one changes rules and
/// files, renews the node certificate, and speaks for the node. Clones tell the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Replaced(watch::Sender<bool>);

impl Replaced {
    pub(crate) fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    pub(crate) fn set(&self) {
        self.0.send_replace(true);
    }

    pub(crate) fn clear(&self) {
        self.0.send_replace(false);
    }

    /// Done when it is so.
    pub(crate) async fn wait_set(&self) {
        self.wait(true).await;
    }

    /// Done when it is not, or no longer, so.
    pub(crate) async fn wait_clear(&self) {
        self.wait(false).await;
    }

    async fn wait(&self, wanted: bool) {
        let mut changes = self.0.subscribe();
        // The sender lives in `self`, so that waiting cannot fail while this is borrowed.
        drop(changes.wait_for(|set| *set == wanted).await);
    }
}
