//! X509-SVID.md, rule by rule, against certificates that break one rule each.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::sync::LazyLock;
use std::time::Duration;

use hauberk_core::identity::{SpiffeIdError, TrustDomain};
use hauberk_core::policy::Reason;
use hauberk_core::svid::{
    ChainVerified, LeafFacts, Serial, SigningFacts, SvidError, VerifiedSvid, check_intermediate,
    check_leaf, check_root,
};
use hauberk_core::time::Timestamp;
use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    SerialNumber, date_time_ymd,
};

const WEB: &str = "spiffe://prod.example/ns/shop/sa/web";

const SUBJECT_ALTERNATIVE_NAME: &[u64] = &[2, 5, 29, 17];
const BASIC_CONSTRAINTS: &[u64] = &[2, 5, 29, 19];
const KEY_USAGE: &[u64] = &[2, 5, 29, 15];
const NAME_CONSTRAINTS: &[u64] = &[2, 5, 29, 30];
const POLICY_CONSTRAINTS: &[u64] = &[2, 5, 29, 36];
const PRIVATE: &[u64] = &[1, 3, 6, 1, 4, 1, 99_999, 1];

/// A BIT STRING with digitalSignature alone.
const DIGITAL_SIGNATURE: &[u8] = &[0x03, 0x02, 0x07, 0x80];

static KEY: LazyLock<KeyPair> = LazyLock::new(|| KeyPair::generate().unwrap());
static CA_KEY: LazyLock<KeyPair> = LazyLock::new(|| KeyPair::generate().unwrap());

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

/// A leaf that obeys every rule, valid on the first of July 2026.
fn leaf() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(2026, 7, 1);
    params.not_after = date_time_ymd(2026, 7, 2);
    params.serial_number = Some(SerialNumber::from_slice(&[0x5a; 16]));
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(WEB)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params
}

/// A CA certificate that obeys every rule, valid on the same day.
fn ca() -> CertificateParams {
    let mut params = leaf();
    params.distinguished_name.push(DnType::CommonName, "Hauberk test");
    params.subject_alt_names = vec![uri("spiffe://prod.example")];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.extended_key_usages = Vec::new();
    params
}

fn issue(params: &CertificateParams) -> Vec<u8> {
    let issuer = Issuer::new(ca(), &*CA_KEY);
    params.signed_by(&*KEY, &issuer).unwrap().der().to_vec()
}

fn changed(mut params: CertificateParams, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    change(&mut params);
    issue(&params)
}

fn extension(oid: &[u64], critical: bool, value: &[u8]) -> CustomExtension {
    let mut extension = CustomExtension::from_oid_content(oid, value.to_vec());
    extension.set_criticality(critical);
    extension
}

fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    [&[tag, u8::try_from(content.len()).unwrap()], content].concat()
}

fn uri_names(uris: &[&[u8]]) -> Vec<u8> {
    der(0x30, &uris.iter().flat_map(|uri| der(0x86, uri)).collect::<Vec<u8>>())
}

/// Exchanges the only occurrence of some bytes for as many others.
fn patched(mut der: Vec<u8>, old: &[u8], new: &[u8]) -> Vec<u8> {
    let places: Vec<usize> = (0..der.len()).filter(|at| der[*at..].starts_with(old)).collect();
    assert_eq!((places.len(), old.len()), (1, new.len()));
    der[places[0]..places[0] + new.len()].copy_from_slice(new);
    der
}

fn noon() -> Timestamp {
    "2026-07-01T12:00:00Z".parse().unwrap()
}

fn td(text: &str) -> TrustDomain {
    text.parse().unwrap()
}

fn check(der: &[u8]) -> Result<LeafFacts, SvidError> {
    check_leaf(der, noon())
}

fn leaf_refusal(change: impl FnOnce(&mut CertificateParams)) -> SvidError {
    check(&changed(leaf(), change)).unwrap_err()
}

fn intermediate(change: impl FnOnce(&mut CertificateParams)) -> Result<SigningFacts, SvidError> {
    check_intermediate(&changed(ca(), change), noon())
}

