//! Keeps the plugin in the node's network: whoever writes the network's configuration anew, or takes the plugin away, is
//! answered within milliseconds.

use std::{
    io,
    time::{Duration, Instant},
};

use hauberk_telemetry::AgentMetrics;
use notify::{
    EventKind, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::Installation;

/// Between two looks that nothing has caused.
const LOOK: Duration = Duration::from_secs(2);

/// The same after one that failed: what another program was about to write is there by then.
const RETRY: Duration = Duration::from_millis(500);

/// Between two words about the same thing.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// Between two looks that news has caused: a file is often written in several steps.
const QUIET: Duration = Duration::from_millis(5);

/// The same once there was news for so many in a row: another program does as we do, or is at work on large files.
const LONGEST_QUIET: Duration = Duration::from_millis(200);
const QUICK_LOOKS: u32 = 20;

/// Does so until it is stopped.
pub(crate) struct Keeper {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Keeper {
    pub(crate) fn start(installation: Installation, metrics: AgentMetrics) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(keep(installation, metrics, stop.clone()));
        Self { stop, task }
    }

    /// Nothing is changed any more once this is done.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        drop(self.task.await);
    }
}

async fn keep(installation: Installation, metrics: AgentMetrics, stop: CancellationToken) {
    let mut news = None;
    let (mut was_there, mut busy) = (false, 0);
    // Why it is not in place since the last look, and whether that was said.
    let mut trouble: Option<(String, bool)> = None;
    let mut told: Option<Instant> = None;
    let mut deaf = false;
    loop {
        // Before the look: what changes after it is news.
        news = news.take().filter(News::listens).or_else(|| News::listen(&installation, &mut deaf));
        let one = installation.clone();
        let looked = tokio::task::spawn_blocking(move || one.ensure()).await;
        let outcome = looked.unwrap_or_else(|error| Err(error.into()));
        trouble = match &outcome {
            Ok(_) => {
                if trouble.is_some_and(|(_, said)| said) {
                    tracing::info!("the CNI plugin is in place again");
                }
                None
            }
            Err(error) => {
                let error = format!("{error:#}");
                let before = trouble.take();
                // A file that is just being written is none for a moment only.
                let lasts = before.as_ref().is_some_and(|(before, _)| *before == error);
                let said = before.is_some_and(|(before, said)| before == error && said);
                if lasts && !said {
                    tracing::warn!(
                        error,
                        "the CNI plugin is not in place: pods start before they are captured"
                    );
                }
                Some((error, said || lasts))
            }
        };
        metrics.set_plugin_in_place(outcome.is_ok());
        if matches!(outcome, Ok(true)) && was_there {
            metrics.plugin_restored();
            // Two programs that disagree would fill the log.
            if told.is_none_or(|last| last.elapsed() > TOLD_EVERY) {
                told = Some(Instant::now());
                tracing::warn!(
                    "the CNI plugin was taken out of the node's network, and is back: pods that started \
                     meanwhile are captured a moment later"
                );
            }
        } else if matches!(outcome, Ok(true)) {
            tracing::info!("the CNI plugin is in place");
        }
        was_there |= outcome.is_ok();
        let quiet = if busy >= QUICK_LOOKS { LONGEST_QUIET } else { QUIET };
        tokio::select! {
            () = stop.cancelled() => return,
            is_news = next(news.as_mut(), if outcome.is_ok() { LOOK } else { RETRY }) => {
                busy = if is_news { busy + 1 } else { 0 };
                sleep(quiet).await;
            }
        }
    }
}

/// Done when there is news, or it is time. Returns whether there is.
async fn next(news: Option<&mut News>, look: Duration) -> bool {
    match news {
        Some(news) => timeout(look, news.changes.recv()).await.is_ok(),
        None => {
            sleep(look).await;
            false
        }
    }
}

/// The kernel's news of the two folders.
struct News {
    changes: mpsc::Receiver<()>,
    /// What is watched may have been made anew, where nobody watches it.
    lost: mpsc::Receiver<()>,
    _watcher: notify::RecommendedWatcher,
}

