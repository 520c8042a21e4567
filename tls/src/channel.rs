//! One TLS 1.3 connection after its handshake: application bytes to records and back, in the caller's
//! buffers, many records at a time.
//!
//! rustls makes the connection and stays in charge of its secrets; what is done here is the record
//! protection of RFC 8446 alone. Why not by rustls as well:
//! `docs/adr/0004-records-without-copies.md`. `handshake.rs` makes a [`Channel`],
//! `record.rs` protects and unprotects single records.
//!
//! Fails closed: after any error nothing more is opened or sealed.

mod handshake;
mod record;

use rustls::{
    AlertDescription, ConnectionTrafficSecrets, Error, client::ClientConnectionData,
    kernel::KernelConnection, server::ServerConnectionData,
};

pub use handshake::{
    CallerToken, Established, FinishError, Handshake, Hello, Progress, read_hello,
};
use record::{ContentType, Protection};
pub use record::{MAX_PLAINTEXT, RECORD_HEADER, RECORD_OVERHEAD};

/// Records that one burst may hold: how far ahead of its limit a key is renewed.
const BURST: u64 = 64;

/// Application bytes of so many records.
const BURST_LENGTH: usize = 64 * MAX_PLAINTEXT;

/// Records without application bytes that a peer may send in a row: key updates, empty records.
const FRUITLESS: u8 = 16;

/// The handshake message of a key update, RFC 8446 section 4.6.3, without its last byte.
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];

/// A TLS 1.3 connection whose handshake is done.
pub struct Channel {
    sealing: Protection,
    opening: Protection,
    secrets: Box<Secrets>,
    /// Records after which a sending key is renewed.
    key_limit: u64,
    /// Renewals of the sending key that nobody has asked for yet.
    renewals: u32,
    /// The peer asked for a new key of ours.
    update_owed: bool,
    fruitless: u8,
    failed: bool,
}

enum Secrets {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Secrets {
    fn next_sealing(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(connection) => connection.update_tx_secret(),
            Self::Server(connection) => connection.update_tx_secret(),
        }
    }

    fn next_opening(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(connection) => connection.update_rx_secret(),
            Self::Server(connection) => connection.update_rx_secret(),
        }
    }
}

/// What the next record was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// The bytes hold no whole record.
    Incomplete,
    /// `used` bytes were a record with `length` application bytes, which are in the output; maybe none.
    Data {
        /// Bytes of the input that are used up.
        used: usize,
        /// Bytes of the output that count.
        length: usize,
    },
    /// The peer closed its direction: nothing comes after it.
    Closed,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("failed", &self.failed).finish_non_exhaustive()
    }
}

impl Channel {
    fn new(
        sealing: (u64, ConnectionTrafficSecrets),
        opening: (u64, ConnectionTrafficSecrets),
        secrets: Secrets,
        key_limit: u64,
    ) -> Result<Self, Error> {
        Ok(Self {
            sealing: Protection::new(sealing)?,
            opening: Protection::new(opening)?,
            secrets: Box::new(secrets),
            key_limit,
            renewals: 0,
            update_owed: false,
            fruitless: 0,
            failed: false,
        })
    }

    /// Renews the sending key after this many records instead of the cipher's own limit, if that is
    /// less. Never later than the limit.
    pub fn lower_key_limit(&mut self, records: u64) {
        self.key_limit = self.key_limit.min(records);
    }

    /// How often the sending key was renewed since this was last asked.
    pub fn take_renewals(&mut self) -> u32 {
        std::mem::take(&mut self.renewals)
    }

    /// Writes what must go out before further application bytes: a key update, if one is due. Call it
    /// before each burst of at most 64 records.
    ///
    /// # Errors
    /// If the secrets cannot be renewed.
    pub fn prepare(&mut self, out: &mut Vec<u8>) -> Result<(), Error> {
        self.check()?;
        if !self.update_owed && self.sealing.sequence() < self.key_limit.saturating_sub(BURST) {
            return Ok(());
        }
        if self.sealing.sequence() == 0 {
            // Nothing was sent under this key yet: it is as new as the next one would be.
            self.update_owed = false;
            return Ok(());
        }
        //= RFC 8446 section 4.6.3
        //# After sending a KeyUpdate message, the sender SHALL send all its traffic using the next
        //# generation of keys
        let [a, b, c, d] = KEY_UPDATE;
        let message = [a, b, c, d, 0];
        let sealed = self.sealing.seal_vec(ContentType::Handshake, &message, out);
        self.guard(sealed)?;
        let next = self.secrets.next_sealing().and_then(Protection::new);
        self.sealing = self.guard(next)?;
        self.renewals = self.renewals.saturating_add(1);
        self.update_owed = false;
        Ok(())
    }

