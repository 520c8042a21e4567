//! What the CA really issues, read by another parser; and what it makes of its folder.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt};

use hauberk_tls::{TrustBundle, signing_request, verify_chain};
use rcgen::{
    CustomExtension, ExtendedKeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
    PKCS_ECDSA_P521_SHA256, PKCS_ED25519, PKCS_RSA_SHA256,
};
use tempfile::TempDir;
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

use super::*;
use crate::ca::{Authority, Issued};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
const SECOND: Duration = Duration::from_secs(1);

const WEB: &str = "spiffe://prod.example/ns/shop/sa/web";

const EC_P256: &str = "1.2.840.10045.3.1.7";
const EC_P384: &str = "1.3.132.0.34";
const ECDSA_SHA256: &str = "1.2.840.10045.4.3.2";
const ECDSA_SHA384: &str = "1.2.840.10045.4.3.3";

/// The bits of a key usage, as x509-parser counts them.
const DIGITAL_SIGNATURE: u16 = 1;
const CERT_AND_CRL_SIGN: u16 = 0b110_0000;

/// Made by `openssl req -new -sha256` with a P-384 key, and the key in it.
const P384_SIGNED_WITH_SHA256: &str = "\
    3081f6307f02010030003076301006072a8648ce3d020106052b810400220362000477f5732307cf15f4fbe1914c06\
    444c0fde1bae964f1f55286dcfcf4cc9321584f6a37887b29af0fd7892b45e6b56aea7d1a6e72696e587ba1c46c54d\
    3c3f73d4c6e97a502b97510117c869fc1d21fb190e30da605ef0db074f41ea009416bed9a000300a06082a8648ce3d\
    040302036700306402300dd4ab155ab8a6bea8abb028e8e8c1e76e253343f18a3ad5cdd3e1abcf6c7118ec899dd355\
    3ff554ac902c95d2d6d88102300757ffbc84cc7a640484f64f3bfe8aa193652a63496f47f9a2f91823e55461e4fcf5\
    fe4e3c98397d21e05af55ff0f63b";
const ITS_KEY: &str = "\
    3076301006072a8648ce3d020106052b810400220362000477f5732307cf15f4fbe1914c06444c0fde1bae964f1f55\
    286dcfcf4cc9321584f6a37887b29af0fd7892b45e6b56aea7d1a6e72696e587ba1c46c54d3c3f73d4c6e97a502b97\
    510117c869fc1d21fb190e30da605ef0db074f41ea009416bed9";

fn start() -> Timestamp {
    "2026-07-01T12:00:00Z".parse().unwrap()
}

fn trust_domain() -> TrustDomain {
    "prod.example".parse().unwrap()
}

fn open(folder: &TempDir, now: Timestamp) -> Result<Authority, CaError> {
    let signer = super::open(&folder.path().join("ca"), &trust_domain(), now)?;
    Ok(Authority::new(trust_domain(), signer))
}

fn refusal(folder: &TempDir, now: Timestamp) -> CaError {
    open(folder, now).err().unwrap()
}

/// A CA made at the start of these tests.
fn made() -> (TempDir, Authority) {
    let folder = tempfile::tempdir().unwrap();
    let authority = open(&folder, start()).unwrap();
    (folder, authority)
}

fn issue(authority: &Authority, request: &[u8], now: Timestamp) -> Result<Issued, CaError> {
    authority.issue(&WEB.parse().unwrap(), request, HOUR, now)
}

fn leaf_of(authority: &Authority, now: Timestamp) -> Issued {
    issue(authority, &signing_request().unwrap().1, now).unwrap()
}

fn parsed(der: &[u8]) -> X509Certificate<'_> {
    let (rest, certificate) = X509Certificate::from_der(der).unwrap();
    assert!(rest.is_empty());
    certificate
}

fn curve(certificate: &X509Certificate<'_>) -> String {
    let parameters = certificate.public_key().algorithm.parameters.as_ref().unwrap();
    parameters.as_oid().unwrap().to_id_string()
}

fn validity(certificate: &X509Certificate<'_>) -> (Timestamp, Timestamp) {
    let validity = certificate.validity();
    let time = Timestamp::from_unix_seconds;
    (time(validity.not_before.timestamp()), time(validity.not_after.timestamp()))
}

fn intermediate_of(issued: &Issued) -> &[u8] {
    issued.chain.get(1).unwrap()
}

