//! The chained CNI plugin, and what it says to the node's agent. A pod's sandbox is made only when the
//! agent has answered that the pod is captured, or not one of the mesh. Without an answer the pod starts only if
//! its namespace was not one of the mesh when the agent was there last; its events say why it does not.
//!
//! On its own it is small and links next to nothing: the container runtime starts it for each pod.

mod conversation;
mod namespaces;
mod plugin;

pub use conversation::{Answer, Question, Verb, read_question, write_answer};
pub use namespaces::{Namespaces, Standing, UNKNOWN_WAITS};
pub use plugin::{Configuration, PLUGIN_TYPE, run};
