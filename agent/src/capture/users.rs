//! News of the machine's users: one that a workload names may be made after it.

use std::path::Path;

use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// Where local users are kept. Others come from directory services, which tell of nothing: the slow look finds them.
const FOLDER: &str = "/etc";
const FILES: [&str; 2] = ["passwd", "nsswitch.conf"];

/// Waits for news.
pub(super) struct UserNews {
    news: mpsc::Receiver<()>,
    _watcher: Option<notify::RecommendedWatcher>,
}

impl UserNews {
    /// Begins to listen. Without the kernel's help there is no news, and the slow look has to do.
    pub(super) fn listen() -> Self {
        let (sender, news) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let concerned = event.is_ok_and(|event| {
                !event.kind.is_access()
                    && event.paths.iter().any(|path| FILES.iter().any(|file| path.ends_with(file)))
            });
            if concerned {
                // If one waits already, that is enough.
                sender.try_send(()).ok();
            }
        });
        let watcher = watcher.and_then(|mut watcher| {
            watcher.watch(Path::new(FOLDER), RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => Self { news, _watcher: Some(watcher) },
            Err(error) => {
                tracing::warn!(%error, "new users of this machine are noticed late");
                Self { news, _watcher: None }
            }
        }
    }

    /// Done when there may be another user.
    pub(super) async fn next(&mut self) {
        if self.news.recv().await.is_none() {
            std::future::pending().await
        }
    }
}