/// That the chain leads to the root, for both roles.
fn verifies(authority: &Authority, chain: &[CertificateDer<'static>], now: Timestamp) {
    let roots = vec![authority.root()];
    let bundle = TrustBundle::new(trust_domain(), roots, now).unwrap();
    let (leaf, intermediates) = chain.split_first().unwrap();
    for is_server in [true, false] {
        let peer = verify_chain(leaf, intermediates, &bundle, is_server, now).unwrap();
        assert_eq!(peer.id().as_str(), WEB);
    }
}

#[test]
fn each_certificate_has_its_key_its_issuer_and_its_time() {
    let (_folder, authority) = made();
    let issued = leaf_of(&authority, start());
    let years = DAY * 3650;
    let root = authority.root();
    let cases = [
        ("root", root.as_ref(), EC_P384, ECDSA_SHA384, "Hauberk root", years),
        ("intermediate", intermediate_of(&issued), EC_P256, ECDSA_SHA384, "Hauberk root", DAY * 7),
        ("leaf", issued.chain[0].as_ref(), EC_P256, ECDSA_SHA256, "Hauberk intermediate", HOUR),
    ];
    for (name, der, key, signature, issuer, life) in cases {
        let certificate = parsed(der);
        assert_eq!(curve(&certificate), key, "{name}");
        let algorithm = certificate.signature_algorithm.algorithm.to_id_string();
        assert_eq!(algorithm, signature, "{name}");
        let issued_by = certificate.issuer().iter_common_name().next().unwrap();
        assert_eq!(issued_by.as_str().unwrap(), issuer, "{name}");
        let wanted = (start().saturating_sub(NOT_BEFORE_BACKDATE), start().saturating_add(life));
        assert_eq!(validity(&certificate), wanted, "{name}");
    }
    assert_eq!(issued.not_after, start().saturating_add(HOUR));
    assert_eq!(authority.root_sha256(), sha256(&root));
    verifies(&authority, &issued.chain, start());
}

#[test]
fn each_certificate_may_do_what_it_is_for_and_has_no_other_extension() {
    let (_folder, authority) = made();
    let issued = leaf_of(&authority, start());
    let ca = [
        ("2.5.29.14", false),
        ("2.5.29.15", true),
        ("2.5.29.17", false),
        ("2.5.29.19", true),
        ("2.5.29.35", false),
    ];
    // Without a subject, the names have to be critical.
    let leaf = [
        ("2.5.29.14", false),
        ("2.5.29.15", true),
        ("2.5.29.17", true),
        ("2.5.29.19", true),
        ("2.5.29.35", false),
        ("2.5.29.37", false),
    ];
    let root = authority.root();
    let root = root.as_ref();
    let own = "spiffe://prod.example";
    let cases = [
        ("root", root, &ca[..], (true, Some(1)), CERT_AND_CRL_SIGN, own),
        // Nothing below it can be a CA.
        (
            "intermediate",
            intermediate_of(&issued),
            &ca[..],
            (true, Some(0)),
            CERT_AND_CRL_SIGN,
            own,
        ),
        ("leaf", issued.chain[0].as_ref(), &leaf[..], (false, None), DIGITAL_SIGNATURE, WEB),
    ];
    for (name, der, extensions, constraints, usage, id) in cases {
        let certificate = parsed(der);
        let found: BTreeMap<String, bool> = certificate
            .extensions()
            .iter()
            .map(|extension| (extension.oid.to_id_string(), extension.critical))
            .collect();
        assert_eq!(found.len(), certificate.extensions().len(), "{name}: one stands twice");
        let wanted: BTreeMap<String, bool> =
            extensions.iter().map(|(oid, critical)| ((*oid).to_owned(), *critical)).collect();
        assert_eq!(found, wanted, "{name}");
        let basic = certificate.basic_constraints().unwrap().unwrap().value;
        assert_eq!((basic.ca, basic.path_len_constraint), constraints, "{name}");
        assert_eq!(certificate.key_usage().unwrap().unwrap().value.flags, usage, "{name}");
        let names = certificate.subject_alternative_name().unwrap().unwrap().value;
        assert_eq!(names.general_names, [GeneralName::URI(id)], "{name}");
    }
    let leaf = parsed(&issued.chain[0]);
    let purposes = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.server_auth && purposes.client_auth);
    let others = [
        purposes.any,
        purposes.code_signing,
        purposes.email_protection,
        purposes.time_stamping,
        purposes.ocsp_signing,
        !purposes.other.is_empty(),
    ];
    assert_eq!(others, [false; 6]);
    assert!(leaf.subject().iter().next().is_none(), "who it is stands in the URI alone");
}

