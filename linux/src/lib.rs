//! Linux networking: namespaces, links, capture rules, socket options, packet capture.
//!
//! Everything that talks to the kernel about a network acts in the *calling thread's* network
//! namespace, as the kernel itself does. [`Netns::run`] and [`NetnsWorker`] are how a caller gets
//! a thread into another one; [`Netns::within`] takes the calling thread there and back, for a system call or two.
//!
//! The crate speaks netlink directly and starts no other program. All of it works in an
//! unprivileged user namespace too: `unshare -Ur` gives enough privilege to make and configure
//! network namespaces below it, which is how its tests can run without root.

pub mod capture;
mod dump;
mod error;
pub mod kernel;
pub mod links;
pub mod netns;
pub mod owner;
pub mod packets;
pub mod pass;
pub mod routing;
pub mod socket;
pub mod sockets;
mod sys;

pub use error::{Error, Result};
pub use netns::{Netns, NetnsWorker};
