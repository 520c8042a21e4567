//! A real Kubernetes of two nodes on one machine, for tests.
//!
//! Three machines, each in namespaces of its own: `control` runs etcd, the control plane and the DNS
//! server, `node-a` and `node-b` run containerd, kubelet and kube-proxy. A bridge joins them: the
//! [`Wire`], which can be listened to and cut. Nothing of the host is changed: the machines have
//! roots, disks and cgroups of their own, and their init ends with this process, however that ends.
//! See [`Cluster::start`].
//!
//! `HAUBERK_CLUSTER_LOGS=<folder>` keeps the logs of all programs of every cluster in that folder.

mod ask;
mod certificates;
mod cgroups;
mod cluster;
mod control;
mod footprint;
mod images;
mod janitor;
mod machine;
mod node;
mod requirements;
mod wire;

pub use cluster::{Cluster, Options};
pub use footprint::Footprint;
pub use images::{Image, Source, busybox};
pub use machine::Machine;
pub use requirements::{Programs, locate};
pub use wire::{CONTROL, NODE_A, NODE_B, OUTSIDE, Wire, ipv4, ipv6};
