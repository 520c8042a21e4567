//! What is taken for a CA, what it issues, and what is refused with which words.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

use std::time::Duration;

use hauberk_tls::{TrustBundle, signing_request, verify_chain};
use rcgen::{
    BasicConstraints, CertifiedIssuer, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

use super::*;
use crate::{
    ca::{Authority, Issued},
    kubernetes::pem,
    policy::chain as whole_text,
};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

const WEB: &str = "spiffe://prod.example/ns/shop/sa/web";

type Ca = CertifiedIssuer<'static, KeyPair>;

type Files = BTreeMap<String, Vec<u8>>;

/// Made by `openssl ecparam -genkey`, as cert-manager writes a key by default.
const SEC1: &str = "-----BEGIN EC PRIVATE KEY-----
MHcCAQEEICBMCULG7kCx6trEqiRticvlPE+CyXuYUuwCoOuS3pUaoAoGCCqGSM49
AwEHoUQDQgAE1PsZWztk296/0IXJNIu3qlbWYIlFjrzcJdOLweb9zcgJ75Ov2cHX
Js7eYxTxRButfwtt9qDH6rfZGQxOw3LXcA==
-----END EC PRIVATE KEY-----
";

fn start() -> Timestamp {
    "2026-07-01T12:00:00Z".parse().unwrap()
}

fn trust_domain() -> TrustDomain {
    "prod.example".parse().unwrap()
}

fn date(timestamp: Timestamp) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(timestamp.unix_seconds()).unwrap()
}

/// As cert-manager makes them: valid since an hour ago, for 90 days.
fn parameters(name: &str, path_length: Option<u8>) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(match path_length {
        None => BasicConstraints::Unconstrained,
        Some(length) => BasicConstraints::Constrained(length),
    });
    parameters.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyEncipherment,
        KeyUsagePurpose::KeyCertSign,
    ];
    parameters.not_before = date(start().saturating_sub(HOUR));
    parameters.not_after = date(start().saturating_add(DAY * 90));
    parameters
}

fn key() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

fn root_of(parameters: CertificateParams) -> Ca {
    CertifiedIssuer::self_signed(parameters, key()).unwrap()
}

fn root(name: &str, path_length: Option<u8>) -> Ca {
    root_of(parameters(name, path_length))
}

fn below(upper: &Ca, parameters: CertificateParams) -> Ca {
    CertifiedIssuer::signed_by(parameters, key(), &**upper).unwrap()
}

fn certificates(list: &[&Ca]) -> Vec<u8> {
    list.iter().map(|ca| pem(ca.der())).collect::<String>().into_bytes()
}

/// A Secret as cert-manager writes it.
fn secret(chain: &[&Ca], roots: &[&Ca]) -> Files {
    let key = chain[0].key().serialize_pem();
    BTreeMap::from([
        (CERTIFICATE.to_owned(), certificates(chain)),
        (KEY.to_owned(), key.into_bytes()),
        (ROOTS.to_owned(), certificates(roots)),
    ])
}

fn with(mut files: Files, field: &str, bytes: &[u8]) -> Files {
    files.insert(field.to_owned(), bytes.to_vec());
    files
}

fn without(mut files: Files, field: &str) -> Files {
    files.remove(field).unwrap();
    files
}

fn armored(label: &str, der: &[u8]) -> Vec<u8> {
    pem(der).replace("CERTIFICATE", label).into_bytes()
}

fn read(files: &Files) -> Arc<Brought> {
    Brought::read(files, &trust_domain(), start())
        .unwrap_or_else(|error| panic!("{}", whole_text(&error)))
}

fn authority(brought: &Arc<Brought>, now: Timestamp) -> Authority {
    Authority::new(trust_domain(), brought.signer(&trust_domain(), now).unwrap())
}

fn issued(authority: &Authority, lifetime: Duration, now: Timestamp) -> Issued {
    let request = signing_request().unwrap().1;
    authority.issue(&WEB.parse().unwrap(), &request, lifetime, now).unwrap()
}

