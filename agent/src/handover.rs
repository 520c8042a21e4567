//! One agent takes the place of another on the same data folder, and no connection fails for it.
//!
//! The next agent connects to the socket in the data folder of the one that runs, its predecessor, and gets
//! the metrics' listener at once, so that probes ask the one that starts. While it has no identity that it can use
//! it says [`protocol::WAIT`] and takes nothing from an agent that works. When it has one it says
//! [`protocol::TAKE`]: the predecessor stops changing rules and files, passes its listeners on, lets go of the
//! folder, and says [`protocol::END`]. Both take connections from the same listeners then, until the next one
//! has taken up its workloads and says [`protocol::READY`]: from there on the predecessor only carries what it
//! has, for as long as its drain lasts.
//!
//! If the next one ends before that, the predecessor takes its place back, once it has the folder's lock again
//! ([`crate::duties`]). If it ends after that, the predecessor ends as well, to be started anew. If the
//! predecessor ends, the next one goes on by itself.
//!
//! The folder is its owner's alone, and so is the socket.
//!
//! `protocol.rs` has what the two say to each other, `predecessor.rs` the side of the one that runs,
//! `successor.rs` that of the next one, `folder.rs` the lock that says whose the folder is, and `replaced.rs`
//! what the rest of the agent knows of it.

mod folder;
mod predecessor;
mod protocol;
mod replaced;
mod successor;

pub(crate) use folder::is_taken;
pub(crate) use predecessor::{End, Incumbent, Successors};
pub(crate) use protocol::{Role, Seat};
pub(crate) use replaced::Replaced;
pub(crate) use successor::{Before, Inherited, tell_when_ready};
