//! The two hello messages of a TLS handshake, which cross in the clear.
//!
//! Reads RFC 8446 section 4.1 and nothing more. Any input is safe: what is short, fragmented
//! beyond repair or not TLS gives `None`.

/// What a client offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// Protocol versions, `0x0304` is TLS 1.3; only the legacy one if there is no
    /// `supported_versions`.
    pub versions: Vec<u16>,
    /// Cipher suites, in the client's order.
    pub cipher_suites: Vec<u16>,
    /// Key exchange groups, in the client's order; `0x11ec` is X25519MLKEM768.
    pub groups: Vec<u16>,
    /// The groups it already sent a key share for.
    pub key_shares: Vec<u16>,
    /// ALPN protocols.
    pub alpn: Vec<Vec<u8>>,
    /// The server name, if one was sent.
    pub server_name: Option<String>,
}

/// What a server chose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerHello {
    /// The protocol version.
    pub version: u16,
    /// The cipher suite.
    pub cipher_suite: u16,
    /// The key exchange group; absent before TLS 1.3, or where a ticket alone was used.
    pub group: Option<u16>,
}

/// The X25519MLKEM768 group, hybrid post-quantum.
pub const X25519MLKEM768: u16 = 0x11ec;

/// TLS 1.3.
pub const TLS13: u16 = 0x0304;

const HANDSHAKE_RECORD: u8 = 22;
const CHANGE_CIPHER_SPEC_RECORD: u8 = 20;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
const SERVER_NAME: u16 = 0;
const SUPPORTED_GROUPS: u16 = 10;
const ALPN: u16 = 16;
const SUPPORTED_VERSIONS: u16 = 43;
const KEY_SHARE: u16 = 51;

/// The `random` that makes a ServerHello a HelloRetryRequest (RFC 8446 section 4.1.3).
const RETRY: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91,
    0xc2, 0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// The first ClientHello of what a client sent.
pub fn client_hello(stream: &[u8]) -> Option<ClientHello> {
    let handshake = plaintext_handshake(stream);
    let mut messages = Reader(&handshake);
    parse_client_hello(messages.message(CLIENT_HELLO)?)
}

/// The ServerHello of what a server sent; one that only asks the client to try again is skipped.
pub fn server_hello(stream: &[u8]) -> Option<ServerHello> {
    let handshake = plaintext_handshake(stream);
    let mut messages = Reader(&handshake);
    let first = messages.message(SERVER_HELLO)?;
    if first.get(2..34) == Some(&RETRY) {
        parse_server_hello(messages.message(SERVER_HELLO)?)
    } else {
        parse_server_hello(first)
    }
}

/// The handshake messages up to where encryption begins, joined over records.
fn plaintext_handshake(stream: &[u8]) -> Vec<u8> {
    let mut records = Reader(stream);
    let mut messages = Vec::new();
    while let Some(kind) = records.u8() {
        let Some(body) = records.take(2).and_then(|_version| records.vector16()) else {
            break;
        };
        match kind {
            HANDSHAKE_RECORD => messages.extend(body.0),
            CHANGE_CIPHER_SPEC_RECORD => {}
            _ => break,
        }
    }
    messages
}

fn parse_client_hello(body: &[u8]) -> Option<ClientHello> {
    let mut body = Reader(body);
    let legacy_version = body.u16()?;
    let _random = body.take(32)?;
    let _session = body.vector8()?;
    let cipher_suites = body.vector16()?.u16s();
    let _compression = body.vector8()?;
    let mut hello =
        ClientHello { versions: vec![legacy_version], cipher_suites, ..Default::default() };
    // TLS 1.2 knows hellos without extensions.
    let mut extensions = body.vector16().unwrap_or(Reader(&[]));
    while let Some((kind, mut value)) = extensions.extension() {
        match kind {
            SUPPORTED_VERSIONS => hello.versions = value.vector8()?.u16s(),
            SUPPORTED_GROUPS => hello.groups = value.vector16()?.u16s(),
            KEY_SHARE => hello.key_shares = key_shares(value.vector16()?)?,
            ALPN => hello.alpn = protocols(value.vector16()?)?,
            SERVER_NAME => hello.server_name = Some(host_name(value.vector16()?)?),
            _ => {}
        }
    }
    Some(hello)
}

fn parse_server_hello(body: &[u8]) -> Option<ServerHello> {
    let mut body = Reader(body);
    let legacy_version = body.u16()?;
    let _random = body.take(32)?;
    let _session = body.vector8()?;
    let cipher_suite = body.u16()?;
    let _compression = body.u8()?;
    let mut hello = ServerHello { version: legacy_version, cipher_suite, group: None };
    let mut extensions = body.vector16().unwrap_or(Reader(&[]));
    while let Some((kind, mut value)) = extensions.extension() {
        match kind {
            SUPPORTED_VERSIONS => hello.version = value.u16()?,
            KEY_SHARE => hello.group = Some(value.u16()?),
            _ => {}
        }
    }
    Some(hello)
}

fn key_shares(mut list: Reader<'_>) -> Option<Vec<u16>> {
    let mut groups = Vec::new();
    while !list.0.is_empty() {
        groups.push(list.u16()?);
        list.vector16()?;
    }
    Some(groups)
}

fn protocols(mut list: Reader<'_>) -> Option<Vec<Vec<u8>>> {
    let mut protocols = Vec::new();
    while !list.0.is_empty() {
        protocols.push(list.vector8()?.0.to_vec());
    }
    Some(protocols)
}