fn both_refuse(change: impl Fn(&mut CertificateParams)) -> SvidError {
    let der = changed(ca(), change);
    let refusal = check_intermediate(&der, noon()).unwrap_err();
    assert_eq!(check_root(&der, noon()), Err(refusal.clone()));
    refusal
}

#[test]
fn a_leaf_that_obeys_every_rule_says_who_it_is() {
    use sha2::{Digest, Sha256};

    let facts = check(&issue(&leaf())).unwrap();
    assert_eq!(facts.id().as_str(), WEB);
    assert_eq!(facts.serial().to_string(), "5a".repeat(16));
    assert_eq!(facts.not_before().to_string(), "2026-07-01T00:00:00Z");
    assert_eq!(facts.not_after().to_string(), "2026-07-02T00:00:00Z");
    let key_id: [u8; 32] = Sha256::digest(KEY.subject_public_key_info()).into();
    assert_eq!(facts.public_key_sha256(), &key_id);
}

#[test]
fn what_the_standard_leaves_open_is_accepted() {
    type Change = fn(&mut CertificateParams);
    let accepted: [(&str, Change); 6] = [
        ("DNS name beside the URI", |p| p.subject_alt_names.push(dns("web.shop.svc"))),
        ("DNS name before the URI", |p| p.subject_alt_names.insert(0, dns("web.shop.svc"))),
        ("a subject", |p| p.distinguished_name.push(DnType::CommonName, "web")),
        ("keyEncipherment and keyAgreement", |p| {
            p.key_usages.extend([KeyUsagePurpose::KeyEncipherment, KeyUsagePurpose::KeyAgreement]);
        }),
        ("a further purpose", |p| {
            p.extended_key_usages.push(ExtendedKeyUsagePurpose::CodeSigning);
        }),
        ("an unknown extension that is not critical", |p| {
            p.custom_extensions.push(extension(PRIVATE, false, &[0x05, 0x00]));
        }),
    ];
    for (name, change) in accepted {
        let facts = check(&changed(leaf(), change)).map_err(|error| format!("{name}: {error}"));
        assert_eq!(facts.unwrap().id().as_str(), WEB, "{name}");
    }
}

#[test]
fn two_uri_names_are_refused() {
    for second in [WEB, "spiffe://prod.example/ns/shop/sa/admin", "https://prod.example"] {
        assert_eq!(
            leaf_refusal(|p| p.subject_alt_names.push(uri(second))),
            SvidError::SeveralUriNames { count: 2 }
        );
    }
}

#[test]
fn no_name_at_all_is_refused() {
    assert_eq!(leaf_refusal(|p| p.subject_alt_names.clear()), SvidError::NoUriName);
}

#[test]
fn a_dns_name_without_a_uri_is_refused() {
    let refusal = leaf_refusal(|p| p.subject_alt_names = vec![dns("web.shop.svc")]);
    assert_eq!(refusal, SvidError::NoUriName);
}

#[test]
fn a_spiffe_id_in_the_subject_or_a_dns_name_counts_for_nothing() {
    let refusal = leaf_refusal(|p| {
        p.subject_alt_names = vec![dns(WEB)];
        p.distinguished_name.push(DnType::CommonName, WEB);
    });
    assert_eq!(refusal, SvidError::NoUriName);
}

#[test]
fn a_uri_of_another_scheme_is_refused() {
    let refusal = leaf_refusal(|p| p.subject_alt_names = vec![uri("https://prod.example/web")]);
    let id = "https://prod.example/web".to_owned();
    assert_eq!(refusal, SvidError::InvalidId(SpiffeIdError::Scheme { id }));
}

#[test]
fn a_uri_that_is_no_valid_spiffe_id_is_refused_with_the_rule_it_breaks() {
    let refusal = leaf_refusal(|p| p.subject_alt_names = vec![uri("spiffe://prod.example/")]);
    let path = "/".to_owned();
    assert_eq!(refusal, SvidError::InvalidId(SpiffeIdError::TrailingSlash { path }));
}

#[test]
fn a_leaf_without_a_path_is_refused() {
    let refusal = leaf_refusal(|p| p.subject_alt_names = vec![uri("spiffe://prod.example")]);
    assert_eq!(refusal, SvidError::NoPath { id: "spiffe://prod.example".parse().unwrap() });
}

