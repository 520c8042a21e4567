//! Connections between agents after their handshake: with each other, and with rustls as the peer
//! that says whether our records are TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    io::{Read, Write},
    sync::Arc,
    time::Duration,
};

use hauberk_core::{
    identity::SpiffeId,
    policy::Reason,
    session::{ALPN, Reauthenticate},
};
use hauberk_tls::{
    ByServerName, Credential, CredentialSlot, PrivateKey, TrustBundle, TrustSlot,
    channel::{
        Channel, Established, Handshake, Hello, MAX_PLAINTEXT, Opened, Progress, RECORD_HEADER,
        RECORD_OVERHEAD, read_hello,
    },
    failure_of, mesh_client_config, mesh_server_config, prove, shared_server_config, verify_chain,
    verify_proof, with_caller_token,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, ConnectionCommon, Error, HandshakeKind,
    ServerConfig, ServerConnection,
    client::{ResolvesClientCert, Resumption},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, ServerName};

const CHECKOUT: &str = "spiffe://example.org/ns/shop/sa/checkout";
const LEDGER: &str = "spiffe://example.org/ns/payments/sa/ledger";
const WEB: &str = "spiffe://example.org/ns/shop/sa/web";

struct World {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    bundle: TrustBundle,
    ledger: Arc<CredentialSlot>,
    issuer: Issuer<'static, KeyPair>,
}

impl World {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = ca.self_signed(&key).unwrap().der().clone();
        let issuer = Issuer::from_ca_cert_der(&root, key).unwrap();
        let domain = LEDGER.parse::<SpiffeId>().unwrap().trust_domain().clone();
        let bundle = TrustBundle::new(domain, vec![root], hauberk_tls::now()).unwrap();
        let trust = TrustSlot::new(bundle.clone());
        let names = ByServerName::default();
        let ledger = slot(LEDGER, &issuer);
        names.store([ledger.clone()]);
        Self {
            ledger,
            client: Arc::new(
                mesh_client_config(slot(CHECKOUT, &issuer), trust.clone(), &[ALPN]).unwrap(),
            ),
            server: Arc::new(mesh_server_config(Arc::new(names), trust, &[ALPN]).unwrap()),
            bundle,
            issuer,
        }
    }

    fn client(&self) -> Handshake {
        Handshake::client(self.client.clone(), ledger_name()).unwrap()
    }

    fn finish(&self, handshake: Handshake) -> Established {
        handshake.finish(&self.bundle, hauberk_tls::now()).unwrap()
    }

    /// Both ends of a connection.
    fn connect(&self) -> (Established, Established) {
        self.connect_as(self.client())
    }

    fn connect_as(&self, mut client: Handshake) -> (Established, Established) {
        let mut server = Handshake::server(self.server.clone()).unwrap();
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        assert_eq!(client.advance(&[], &mut to_server).unwrap(), Progress::NeedsBytes);
        assert_eq!(server.advance(&to_server, &mut to_client).unwrap(), Progress::NeedsBytes);
        to_server.clear();
        assert_eq!(client.advance(&to_client, &mut to_server).unwrap(), Progress::Done);
        to_client.clear();
        assert_eq!(server.advance(&to_server, &mut to_client).unwrap(), Progress::Done);
        assert!(to_client.is_empty(), "the server has nothing left to say, no tickets either");
        (self.finish(client), self.finish(server))
    }

    /// Our client with rustls as it is usually used as the server.
    fn connect_to_rustls(&self) -> (Established, ServerConnection) {
        let mut client = self.client();
        let mut server = ServerConnection::new(self.server.clone()).unwrap();
        let mut to_server = Vec::new();
        client.advance(&[], &mut to_server).unwrap();
        loop {
            read_tls(&mut server, &to_server);
            to_server.clear();
            let to_client = write_tls(&mut server);
            if to_client.is_empty() {
                break;
            }
            client.advance(&to_client, &mut to_server).unwrap();
        }
        assert!(!server.is_handshaking());
        (self.finish(client), server)
    }
}

fn read_tls<D>(connection: &mut ConnectionCommon<D>, bytes: &[u8]) {
    try_read_tls(connection, bytes).unwrap();
}

