//! Buffers that all sessions of a thread share. They are lent for the time of one poll, which never
//! waits in between, so that no connection holds any.

use std::cell::RefCell;

use hauberk_tls::channel::{MAX_PLAINTEXT, RECORD_OVERHEAD};

/// The longest record of ours.
pub(crate) const RECORD: usize = MAX_PLAINTEXT + RECORD_OVERHEAD;

/// Records in one burst. Of 4, 8 and 16 the last costs the least CPU for each byte; see
/// `docs/performance.md`.
pub(crate) const SLOTS: usize = 16;

/// Two buffers of a burst's length.
pub(crate) struct Scratch {
    /// Records, as they are on the wire.
    pub(crate) cipher: Box<[u8]>,
    /// What is in them.
    pub(crate) plain: Box<[u8]>,
}

/// Of the peer's records, one may be begun before a burst is read; its padding may be longer than ours.
const LENGTH: usize = (SLOTS + 1) * (MAX_PLAINTEXT + RECORD_OVERHEAD + 256);

thread_local! {
    static SCRATCH: RefCell<Option<Scratch>> = const { RefCell::new(None) };
}

/// Lends the thread's buffers.
pub(crate) fn with_scratch<T>(work: impl FnOnce(&mut Scratch) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| {
        work(scratch.get_or_insert_with(|| Scratch {
            cipher: vec![0; LENGTH].into_boxed_slice(),
            plain: vec![0; LENGTH].into_boxed_slice(),
        }))
    })
}
