//! What only one agent of a node does at a time: it changes rules, answers the CNI plugin, renews the node
//! certificate, and keeps what it gets in the data folder.
//!
//! An agent that another one replaces lays this down, and goes on with its connections and with what the
//! control plane says of them. If it takes it up again, it does so as at its start: nothing that the other one
//! may have changed is taken for what it was.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context as _;
use hauberk_telemetry::{Health, State as HealthState};
use tokio::{runtime::Handle, sync::Mutex, task::JoinHandle};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    capture::{CAPTURE_CHECK, Captured, Captures},
    cni::{self, Installation, Keeper, Server},
    context::Context,
    handover::Replaced,
    identity::Node,
    policy::{Enforcer, Subscription},
};

/// What they are done with.
pub(crate) struct Means {
    pub(crate) context: Arc<Context>,
    pub(crate) health: Health,
    pub(crate) enforcer: Arc<Enforcer>,
    pub(crate) subscription: Subscription,
    /// Who tends it has it to itself.
    pub(crate) node: Arc<Mutex<Node>>,
    /// Answers the CNI plugin on this socket, if the node has pods.
    pub(crate) plugin: Option<(Server, PathBuf)>,
    /// Where the plugin is to be, then.
    pub(crate) installation: Option<Installation>,
    pub(crate) replaced: Replaced,
}

/// An agent that does them.
pub(crate) struct OnDuty {
    means: Means,
    capturing: JoinHandle<(Captures, Captured)>,
    answering: Option<AbortOnDropHandle<()>>,
    keeper: Option<Keeper>,
    _word: Option<AbortOnDropHandle<()>>,
    subscribed: AbortOnDropHandle<()>,
}

/// An agent that does them no more, or not now. The rules stand as they are.
pub(crate) struct OffDuty {
    means: Means,
    captures: Captures,
    captured: Captured,
    subscribed: AbortOnDropHandle<()>,
}

impl OnDuty {
    /// Begins, with what is captured already.
    ///
    /// # Errors
    /// If the CNI plugin cannot be listened for.
    pub(crate) fn begin(
        means: Means,
        captures: Captures,
        captured: Captured,
    ) -> anyhow::Result<Self> {
        let answering = match &means.plugin {
            None => None,
            Some((server, socket)) => {
                let answering = server.clone().run(cni::listen(socket)?);
                Some(AbortOnDropHandle::new(tokio::spawn(answering)))
            }
        };
        // A pod that starts before there is any state waits.
        let metrics = &means.context.metrics;
        let keeper = means.installation.clone().map(|one| Keeper::start(one, metrics.clone()));
        let word = means.installation.as_ref().zip(means.plugin.as_ref());
        let word = word.map(|(one, (server, _))| {
            let leaving = cni::leave_word(one.namespaces.clone(), server.snapshots.clone());
            AbortOnDropHandle::new(tokio::spawn(leaving))
        });
        let subscribed = tokio::spawn(means.subscription.clone().run());
        Ok(Self {
            // On a thread of its own: it asks the kernel about every workload, and what is ready on a thread that carries
            // connections would wait for that.
            capturing: tokio::task::spawn_blocking(move || {
                Handle::current().block_on(captures.run(captured))
            }),
            answering,
            keeper,
            _word: word,
            subscribed: AbortOnDropHandle::new(subscribed),
            means,
        })
    }

    /// Lets another agent do them, which has not begun yet.
    ///
    /// # Errors
    /// If the captures have failed.
    pub(crate) async fn lay_down(self) -> anyhow::Result<OffDuty> {
        let replaced = self.means.replaced.clone();
        let off = self.end(|| replaced.set()).await?;
        // Nobody renews the node certificate from here on.
        drop(off.means.node.lock().await);
        Ok(off)
    }

    /// Ends them, and takes no more connections.
    ///
    /// # Errors
    /// If the captures have failed.
    pub(crate) async fn stop(self) -> anyhow::Result<OffDuty> {
        let stopping = self.means.context.stopping.clone();
        self.end(|| stopping.cancel()).await
    }

    async fn end(self, say: impl FnOnce()) -> anyhow::Result<OffDuty> {
        let text = "the agent is stopping, or another one takes its place";
        self.means.health.set(CAPTURE_CHECK, HealthState::NotReady(text.to_owned()));
        // Pods that start from now on wait for the next agent.
        drop(self.answering);
        if let Some(keeper) = self.keeper {
            keeper.stop().await;
        }
        say();
        let (captures, captured) = self.capturing.await.context("stop capturing")?;
        Ok(OffDuty { means: self.means, captures, captured, subscribed: self.subscribed })
    }
}

impl OffDuty {
    /// What was captured when they ended.
    pub(crate) fn captured(&mut self) -> &mut Captured {
        &mut self.captured
    }

    /// Takes no more connections, and closes the sessions that carry nothing.
    pub(crate) fn close(&mut self) {
        self.captured.close();
    }

    /// Does them again, after another agent that does so no more: whoever calls this has the data folder's
    /// lock.
    ///
    /// # Errors
    /// If what the other one has left cannot be used. Then another start is as good, and a safer one.
    pub(crate) async fn take_up(self) -> anyhow::Result<OnDuty> {
        let Self { means, captures, captured, subscribed } = self;
        // Before anything is asked for: with a certificate that was renewed since, this agent would pass for a
        // thief of it.
        if means.node.lock().await.reload() {
            tracing::info!("uses the node certificate that the other agent got");
        }
        // Nothing is applied while it is seen which state is the newer one. The stream that is opened then tells
        // the control plane anew what is in force here, and how the workloads stand.
        subscribed.abort();
        drop(subscribed.await);
        means.enforcer.take_up();
        means.replaced.clear();
        OnDuty::begin(means, captures, captured)
    }
}