    /// Seals one record in place: `record` is [`RECORD_HEADER`] bytes of room, the application bytes, and
    /// room for the rest of [`RECORD_OVERHEAD`]. At most [`MAX_PLAINTEXT`] application bytes, at
    /// least one.
    ///
    /// # Errors
    /// If the lengths are wrong, [`prepare`](Self::prepare) was not called in time, or the channel has failed before.
    pub fn seal_in_place(&mut self, record: &mut [u8]) -> Result<(), Error> {
        self.check()?;
        let sealed = self.may_seal().and_then(|()| self.sealing.seal_in_place(record));
        self.guard(sealed)
    }

    /// A key protects no more records than its cipher allows, whatever the caller does.
    fn may_seal(&self) -> Result<(), Error> {
        if self.sealing.sequence() < self.key_limit.max(BURST) {
            return Ok(());
        }
        Err(Error::General("the sending key has protected as many records as it may".to_owned()))
    }

    /// Seals bytes as records behind what is in `out`.
    ///
    /// # Errors
    /// If the channel has failed before.
    pub fn seal(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        for burst in bytes.chunks(BURST_LENGTH) {
            self.prepare(out)?;
            for chunk in burst.chunks(MAX_PLAINTEXT) {
                let sealed = self
                    .may_seal()
                    .and_then(|()| self.sealing.seal_vec(ContentType::ApplicationData, chunk, out));
                self.guard(sealed)?;
            }
        }
        Ok(())
    }

    /// Says that nothing more comes from this side.
    ///
    /// # Errors
    /// If the channel has failed before.
    pub fn close(&mut self, out: &mut Vec<u8>) -> Result<(), Error> {
        self.check()?;
        // warning(1), close_notify(0)
        let sealed = self.sealing.seal_vec(ContentType::Alert, &[1, 0], out);
        self.failed = true;
        sealed
    }

    /// Opens the first record of `input` into `output`, which must have room for its ciphertext: at
    /// most [`MAX_PLAINTEXT`] and 256 bytes more.
    ///
    /// # Errors
    /// If the record is not authentic or breaks the protocol, if the peer sent a fatal alert, or if
    /// the channel has failed before. The connection must end then.
    pub fn open(&mut self, input: &[u8], output: &mut [u8]) -> Result<Opened, Error> {
        self.check()?;
        let opened = self.open_record(input, output);
        self.guard(opened)
    }

    fn open_record(&mut self, input: &[u8], output: &mut [u8]) -> Result<Opened, Error> {
        let Some(record) = self.opening.open(input, output)? else {
            return Ok(Opened::Incomplete);
        };
        let content = &output[..record.length];
        let length = match record.content {
            ContentType::ApplicationData => record.length,
            ContentType::Alert => return alert(content),
            ContentType::Handshake => {
                self.take_key_update(content)?;
                0
            }
        };
        if length > 0 {
            self.fruitless = 0;
        } else {
            // Work for us, none for the peer.
            self.fruitless += 1;
            if self.fruitless > FRUITLESS {
                return Err(Error::General("too many records without data".to_owned()));
            }
        }
        Ok(Opened::Data { used: record.used, length })
    }

    /// The only handshake message that may come now. Session tickets are not sent in `hauberk/1`.
    fn take_key_update(&mut self, message: &[u8]) -> Result<(), Error> {
        match message.strip_prefix(&KEY_UPDATE) {
            Some([0]) => {}
            Some([1]) => self.update_owed = true,
            Some(_) | None => {
                return Err(Error::General(
                    "a handshake message other than a key update".to_owned(),
                ));
            }
        }
        self.opening = self.secrets.next_opening().and_then(Protection::new)?;
        Ok(())
    }

    fn check(&self) -> Result<(), Error> {
        if self.failed {
            return Err(Error::General("the TLS connection has ended before".to_owned()));
        }
        Ok(())
    }

    fn guard<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        self.failed |= result.is_err();
        result
    }
}

fn alert(content: &[u8]) -> Result<Opened, Error> {
    match content {
        // close_notify
        [_, 0] => Ok(Opened::Closed),
        //= RFC 8446 section 6
        //# All the alerts listed in Section 6.2 MUST be sent with AlertLevel=fatal and MUST be
        //# treated as error alerts when received regardless of the AlertLevel in the message.
        [_, description] => Err(Error::AlertReceived(AlertDescription::from(*description))),
        _ => Err(Error::General("an alert of a wrong length".to_owned())),
    }
}