fn try_read_tls<D>(connection: &mut ConnectionCommon<D>, mut bytes: &[u8]) -> Result<(), Error> {
    while !bytes.is_empty() {
        connection.read_tls(&mut bytes).unwrap();
        connection.process_new_packets()?;
    }
    Ok(())
}

fn write_tls<D>(connection: &mut ConnectionCommon<D>) -> Vec<u8> {
    let mut out = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut out).unwrap();
    }
    out
}

fn ledger_name() -> ServerName<'static> {
    name_of(LEDGER)
}

fn name_of(id: &str) -> ServerName<'static> {
    ServerName::try_from(id.parse::<SpiffeId>().unwrap().server_name()).unwrap()
}

fn slot(id: &str, issuer: &Issuer<'_, KeyPair>) -> Arc<CredentialSlot> {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    parameters.is_ca = IsCa::ExplicitNoCa;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    parameters.not_before = time::OffsetDateTime::now_utc() - time::Duration::minutes(1);
    parameters.not_after = time::OffsetDateTime::now_utc() + time::Duration::minutes(5);
    let leaf = parameters.signed_by(&key, issuer).unwrap().der().clone();
    let key = PrivateKey::from_pkcs8(key.serialize_der());
    let slot = CredentialSlot::new(id.parse().unwrap());
    slot.store(Credential::new(vec![leaf], &key, hauberk_tls::now()).unwrap()).unwrap();
    slot
}

/// Everything that is in these records.
fn open_all(channel: &mut Channel, mut records: &[u8]) -> Result<Vec<u8>, Error> {
    let mut all = Vec::new();
    let mut buffer = vec![0; MAX_PLAINTEXT + 256];
    while !records.is_empty() {
        match channel.open(records, &mut buffer)? {
            Opened::Data { used, length } => {
                all.extend_from_slice(&buffer[..length]);
                records = &records[used..];
            }
            Opened::Incomplete | Opened::Closed => break,
        }
    }
    Ok(all)
}

fn sealed(channel: &mut Channel, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    channel.seal(bytes, &mut out).unwrap();
    out
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| u8::try_from(n % 251).unwrap()).collect()
}

#[test]
fn both_ends_know_each_other_and_share_a_value_that_no_other_connection_has() {
    let world = World::new();
    let (client, server) = world.connect();
    assert_eq!(client.peer.id().to_string(), LEDGER);
    assert_eq!(server.peer.id().to_string(), CHECKOUT);
    assert_eq!(client.binding, server.binding);
    assert_eq!(client.name, server.name);
    assert_eq!((client.version, client.group), (Some("TLSv1.3"), Some("X25519MLKEM768")));
    assert_eq!(client.alpn.as_deref(), Some(ALPN));
    let (other, _) = world.connect();
    assert_ne!(client.binding, other.binding);
    assert_ne!(client.name, other.name);
}

#[test]
fn bytes_pass_both_ways_in_many_records() {
    let (mut client, mut server) = World::new().connect();
    for length in [1, 100, MAX_PLAINTEXT, MAX_PLAINTEXT + 1, 300_000] {
        let bytes = pattern(length);
        let records = sealed(&mut client.channel, &bytes);
        assert_eq!(open_all(&mut server.channel, &records).unwrap(), bytes);
        let records = sealed(&mut server.channel, &bytes);
        assert_eq!(open_all(&mut client.channel, &records).unwrap(), bytes);
    }
}

#[test]
fn a_record_sealed_in_place_is_one_of_tls() {
    let (mut client, mut server) = World::new().connect_to_rustls();
    let bytes = pattern(MAX_PLAINTEXT);
    let mut record = vec![0; bytes.len() + RECORD_OVERHEAD];
    record[RECORD_HEADER..RECORD_HEADER + bytes.len()].copy_from_slice(&bytes);
    client.channel.seal_in_place(&mut record).unwrap();
    read_tls(&mut server, &record);
    let mut got = vec![0; bytes.len()];
    server.reader().read_exact(&mut got).unwrap();
    assert_eq!(got, bytes);
    for wrong in [RECORD_OVERHEAD, MAX_PLAINTEXT + RECORD_OVERHEAD + 1] {
        let (mut fresh, _) = World::new().connect_to_rustls();
        fresh.channel.seal_in_place(&mut vec![0; wrong]).expect_err("a wrong length was taken");
    }
}

