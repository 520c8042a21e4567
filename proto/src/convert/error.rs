use std::fmt;

/// A message that does not convert. Nothing of it is used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConvertError {
    /// The field, as a path.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl ConvertError {
    pub(crate) fn missing(field: &str) -> Self {
        Self { field: field.to_owned(), problem: "is missing or of an unknown kind".to_owned() }
    }

    pub(crate) fn new(field: &str, problem: impl fmt::Display) -> Self {
        Self { field: field.to_owned(), problem: problem.to_string() }
    }
}
