//! The per-node agent: captures the TCP connections of its workloads, carries them to other agents in
//! mutual TLS, and lets through what the policy allows.
//!
//! The way of one connection: `outbound.rs` on the caller's node, `inbound.rs` on the destination's.

pub mod app;
pub mod config;
pub mod probe;

/// For every program that runs an agent: less CPU for each new connection than with the C library's, see
/// `docs/performance.md`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

mod authorize;
pub mod boot;
mod capture;
mod cni;
mod context;
mod copy;
mod delivery;
mod departed;
mod duties;
mod edges;
mod forward;
mod handover;
mod identity;
mod inbound;
mod kubelet;
mod lanes;
mod local_edge;
mod mux;
mod outbound;
mod pages;
mod passthrough;
mod policy;
mod pool;
mod published;
mod quietly;
mod receive;
mod relay;
mod report;
mod services;
mod session;
mod trunks;

#[cfg(test)]
mod tests {
    /// How many bytes the future of a function has.
    fn of_two<A, B, F>(_: impl Fn(A, B) -> F) -> usize {
        size_of::<F>()
    }

    fn of_three<A, B, C, F>(_: impl Fn(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    fn of_five<A, B, C, D, E, F>(_: impl Fn(A, B, C, D, E) -> F) -> usize {
        size_of::<F>()
    }

    /// Every open connection has one of these for as long as it lives. Whoever makes one longer should
    /// know: a rare way belongs in a box of its own.
    #[test]
    fn the_futures_of_connections_stay_small() {
        let (outbound, inbound) =
            (of_three(crate::outbound::serve), of_five(crate::inbound::serve_mesh));
        println!("outbound {outbound}, inbound {inbound} bytes");
        assert!(outbound <= 1_340, "outbound {outbound} bytes");
        assert!(inbound <= 500, "inbound {inbound} bytes");
        let stream = size_of::<crate::inbound::Stream<'static>>()
            + of_two(|stream: Box<crate::inbound::Stream<'static>>, carried| stream.carry(carried));
        assert!(stream <= 1_390, "stream of an inbound connection {stream} bytes");
        let relay = size_of::<crate::relay::Relay>() + size_of::<crate::session::Session>();
        assert!(relay <= 560, "relay and session {relay} bytes");
        let shared = size_of::<crate::mux::Relay>();
        assert!(shared <= 300, "relay over a multiplexed session {shared} bytes");
    }
}