#[test]
fn keys_are_renewed_before_their_limit_in_both_directions() {
    let (mut client, mut server) = World::new().connect();
    client.channel.lower_key_limit(100);
    server.channel.lower_key_limit(80);
    let mut renewals = 0;
    for number in 0..500_u32 {
        let bytes = number.to_be_bytes();
        let records = sealed(&mut client.channel, &bytes);
        renewals += u32::from(records.len() > bytes.len() + RECORD_OVERHEAD);
        assert_eq!(open_all(&mut server.channel, &records).unwrap(), bytes);
        let records = sealed(&mut server.channel, &bytes);
        assert_eq!(open_all(&mut client.channel, &records).unwrap(), bytes);
    }
    // Every 36 records, which is the limit less a burst.
    assert_eq!(renewals, 13);
}

#[test]
fn a_key_protects_no_more_records_than_it_may() {
    let (mut client, mut server) = World::new().connect();
    client.channel.lower_key_limit(100);
    let record = |bytes: &[u8]| {
        let mut record = vec![0; bytes.len() + RECORD_OVERHEAD];
        record[RECORD_HEADER..RECORD_HEADER + bytes.len()].copy_from_slice(bytes);
        record
    };
    for number in 0..100_u8 {
        let mut sealed = record(&[number]);
        client.channel.seal_in_place(&mut sealed).unwrap();
        assert_eq!(open_all(&mut server.channel, &sealed).unwrap(), [number]);
    }
    // Nobody has asked whether a new key is due.
    client.channel.seal_in_place(&mut record(b"x")).expect_err("one more than it may");
    client.channel.prepare(&mut Vec::new()).expect_err("it has failed for good");

    let (mut client, mut server) = World::new().connect();
    client.channel.lower_key_limit(100);
    // More at once than are left to any key.
    let bytes = pattern(200 * MAX_PLAINTEXT);
    let records = sealed(&mut client.channel, &bytes);
    assert_eq!(open_all(&mut server.channel, &records).unwrap(), bytes);
    assert!(client.channel.take_renewals() >= 2);
}

#[test]
fn key_updates_are_those_of_tls() {
    let (mut client, mut server) = World::new().connect_to_rustls();
    client.channel.lower_key_limit(70);
    for number in 0..50_u8 {
        read_tls(&mut server, &sealed(&mut client.channel, &[number; 3]));
        let mut got = [0; 3];
        server.reader().read_exact(&mut got).unwrap();
        assert_eq!(got, [number; 3]);
        if number % 10 == 9 {
            // rustls renews its key and asks for one of ours.
            server.refresh_traffic_keys().unwrap();
        }
        server.writer().write_all(&[number; 5]).unwrap();
        let records = write_tls(&mut server);
        assert_eq!(open_all(&mut client.channel, &records).unwrap(), [number; 5]);
    }
}

#[test]
fn what_rides_along_with_the_handshake_is_not_lost() {
    let world = World::new();
    let mut client = world.client();
    let mut server = Handshake::server(world.server.clone()).unwrap();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    client.advance(&[], &mut to_server).unwrap();
    server.advance(&to_server, &mut to_client).unwrap();
    to_server.clear();
    client.advance(&to_client, &mut to_server).unwrap();
    let mut client = world.finish(client);
    client.channel.seal(b"first", &mut to_server).unwrap();
    client.channel.seal(b"second", &mut to_server).unwrap();
    // In two pieces: the second ends in the middle of a record.
    let (one, two) = to_server.split_at(to_server.len() - 3);
    assert_eq!(server.advance(one, &mut to_client).unwrap(), Progress::Done);
    let mut server = world.finish(server);
    assert_eq!(server.plaintext, b"first");
    let mut rest = server.ciphertext;
    rest.extend_from_slice(two);
    assert_eq!(open_all(&mut server.channel, &rest).unwrap(), b"second");
}

