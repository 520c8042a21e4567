//! Which incoming handshakes go on, and when, so that whoever floods a port with connections is in its own way and
//! in nobody else's.
//!
//! A connection is *silent* until its ClientHello is there: that costs a file and some memory, so silent ones wait
//! for nothing, and the oldest of whoever has most of them gives way to the next. Then its handshake is *unfinished*:
//! there is room for fewer of these, shared in the same way. A step of it waits for its [`Turn`], which callers have
//! one after another (`turns.rs`).
//!
//! Who calls is known for sure only when its handshake is over. Until then it is its address, which an agent may
//! have in common with others (address translation, programs of the same host), unless its hello has a
//! [`CallerToken`]: that of an earlier connection, which only its two ends know. Then it has the room and the turns of
//! its identity and node, whatever comes from the same address. See `docs/adr/0015-handshakes-give-way.md`.

mod known;
mod room;
mod shares;
mod turns;

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hauberk_core::{
    identity::{ResourceName, SpiffeId},
    time::Timestamp,
};

use self::{known::KnownCallers, turns::Turns};
pub use self::{
    room::{FairRoom, Slot},
    shares::{Share, Shares},
    turns::{CallerTurns, Turn},
};
use crate::channel::CallerToken;

/// Connections whose ClientHello is not there, some 10 kB each at most. A caller that speaks at once is such a one for
/// no time at all, however fast a flood displaces the oldest.
const SILENT: usize = 4_096;

/// Unfinished handshakes, some 20 kB each. A flood of 5,000 a second, which is more than a processor answers, leaves a
/// caller of the same address 0.4 s for its round trip.
const UNFINISHED: usize = 2_048;

/// Where a caller is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// At this address. All that is known of whoever has not proven itself.
    Address(IpAddr),
    /// On this node of the mesh.
    Node(ResourceName),
}

/// Whose a connection is, as far as is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    origin: Origin,
    identity: Option<SpiffeId>,
}

impl Caller {
    /// Somebody at this address.
    #[must_use]
    pub fn at(address: IpAddr) -> Self {
        Self { origin: Origin::Address(site(address)), identity: None }
    }

    /// Somebody who has proven this identity, which has its home on this node; without one, whoever has its
    /// certificate at this address.
    #[must_use]
    pub fn proven(identity: SpiffeId, node: Option<ResourceName>, address: IpAddr) -> Self {
        let origin = node.map_or_else(|| Origin::Address(site(address)), Origin::Node);
        Self { origin, identity: Some(identity) }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(identity) = &self.identity {
            write!(f, "{identity} at ")?;
        }
        match &self.origin {
            Origin::Address(address) => write!(f, "{address}"),
            Origin::Node(node) => write!(f, "{node}"),
        }
    }
}

/// A machine has its /64 of IPv6 to itself: all addresses in it are one caller.
fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let bits = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(bits))
        }
    }
}

/// Why a connection has to give way to newer ones.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RateLimited {
    /// Its ClientHello was not there, and too many such connections are open.
    #[error("gave way before its handshake began: too many connections of {caller} are silent")]
    Silent {
        /// Who has most of them.
        caller: Arc<Caller>,
    },
    /// Its handshake was not over, and too many are unfinished.
    #[error("gave way in its handshake: too many handshakes of {caller} are unfinished")]
    Unfinished {
        /// Who has most of them.
        caller: Arc<Caller>,
    },
}

/// The incoming connections of a port, or of several, until their handshakes are over.
#[derive(Debug)]
pub struct HandshakeLimiter {
    silent: Arc<FairRoom>,
    unfinished: Arc<FairRoom>,
    turns: Arc<Turns>,
    known: KnownCallers,
    /// Of the next connection: the oldest is the one that came first, however late it speaks.
    next: AtomicU64,
}

impl HandshakeLimiter {
    /// One to which nobody has come yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            silent: FairRoom::new(SILENT, SILENT),
            unfinished: FairRoom::new(UNFINISHED, UNFINISHED),
            turns: Turns::new(),
            known: KnownCallers::new(),
            next: AtomicU64::new(0),
        })
    }

    /// Takes in a connection whose ClientHello is not there yet.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Admission {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let slot = self.silent.enter_as(Arc::new(Caller::at(address)), number);
        Admission { limiter: self.clone(), number, slot, has_spoken: false }
    }

    /// Remembers who has proven itself on a connection with this token, for its later ones.
    pub fn remember(&self, token: CallerToken, caller: &Arc<Caller>, now: Timestamp) {
        self.known.remember(token, caller.clone(), now);
    }
}

/// One incoming connection, from its start to the end of its handshake: then this is dropped.
#[derive(Debug)]
pub struct Admission {
    limiter: Arc<HandshakeLimiter>,
    number: u64,
    slot: Slot,
    has_spoken: bool,
}

