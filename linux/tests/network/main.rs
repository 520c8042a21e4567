//! Real namespaces, real rules, real sockets. Each test makes its own namespaces.
//!
//! They need to be root, or root of a user namespace:
//! `unshare -Ur cargo test -p hauberk-linux -- --skip needs_root`. Those left out in the second
//! case switch to another user, make a cgroup or run tcpdump. `nft` and `ip` are used to look at the result.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::as_conversions)]

mod drift;
mod held;
mod host;
mod namespace;
mod netns;
mod packets;
mod published;
mod routing;
mod support;
mod transparent;