#[test]
fn a_changed_byte_anywhere_is_refused_and_nothing_is_opened_afterwards() {
    let world = World::new();
    let length = RECORD_OVERHEAD + 4;
    // From the record's length on; a wrong type or version is refused without a key.
    for place in [3, 4, 5, 9, length - 1] {
        let (mut client, mut server) = world.connect();
        let mut record = sealed(&mut client.channel, b"data");
        assert_eq!(record.len(), length);
        let good = sealed(&mut client.channel, b"more");
        record[place] ^= 1;
        record.extend_from_slice(&[0; 300]);
        open_all(&mut server.channel, &record).expect_err("a changed record was taken");
        open_all(&mut server.channel, &good).expect_err("the channel went on");
        server.channel.seal(b"x", &mut Vec::new()).expect_err("the channel went on");
    }
}

#[test]
fn records_out_of_order_or_twice_are_refused() {
    let (mut client, mut server) = World::new().connect();
    let first = sealed(&mut client.channel, b"first");
    let second = sealed(&mut client.channel, b"second");
    let error = open_all(&mut server.channel, &second).unwrap_err();
    assert_eq!(error, Error::DecryptError);
    let (mut client, mut server) = World::new().connect();
    let twice = sealed(&mut client.channel, b"first").repeat(2);
    assert_eq!(open_all(&mut server.channel, &twice).unwrap_err(), Error::DecryptError);
    drop(first);
}

#[test]
fn a_record_too_long_is_refused_on_its_header() {
    let (_, mut server) = World::new().connect();
    let header = [23, 3, 3, 0x41, 0x01];
    let error = server.channel.open(&header, &mut [0; 17_000]).unwrap_err();
    assert_eq!(error, Error::PeerSentOversizedRecord);
}

#[test]
fn records_in_clear_are_refused() {
    for header in [[22, 3, 3, 0, 20], [20, 3, 3, 0, 1], [21, 3, 3, 0, 2], [23, 3, 1, 0, 20]] {
        let (_, mut server) = World::new().connect();
        server.channel.open(&header, &mut [0; 64]).expect_err("it was taken");
    }
}

#[test]
fn half_a_record_is_waited_for() {
    let (mut client, mut server) = World::new().connect();
    let record = sealed(&mut client.channel, b"data");
    for length in 0..record.len() {
        let opened = server.channel.open(&record[..length], &mut [0; 64]).unwrap();
        assert_eq!(opened, Opened::Incomplete);
    }
    assert_eq!(open_all(&mut server.channel, &record).unwrap(), b"data");
}

#[test]
fn a_close_is_told_from_a_fatal_alert() {
    let (mut client, mut server) = World::new().connect();
    let mut bytes = Vec::new();
    client.channel.close(&mut bytes).unwrap();
    assert_eq!(server.channel.open(&bytes, &mut [0; 64]).unwrap(), Opened::Closed);
    client.channel.seal(b"x", &mut bytes).expect_err("it went on after the close");

    // A server that refuses the client's certificate says so after the client is done.
    let world = World::new();
    let stranger = World::new();
    let mut client = Handshake::client(stranger.client.clone(), ledger_name()).unwrap();
    let mut server = Handshake::server(world.server.clone()).unwrap();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    client.advance(&[], &mut to_server).unwrap();
    server.advance(&to_server, &mut to_client).unwrap();
    to_server.clear();
    // The client refuses the server as well: neither knows the other's root.
    client.advance(&to_client, &mut to_server).expect_err("a foreign server was taken");
    to_client.clear();
    let error = server.advance(&to_server, &mut to_client).unwrap_err();
    assert!(matches!(error, Error::AlertReceived(_)), "{error:?}");
}

