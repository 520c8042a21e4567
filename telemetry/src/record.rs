//! One record a connection: what it was, what was decided about it, and how it ended.
//!
//! The same shape is written to disk, and kept for `hauberk denied`, which reads it back. A record
//! holds identities and addresses, never payload, keys or certificates. Unknown fields are ignored when reading, so that an older command can read what
//! a newer agent wrote.

mod destination;
mod flood;
mod queue;
mod sink;

use std::net::SocketAddr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

pub use self::destination::Destination;
pub use self::flood::{DenialEdge, DenialSummary, FloodLimits};
pub use self::sink::{Denial, RecordError, RecordOptions, RecordSink, ShutdownTimedOut};

/// Value of `type` in a [`ConnectionRecord`].
pub const CONNECTION_TYPE: &str = "hauberk.connection";
/// Value of `type` in a [`DenialSummary`].
pub const SUMMARY_TYPE: &str = "hauberk.connection.summary";

/// Which end of a connection wrote the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The agent of the caller.
    Source,
    /// The agent of the called workload, whose decision counts.
    Destination,
}

impl Side {
    /// The word used in records and labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// What was decided about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Let through by a rule or a grant.
    Allow,
    /// Refused.
    Deny,
    /// Let through only because the policy is in audit mode.
    WouldDeny,
}

impl Decision {
    /// The word used in records and labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::WouldDeny => "would_deny",
        }
    }
}

/// One end of a connection, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Identity proven by TLS; none when nothing was proven.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spiffe_id: Option<String>,
    /// Node it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Namespace of the workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name of the workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    /// Socket address. For tracing packets; it identifies nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addr: Option<SocketAddr>,
}

/// How the bytes of a connection went between its two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// In mutual TLS between two agents, or two ends of one.
    Mtls,
    /// Through one agent that had proven both ends, without TLS.
    VerifiedLocal,
    /// In clear, as an audited workload's connections with the world outside of the mesh.
    Clear,
}

/// What TLS settled on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsInfo {
    /// Protocol version, such as `TLSv1.3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Key exchange group, such as `X25519MLKEM768`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Serial of the certificate this side showed, hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_serial: Option<String>,
    /// Serial of the certificate the peer showed, hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_serial: Option<String>,
    /// End of the peer's certificate, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_not_after: Option<String>,
}

/// What is known about one connection when it ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "hauberk.connection")]
pub struct ConnectionRecord {
    /// Hexadecimal, the same at both ends.
    pub conn_id: String,
    /// When the connection was opened, RFC 3339 in UTC with milliseconds; see [`rfc3339_millis`].
    pub time: String,
    /// Which end wrote this.
    pub side: Side,
    /// The caller.
    pub src: Peer,
    /// The called workload.
    pub dst: Peer,
    /// Address the application dialled before its connection was captured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_dst: Option<SocketAddr>,
    /// What TLS settled on; none when there was no handshake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsInfo>,
    /// How its bytes went; none when none ever could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<Path>,
    /// Enforcement mode: `enforce`, `audit` or `off`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// What was decided.
    pub decision: Decision,
    /// Why not, a word of the closed set of reasons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why, as a sentence for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Rule that allowed or denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Policy that decided, as `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Rule that came closest, and what differed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest_miss: Option<String>,
    /// The smallest change that would allow the connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
    /// Revision of the policy state the decision was made with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_revision: Option<u64>,
    /// Grant that allowed the connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<String>,
    /// Team that owns the called endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Bytes from the application on this side to its peer.
    pub bytes_sent: u64,
    /// Bytes from the peer to the application on this side.
    pub bytes_received: u64,
    /// Milliseconds from accept to close.
    pub duration_ms: u64,
    /// Milliseconds from accept until a first byte could pass; none when none ever could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_ms: Option<u64>,
    /// Why the connection ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub close_reason: Option<String>,
}

impl ConnectionRecord {
    /// A record with what is always known; everything else is empty and to be filled in.
    #[must_use]
    pub fn new(conn_id: String, opened: SystemTime, side: Side, decision: Decision) -> Self {
        Self {
            conn_id,
            time: rfc3339_millis(opened),
            side,
            src: Peer::default(),
            dst: Peer::default(),
            original_dst: None,
            tls: None,
            path: None,
            mode: None,
            decision,
            reason: None,
            detail: None,
            rule: None,
            policy: None,
            nearest_miss: None,
            mend: None,
            policy_revision: None,
            grant: None,
            owner: None,
            bytes_sent: 0,
            bytes_received: 0,
            duration_ms: 0,
            open_ms: None,
            close_reason: None,
        }
    }

    /// Port the caller asked for: of the address it dialled, else of the called workload.
    #[must_use]
    pub fn dst_port(&self) -> Option<u16> {
        self.original_dst.or(self.dst.addr).map(|addr| addr.port())
    }
}

/// One line of a record file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum RecordLine {
    /// A connection.
    Connection(Box<ConnectionRecord>),
    /// How many denials of one edge were counted instead of written.
    Summary(DenialSummary),
}

impl RecordLine {
    /// Reads one line.
    ///
    /// # Errors
    ///
    /// When the line is not JSON, its `type` is not one of ours, or a field is missing.
    pub fn parse(line: &str) -> Result<Self, ParseRecordError> {
        // serde checks no tag when reading a struct, so the type is looked at first: otherwise
        // anything with the right fields would pass for a connection.
        #[derive(Deserialize)]
        struct Tag {
            #[serde(rename = "type")]
            kind: String,
        }
        let tag: Tag = serde_json::from_str(line)?;
        match tag.kind.as_str() {
            CONNECTION_TYPE => Ok(Self::Connection(serde_json::from_str(line)?)),
            SUMMARY_TYPE => Ok(Self::Summary(serde_json::from_str(line)?)),
            _ => Err(ParseRecordError::UnknownType { kind: tag.kind }),
        }
    }
}

/// A line is not a record.
#[derive(Debug, thiserror::Error)]
pub enum ParseRecordError {
    /// Not JSON, or a field is missing or of the wrong kind.
    #[error("read a record line")]
    Json(#[from] serde_json::Error),
    /// A `type` that this version does not know.
    #[error("record type {kind:?} is unknown, expected {CONNECTION_TYPE:?} or {SUMMARY_TYPE:?}")]
    UnknownType {
        /// The type found.
        kind: String,
    },
}

/// A time as RFC 3339 in UTC with milliseconds: `2026-11-24T10:53:44.120Z`.
///
/// A time beyond the year 9999 or before -9999 is written as the epoch, which stands out.
#[must_use]
pub fn rfc3339_millis(time: SystemTime) -> String {
    let timestamp = jiff::Timestamp::try_from(time).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{timestamp:.3}")
}