#[test]
fn an_unreadable_name_is_refused_because_another_parser_might_read_it() {
    let refusal = leaf_refusal(|p| {
        let names = uri_names(&[WEB.as_bytes(), b"spiffe://prod.example/\xff"]);
        p.subject_alt_names.clear();
        p.custom_extensions.push(extension(SUBJECT_ALTERNATIVE_NAME, true, &names));
    });
    assert_eq!(refusal, SvidError::Malformed { part: "subject alternative name" });
}

#[test]
fn a_nul_in_the_uri_is_refused() {
    let refusal = leaf_refusal(|p| {
        let names = uri_names(&[b"spiffe://prod.example/web\0.evil"]);
        p.subject_alt_names.clear();
        p.custom_extensions.push(extension(SUBJECT_ALTERNATIVE_NAME, true, &names));
    });
    let (segment, character) = ("web\0.evil".to_owned(), '\0');
    assert_eq!(refusal, SvidError::InvalidId(SpiffeIdError::PathCharacter { segment, character }));
}

#[test]
fn names_that_are_not_critical_are_refused_when_the_subject_is_empty() {
    let not_critical = |p: &mut CertificateParams| {
        let names = uri_names(&[WEB.as_bytes()]);
        p.subject_alt_names.clear();
        p.custom_extensions.push(extension(SUBJECT_ALTERNATIVE_NAME, false, &names));
    };
    assert_eq!(leaf_refusal(not_critical), SvidError::NamesNotCritical);
    let with_subject = changed(leaf(), |p| {
        not_critical(p);
        p.distinguished_name.push(DnType::CommonName, "web");
    });
    assert_eq!(check(&with_subject).unwrap().id().as_str(), WEB);
}

#[test]
fn a_leaf_with_the_ca_flag_is_refused() {
    for constraints in [BasicConstraints::Unconstrained, BasicConstraints::Constrained(0)] {
        let refusal = leaf_refusal(|p| p.is_ca = IsCa::Ca(constraints));
        assert_eq!(refusal, SvidError::LeafIsCa);
    }
}

#[test]
fn a_leaf_that_does_not_say_whether_it_is_a_ca_is_refused() {
    assert_eq!(leaf_refusal(|p| p.is_ca = IsCa::NoCa), SvidError::NoBasicConstraints);
}

#[test]
fn a_signing_certificate_authenticates_nobody() {
    assert_eq!(check(&issue(&ca())), Err(SvidError::LeafIsCa));
}

#[test]
fn a_leaf_without_key_usage_is_refused() {
    assert_eq!(leaf_refusal(|p| p.key_usages.clear()), SvidError::NoKeyUsage);
}

#[test]
fn a_key_usage_that_is_not_critical_is_refused() {
    let refusal = leaf_refusal(|p| {
        p.key_usages.clear();
        p.custom_extensions.push(extension(KEY_USAGE, false, DIGITAL_SIGNATURE));
    });
    assert_eq!(refusal, SvidError::KeyUsageNotCritical);
}

#[test]
fn a_leaf_without_digital_signature_is_refused() {
    let refusal = leaf_refusal(|p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement]);
    assert_eq!(refusal, SvidError::KeyUsageMissing { usage: "digitalSignature" });
}

#[test]
fn a_leaf_with_key_cert_sign_is_refused() {
    let refusal = leaf_refusal(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign));
    assert_eq!(refusal, SvidError::KeyUsageForbidden { usage: "keyCertSign" });
}

#[test]
fn a_leaf_with_crl_sign_is_refused() {
    let refusal = leaf_refusal(|p| p.key_usages.push(KeyUsagePurpose::CrlSign));
    assert_eq!(refusal, SvidError::KeyUsageForbidden { usage: "cRLSign" });
}

#[test]
fn a_leaf_without_extended_key_usage_is_refused() {
    let refusal = leaf_refusal(|p| p.extended_key_usages.clear());
    assert_eq!(refusal, SvidError::NoExtendedKeyUsage);
}