/// That peers who trust this root, and it alone, accept a chain.
fn verifies(root: &Ca, chain: &[CertificateDer<'static>], now: Timestamp) {
    let bundle = TrustBundle::new(trust_domain(), vec![root.der().clone()], now).unwrap();
    let (leaf, intermediates) = chain.split_first().unwrap();
    for is_server in [true, false] {
        let peer = verify_chain(leaf, intermediates, &bundle, is_server, now).unwrap();
        assert_eq!(peer.id().as_str(), WEB);
    }
}

#[test]
fn a_ca_of_every_shape_issues_what_leads_to_its_root() {
    let (free, tight, leaves) =
        (root("free", None), root("tight", Some(1)), root("leaves", Some(0)));
    let middle = below(&free, parameters("middle", None));
    let intermediate = below(&free, parameters("mesh", None));
    let for_leaves = below(&free, parameters("mesh", Some(0)));
    let under_tight = below(&tight, parameters("mesh", None));
    let lowest = below(&middle, parameters("mesh", Some(1)));
    let stranger = root("stranger", None);
    // Renewed with another key: two roots of one name, and only one of them is the issuer.
    let other = root("free", None);
    // What is between a leaf and the root: our own intermediate, unless the path length forbids it.
    let cases = [
        ("a root", secret(&[&free], &[&free]), &free, 1),
        ("a root that allows one CA below it", secret(&[&tight], &[&tight]), &tight, 1),
        ("a root that allows none", secret(&[&leaves], &[&leaves]), &leaves, 0),
        ("an intermediate", secret(&[&intermediate], &[&free]), &free, 2),
        ("an intermediate for leaves", secret(&[&for_leaves], &[&free]), &free, 1),
        ("a root above that allows one CA", secret(&[&under_tight], &[&tight]), &tight, 1),
        ("two steps", secret(&[&lowest, &middle], &[&free]), &free, 3),
        ("the root in both entries", secret(&[&lowest, &middle, &free], &[&free]), &free, 3),
        ("other roots", secret(&[&intermediate], &[&stranger, &other, &free]), &free, 2),
        ("a root without ca.crt", without(secret(&[&free], &[&free]), ROOTS), &free, 1),
        (
            "a chain to its root without ca.crt",
            without(secret(&[&intermediate, &free], &[&free]), ROOTS),
            &free,
            2,
        ),
        ("an empty ca.crt", with(secret(&[&free], &[&free]), ROOTS, b"\n"), &free, 1),
    ];
    for (name, files, root, between) in cases {
        let brought = read(&files);
        assert_eq!(brought.root(), root.der(), "{name}");
        let issued = issued(&authority(&brought, start()), HOUR, start());
        assert_eq!(issued.chain.len(), 1 + between, "{name}");
        verifies(root, &issued.chain, start());
    }
}

#[test]
fn a_key_of_every_kind_that_cert_manager_makes_signs() {
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ECDSA_P521_SHA512,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let root = CertifiedIssuer::self_signed(parameters("root", None), key).unwrap();
        let brought = read(&secret(&[&root], &[&root]));
        let issued = issued(&authority(&brought, start()), HOUR, start());
        verifies(&root, &issued.chain, start());
    }
}

#[test]
fn a_key_is_read_in_every_encoding() {
    let root =
        CertifiedIssuer::self_signed(parameters("root", None), KeyPair::from_pem(SEC1).unwrap());
    let root = root.unwrap();
    let files = with(secret(&[&root], &[&root]), KEY, SEC1.as_bytes());
    verifies(&root, &issued(&authority(&read(&files), start()), HOUR, start()).chain, start());

    let key = KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
    let pkcs8 = key.serialize_der();
    // PKCS#1 is what an OCTET STRING in it has.
    let place =
        pkcs8.windows(5).position(|bytes| (bytes[0], bytes[1], bytes[4]) == (0x04, 0x82, 0x30));
    let pkcs1 = armored("RSA PRIVATE KEY", &pkcs8[place.unwrap() + 4..]);
    let root = CertifiedIssuer::self_signed(parameters("root", None), key).unwrap();
    let files = with(secret(&[&root], &[&root]), KEY, &pkcs1);
    verifies(&root, &issued(&authority(&read(&files), start()), HOUR, start()).chain, start());
}