fn host_name(mut list: Reader<'_>) -> Option<String> {
    const HOST_NAME: u8 = 0;
    match list.u8()? {
        HOST_NAME => Some(String::from_utf8_lossy(list.vector16()?.0).into_owned()),
        _ => None,
    }
}

/// A position in bytes that never goes beyond their end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        let bytes: [u8; 2] = self.take(2)?.try_into().ok()?;
        Some(u16::from_be_bytes(bytes))
    }

    /// A vector with a length of one byte.
    fn vector8(&mut self) -> Option<Reader<'a>> {
        let length = self.u8()?;
        self.take(length.into()).map(Reader)
    }

    /// A vector with a length of two bytes.
    fn vector16(&mut self) -> Option<Reader<'a>> {
        let length = self.u16()?;
        self.take(length.into()).map(Reader)
    }

    /// A handshake message's body, if it is of this kind.
    fn message(&mut self, kind: u8) -> Option<&'a [u8]> {
        if self.u8()? != kind {
            return None;
        }
        let high = usize::from(self.u8()?);
        let low = usize::from(self.u16()?);
        self.take(high << 16 | low)
    }

    fn extension(&mut self) -> Option<(u16, Reader<'a>)> {
        Some((self.u16()?, self.vector16()?))
    }

    fn u16s(mut self) -> Vec<u16> {
        std::iter::from_fn(|| self.u16()).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn vector8(body: &[u8]) -> Vec<u8> {
        [&[u8::try_from(body.len()).unwrap()], body].concat()
    }

    fn vector16(body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&length, body].concat()
    }

    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &vector16(body)].concat()
    }

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        [&[kind, 0][..], &vector16(body)].concat()
    }

    /// In records of at most `size` bytes.
    fn records(kind: u8, message: &[u8], size: usize) -> Vec<u8> {
        message
            .chunks(size)
            .flat_map(|chunk| [&[kind, 3, 1][..], &vector16(chunk)].concat())
            .collect()
    }

    fn client() -> Vec<u8> {
        let share = [&[0x11, 0xec][..], &vector16(&[7; 40])].concat();
        let name = [&[0][..], &vector16(b"a.example")].concat();
        let extensions = [
            extension(SERVER_NAME, &vector16(&name)),
            extension(SUPPORTED_GROUPS, &vector16(&[0x11, 0xec, 0, 29])),
            extension(ALPN, &vector16(&[vector8(b"h2"), vector8(b"x")].concat())),
            extension(SUPPORTED_VERSIONS, &vector8(&[3, 4])),
            extension(KEY_SHARE, &vector16(&share)),
        ]
        .concat();
        let body = [
            &[3, 3][..],
            &[1; 32],
            &vector8(&[2; 32]),
            &vector16(&[0x13, 0x02]),
            &vector8(&[0]),
            &vector16(&extensions),
        ]
        .concat();
        message(CLIENT_HELLO, &body)
    }

    fn server(random: &[u8; 32]) -> Vec<u8> {
        let share = [&[0x11, 0xec][..], &vector16(&[7; 40])].concat();
        let extensions =
            [extension(SUPPORTED_VERSIONS, &[3, 4]), extension(KEY_SHARE, &share)].concat();
        let body =
            [&[3, 3][..], random, &vector8(&[]), &[0x13, 0x02, 0], &vector16(&extensions)].concat();
        message(SERVER_HELLO, &body)
    }

    #[test]
    fn a_client_hello_is_read_also_over_several_records() {
        let expected = ClientHello {
            versions: vec![TLS13],
            cipher_suites: vec![0x1302],
            groups: vec![X25519MLKEM768, 29],
            key_shares: vec![X25519MLKEM768],
            alpn: vec![b"h2".to_vec(), b"x".to_vec()],
            server_name: Some("a.example".to_owned()),
        };
        for size in [7, 16_384] {
            let stream = records(HANDSHAKE_RECORD, &client(), size);
            assert_eq!(client_hello(&stream), Some(expected.clone()));
            assert_eq!(server_hello(&stream), None);
        }
    }

    #[test]
    fn a_server_hello_is_read_also_after_a_retry() {
        let expected =
            ServerHello { version: TLS13, cipher_suite: 0x1302, group: Some(X25519MLKEM768) };
        let hello = records(HANDSHAKE_RECORD, &server(&[9; 32]), 16_384);
        let retry = records(HANDSHAKE_RECORD, &server(&RETRY), 16_384);
        let change = records(CHANGE_CIPHER_SPEC_RECORD, &[1], 1);
        assert_eq!(server_hello(&hello), Some(expected.clone()));
        assert_eq!(server_hello(&[retry.clone(), change, hello].concat()), Some(expected));
        assert_eq!(server_hello(&retry), None);
    }

    #[test]
    fn every_truncation_and_every_altered_byte_is_survived() {
        for stream in [client(), server(&[9; 32])] {
            let stream = records(HANDSHAKE_RECORD, &stream, 100);
            for at in 0..stream.len() {
                client_hello(&stream[..at]);
                server_hello(&stream[..at]);
                for value in [0, 1, 2, 22, 43, 51, 127, 128, 255] {
                    let mut altered = stream.clone();
                    altered[at] = value;
                    client_hello(&altered);
                    server_hello(&altered);
                }
            }
        }
    }
}
