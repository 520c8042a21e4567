//! Policy: what owners declare ([`model`]), how it is bound to identities ([`resolve`]), how it is
//! indexed ([`table`]) and the one decision that everything in Hauberk asks ([`table::DecisionTable::decide`]),
//! the tests that policies carry included ([`examples`]).

pub mod examples;
pub mod model;
pub mod namespace;
pub mod node;
pub mod reason;
pub mod resolve;
pub mod service;
pub mod service_ports;
pub mod table;
pub mod verdict;

pub use model::*;
pub use namespace::MeshNamespace;
pub use node::MeshNode;
pub use reason::Reason;
pub use service::{Backends, Hints, MeshService, NodePort, Reach};
pub use table::{DecisionTable, Request};
pub use verdict::{Allowed, Denial, NearestMiss, Verdict};