impl Admission {
    /// The ClientHello is there, maybe with a token of an earlier connection.
    pub fn heard(&mut self, token: Option<&CallerToken>, now: Timestamp) {
        let caller = token.and_then(|token| self.limiter.known.find(token, now));
        let caller = caller.unwrap_or_else(|| self.slot.caller().clone());
        self.slot = self.limiter.unfinished.enter_as(caller, self.number);
        self.has_spoken = true;
    }

    /// The turns of this connection's caller, after [`heard`](Self::heard). What it has to wait for them is added to
    /// `waited`.
    pub fn turns<'a>(&self, waited: &'a mut Duration) -> CallerTurns<'a> {
        self.limiter.turns.of(self.slot.caller().clone(), self.number, waited)
    }

    /// Does this part of the handshake, which is broken off if the connection has to give way.
    ///
    /// # Errors
    /// If it had to.
    pub async fn unless_displaced<F: Future>(&mut self, part: F) -> Result<F::Output, RateLimited> {
        tokio::select! {
            biased;
            () = self.slot.displaced() => {}
            done = part => return Ok(done),
        }
        let caller = self.slot.caller().clone();
        Err(if self.has_spoken {
            RateLimited::Unfinished { caller }
        } else {
            RateLimited::Silent { caller }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    const FLOOD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    fn now() -> Timestamp {
        Timestamp::from_unix_millis(1_000)
    }

    fn web() -> Arc<Caller> {
        let identity = "spiffe://example.org/ns/shop/sa/web".parse().unwrap();
        Arc::new(Caller::proven(identity, Some("machine-a".parse().unwrap()), FLOOD))
    }

    /// Whether a connection may go on.
    async fn goes_on(admission: &mut Admission) -> bool {
        admission.unless_displaced(ready(())).await.is_ok()
    }

    #[tokio::test]
    async fn silent_connections_displace_only_their_own_oldest() {
        let limiter = HandshakeLimiter::new();
        let mut other = limiter.enter(OTHER);
        let mut flood: Vec<_> = (0..SILENT + 100).map(|_| limiter.enter(FLOOD)).collect();
        assert!(goes_on(&mut other).await);
        let mut displaced = 0;
        for (number, admission) in flood.iter_mut().enumerate() {
            if !goes_on(admission).await {
                assert!(number <= 100, "{number} had to give way");
                displaced += 1;
            }
        }
        assert_eq!(displaced, 101);
    }

    #[tokio::test]
    async fn whoever_speaks_at_once_is_in_no_silent_ones_way_nor_they_in_its() {
        let limiter = HandshakeLimiter::new();
        let _flood: Vec<_> = (0..SILENT).map(|_| limiter.enter(FLOOD)).collect();
        let mut honest = limiter.enter(FLOOD);
        honest.heard(None, now());
        let _more: Vec<_> = (0..SILENT).map(|_| limiter.enter(FLOOD)).collect();
        assert!(goes_on(&mut honest).await);
    }

    #[tokio::test]
    async fn a_known_caller_has_room_of_its_own_at_the_address_of_a_flood() {
        let limiter = HandshakeLimiter::new();
        let token = CallerToken::new([7; 16]);
        limiter.remember(token, &web(), now());
        let (mut known, mut unknown) = (limiter.enter(FLOOD), limiter.enter(FLOOD));
        known.heard(Some(&token), now());
        unknown.heard(Some(&CallerToken::new([8; 16])), now());
        let mut flood = Vec::new();
        for _ in 0..UNFINISHED {
            let mut admission = limiter.enter(FLOOD);
            admission.heard(None, now());
            flood.push(admission);
        }
        assert!(goes_on(&mut known).await);
        let refused = unknown.unless_displaced(pending::<()>()).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            "gave way in its handshake: too many handshakes of 10.0.0.1 are unfinished"
        );
    }

    #[tokio::test]
    async fn a_silent_one_that_has_to_give_way_is_told_why() {
        let limiter = HandshakeLimiter::new();
        let mut first = limiter.enter(FLOOD);
        let _flood: Vec<_> = (0..SILENT).map(|_| limiter.enter(FLOOD)).collect();
        let refused = first.unless_displaced(pending::<()>()).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            "gave way before its handshake began: too many connections of 10.0.0.1 are silent"
        );
    }

    #[test]
    fn callers_are_shown_as_far_as_they_are_known() {
        assert_eq!(web().to_string(), "spiffe://example.org/ns/shop/sa/web at machine-a");
        let identity = "spiffe://example.org/ns/shop/sa/web".parse().unwrap();
        let away = Caller::proven(identity, None, OTHER);
        assert_eq!(away.to_string(), "spiffe://example.org/ns/shop/sa/web at 10.0.0.2");
    }

    #[test]
    fn the_addresses_of_a_64_are_one_caller() {
        let same = ["fd00::1", "fd00::ffff:2"].map(|text| site(text.parse().unwrap()));
        assert_eq!(same[0], same[1]);
        assert_ne!(same[0], site("fd00:0:0:1::1".parse().unwrap()));
        assert_eq!(site("::ffff:10.0.0.1".parse().unwrap()), FLOOD);
    }
}