#[test]
fn a_leaf_for_only_one_side_of_a_connection_is_refused() {
    let server_only = leaf_refusal(|p| p.extended_key_usages.truncate(1));
    assert_eq!(server_only, SvidError::ExtendedKeyUsageMissing { purpose: "clientAuth" });
    let client_only = leaf_refusal(|p| drop(p.extended_key_usages.remove(0)));
    assert_eq!(client_only, SvidError::ExtendedKeyUsageMissing { purpose: "serverAuth" });
    let any = leaf_refusal(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any]);
    assert_eq!(any, SvidError::ExtendedKeyUsageMissing { purpose: "serverAuth" });
}

#[test]
fn an_unknown_critical_extension_is_refused() {
    let refusal =
        leaf_refusal(|p| p.custom_extensions.push(extension(PRIVATE, true, &[0x05, 0x00])));
    let oid = "1.3.6.1.4.1.99999.1".to_owned();
    assert_eq!(refusal, SvidError::UnknownCriticalExtension { oid });
}

#[test]
fn a_critical_extension_that_nothing_evaluates_is_refused_even_when_its_format_is_known() {
    let policy = extension(POLICY_CONSTRAINTS, true, &[0x30, 0x03, 0x80, 0x01, 0x00]);
    let expected = SvidError::UnknownCriticalExtension { oid: "2.5.29.36".to_owned() };
    assert_eq!(leaf_refusal(|p| p.custom_extensions.push(policy.clone())), expected);
    assert_eq!(both_refuse(|p| p.custom_extensions.push(policy.clone())), expected);
    let names = extension(NAME_CONSTRAINTS, true, &[0x30, 0x00]);
    let expected = SvidError::UnknownCriticalExtension { oid: "2.5.29.30".to_owned() };
    assert_eq!(leaf_refusal(|p| p.custom_extensions.push(names)), expected);
}

#[test]
fn an_extension_that_is_there_twice_is_refused() {
    let refusal = leaf_refusal(|p| {
        p.custom_extensions.push(extension(KEY_USAGE, true, DIGITAL_SIGNATURE));
    });
    assert_eq!(refusal, SvidError::DuplicateExtension { oid: "2.5.29.15".to_owned() });
    let refusal = leaf_refusal(|p| {
        let names = uri_names(&[WEB.as_bytes()]);
        p.custom_extensions.push(extension(SUBJECT_ALTERNATIVE_NAME, true, &names));
    });
    assert_eq!(refusal, SvidError::DuplicateExtension { oid: "2.5.29.17".to_owned() });
}

#[test]
fn bytes_left_over_within_an_extension_are_refused() {
    let refusal = leaf_refusal(|p| {
        p.is_ca = IsCa::NoCa;
        p.custom_extensions.push(extension(BASIC_CONSTRAINTS, true, &[0x30, 0x00, 0x05, 0x00]));
    });
    assert_eq!(refusal, SvidError::Malformed { part: "basic constraints" });
    let refusal = leaf_refusal(|p| {
        p.key_usages.clear();
        let value = [DIGITAL_SIGNATURE, &[0x00]].concat();
        p.custom_extensions.push(extension(KEY_USAGE, true, &value));
    });
    assert_eq!(refusal, SvidError::Malformed { part: "key usage" });
}

#[test]
fn bytes_after_the_certificate_are_refused() {
    for garbage in [&[0x00][..], &issue(&leaf())] {
        let der = [issue(&leaf()), garbage.to_vec()].concat();
        assert_eq!(check(&der), Err(SvidError::TrailingBytes { count: garbage.len() }));
    }
}

#[test]
fn bytes_after_the_signature_within_the_certificate_are_refused() {
    let mut der = issue(&leaf());
    assert_eq!(der[..2], [0x30, 0x82], "a length of two bytes");
    let length = u16::from_be_bytes([der[2], der[3]]) + 2;
    der[2..4].copy_from_slice(&length.to_be_bytes());
    der.extend([0x05, 0x00]);
    assert_eq!(check(&der), Err(SvidError::Malformed { part: "structure" }));
}

#[test]
fn what_is_no_certificate_is_refused() {
    let pem = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
    for der in [&b""[..], &[0x30], &[0x30, 0x00], &[0x30, 0x80, 0x00, 0x00], pem, &[0xff; 64]] {
        assert_eq!(check(der), Err(SvidError::Malformed { part: "structure" }), "{der:?}");
    }
}

