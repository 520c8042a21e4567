//! The harness of the end-to-end tests: a mesh of two machines and three workloads in network
//! namespaces, with the real control plane and the real agents; and a thief of credentials.

pub mod mesh;
pub mod stolen;