#[test]
fn a_servers_certificate_has_its_dns_name_and_is_nobodys_in_the_mesh() {
    const NAME: &str = "hauberk-control-plane.hauberk-system.svc";
    let (_folder, authority) = made();
    let request = signing_request().unwrap().1;
    let issued = authority.issue_for_server(NAME, &request, HOUR, start()).unwrap();
    let leaf = parsed(&issued.chain[0]);
    let names = leaf.subject_alternative_name().unwrap().unwrap().value;
    assert_eq!(names.general_names, [GeneralName::DNSName(NAME)]);
    let purposes = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.server_auth && !purposes.client_auth && !purposes.any);
    assert!(!leaf.basic_constraints().unwrap().unwrap().value.ca);
    assert_eq!(validity(&leaf).1, start().saturating_add(HOUR));
    let roots = vec![authority.root().clone()];
    let bundle = TrustBundle::new(trust_domain(), roots, start()).unwrap();
    let (leaf, intermediates) = issued.chain.split_first().unwrap();
    for is_server in [true, false] {
        assert!(verify_chain(leaf, intermediates, &bundle, is_server, start()).is_err());
    }
}

#[test]
fn a_serial_is_random_in_126_bits_and_told_as_it_stands_in_the_certificate() {
    let (_folder, authority) = made();
    let request = signing_request().unwrap().1;
    let serials: Vec<Vec<u8>> = (0..80)
        .map(|_| {
            let issued = issue(&authority, &request, start()).unwrap();
            let serial = parsed(&issued.chain[0]).raw_serial().to_vec();
            assert_eq!(hex::encode(&serial), issued.serial);
            serial
        })
        .collect();
    let (mut ever, mut always) = ([0_u8; 16], [0xff_u8; 16]);
    for serial in &serials {
        let bytes: &[u8; 16] = serial.as_slice().try_into().unwrap();
        for (place, byte) in bytes.iter().enumerate() {
            ever[place] |= byte;
            always[place] &= byte;
        }
    }
    // The first two bits keep it positive and of one length. A bit that is the same 80 times by
    // chance is rarer than 1 in 2^70.
    let (mut all, mut none) = ([0xff_u8; 16], [0_u8; 16]);
    (all[0], none[0]) = (0x7f, 0x40);
    assert_eq!((ever, always), (all, none));
    let issued = leaf_of(&authority, start());
    let root = authority.root();
    let of_cas = [root.as_ref(), intermediate_of(&issued)];
    for serial in of_cas.map(|der| parsed(der).raw_serial()) {
        assert_eq!((serial.len(), serial[0] & 0xc0), (16, 0x40));
    }
}

#[test]
fn a_leaf_ends_with_its_issuer_at_the_latest() {
    let (_folder, authority) = made();
    let end = start().saturating_add(DAY * 7);
    let request = signing_request().unwrap().1;
    let cases = [
        ("well within", Duration::ZERO, DAY, start().saturating_add(DAY)),
        ("just as long", Duration::ZERO, DAY * 7, end),
        ("longer", Duration::ZERO, DAY * 30, end),
        ("late and short", DAY * 6, HOUR, start().saturating_add(DAY * 6 + HOUR)),
        ("late and long", DAY * 6 + HOUR, DAY, end),
    ];
    for (name, passed, lifetime, wanted) in cases {
        let now = start().saturating_add(passed);
        let issued = authority.issue(&WEB.parse().unwrap(), &request, lifetime, now).unwrap();
        let (begin, end) = validity(&parsed(&issued.chain[0]));
        assert_eq!(begin, now.saturating_sub(NOT_BEFORE_BACKDATE), "{name}");
        assert_eq!((end, issued.not_after), (wanted, wanted), "{name}");
        verifies(&authority, &issued.chain, now);
    }
}