#[test]
fn another_version_than_three_is_refused() {
    for (encoded, version) in [(0, 1), (1, 2), (3, 4)] {
        let of_version = [0xa0, 0x03, 0x02, 0x01, encoded];
        let der = patched(issue(&leaf()), &[0xa0, 0x03, 0x02, 0x01, 0x02], &of_version);
        assert_eq!(check(&der), Err(SvidError::Version { version }));
    }
}

#[test]
fn serial_numbers_are_positive_and_at_most_twenty_bytes_long() {
    let with_serial = |bytes: &[u8]| {
        let serial = SerialNumber::from_slice(bytes);
        check(&changed(leaf(), |p| p.serial_number = Some(serial)))
    };
    assert_eq!(with_serial(&[0x7f; 20]).unwrap().serial().to_string(), "7f".repeat(20));
    assert_eq!(with_serial(&[0x01]).unwrap().serial().to_string(), "01");
    assert_eq!(with_serial(&[0x80]).unwrap().serial().to_string(), "80");
    assert_eq!(with_serial(&[0x7f; 21]), Err(SvidError::SerialTooLong { length: 21 }));
    // With the sign byte that keeps it positive.
    assert_eq!(with_serial(&[0xff; 20]), Err(SvidError::SerialTooLong { length: 21 }));
    assert_eq!(with_serial(&[0x00]), Err(SvidError::SerialNotPositive));
    let negative = [&[0x02, 0x10, 0xda][..], &[0x5a; 15]].concat();
    let positive = [&[0x02, 0x10, 0x5a][..], &[0x5a; 15]].concat();
    let der = patched(issue(&leaf()), &positive, &negative);
    assert_eq!(check(&der), Err(SvidError::SerialNotPositive));
}

#[test]
fn an_expired_leaf_is_refused_from_the_instant_after_its_not_after() {
    let der = issue(&leaf());
    let not_after: Timestamp = "2026-07-02T00:00:00Z".parse().unwrap();
    assert!(check_leaf(&der, not_after).is_ok());
    let now = not_after.saturating_add(Duration::from_millis(1));
    let refusal = check_leaf(&der, now).unwrap_err();
    assert_eq!(refusal, SvidError::Expired { not_after, now });
    assert_eq!(refusal.reason(), Reason::ExpiredCert);
}

#[test]
fn a_leaf_is_refused_until_its_not_before() {
    let der = issue(&leaf());
    let not_before: Timestamp = "2026-07-01T00:00:00Z".parse().unwrap();
    assert!(check_leaf(&der, not_before).is_ok());
    let now = not_before.saturating_sub(Duration::from_millis(1));
    let refusal = check_leaf(&der, now).unwrap_err();
    assert_eq!(refusal, SvidError::NotYetValid { not_before, now });
    assert_eq!(refusal.reason(), Reason::ExpiredCert);
}

#[test]
fn a_validity_that_ends_before_it_begins_is_refused() {
    let refusal = leaf_refusal(|p| std::mem::swap(&mut p.not_before, &mut p.not_after));
    assert!(matches!(refusal, SvidError::EmptyValidity { .. }), "{refusal}");
    assert_eq!(refusal.reason(), Reason::BadSvid);
}

#[test]
fn an_expired_leaf_that_breaks_another_rule_is_reported_for_that_rule() {
    let der = changed(leaf(), |p| p.is_ca = IsCa::NoCa);
    assert_eq!(check_leaf(&der, Timestamp::MAX), Err(SvidError::NoBasicConstraints));
}

#[test]
fn a_signing_certificate_that_obeys_every_rule_is_accepted() {
    let facts = intermediate(|_| {}).unwrap();
    assert_eq!(facts.trust_domain(), Some(&td("prod.example")));
    assert_eq!(facts.path_length(), Some(0));
    assert_eq!(facts.serial().to_string(), "5a".repeat(16));
    assert_eq!(facts.not_after().to_string(), "2026-07-02T00:00:00Z");
    let root = ca().self_signed(&*CA_KEY).unwrap();
    let facts = check_root(root.der(), noon()).unwrap();
    assert_eq!(facts.trust_domain(), Some(&td("prod.example")));
    assert_eq!(facts.not_before().to_string(), "2026-07-01T00:00:00Z");
}

