//! What is known of all objects of one kind, kept up to date by a list and a watch.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use kube::{
    Api, Resource, ResourceExt,
    api::ListParams,
    runtime::{WatchStreamExt, utils::Backoff, watcher},
};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};

/// How long a kind may stay unlisted before that is told: most often, a permission is missing.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pause after a watch has failed, doubled each time up to the longest. What changes meanwhile, agents enforce that much
/// later; there are a dozen watches, each of which asks twice in that time.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A watch that has not failed for so long begins anew with the shortest pause, and tells of its failure again.
const CALM: Duration = Duration::from_secs(10);

/// The pauses of one watch.
struct Pauses {
    next: Duration,
    failed: Option<Instant>,
}

impl Pauses {
    fn new() -> Self {
        Self { next: PAUSE, failed: None }
    }
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.failed.replace(Instant::now()).is_none_or(|failed| failed.elapsed() >= CALM) {
            self.next = PAUSE;
        }
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST_PAUSE);
        // Watches that failed together do not come back together.
        let part = getrandom::u32().map_or(1.0, |chance| f64::from(chance) / f64::from(u32::MAX));
        Some(pause.mul_f64(0.5 + part / 2.0))
    }
}

impl Backoff for Pauses {
    /// That a list begins is a success for whoever calls this, and comes before each failed one.
    fn reset(&mut self) {}
}

/// All objects of a kind by `namespace/name`, reduced to what is needed of them.
pub(crate) struct Watched<T> {
    what: &'static str,
    inner: Mutex<Inner<T>>,
    /// Somebody wants everything to be listed anew.
    doubted: Notify,
}

/// Objects and the version that they are of, always of one piece.
struct Inner<T> {
    objects: BTreeMap<String, T>,
    /// Whether all of them have been listed once.
    listed: bool,
    /// The newest resource version that is in them.
    version: u64,
}

/// A list that is not whole yet.
struct Listing<T> {
    objects: BTreeMap<String, T>,
    version: u64,
}

impl<T> Default for Listing<T> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), version: 0 }
    }
}

