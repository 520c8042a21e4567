//! The workloads behind one mesh listener.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use hauberk_tls::{ByServerName, limiter::Shares};

use crate::{authorize, context::Local, policy::Snapshot, pool::Edge};

/// Incoming streams of one listener at once.
const MAX_STREAMS: usize = 24_576;

/// Who lives behind a listener, by key, and their certificates, by the name that callers ask for.
pub(crate) struct Locals {
    by_key: ArcSwap<HashMap<String, Arc<Local>>>,
    pub(crate) names: Arc<ByServerName>,
    /// What callers have open.
    pub(crate) streams: Arc<Shares>,
}

impl Default for Locals {
    fn default() -> Self {
        let streams = Shares::new(MAX_STREAMS);
        Self { by_key: ArcSwap::default(), names: Arc::default(), streams }
    }
}

impl Locals {
    pub(crate) fn get(&self, key: &str) -> Option<Arc<Local>> {
        self.by_key.load().get(key).cloned()
    }

    /// Who serves this port: of a namespace its only workload, of a host the one that declares it. The listener
    /// tells that, and never an address.
    pub(crate) fn serving(&self, port: u16) -> Option<Arc<Local>> {
        self.by_key
            .load()
            .values()
            .find(|local| !local.is_on_host() || local.workload.ports.contains(&port))
            .cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Local>> {
        self.by_key.load().values().cloned().collect()
    }

    /// Closes the idle sessions that are old, or lead where nothing is allowed any more.
    pub(super) fn sweep_pools(&self, snapshot: &Snapshot) {
        for local in self.by_key.load().values() {
            let source = &local.workload.identity;
            let allows = |edge: &Edge, port| {
                authorize::check(snapshot, source, &edge.destination, port).is_ok()
            };
            local.pool.sweep(allows);
            local.trunks.sweep(allows);
        }
    }

    /// They open nothing new any more.
    pub(super) fn retire_pools(&self) {
        for local in self.by_key.load().values() {
            local.pool.retire();
            local.trunks.retire();
        }
    }

    pub(super) fn store(&self, locals: Vec<Arc<Local>>) {
        self.names.store(locals.iter().map(|local| local.identity.slot.clone()));
        let locals: HashMap<String, Arc<Local>> =
            locals.into_iter().map(|local| (local.workload.key(), local)).collect();
        let before = self.by_key.swap(Arc::new(locals));
        let now = self.by_key.load();
        for (key, old) in before.iter() {
            if now.get(key).is_none_or(|new| !Arc::ptr_eq(new, old)) {
                old.pool.retire();
                old.trunks.retire();
            }
        }
    }

    /// A caller that comes before the first certificate of the one it wants waits for that, rather
    /// than being refused; for nobody else's.
    pub(crate) async fn wait_for_certificate(&self, server_name: Option<&str>) {
        let Some(slot) = server_name.and_then(|name| self.names.find(name)) else { return };
        if slot.load().is_some() {
            return;
        }
        let locals = self.by_key.load_full();
        let wanted = locals.values().find(|local| Arc::ptr_eq(&local.identity.slot, &slot));
        if let Some(local) = wanted {
            local.has_certificate().await;
        }
    }
}
