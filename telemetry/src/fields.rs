//! The names of log fields, in one place so that one search finds every event about one thing.
//!
//! Use them with tracing's braces: `tracing::info!({ fields::CONN_ID } = %id, "connection closed")`.

/// Identifier of a connection, hexadecimal, the same at both ends.
pub const CONN_ID: &str = "conn.id";
/// Which way a connection goes, seen from this agent: `inbound` or `outbound`.
pub const DIRECTION: &str = "direction";
/// Which end of the connection this agent is: `source` or `destination`.
pub const SIDE: &str = "side";

/// SPIFFE ID of the caller.
pub const SRC_IDENTITY: &str = "src.identity";
/// Socket address of the caller.
pub const SRC_ADDR: &str = "src.addr";
/// Node the caller runs on.
pub const SRC_NODE: &str = "src.node";
/// Namespace of the caller.
pub const SRC_NAMESPACE: &str = "src.namespace";
/// Workload name of the caller.
pub const SRC_WORKLOAD: &str = "src.workload";

/// SPIFFE ID of the called workload.
pub const DST_IDENTITY: &str = "dst.identity";
/// Socket address of the called workload.
pub const DST_ADDR: &str = "dst.addr";
/// Node the called workload runs on.
pub const DST_NODE: &str = "dst.node";
/// Namespace of the called workload.
pub const DST_NAMESPACE: &str = "dst.namespace";
/// Name of the called workload.
pub const DST_WORKLOAD: &str = "dst.workload";
/// Port that was called.
pub const DST_PORT: &str = "dst.port";
/// Address the application dialled before its connection was captured.
pub const ORIGINAL_DST: &str = "original_dst";

/// What was decided: `allow`, `deny` or `would_deny`.
pub const DECISION: &str = "decision";
/// Why, a word of the closed set of reasons.
pub const REASON: &str = "reason";
/// Why, as a sentence for a person.
pub const DETAIL: &str = "detail";
/// Enforcement mode the decision was made in.
pub const MODE: &str = "mode";
/// Policy that decided, as `namespace/name`.
pub const POLICY: &str = "policy";
/// Revision of the policy state the decision was made with.
pub const POLICY_REVISION: &str = "policy.revision";
/// Rule that allowed or denied.
pub const RULE: &str = "rule";
/// Rule that came closest, and what differed.
pub const NEAREST_MISS: &str = "nearest_miss";
/// The smallest change that would allow the connection.
pub const MEND: &str = "mend";
/// Grant that allowed the connection.
pub const GRANT: &str = "grant";
/// Team that owns the called endpoint.
pub const OWNER: &str = "owner";
/// Why a connection ended.
pub const CLOSE_REASON: &str = "close_reason";

/// Negotiated TLS version.
pub const TLS_VERSION: &str = "tls.version";
/// Negotiated key exchange group.
pub const TLS_GROUP: &str = "tls.group";
/// Serial number of a certificate, hexadecimal.
pub const CERT_SERIAL: &str = "cert.serial";
/// Time a certificate ends.
pub const CERT_NOT_AFTER: &str = "cert.not_after";

/// SPIFFE ID of a local workload.
pub const WORKLOAD_IDENTITY: &str = "workload.identity";
/// Namespace of a local workload.
pub const WORKLOAD_NAMESPACE: &str = "workload.namespace";
/// Name of a local workload.
pub const WORKLOAD_NAME: &str = "workload.name";
/// Name of a node.
pub const NODE: &str = "node";
/// Identifier of an agent.
pub const AGENT: &str = "agent";
/// Trust domain something belongs to.
pub const TRUST_DOMAIN: &str = "trust_domain";
/// Address of the control plane.
pub const CONTROL_PLANE_ADDR: &str = "control_plane.addr";

/// Address a listener is bound to.
pub const LISTEN_ADDR: &str = "listen.addr";
/// Path of a file.
pub const PATH: &str = "path";
/// The error that caused the event.
pub const ERROR: &str = "error";
/// A number of things, named by the message.
pub const COUNT: &str = "count";
/// A length of time in milliseconds.
pub const DURATION_MS: &str = "duration_ms";