impl<T: PartialEq + Send + 'static> Watched<T> {
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
        let watched = Arc::new(Self::unlisted(what));
        let this = watched.clone();
        tokio::spawn(async move {
            let begin = || watcher(api.clone(), config.clone()).backoff(Pauses::new()).boxed();
            let mut events = begin();
            let mut listing = Listing::default();
            let mut told: Option<Instant> = None;
            let mut waiting =
                tokio::time::interval_at((Instant::now() + PATIENCE).into(), PATIENCE);
            loop {
                let event = tokio::select! {
                    event = events.next() => match event {
                        Some(event) => event,
                        None => return,
                    },
                    () = this.doubted.notified() => {
                        events = begin();
                        continue;
                    }
                    _ = waiting.tick(), if !this.is_listed() => {
                        tracing::warn!(kind = this.what, "still waiting for the first list");
                        continue;
                    }
                };
                let event = match event {
                    Ok(event) => event,
                    Err(error) => {
                        // The last state stays in force; the watcher tries again by itself.
                        if told.is_none_or(|told| told.elapsed() >= CALM) {
                            told = Some(Instant::now());
                            tracing::warn!(kind = this.what, %error, "the watch failed, it is tried again");
                        }
                        continue;
                    }
                };
                let begins = matches!(event, watcher::Event::Init);
                if this.take(event, &mut listing, &reduce) {
                    changed.send_modify(|count| *count += 1);
                }
                if begins {
                    listing.version = floor(&api).await;
                }
            }
        });
        watched
    }

    fn unlisted(what: &'static str) -> Self {
        let inner = Inner { objects: BTreeMap::new(), listed: false, version: 0 };
        Self { what, inner: Mutex::new(inner), doubted: Notify::new() }
    }

    /// Returns whether that is a change.
    fn take<K: Resource>(
        &self,
        event: watcher::Event<K>,
        listing: &mut Listing<T>,
        reduce: impl Fn(K) -> T,
    ) -> bool {
        match event {
            watcher::Event::Init => {
                *listing = Listing::default();
                false
            }
            watcher::Event::InitApply(object) => {
                listing.version = listing.version.max(version(&object));
                listing.objects.insert(key(&object), reduce(object));
                false
            }
            watcher::Event::InitDone => {
                let Listing { objects, version } = std::mem::take(listing);
                let mut inner = self.lock();
                let news = !inner.listed || inner.objects != objects;
                inner.objects = objects;
                inner.listed = true;
                inner.version = inner.version.max(version);
                news
            }
            watcher::Event::Apply(object) => {
                let (key, version) = (key(&object), version(&object));
                let reduced = reduce(object);
                let mut inner = self.lock();
                inner.version = inner.version.max(version);
                // Most writes change nothing of what is needed: heartbeats, for one.
                let news = inner.objects.get(&key) != Some(&reduced);
                inner.objects.insert(key, reduced);
                news
            }
            watcher::Event::Delete(object) => {
                let mut inner = self.lock();
                inner.version = inner.version.max(version(&object));
                inner.objects.remove(&key(&object)).is_some()
            }
        }
    }

    /// Lists everything anew. A watch tells of changes, and not that there were none: only a list says how
    /// new what is known is.
    pub(crate) fn list_anew(&self) {
        self.doubted.notify_one();
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

/// How new an object is: Kubernetes' versions are numbers that only grow.
fn version(object: &impl Resource) -> u64 {
    let version = object.meta().resource_version.as_deref();
    version.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// What a list that begins now is not older than, whatever is in it: that a deleted object is not there is
/// news, too. Zero, which claims nothing, if the API server cannot be asked.
async fn floor<K>(api: &Api<K>) -> u64
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let one = ListParams::default().limit(1);
    let listed = api.list_metadata(&one).await;
    listed.ok().and_then(|list| list.metadata.resource_version?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn map(name: &str, version: &str, value: &str) -> ConfigMap {
        let mut map = ConfigMap::default();
        map.metadata.name = Some(name.to_owned());
        map.metadata.resource_version = Some(version.to_owned());
        map.data = Some([("value".to_owned(), value.to_owned())].into());
        map
    }

    fn value(map: ConfigMap) -> String {
        map.data.unwrap_or_default().remove("value").unwrap_or_default()
    }

    fn seen(watched: &Watched<String>) -> (Vec<String>, u64) {
        watched.read(|objects, version| (objects.values().cloned().collect(), version))
    }

    /// How long a stream of so many failures takes, each after a list has begun, in the time of the runtime.
    async fn time_of(failures: usize) -> Duration {
        let events = (0..failures).flat_map(|_| [Ok(()), Err(())]);
        let begun = tokio::time::Instant::now();
        let outcomes = futures_util::stream::iter(events).backoff(Pauses::new());
        let seen: Vec<_> = outcomes.collect().await;
        assert_eq!(seen.len(), 2 * failures);
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_goes_on_failing_is_tried_every_second_and_not_more_often() {
        assert!(time_of(2).await <= Duration::from_millis(300));
        let taken = time_of(100).await;
        assert!((45..=100).contains(&taken.as_secs()), "{taken:?} for 100 failures");
    }

    #[test]
    fn a_watch_that_was_calm_begins_anew() {
        let mut pauses = Pauses::new();
        assert!(pauses.by_ref().take(10).last().is_some_and(|last| last >= LONGEST_PAUSE / 2));
        pauses.failed = pauses.failed.and_then(|failed| failed.checked_sub(CALM));
        assert!(pauses.next().is_some_and(|first| first <= PAUSE));
    }

    #[test]
    fn no_version_is_claimed_before_the_objects_of_it_are_there() {
        let watched = Watched::unlisted("ConfigMap");
        let mut listing = Listing::default();
        let mut take = |event| watched.take(event, &mut listing, value);
        assert!(!take(watcher::Event::Init));
        assert!(!take(watcher::Event::InitApply(map("a", "7", "one"))));
        assert_eq!(seen(&watched), (vec![], 0));
        assert!(take(watcher::Event::InitDone));
        assert_eq!(seen(&watched), (vec!["one".to_owned()], 7));
        // Listed anew, half of it.
        assert!(!take(watcher::Event::Init));
        assert!(!take(watcher::Event::InitApply(map("b", "9", "two"))));
        assert_eq!(seen(&watched), (vec!["one".to_owned()], 7));
        assert!(take(watcher::Event::InitDone));
        assert_eq!(seen(&watched), (vec!["two".to_owned()], 9));
    }

    #[test]
    fn a_deletion_is_news_and_counts_and_a_heartbeat_counts_only() {
        let watched = Watched::unlisted("ConfigMap");
        let mut listing = Listing::default();
        let mut take = |event| watched.take(event, &mut listing, value);
        assert!(take(watcher::Event::Apply(map("a", "3", "one"))));
        assert!(!take(watcher::Event::Apply(map("a", "4", "one"))));
        assert_eq!(seen(&watched), (vec!["one".to_owned()], 4));
        assert!(take(watcher::Event::Delete(map("a", "5", "one"))));
        assert_eq!(seen(&watched), (vec![], 5));
        assert!(!take(watcher::Event::Delete(map("a", "6", "one"))));
    }

    #[test]
    fn the_floor_of_a_list_counts_when_the_list_is_whole() {
        let watched = Watched::<String>::unlisted("ConfigMap");
        let mut listing = Listing::default();
        watched.take(watcher::Event::<ConfigMap>::Init, &mut listing, value);
        listing.version = 50;
        assert_eq!(seen(&watched), (vec![], 0));
        watched.take(watcher::Event::<ConfigMap>::InitDone, &mut listing, value);
        assert_eq!(seen(&watched), (vec![], 50));
    }
}