#[test]
fn an_intermediate_ends_with_the_root_at_the_latest_and_both_ends_are_told() {
    let (folder, authority) = made();
    let root_end = start().saturating_add(DAY * 3650);
    assert_eq!(authority.expiries(), (root_end, start().saturating_add(DAY * 7)));
    let late = root_end.saturating_sub(DAY * 3);
    let authority = open(&folder, late).unwrap();
    assert_eq!(authority.expiries(), (root_end, root_end));
    let request = signing_request().unwrap().1;
    let issued = authority.issue(&WEB.parse().unwrap(), &request, DAY * 7, late).unwrap();
    for der in &issued.chain {
        assert_eq!(validity(&parsed(der)).1, root_end);
    }
    verifies(&authority, &issued.chain, late);
    let refused = refusal(&folder, root_end.saturating_add(SECOND));
    let damaged = matches!(&refused, CaError::Damaged(path, _) if path.ends_with(ROOT_CERTIFICATE));
    assert!(damaged, "{refused:?}");
}

#[test]
fn the_intermediate_is_renewed_at_half_of_its_life_with_a_new_key() {
    let (folder, authority) = made();
    let before = leaf_of(&authority, start());
    let half = start().saturating_add(DAY * 7 / 2);
    assert!(!authority.renew_intermediate(start()).unwrap());
    assert!(!authority.renew_intermediate(half.saturating_sub(SECOND)).unwrap());
    assert_eq!(intermediate_of(&leaf_of(&authority, half)), intermediate_of(&before));
    assert!(authority.renew_intermediate(half).unwrap());
    assert!(!authority.renew_intermediate(half).unwrap(), "only once");

    let after = leaf_of(&authority, half);
    let (old, new) = (parsed(intermediate_of(&before)), parsed(intermediate_of(&after)));
    assert_ne!(old.public_key().raw, new.public_key().raw);
    assert_ne!(old.raw_serial(), new.raw_serial());
    assert_eq!(validity(&new).1, half.saturating_add(DAY * 7));
    assert_eq!(authority.expiries().1, half.saturating_add(DAY * 7));
    verifies(&authority, &after.chain, half);
    // What the old one issued carries it along, and is good until its own end.
    verifies(&authority, &before.chain, start().saturating_add(HOUR));
    // After a restart it is still the new one, and its half is counted from when it was made.
    let authority = open(&folder, half.saturating_add(DAY)).unwrap();
    assert_eq!(intermediate_of(&leaf_of(&authority, half)), intermediate_of(&after));
    let next = half.saturating_add(DAY * 7 / 2);
    assert!(!authority.renew_intermediate(next.saturating_sub(SECOND)).unwrap());
    assert!(authority.renew_intermediate(next).unwrap());
}

#[test]
fn an_intermediate_that_is_of_no_use_is_made_anew_under_the_same_root() {
    type Break = fn(&Path);
    let other_key = |path: &Path| {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        write_private(path, &key.serialize_der()).unwrap();
    };
    let cases: [(&str, &str, Duration, Break); 6] = [
        ("expired", INTERMEDIATE_KEY, DAY * 7 + SECOND, |_| {}),
        ("no certificate", INTERMEDIATE_CERTIFICATE, HOUR, |path| fs::remove_file(path).unwrap()),
        ("no key", INTERMEDIATE_KEY, HOUR, |path| fs::remove_file(path).unwrap()),
        ("a key of another", INTERMEDIATE_KEY, HOUR, other_key),
        ("half a certificate", INTERMEDIATE_CERTIFICATE, HOUR, cut_in_half),
        ("half a key", INTERMEDIATE_KEY, HOUR, cut_in_half),
    ];
    for (name, which, passed, break_it) in cases {
        let (folder, authority) = made();
        let before = leaf_of(&authority, start());
        break_it(&folder.path().join("ca").join(which));
        let now = start().saturating_add(passed);
        let again = open(&folder, now).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert_eq!(again.root(), authority.root(), "{name}");
        let after = leaf_of(&again, now);
        assert_ne!(intermediate_of(&after), intermediate_of(&before), "{name}");
        verifies(&again, &after.chain, now);
    }
}

fn cut_in_half(path: &Path) {
    let bytes = fs::read(path).unwrap();
    write_private(path, &bytes[..bytes.len() / 2]).unwrap();
}