#[test]
fn what_is_issued_ends_with_the_ca_at_the_latest() {
    let root = root("root", None);
    let mut short = parameters("mesh", None);
    short.not_after = date(start().saturating_add(DAY * 3));
    let intermediate = below(&root, short);
    let brought = read(&secret(&[&intermediate], &[&root]));
    let end = start().saturating_add(DAY * 3);
    assert_eq!(brought.not_after(), end);
    let authority = authority(&brought, start());
    assert_eq!(authority.expiries(), (start().saturating_add(DAY * 90), end));
    let late = end.saturating_sub(HOUR);
    let issued = issued(&authority, DAY, late);
    assert_eq!(issued.not_after, end);
    verifies(&root, &issued.chain, late);
    // Another intermediate would be no younger.
    assert!(!authority.renew_intermediate(late).unwrap());
    let request = signing_request().unwrap().1;
    let refused = authority.issue(&WEB.parse().unwrap(), &request, HOUR, end).err().unwrap();
    assert!(matches!(refused, CaError::Ended(at) if at == end), "{refused:?}");
}

#[test]
fn the_own_intermediate_below_it_is_renewed_and_a_ca_for_leaves_needs_none() {
    let (root, leaves) = (root("root", None), root("leaves", Some(0)));
    let half = start().saturating_add(DAY * 7 / 2);
    let with_intermediate = authority(&read(&secret(&[&root], &[&root])), start());
    let before = issued(&with_intermediate, HOUR, start());
    assert!(!with_intermediate.renew_intermediate(half.saturating_sub(HOUR)).unwrap());
    assert!(with_intermediate.renew_intermediate(half).unwrap());
    let after = issued(&with_intermediate, HOUR, half);
    assert_ne!(before.chain[1], after.chain[1]);
    verifies(&root, &after.chain, half);

    let direct = authority(&read(&secret(&[&leaves], &[&leaves])), start());
    assert!(!direct.renew_intermediate(start().saturating_add(DAY * 80)).unwrap());
}

#[test]
fn an_own_intermediate_is_handed_over_and_a_brought_key_never() {
    let (root, leaves) = (root("root", None), root("leaves", Some(0)));
    let brought = read(&secret(&[&root], &[&root]));
    let signer = brought.signer(&trust_domain(), start()).unwrap();
    let handover = signer.hand_over().unwrap();
    let other = handover.signer(root.der(), &trust_domain(), start()).unwrap();
    let other = Authority::new(trust_domain(), other);
    verifies(&root, &issued(&other, HOUR, start()).chain, start());
    assert!(!other.renew_intermediate(start().saturating_add(DAY * 6)).unwrap());
    let kept = serde_json::to_string(&handover).unwrap();
    let key = read_key(&secret(&[&root], &[&root]));
    assert!(!kept.contains(&key), "the key that was brought is in what was handed over");
    // Under another root it is worth nothing.
    let stranger = self::root("root", None);
    assert!(handover.signer(stranger.der(), &trust_domain(), start()).is_err());

    let direct = read(&secret(&[&leaves], &[&leaves]));
    assert!(direct.signer(&trust_domain(), start()).unwrap().hand_over().is_none());
}

/// The base64 of a key in PEM, without its lines.
fn read_key(files: &Files) -> String {
    let text = std::str::from_utf8(&files[KEY]).unwrap();
    text.lines().filter(|line| !line.starts_with('-')).collect()
}

/// `permitted`, for one URI.
fn uri_constraint(name: &str) -> CustomExtension {
    let der = |tag: u8, content: &[u8]| {
        let length = u8::try_from(content.len()).unwrap();
        [&[tag, length], content].concat()
    };
    let subtree = der(0x30, &der(0x86, name.as_bytes()));
    let content = der(0x30, &der(0xa0, &subtree));
    let mut extension = CustomExtension::from_oid_content(&[2, 5, 29, 30], content);
    extension.set_criticality(true);
    extension
}

fn changed(change: impl FnOnce(&mut CertificateParams)) -> Files {
    let mut parameters = parameters("mesh", None);
    change(&mut parameters);
    let root = root_of(parameters);
    secret(&[&root], &[&root])
}

