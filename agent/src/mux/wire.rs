//! The socket of a multiplexed session, and the way of what its streams have said to it.
//!
//! The driver has it, but for one thing: while one stream alone speaks, its own task sends what it has said, so that
//! nobody is woken for that.

use hauberk_tls::channel::{MAX_PLAINTEXT, RECORD_HEADER, RECORD_OVERHEAD};

use super::{Mux, Speakers, State};
use crate::session::{Link, RECORD, SLOTS, Scratch, SessionError};

/// After so many flushes in a row that had the frames of one stream alone, nothing is gathered: there is nobody to gather
/// with, and whoever waits for the answer waits for less.
const ALONE: u32 = 8;

/// Then every so many flushes it is tried whether that is still so.
const TRIED: u32 = 16;

/// Room that an idle session keeps for frames.
const KEPT_ROOM: usize = 4 * 1024;

pub(super) struct Wire {
    pub(super) link: Link,
    /// The last frames that went out; kept for its room.
    going: Vec<u8>,
    /// How sending failed, for the driver.
    failed: Option<SessionError>,
}

impl Wire {
    pub(super) fn new(link: Link) -> Self {
        Self { link, going: Vec::new(), failed: None }
    }

    /// What is known of its end.
    pub(super) fn check(&mut self) -> Result<(), SessionError> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Takes what was said, to be sent.
    pub(super) fn take(&mut self, state: &mut State) {
        state.alone = match std::mem::replace(&mut state.speakers, Speakers::None) {
            Speakers::None | Speakers::One(_) => state.alone.wrapping_add(1).max(1),
            Speakers::Several => 0,
        };
        self.going.clear();
        std::mem::swap(&mut self.going, &mut state.out);
        state.wake_waiting();
    }

    /// Seals and sends what was taken, many records for one write. What the network does not take waits in the link.
    pub(super) fn send(&mut self, scratch: &mut Scratch) -> Result<(), SessionError> {
        let mut rest = self.going.as_slice();
        while !rest.is_empty() {
            // Before each burst: frames of many streams may be more records than are left to a key.
            self.link.prepare()?;
            if self.link.is_blocked() {
                break;
            }
            let mut length = 0;
            for record in scratch.cipher.chunks_mut(RECORD).take(SLOTS) {
                let (content, more) = rest.split_at(rest.len().min(MAX_PLAINTEXT));
                if content.is_empty() {
                    break;
                }
                rest = more;
                let size = content.len() + RECORD_OVERHEAD;
                let record = &mut record[..size];
                record[RECORD_HEADER..RECORD_HEADER + content.len()].copy_from_slice(content);
                self.link.seal_in_place(record)?;
                length += size;
            }
            self.link.send(&scratch.cipher[..length])?;
        }
        // What TLS had to say itself is in the way, or the network.
        if !rest.is_empty() {
            let rest = rest.to_vec();
            self.link.seal(&rest)?;
        }
        if self.going.capacity() > KEPT_ROOM {
            self.going = Vec::new();
        }
        Ok(())
    }
}

impl State {
    /// Whether what is said waits until everything else that is ready had its turn.
    pub(super) fn gathers(&self) -> bool {
        self.alone < ALONE || self.alone.is_multiple_of(TRIED)
    }
}

impl Mux {
    /// Sends what was said, from the task of a stream. What is left of it is the driver's.
    pub(super) fn send_at_once(&self, scratch: &mut Scratch) {
        let is_left = match self.wire.try_lock().as_deref_mut() {
            Ok(Some(wire)) => wire.send_now(self, scratch),
            // The driver has it just now, or it is gone.
            Ok(None) | Err(_) => true,
        };
        if is_left {
            self.lock().wake_driver();
        }
    }
}

impl Wire {
    /// Whether something is left of it.
    fn send_now(&mut self, mux: &Mux, scratch: &mut Scratch) -> bool {
        if self.link.is_blocked() || self.failed.is_some() {
            return true;
        }
        // Until it is known better: if this panics, others' frames are lost as well.
        self.failed = Some(SessionError::Closed);
        self.take(&mut mux.lock());
        self.failed = self.send(scratch).err();
        self.link.is_blocked() || self.failed.is_some()
    }
}