#[test]
fn a_refused_client_learns_it_from_an_alert() {
    let world = World::new();
    // Nobody's certificate: the configuration of a client without a credential.
    let empty = CredentialSlot::new(CHECKOUT.parse().unwrap());
    let trust = TrustSlot::new(world.bundle.clone());
    let config = Arc::new(mesh_client_config(empty, trust, &[ALPN]).unwrap());
    let mut client = Handshake::client(config, ledger_name()).unwrap();
    let mut server = Handshake::server(world.server.clone()).unwrap();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    client.advance(&[], &mut to_server).unwrap();
    server.advance(&to_server, &mut to_client).unwrap();
    to_server.clear();
    assert_eq!(client.advance(&to_client, &mut to_server).unwrap(), Progress::Done);
    let mut client = world.finish(client);
    to_client.clear();
    let error = server.advance(&to_server, &mut to_client).unwrap_err();
    assert_eq!(error, Error::NoCertificatesPresented);
    let refused = client.channel.open(&to_client, &mut [0; 64]).unwrap_err();
    assert_eq!(refused, Error::AlertReceived(AlertDescription::CertificateRequired));
}

/// Shows one certificate, whomever its callers ask for.
#[derive(Debug)]
struct Always(Arc<CredentialSlot>);

impl ResolvesServerCert for Always {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        ResolvesClientCert::resolve(self.0.as_ref(), &[], &[])
    }
}

#[test]
fn a_server_with_anothers_certificate_is_refused() {
    let world = World::new();
    let mut config = ServerConfig::clone(&world.server);
    config.cert_resolver = Arc::new(Always(slot(WEB, &world.issuer)));
    let config = Arc::new(config);
    // It is a good certificate of the trust domain; only who asks for its owner takes it.
    for (asked_for, is_owner) in [(LEDGER, false), (WEB, true)] {
        let mut client = Handshake::client(world.client.clone(), name_of(asked_for)).unwrap();
        let mut server = ServerConnection::new(config.clone()).unwrap();
        let mut to_server = Vec::new();
        client.advance(&[], &mut to_server).unwrap();
        read_tls(&mut server, &to_server);
        to_server.clear();
        let outcome = client.advance(&write_tls(&mut server), &mut to_server);
        let heard = try_read_tls(&mut server, &to_server);
        if is_owner {
            assert_eq!(outcome.unwrap(), Progress::Done);
            heard.unwrap();
            assert_eq!(world.finish(client).peer.id().to_string(), WEB);
            continue;
        }
        let failure = failure_of(&outcome.unwrap_err());
        assert_eq!((failure.reason, failure.by_peer), (Reason::IdentityMismatch, false));
        assert!(failure.detail.contains(WEB), "{}", failure.detail);
        let heard = heard.unwrap_err();
        assert!(matches!(heard, Error::AlertReceived(_)), "{heard:?}");
    }
}

#[test]
fn a_server_resumes_nothing_and_takes_no_early_data() {
    let world = World::new();
    let trust = TrustSlot::new(world.bundle.clone());
    let resolver = Arc::new(Always(world.ledger.clone()));
    let shared = Arc::new(shared_server_config(resolver, trust, ALPN, Duration::ZERO).unwrap());
    for config in [&world.server, &shared] {
        assert_eq!((config.max_early_data_size, config.send_tls13_tickets), (0, 0));
        assert!(!config.session_storage.can_cache() && !config.ticketer.enabled());
    }
    assert!(!world.client.enable_early_data);
    // A client that would like both gets neither, the second time no more than the first.
    let mut eager = ClientConfig::clone(&world.client);
    eager.resumption = Resumption::in_memory_sessions(8);
    eager.enable_early_data = true;
    let eager = Arc::new(eager);
    for config in [&world.server, &shared] {
        for _ in 0..2 {
            let mut client = ClientConnection::new(eager.clone(), ledger_name()).unwrap();
            let mut server = ServerConnection::new(config.clone()).unwrap();
            assert!(client.early_data().is_none());
            for _ in 0..2 {
                read_tls(&mut server, &write_tls(&mut client));
                read_tls(&mut client, &write_tls(&mut server));
            }
            assert!(!client.is_handshaking() && !server.is_handshaking());
            assert!(server.early_data().is_none());
            let kinds = [client.handshake_kind(), server.handshake_kind()];
            assert_eq!(kinds, [Some(HandshakeKind::Full); 2]);
            assert_eq!(client.tls13_tickets_received(), 0);
        }
    }
}

