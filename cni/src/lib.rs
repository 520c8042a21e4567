//! The chained CNI plugin, and what it says to the node's agent. A pod's sandbox is made only when the
//! agent has answered that the pod is captured, or not one of the mesh: without an answer the pod does not
//! start, and its events say why.
//!
//! On its own it is small and links next to nothing: the container runtime starts it for each pod.

mod conversation;
mod plugin;

pub use conversation::{Answer, Question, Verb, read_question, write_answer};
pub use plugin::{Configuration, PLUGIN_TYPE, run};