#[test]
fn a_signing_certificate_need_not_be_an_svid_nor_limit_its_paths() {
    let facts = intermediate(|p| {
        p.subject_alt_names.clear();
        p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    });
    let facts = facts.unwrap();
    assert_eq!((facts.trust_domain(), facts.path_length()), (None, None));
}

#[test]
fn name_constraints_of_a_signing_certificate_are_left_to_path_validation() {
    let names = extension(NAME_CONSTRAINTS, true, &[0x30, 0x00]);
    assert!(intermediate(|p| p.custom_extensions.push(names)).is_ok());
}

#[test]
fn a_leaf_signs_nothing() {
    let der = issue(&leaf());
    assert_eq!(check_intermediate(&der, noon()), Err(SvidError::NotCa));
    assert_eq!(check_root(&der, noon()), Err(SvidError::NotCa));
    assert_eq!(both_refuse(|p| p.is_ca = IsCa::NoCa), SvidError::NoBasicConstraints);
}

#[test]
fn a_signing_certificate_without_key_cert_sign_is_refused() {
    let missing = SvidError::KeyUsageMissing { usage: "keyCertSign" };
    assert_eq!(both_refuse(|p| p.key_usages = vec![KeyUsagePurpose::CrlSign]), missing);
    assert_eq!(both_refuse(|p| p.key_usages.clear()), SvidError::NoKeyUsage);
    let not_critical = both_refuse(|p| {
        p.key_usages.clear();
        p.custom_extensions.push(extension(KEY_USAGE, false, &[0x03, 0x02, 0x02, 0x04]));
    });
    assert_eq!(not_critical, SvidError::KeyUsageNotCritical);
}

#[test]
fn a_signing_certificate_whose_id_has_a_path_is_refused() {
    let refusal = both_refuse(|p| p.subject_alt_names = vec![uri(WEB)]);
    assert_eq!(refusal, SvidError::SigningIdHasPath { id: WEB.parse().unwrap() });
}

#[test]
fn a_signing_certificate_with_two_uri_names_or_an_invalid_one_is_refused() {
    let refusal = both_refuse(|p| p.subject_alt_names.push(uri("spiffe://other.example")));
    assert_eq!(refusal, SvidError::SeveralUriNames { count: 2 });
    let refusal = both_refuse(|p| p.subject_alt_names = vec![uri("https://prod.example")]);
    let id = "https://prod.example".to_owned();
    assert_eq!(refusal, SvidError::InvalidId(SpiffeIdError::Scheme { id }));
}

#[test]
fn a_signing_certificate_without_a_subject_is_refused() {
    let refusal = both_refuse(|p| p.distinguished_name = DistinguishedName::new());
    assert_eq!(refusal, SvidError::CaWithoutSubject);
}

#[test]
fn a_path_length_beyond_what_path_validation_can_read_is_refused() {
    let refusal = both_refuse(|p| {
        p.is_ca = IsCa::NoCa;
        let value = [0x30, 0x07, 0x01, 0x01, 0xff, 0x02, 0x02, 0x01, 0x00];
        p.custom_extensions.push(extension(BASIC_CONSTRAINTS, true, &value));
    });
    assert_eq!(refusal, SvidError::PathLength { found: 256 });
    assert!(intermediate(|p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(255))).is_ok());
}