impl News {
    /// Nothing if the kernel does not help; then the slow look has to do.
    fn listen(installation: &Installation, deaf: &mut bool) -> Option<Self> {
        let folders = [installation.configurations.clone(), installation.bin.clone()];
        let (changed, changes) = mpsc::channel(1);
        let (gone, lost) = mpsc::channel(1);
        let watched = folders.clone();
        let told = move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else {
                // Some may be missing.
                gone.try_send(()).ok();
                changed.try_send(()).ok();
                return;
            };
            if event.need_rescan()
                || (!is_only_a_look(event.kind)
                    && event.paths.iter().any(|path| watched.contains(path)))
            {
                gone.try_send(()).ok();
            }
            if !is_only_a_look(event.kind) {
                // If one waits already, that is enough.
                changed.try_send(()).ok();
            }
        };
        let watching = notify::recommended_watcher(told).and_then(|mut watcher| {
            for folder in &folders {
                watcher.watch(folder, RecursiveMode::NonRecursive)?;
            }
            Ok(watcher)
        });
        match watching {
            Ok(watcher) => Some({
                *deaf = false;
                Self { changes, lost, _watcher: watcher }
            }),
            Err(error) => {
                let error = match error.kind {
                    notify::ErrorKind::Io(error) => error,
                    other => io::Error::other(format!("{other:?}")),
                };
                if !std::mem::replace(deaf, true) {
                    tracing::warn!(%error, "changes of the node's network are noticed late, after up to 2 s");
                }
                None
            }
        }
    }

    fn listens(&self) -> bool {
        self.lost.is_empty()
    }
}

fn is_only_a_look(kind: EventKind) -> bool {
    kind.is_access() && kind != EventKind::Access(AccessKind::Close(AccessMode::Write))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use std::fs;

    use super::*;
    use crate::cni::install::tests::{NETWORK, installation};

    /// Done when the configuration names the plugin; how long that took.
    async fn until_chained(installation: &Installation) -> Duration {
        let began = Instant::now();
        let path = installation.configurations.join("10-pods.conflist");
        while !fs::read_to_string(&path).is_ok_and(|text| text.contains("hauberk-cni")) {
            assert!(began.elapsed() < Duration::from_secs(30), "the plugin is not chained");
            sleep(Duration::from_millis(1)).await;
        }
        began.elapsed()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_writes_the_network_anew_is_answered_before_the_slow_look() {
        let folder = tempfile::tempdir().unwrap();
        let installation = installation(folder.path());
        let path = installation.configurations.join("10-pods.conflist");
        fs::write(&path, NETWORK).unwrap();
        let metrics = AgentMetrics::new().unwrap();
        let keeper = Keeper::start(installation.clone(), metrics.clone());
        until_chained(&installation).await;
        // Written in place, and renamed over what was there.
        let mut took = Vec::new();
        for _ in 0..3 {
            fs::write(&path, NETWORK).unwrap();
            took.push(until_chained(&installation).await);
            let new = folder.path().join("new");
            fs::write(&new, NETWORK).unwrap();
            fs::rename(&new, &path).unwrap();
            took.push(until_chained(&installation).await);
        }
        took.sort();
        assert!(took[2] < LOOK / 4, "the slow look would have taken as long: {took:?}");
        fs::remove_file(installation.bin.join("hauberk-cni")).unwrap();
        fs::write(&path, NETWORK).unwrap();
        until_chained(&installation).await;
        assert!(installation.bin.join("hauberk-cni").exists());

        fs::remove_dir_all(&installation.configurations).unwrap();
        fs::create_dir(&installation.configurations).unwrap();
        fs::write(&path, NETWORK).unwrap();
        until_chained(&installation).await;
        fs::write(&path, NETWORK).unwrap();
        until_chained(&installation).await;

        keeper.stop().await;
        fs::write(&path, NETWORK).unwrap();
        sleep(QUIET * 20).await;
        assert_eq!(fs::read_to_string(&path).unwrap(), NETWORK, "it is not kept any more");
    }
}
