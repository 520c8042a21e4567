//! What is known of all objects of one kind, kept up to date by a list and a watch.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::StreamExt;
use kube::{
    Api, Resource, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

/// How long a kind may stay unlisted before that is told: most often, a permission is missing.
const PATIENCE: Duration = Duration::from_secs(10);

/// All objects of a kind by `namespace/name`, reduced to what is needed of them.
pub(crate) struct Watched<T> {
    what: &'static str,
    inner: Mutex<Inner<T>>,
}

struct Inner<T> {
    objects: BTreeMap<String, T>,
    /// Whether all of them have been listed once.
    listed: bool,
    /// The newest resource version seen.
    version: u64,
}

impl<T: Send + 'static> Watched<T> {
    /// Follows the objects of `api` until the program ends. `changed` counts up with each change.
    pub(crate) fn follow<K>(
        what: &'static str,
        api: Api<K>,
        changed: watch::Sender<u64>,
        reduce: impl Fn(K) -> T + Send + 'static,
    ) -> Arc<Self>
    where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        Self::follow_some(what, api, watcher::Config::default(), changed, reduce)
    }

    /// The same, but only those that `config` selects.
    pub(crate) fn follow_some<K>(
        what: &'static str,
        api: Api<K>,
        config: watcher::Config,
        changed: watch::Sender<u64>,
        reduce: impl Fn(K) -> T + Send + 'static,
    ) -> Arc<Self>
    where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let inner = Inner { objects: BTreeMap::new(), listed: false, version: 0 };
        let watched = Arc::new(Self { what, inner: Mutex::new(inner) });
        let this = watched.clone();
        tokio::spawn(async move {
            let events = watcher(api, config).default_backoff();
            let mut events = std::pin::pin!(events);
            let mut listing = BTreeMap::new();
            loop {
                let event = match tokio::time::timeout(PATIENCE, events.next()).await {
                    Ok(Some(event)) => event,
                    Ok(None) => return,
                    Err(_) if this.is_listed() => continue,
                    Err(_) => {
                        tracing::warn!(kind = this.what, "still waiting for the first list");
                        continue;
                    }
                };
                let news = match event {
                    Ok(event) => this.take(event, &mut listing, &reduce),
                    Err(error) => {
                        // The last state stays in force; the watcher tries again by itself.
                        tracing::warn!(kind = this.what, %error, "the watch failed, it is tried again");
                        false
                    }
                };
                if news {
                    changed.send_modify(|count| *count += 1);
                }
            }
        });
        watched
    }

    /// Returns whether that is a change.
    fn take<K: Resource>(
        &self,
        event: watcher::Event<K>,
        listing: &mut BTreeMap<String, T>,
        reduce: impl Fn(K) -> T,
    ) -> bool {
        match event {
            watcher::Event::Init => {
                listing.clear();
                false
            }
            watcher::Event::InitApply(object) => {
                self.saw(&object);
                listing.insert(key(&object), reduce(object));
                false
            }
            watcher::Event::InitDone => {
                let mut inner = self.lock();
                inner.objects = std::mem::take(listing);
                inner.listed = true;
                true
            }
            watcher::Event::Apply(object) => {
                self.saw(&object);
                let key = key(&object);
                self.lock().objects.insert(key, reduce(object));
                true
            }
            watcher::Event::Delete(object) => {
                self.saw(&object);
                self.lock().objects.remove(&key(&object)).is_some()
            }
        }
    }

    fn saw(&self, object: &impl Resource) {
        let version = object.meta().resource_version.as_deref().and_then(|text| text.parse().ok());
        let mut inner = self.lock();
        inner.version = inner.version.max(version.unwrap_or(0));
    }

    /// Whether all objects have been listed once.
    pub(crate) fn is_listed(&self) -> bool {
        self.lock().listed
    }

    /// Works on all objects, by `namespace/name`, with the newest resource version seen.
    pub(crate) fn read<R>(&self, work: impl FnOnce(&BTreeMap<String, T>, u64) -> R) -> R {
        let inner = self.lock();
        work(&inner.objects, inner.version)
    }

    pub(crate) fn what(&self) -> &'static str {
        self.what
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `namespace/name`, or the name of what has no namespace.
pub(crate) fn key(object: &impl Resource) -> String {
    match object.namespace() {
        Some(namespace) => format!("{namespace}/{}", object.name_any()),
        None => object.name_any(),
    }
}
