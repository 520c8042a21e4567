//! What plugin and agent say to each other over a Unix socket: one line of JSON each way.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// The longest line.
const MAX_LINE: u64 = 64 * 1024;

/// What the runtime does with a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// Its sandbox is being made: nothing of the pod runs yet.
    Add,
    /// The sandbox is looked at.
    Check,
}

/// A pod that is about to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// What for.
    pub verb: Verb,
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The path of its network namespace, on the host.
    pub netns: String,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "answer", deny_unknown_fields)]
pub enum Answer {
    /// The pod is captured.
    Captured,
    /// It is not one of the mesh.
    Outside,
    /// It must not start.
    Refused {
        /// Why.
        reason: String,
    },
}

impl Question {
    /// Asks the agent.
    ///
    /// # Errors
    /// If it cannot be reached, or does not answer in time.
    pub fn ask(&self, socket: &Path, patience: Duration) -> io::Result<Answer> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let answer = read_line(&stream)?;
        Ok(serde_json::from_slice(&answer)?)
    }
}

/// The agent's end: reads a question.
///
/// # Errors
/// If it is none.
pub fn read_question(stream: &UnixStream) -> io::Result<Question> {
    Ok(serde_json::from_slice(&read_line(stream)?)?)
}

/// The agent's end: answers.
///
/// # Errors
/// If the plugin is gone.
pub fn write_answer(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn read_line(stream: &UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_LINE)).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other end went away"));
    }
    Ok(line)
}
