//! The workloads behind one mesh listener.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use hauberk_tls::ByServerName;

use crate::context::Local;

/// Who lives behind a listener, by key, and their certificates, by the name that callers ask for.
#[derive(Default)]
pub(crate) struct Locals {
    by_key: ArcSwap<HashMap<String, Arc<Local>>>,
    pub(super) names: Arc<ByServerName>,
}

impl Locals {
    pub(crate) fn get(&self, key: &str) -> Option<Arc<Local>> {
        self.by_key.load().get(key).cloned()
    }

    pub(super) fn store(&self, locals: Vec<Arc<Local>>) {
        self.names.store(locals.iter().map(|local| local.identity.slot.clone()));
        self.by_key.store(Arc::new(
            locals.into_iter().map(|local| (local.workload.key(), local)).collect(),
        ));
    }

    /// A caller that comes before the first certificate waits for it, rather than being refused.
    pub(crate) async fn wait_for_certificate(&self) {
        let locals: Vec<Arc<Local>> = self.by_key.load().values().cloned().collect();
        for local in locals {
            if local.identity.slot.load().is_none() {
                local.has_certificate().await;
            }
        }
    }
}