#[test]
fn an_intermediate_that_narrows_the_purposes_of_its_leaves_is_refused() {
    let der = changed(ca(), |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    let expected = SvidError::ExtendedKeyUsageMissing { purpose: "clientAuth" };
    assert_eq!(check_intermediate(&der, noon()), Err(expected));
    assert!(check_root(&der, noon()).is_ok(), "path validation starts below the anchor");
}

#[test]
fn a_signing_certificate_out_of_its_time_is_refused() {
    let der = issue(&ca());
    for (now, check) in [(Timestamp::MAX, "expired"), (Timestamp::UNIX_EPOCH, "not yet valid")] {
        for refusal in [check_intermediate(&der, now), check_root(&der, now)] {
            assert_eq!(refusal.unwrap_err().reason(), Reason::ExpiredCert, "{check}");
        }
    }
}

#[test]
fn a_verified_chain_makes_a_verified_svid_of_the_bundles_trust_domain() {
    let proof = ChainVerified::assert_signature_path_checked();
    let der = issue(&leaf());
    let verified = VerifiedSvid::from_verified_chain(proof, &der, &td("prod.example"), noon());
    let verified = verified.unwrap();
    assert_eq!(verified.id().as_str(), WEB);
    assert_eq!(verified.facts(), &check(&der).unwrap());
}

#[test]
fn a_leaf_of_another_trust_domain_than_the_bundle_is_refused_as_untrusted() {
    for other in ["other.example", "prod.example.evil", "prod", "example"] {
        let proof = ChainVerified::assert_signature_path_checked();
        let refusal = VerifiedSvid::from_verified_chain(proof, &issue(&leaf()), &td(other), noon())
            .unwrap_err();
        let expected = td(other);
        assert_eq!(refusal, SvidError::WrongTrustDomain { id: WEB.parse().unwrap(), expected });
        assert_eq!(refusal.reason(), Reason::UntrustedRoot);
    }
}

#[test]
fn a_verified_chain_does_not_excuse_a_bad_leaf() {
    let refused = |der: &[u8], now| {
        let proof = ChainVerified::assert_signature_path_checked();
        VerifiedSvid::from_verified_chain(proof, der, &td("prod.example"), now).unwrap_err()
    };
    assert_eq!(refused(&issue(&ca()), noon()).reason(), Reason::BadSvid);
    assert_eq!(refused(&issue(&leaf()), Timestamp::MAX).reason(), Reason::ExpiredCert);
    assert_eq!(refused(b"", noon()).reason(), Reason::BadSvid);
}

#[test]
fn serial_numbers_read_back_from_their_text() {
    for text in ["01", "80", "0a0b", &"ff".repeat(20)] {
        let serial: Serial = text.parse().unwrap();
        assert_eq!(serial.to_string(), text);
        let json = serde_json::to_string(&serial).unwrap();
        assert_eq!(serde_json::from_str::<Serial>(&json).unwrap(), serial);
    }
    assert_eq!("000A".parse::<Serial>().unwrap().to_string(), "0a");
    for text in ["", "0", "1", "00", "0000", "0x01", "zz", "01:02", "+1", "é", &"01".repeat(21)] {
        assert!(text.parse::<Serial>().is_err(), "{text:?}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(check(&bytes).is_err());
        prop_assert!(check_intermediate(&bytes, noon()).is_err());
        prop_assert!(check_root(&bytes, noon()).is_err());
    }

    #[test]
    fn a_damaged_certificate_never_panics_and_never_outlives_its_time(
        at in any::<prop::sample::Index>(), to in any::<u8>(), is_leaf in any::<bool>(),
    ) {
        static LEAF: LazyLock<Vec<u8>> = LazyLock::new(|| issue(&leaf()));
        static CA: LazyLock<Vec<u8>> = LazyLock::new(|| issue(&ca()));
        let mut der = if is_leaf { LEAF.clone() } else { CA.clone() };
        let at = at.index(der.len());
        der[at] = to;
        if let Ok(facts) = check(&der) {
            prop_assert!(facts.not_before() <= noon() && noon() <= facts.not_after());
            prop_assert!(!facts.id().path().is_empty());
        }
        prop_assert!(!is_leaf || check_intermediate(&der, noon()).is_err());
        let truncated = check(&der[..at]);
        prop_assert!(truncated.is_err());
    }

    #[test]
    fn serial_numbers_of_up_to_twenty_bytes_read_back(
        bytes in prop::collection::vec(any::<u8>(), 1..=20),
    ) {
        if let Ok(serial) = Serial::from_be_bytes(&bytes) {
            prop_assert_eq!(serial.to_string().parse::<Serial>().unwrap(), serial);
            prop_assert_eq!(Serial::from_be_bytes(serial.as_be_bytes()), Ok(serial));
        }
    }
}