#[test]
fn session_tickets_are_refused() {
    let mut world = World::new();
    let mut config = ServerConfig::clone(&world.server);
    config.send_tls13_tickets = 1;
    config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
    world.server = Arc::new(config);
    let mut client = world.client();
    let mut server = ServerConnection::new(world.server.clone()).unwrap();
    let mut to_server = Vec::new();
    client.advance(&[], &mut to_server).unwrap();
    read_tls(&mut server, &to_server);
    to_server.clear();
    let to_client = write_tls(&mut server);
    client.advance(&to_client, &mut to_server).unwrap();
    let mut client = world.finish(client);
    read_tls(&mut server, &to_server);
    let ticket = write_tls(&mut server);
    assert!(!ticket.is_empty());
    let error = open_all(&mut client.channel, &ticket).unwrap_err();
    assert!(error.to_string().contains("other than a key update"), "{error}");
}

#[test]
fn a_peer_that_only_renews_its_key_is_cut_off() {
    let (mut client, mut server) = World::new().connect_to_rustls();
    let mut error = None;
    for _ in 0..40 {
        server.refresh_traffic_keys().unwrap();
        if let Err(found) = open_all(&mut client.channel, &write_tls(&mut server)) {
            error = Some(found);
            break;
        }
    }
    let error = error.expect("it went on for ever");
    assert!(error.to_string().contains("too many records without data"), "{error}");
}

/// Verified chains are remembered; what is remembered must not outlive them, nor cover anything else.
#[test]
fn a_chain_that_was_verified_is_refused_once_it_has_ended() {
    let (slot, bundle) = {
        let world = World::new();
        (world.ledger, world.bundle)
    };
    let credential = slot.load().unwrap();
    let (leaf, rest) = credential.chain().split_first().unwrap();
    let now = hauberk_tls::now();
    let verify = |leaf: &CertificateDer<'_>, bundle: &TrustBundle, time| {
        verify_chain(leaf, rest, bundle, true, time).map(|peer| peer.id().to_string())
    };
    for _ in 0..2 {
        assert_eq!(verify(leaf, &bundle, now).unwrap(), LEDGER);
    }
    let after = credential.facts().not_after().saturating_add(Duration::from_secs(1));
    let expired = verify(leaf, &bundle, after).unwrap_err();
    assert_eq!(expired.reason(), Reason::ExpiredCert);
    let early = credential.facts().not_before().saturating_sub(Duration::from_secs(1));
    assert_eq!(verify(leaf, &bundle, early).unwrap_err().reason(), Reason::ExpiredCert);
    let mut changed = leaf.to_vec();
    *changed.last_mut().unwrap() ^= 1;
    verify(&CertificateDer::from(changed), &bundle, now).expect_err("a changed leaf was taken");
    // Other roots remember nothing of it.
    verify(leaf, &World::new().bundle, now).expect_err("a foreign leaf was taken");
    assert_eq!(verify(leaf, &bundle, now).unwrap(), LEDGER);
}

/// A proof of the ledger, as destination, on the connection with this binding.
fn proof(world: &World, binding: &[u8; 32], sequence: u32) -> Reauthenticate {
    prove(&world.ledger.load().unwrap(), binding, false, sequence).unwrap()
}

/// Whether the peer of a connection takes a proof, if its last one had this sequence.
fn is_taken(
    world: &World,
    peer: &Established,
    proof: &Reauthenticate,
    from_source: bool,
    last: u32,
) -> Result<(), String> {
    let (before, binding) = (&peer.peer, &peer.binding);
    let now = hauberk_tls::now();
    verify_proof(proof, before, &world.bundle, binding, from_source, last, now)
        .map(drop)
        .map_err(|error| error.to_string())
}

#[test]
fn the_sequences_of_proofs_go_up_and_may_leave_numbers_out() {
    let world = World::new();
    let (client, _) = world.connect();
    for (sequence, last, is_good) in [(1, 0, true), (9, 1, true), (9, 9, false), (8, 9, false)] {
        let proof = proof(&world, &client.binding, sequence);
        let taken = is_taken(&world, &client, &proof, false, last);
        assert_eq!(taken.is_ok(), is_good, "{sequence} after {last}: {taken:?}");
    }
}