#[test]
fn loose_modes_of_the_folder_and_of_every_file_are_refused_at_start() {
    let (folder, _) = made();
    let ca = folder.path().join("ca");
    let files = [ROOT_KEY, ROOT_CERTIFICATE, INTERMEDIATE_KEY, INTERMEDIATE_CERTIFICATE];
    let mut found: Vec<_> =
        fs::read_dir(&ca).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    found.sort();
    let mut known = files.map(std::ffi::OsString::from);
    known.sort();
    assert_eq!(found, known, "what the folder has is looked at below");
    let files = files.map(|name| (ca.join(name), [0o644, 0o640, 0o620, 0o604, 0o601], 0o600));
    let folders = [(ca.clone(), [0o755, 0o750, 0o720, 0o704, 0o701], 0o700)];
    for (path, modes, wanted) in files.into_iter().chain(folders) {
        let shown = path.display();
        for mode in modes {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(
                refusal(&folder, start()).to_string(),
                format!(
                    "{shown} has mode {mode:04o}, so others than its owner may use it; \
                     run: chmod {wanted:04o} {shown}"
                )
            );
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(wanted)).unwrap();
        assert!(open(&folder, start()).is_ok(), "{shown}");
    }
}

#[test]
fn what_is_made_can_be_read_by_its_owner_only() {
    let (folder, authority) = made();
    authority.renew_intermediate(start().saturating_add(DAY * 4)).unwrap();
    let ca = folder.path().join("ca");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&ca), 0o700);
    for entry in fs::read_dir(&ca).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[test]
fn a_folder_without_its_root_is_refused_and_gets_no_new_one() {
    let both = [ROOT_KEY, ROOT_CERTIFICATE];
    for gone in [&both[1..], &both[..]] {
        let (folder, _) = made();
        let ca = folder.path().join("ca");
        for name in gone {
            fs::remove_file(ca.join(name)).unwrap();
        }
        let refused = refusal(&folder, start());
        assert!(matches!(&refused, CaError::Missing(path) if path.ends_with(ROOT_CERTIFICATE)));
        assert!(refused.to_string().contains("restore the folder from a backup"), "{refused}");
        assert!(!ca.join(ROOT_CERTIFICATE).exists());
    }
    // Without its key, the root issues nothing new; what there is goes on.
    let (folder, authority) = made();
    fs::remove_file(folder.path().join("ca").join(ROOT_KEY)).unwrap();
    leaf_of(&open(&folder, start()).unwrap(), start());
    let late = start().saturating_add(DAY * 4);
    let refused = authority.renew_intermediate(late).unwrap_err();
    assert!(matches!(&refused, CaError::Missing(path) if path.ends_with(ROOT_KEY)), "{refused:?}");
}

#[test]
fn the_folder_of_another_trust_domain_is_refused() {
    let (folder, _) = made();
    let ca = folder.path().join("ca");
    let other = "other.example".parse().unwrap();
    let refused = super::open(&ca, &other, start()).err().unwrap();
    assert_eq!(
        refused.to_string(),
        format!(
            "the CA in {} is of trust domain prod.example, not other.example; use --trust-domain \
             prod.example",
            ca.display()
        )
    );
}

/// A request for much more than a workload gets, with one more extension.
fn greedy_request(key: &KeyPair, extension: Option<CustomExtension>) -> Vec<u8> {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::OrganizationName, "other.example");
    parameters.subject_alt_names = vec![
        SanType::URI("spiffe://prod.example/control-plane".try_into().unwrap()),
        SanType::DnsName("db.example".try_into().unwrap()),
    ];
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::KeyEncipherment];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
    parameters.custom_extensions.extend(extension);
    parameters.serialize_request(key).unwrap().der().to_vec()
}

fn extension(oid: &[u64], value: &[u8]) -> CustomExtension {
    let mut extension = CustomExtension::from_oid_content(oid, value.to_vec());
    extension.set_criticality(true);
    extension
}

#[test]
fn of_a_request_nothing_but_the_key_gets_into_the_leaf() {
    let (_folder, authority) = made();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    // cA true, and any number of CAs below.
    let ca = extension(&[2, 5, 29, 19], &[0x30, 0x03, 0x01, 0x01, 0xff]);
    let plain = leaf_of(&authority, start());
    let extensions = |der: &[u8]| -> Vec<(String, bool, usize)> {
        let certificate = parsed(der);
        let extensions = certificate.extensions().iter();
        extensions.map(|one| (one.oid.to_id_string(), one.critical, one.value.len())).collect()
    };
    for (name, more) in [("greedy", None), ("a CA", Some(ca))] {
        let request = greedy_request(&key, more);
        let issued = issue(&authority, &request, start()).unwrap();
        let leaf = parsed(&issued.chain[0]);
        assert_eq!(leaf.public_key().raw, key.subject_public_key_info(), "{name}");
        assert!(!leaf.is_ca(), "{name}");
        assert_eq!(leaf.key_usage().unwrap().unwrap().value.flags, DIGITAL_SIGNATURE, "{name}");
        let names = leaf.subject_alternative_name().unwrap().unwrap().value;
        assert_eq!(names.general_names, [GeneralName::URI(WEB)], "{name}");
        assert!(leaf.subject().iter().next().is_none(), "{name}");
        // As many bytes of each extension as for a request that asks for nothing.
        assert_eq!(extensions(&issued.chain[0]), extensions(&plain.chain[0]), "{name}");
        verifies(&authority, &issued.chain, start());
    }
}

