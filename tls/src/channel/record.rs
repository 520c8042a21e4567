//! Protection of single records, RFC 8446 section 5.2: sequence number, nonce, additional data,
//! content type, padding. Nothing else is decided here.

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use rustls::{ConnectionTrafficSecrets, Error, InvalidMessage};

/// The most application bytes in a record.
pub const MAX_PLAINTEXT: usize = 1 << 14;

/// Bytes of a record's header.
pub const RECORD_HEADER: usize = 5;

const TAG: usize = 16;

/// Bytes of a record besides its content: header, content type, tag.
pub const RECORD_OVERHEAD: usize = RECORD_HEADER + 1 + TAG;

//= RFC 8446 section 5.2
//# length:  The length (in bytes) of the following TLSCiphertext.encrypted_record [...] An endpoint
//# that receives a record that exceeds this length MUST terminate the connection with a
//# "record_overflow" alert.
const MAX_CIPHERTEXT: usize = MAX_PLAINTEXT + 256;

/// What is in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ContentType {
    Alert,
    Handshake,
    ApplicationData,
}

impl ContentType {
    fn byte(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::ApplicationData => 23,
        }
    }
}

/// A record that was opened.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) content: ContentType,
    /// Bytes of the input that it was.
    pub(super) used: usize,
    /// Bytes of the output that are its content.
    pub(super) length: usize,
}

/// The key of one direction, and how often it was used.
pub(super) struct Protection {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Protection {
    pub(super) fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher that is not known here".to_owned())),
        };
        let unbound = UnboundKey::new(algorithm, key.as_ref())
            .map_err(|_| Error::General("a traffic key of a wrong length".to_owned()))?;
        let iv = iv
            .as_ref()
            .first_chunk()
            .ok_or_else(|| Error::General("a traffic nonce of a wrong length".to_owned()))?;
        Ok(Self { key: LessSafeKey::new(unbound), iv: *iv, sequence })
    }

    /// How many records were protected with this key.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// See [`super::Channel::seal_in_place`].
    pub(super) fn seal_in_place(&mut self, record: &mut [u8]) -> Result<(), Error> {
        self.seal(ContentType::ApplicationData, record)
    }

    /// Seals `content` as one record behind what is in `out`.
    pub(super) fn seal_vec(
        &mut self,
        content_type: ContentType,
        content: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let start = out.len();
        out.resize(start + RECORD_HEADER, 0);
        out.extend_from_slice(content);
        out.resize(start + content.len() + RECORD_OVERHEAD, 0);
        self.seal(content_type, &mut out[start..])
    }

    fn seal(&mut self, content_type: ContentType, record: &mut [u8]) -> Result<(), Error> {
        let wrong = || Error::General("a record of a wrong length".to_owned());
        let content = record.len().checked_sub(RECORD_OVERHEAD).ok_or_else(wrong)?;
        if content == 0 || content > MAX_PLAINTEXT {
            return Err(wrong());
        }
        let header = header(content + 1 + TAG).ok_or_else(wrong)?;
        let nonce = self.next_nonce()?;
        let (head, rest) = record.split_first_chunk_mut::<RECORD_HEADER>().ok_or_else(wrong)?;
        *head = header;
        let (content, trailer) = rest.split_at_mut(content);
        self.key
            .seal_in_place_scatter(
                nonce,
                Aad::from(header),
                content,
                &[content_type.byte()],
                trailer,
            )
            .map_err(|_| Error::EncryptError)
    }

    /// Opens the first record of `input` into `output`; `None` if it is not whole.
    pub(super) fn open(
        &mut self,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<Option<Record>, Error> {
        let Some((header, rest)) = input.split_first_chunk::<RECORD_HEADER>() else {
            return Ok(None);
        };
        let [content_type, major, minor, high, low] = *header;
        //= RFC 8446 section 5.2
        //# opaque_type:  The outer opaque_type field of a TLSCiphertext record is always set to the
        //# value 23 (application_data)
        if content_type != ContentType::ApplicationData.byte() || (major, minor) != (3, 3) {
            return Err(Error::InvalidMessage(InvalidMessage::InvalidContentType));
        }
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > MAX_CIPHERTEXT {
            return Err(Error::PeerSentOversizedRecord);
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let inner = length.checked_sub(TAG).ok_or(Error::DecryptError)?;
        let (ciphertext, tag) = body.split_at(inner);
        let plaintext = output
            .get_mut(..inner)
            .ok_or_else(|| Error::General("no room for a record".to_owned()))?;
        let nonce = self.next_nonce()?;
        self.key
            .open_separate_gather(nonce, Aad::from(*header), ciphertext, tag, plaintext)
            .map_err(|_| Error::DecryptError)?;
        //= RFC 8446 section 5.4
        //# the receiving implementation scans the field from the end toward the beginning until it
        //# finds a non-zero octet.  This non-zero octet is the content type of the message.
        let padding = plaintext.iter().rev().take_while(|byte| **byte == 0).count();
        let end = inner.checked_sub(padding + 1);
        let (Some(end), Some(kind)) = (end, end.and_then(|end| plaintext.get(end))) else {
            return Err(Error::InvalidMessage(InvalidMessage::InvalidContentType));
        };
        if end > MAX_PLAINTEXT {
            return Err(Error::PeerSentOversizedRecord);
        }
        let content = match kind {
            21 => ContentType::Alert,
            22 => ContentType::Handshake,
            23 => ContentType::ApplicationData,
            _ => return Err(Error::InvalidMessage(InvalidMessage::InvalidContentType)),
        };
        Ok(Some(Record { content, used: RECORD_HEADER + length, length: end }))
    }

    /// Never the same twice for a key: the sequence only counts up, and ends before it wraps.
    fn next_nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = self.iv;
        for (byte, number) in nonce.iter_mut().skip(NONCE_LEN - 8).zip(self.sequence.to_be_bytes())
        {
            *byte ^= number;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(Error::EncryptError)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

fn header(length: usize) -> Option<[u8; RECORD_HEADER]> {
    let [high, low] = u16::try_from(length).ok()?.to_be_bytes();
    Some([ContentType::ApplicationData.byte(), 3, 3, high, low])
}