#[test]
fn what_cannot_work_is_refused_with_the_entry_and_the_reason() {
    let (top, zero) = (root("top", None), root("zero", Some(0)));
    let good = secret(&[&top], &[&top]);
    let namesake = root("top", None);
    let intermediate = below(&top, parameters("mesh", None));
    let mut for_servers = parameters("mesh", None);
    for_servers.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let for_servers = below(&top, for_servers);
    let constrained = changed(|ca| ca.custom_extensions = vec![uri_constraint("prod.example")]);
    let spiffe = |id: &str| {
        let name = SanType::URI(id.try_into().unwrap());
        changed(move |ca| ca.subject_alt_names = vec![name])
    };
    let encrypted = armored("ENCRYPTED PRIVATE KEY", &[0x30, 0]);
    let cases = [
        ("no certificate", without(good.clone(), CERTIFICATE), "tls.crt is missing or empty"),
        ("no key", without(good.clone(), KEY), "tls.key is missing or empty"),
        (
            "no root",
            without(secret(&[&intermediate], &[&top]), ROOTS),
            "ca.crt is missing or empty",
        ),
        ("no PEM", with(good.clone(), CERTIFICATE, b"hello"), "tls.crt is not PEM"),
        ("no PEM of a root", with(good.clone(), ROOTS, b"hello"), "ca.crt is not PEM"),
        (
            "no certificate in the PEM",
            with(good.clone(), CERTIFICATE, &armored("CERTIFICATE", &[0x30, 0])),
            "tls.crt, certificate 1: it cannot be read",
        ),
        ("an encrypted key", with(good.clone(), KEY, &encrypted), "that is not encrypted"),
        (
            "a key of no known kind",
            with(good.clone(), KEY, &armored("PRIVATE KEY", &[0x30, 3, 2, 1, 0])),
            "tls.key is damaged or of a kind that is not accepted; use ECDSA",
        ),
        (
            "the key of another",
            with(good.clone(), KEY, key().serialize_pem().as_bytes()),
            "tls.key is not the key of the first certificate of tls.crt",
        ),
        (
            "the chain in the wrong order",
            with(
                secret(&[&intermediate, &top], &[&top]),
                CERTIFICATE,
                &certificates(&[&top, &intermediate]),
            ),
            "tls.key is not the key of the first certificate of tls.crt",
        ),
        ("no CA", changed(|ca| ca.is_ca = IsCa::ExplicitNoCa), "(cA is not true)"),
        (
            "no keyCertSign",
            changed(|ca| ca.key_usages = vec![KeyUsagePurpose::DigitalSignature]),
            "the key usage lacks keyCertSign",
        ),
        ("no key usage", changed(|ca| ca.key_usages = vec![]), "the key usage is missing"),
        (
            "no name",
            changed(|ca| ca.distinguished_name = DistinguishedName::new()),
            "the subject of the CA certificate is empty",
        ),
        (
            "for servers only",
            secret(&[&for_servers], &[&top]),
            "the extended key usage lacks clientAuth",
        ),
        (
            "expired",
            changed(|ca| ca.not_after = date(start().saturating_sub(HOUR / 2))),
            "the certificate expired at 2026-07-01T11:30:00Z",
        ),
        (
            "not valid yet",
            changed(|ca| ca.not_before = date(start().saturating_add(HOUR))),
            "the certificate is not valid before 2026-07-01T13:00:00Z",
        ),
        (
            "another root",
            secret(&[&intermediate], &[&zero]),
            "tls.crt does not lead to ca.crt: CN=top issued certificate 1 of tls.crt",
        ),
        (
            "a root of the same name",
            secret(&[&intermediate], &[&namesake]),
            "peers would refuse what this CA issues",
        ),
        (
            "a root that allows no CA below it",
            secret(&[&below(&zero, parameters("mesh", None))], &[&zero]),
            "ca.crt, certificate 1 (CN=zero): its path length allows 0 CA certificates below it, and there are 1",
        ),
        (
            "constraints on URIs",
            constrained,
            "its name constraints speak of URIs (permitted prod.example)",
        ),
        (
            "another trust domain",
            spiffe("spiffe://other.example"),
            "it is of trust domain other.example, not prod.example",
        ),
        ("a SPIFFE ID of a workload", spiffe(WEB), "a signing certificate names only its trust"),
    ];
    for (name, files, wanted) in cases {
        let refused = Brought::read(&files, &trust_domain(), start()).err();
        let text = refused.map(|error| whole_text(&error)).unwrap_or_default();
        assert!(text.contains(wanted), "{name}: {text:?}");
        let key = files.get(KEY).map(|_| read_key(&files)).unwrap_or_default();
        assert!(key.is_empty() || !text.contains(&key), "{name}: a key is shown");
    }
}