#[test]
fn an_extension_that_cannot_be_dropped_knowingly_is_refused() {
    let (_folder, authority) = made();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    // For one DNS name, and one policy.
    let names = [0x30, 0x07, 0xa0, 0x05, 0x30, 0x03, 0x82, 0x01, 0x61];
    let policies = [0x30, 0x06, 0x30, 0x04, 0x06, 0x02, 0x2a, 0x03];
    let cases = [
        ("name constraints", extension(&[2, 5, 29, 30], &names)),
        ("policies", extension(&[2, 5, 29, 32], &policies)),
        ("one of nobody's", extension(&[1, 3, 6, 1, 4, 1, 99_999, 1], &[0x05, 0x00])),
    ];
    for (name, extension) in cases {
        let request = greedy_request(&key, Some(extension));
        let refused = issue(&authority, &request, start()).err().unwrap();
        let unsupported = matches!(refused, CaError::Request(rcgen::Error::UnsupportedExtension));
        assert!(unsupported, "{name}: {refused:?}");
    }
}

#[test]
fn the_key_of_a_leaf_is_that_of_the_request_whatever_it_was_signed_with() {
    let (_folder, authority) = made();
    let plain = |algorithm| {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let request = CertificateParams::default().serialize_request(&key).unwrap();
        (request.der().to_vec(), key.subject_public_key_info())
    };
    let by_openssl = (hex::decode(P384_SIGNED_WITH_SHA256).unwrap(), hex::decode(ITS_KEY).unwrap());
    let cases = [
        ("P-256", plain(&PKCS_ECDSA_P256_SHA256)),
        ("P-384", plain(&PKCS_ECDSA_P384_SHA384)),
        ("Ed25519", plain(&PKCS_ED25519)),
        ("P-384 signed with SHA-256", by_openssl),
    ];
    for (name, (request, key)) in cases {
        let issued = issue(&authority, &request, start()).unwrap();
        assert_eq!(parsed(&issued.chain[0]).public_key().raw, key, "{name}");
        verifies(&authority, &issued.chain, start());
    }
}

#[test]
fn a_request_that_proves_no_acceptable_key_is_refused() {
    let (_folder, authority) = made();
    let signed_by = |algorithm| {
        let key = KeyPair::generate_for(algorithm).unwrap();
        CertificateParams::default().serialize_request(&key).unwrap().der().to_vec()
    };
    let good = signing_request().unwrap().1;
    let mut forged = good.clone();
    // The signature comes last.
    *forged.last_mut().unwrap() ^= 1;
    let mut stolen = hex::decode(P384_SIGNED_WITH_SHA256).unwrap();
    let key = hex::decode(ITS_KEY).unwrap();
    let place = stolen.windows(key.len()).position(|window| window == key).unwrap();
    stolen[place + key.len() - 1] ^= 1;
    for (name, request) in [
        ("nothing", Vec::new()),
        ("no request", vec![0x30, 0x03, 0x02, 0x01, 0x00]),
        ("half a request", good[..good.len() / 2].to_vec()),
        ("too long", vec![0; 8 * 1024 + 1]),
        ("a forged signature", forged),
        ("a key that has not signed it", stolen),
        ("P-521", signed_by(&PKCS_ECDSA_P521_SHA256)),
    ] {
        let refused = issue(&authority, &request, start()).err();
        assert!(matches!(refused, Some(CaError::Request(_))), "{name}: {refused:?}");
    }
    let refused = issue(&authority, &signed_by(&PKCS_RSA_SHA256), start()).err();
    assert!(matches!(refused, Some(CaError::WeakKey)), "{refused:?}");
}
