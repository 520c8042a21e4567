//! What carries the bytes of a connection: a session of its own, or one of many streams of a session.

use hauberk_core::session::ResetCause;

use crate::{
    mux,
    relay::{Application, Event, Relay},
    report::Report,
    session::Session,
};

/// What carries the bytes.
pub(crate) enum Carried {
    /// A session of its own.
    Dedicated(Box<Relay>),
    /// One of many streams of a session.
    Stream(Box<mux::Relay>),
}

/// The same without the application.
pub(super) enum Road {
    Dedicated(Box<Session>),
    Stream(mux::Stream),
}

impl Carried {
    pub(super) async fn run(&mut self) -> Event {
        match self {
            Self::Dedicated(relay) => relay.run().await,
            Self::Stream(relay) => match relay.run().await {
                mux::Fate::Accepted => Event::Accepted,
                mux::Fate::Bulk => Event::Bulk,
                mux::Fate::Moved => Event::Moved,
                mux::Fate::End(end) => Event::End(end),
            },
        }
    }

    pub(super) async fn connect_application(&mut self) -> std::io::Result<()> {
        match self {
            Self::Dedicated(relay) => relay.connect_application().await,
            Self::Stream(relay) => relay.connect_application().await,
        }
    }

    pub(super) fn keep_alive(&mut self) {
        match self {
            Self::Dedicated(relay) => relay.keep_alive(),
            Self::Stream(relay) => relay.keep_alive(),
        }
    }

    pub(super) fn awaits_answer(&self) -> bool {
        match self {
            Self::Dedicated(relay) => relay.session.machine.awaits_answer(),
            Self::Stream(relay) => relay.awaits_answer(),
        }
    }

    pub(super) fn tell_bytes(&self, report: &mut Report<'_>) {
        match self {
            Self::Dedicated(relay) => report.bytes(relay.sent, relay.received),
            Self::Stream(relay) => report.bytes(relay.sent, relay.received),
        }
    }

    pub(super) fn into_parts(self) -> (Application, Road) {
        match self {
            Self::Dedicated(relay) => {
                let (application, session) = relay.into_parts();
                (application, Road::Dedicated(session))
            }
            Self::Stream(relay) => {
                let (application, stream) = relay.into_parts();
                (application, Road::Stream(stream))
            }
        }
    }
}

impl Road {
    /// Breaks the stream off. The session, if another stream may come on it.
    pub(super) async fn reset(self, cause: ResetCause) -> Option<Box<Session>> {
        match self {
            Self::Dedicated(mut session) => {
                session.reset(cause);
                session.settle().await.then_some(session)
            }
            Self::Stream(stream) => {
                stream.reset(cause);
                None
            }
        }
    }
}