#[test]
fn a_proof_is_good_for_one_connection_one_side_and_one_identity() {
    let world = World::new();
    let ((client, server), (other, _)) = (world.connect(), world.connect());
    let own = proof(&world, &client.binding, 1);
    is_taken(&world, &client, &own, false, 0).unwrap();
    for (name, peer, proof, from_source) in [
        ("of another connection", &client, proof(&world, &other.binding, 1), false),
        ("of the other side", &client, own.clone(), true),
        // Its peer is checkout.
        ("of another identity", &server, own.clone(), false),
        ("with another sequence", &client, Reauthenticate { sequence: 2, ..own.clone() }, false),
    ] {
        is_taken(&world, peer, &proof, from_source, 0).expect_err(name);
    }
}

#[test]
fn a_trust_bundle_with_the_same_roots_changes_nothing() {
    let (world, other) = (World::new(), World::new());
    let domain = world.bundle.trust_domain().clone();
    let [one, two] = [&world, &other].map(|world| world.bundle.roots()[0].clone());
    let bundle = |roots: Vec<CertificateDer<'static>>| {
        TrustBundle::new(domain.clone(), roots, hauberk_tls::now()).unwrap()
    };
    let trust = TrustSlot::new(bundle(vec![one.clone(), two.clone()]));
    let first = trust.load();
    for same in [
        TrustBundle::clone(&first),
        bundle(vec![one.clone(), two.clone()]),
        // Roots are a set.
        bundle(vec![two.clone(), one.clone()]),
    ] {
        trust.store(same);
        assert!(Arc::ptr_eq(&first, &trust.load()));
    }
    for roots in [vec![one.clone()], vec![two.clone()], vec![one, two]] {
        let before = trust.load();
        trust.store(bundle(roots));
        assert!(!Arc::ptr_eq(&before, &trust.load()));
    }
}

#[test]
fn the_name_is_read_before_the_handshake() {
    let world = World::new();
    let mut hello = Vec::new();
    world.client().advance(&[], &mut hello).unwrap();
    let mut out = Vec::new();
    let name = LEDGER.parse::<SpiffeId>().unwrap().server_name();
    let read = Hello::Read { server_name: Some(name), token: None };
    assert_eq!(read_hello(&hello, &mut out).unwrap(), read);
    for length in [0, 1, 5, hello.len() - 1] {
        assert_eq!(read_hello(&hello[..length], &mut out).unwrap(), Hello::Incomplete);
    }
    assert!(out.is_empty());
    read_hello(b"GET / HTTP/1.1\r\n\r\n", &mut out).expect_err("HTTP is no ClientHello");
}

#[test]
fn the_hello_of_a_later_connection_has_the_token_of_the_one_before() {
    let world = World::new();
    let (client, server) = world.connect();
    assert_eq!(client.token, server.token);
    let later = || {
        let config = with_caller_token(&world.client, client.token);
        Handshake::client(config, ledger_name()).unwrap()
    };
    let mut hello = Vec::new();
    later().advance(&[], &mut hello).unwrap();
    let Hello::Read { token, .. } = read_hello(&hello, &mut Vec::new()).unwrap() else {
        panic!("the hello is not whole");
    };
    assert_eq!(token, Some(server.token));
    // It is no protocol that is spoken, and each connection has a token of its own.
    let (client, server) = world.connect_as(later());
    assert_eq!(server.alpn.as_deref(), Some(ALPN));
    assert_eq!(client.token, server.token);
    assert_ne!(Some(client.token), token);
}

#[test]
fn a_handshake_that_never_ends_is_cut_off() {
    let world = World::new();
    let mut server = Handshake::server(world.server.clone()).unwrap();
    let mut out = Vec::new();
    // The header of a record, and its bytes one after the other, for ever.
    let mut error = None;
    for _ in 0..100 {
        let mut record = vec![22, 3, 1, 0x3f, 0xff, 1, 0xff, 0xff, 0xff];
        record.resize(0x3fff + 5, 0);
        if let Err(found) = server.advance(&record, &mut out) {
            error = Some(found);
            break;
        }
    }
    error.expect("it was read for ever");
}
