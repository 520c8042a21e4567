//! SPIFFE-ID.md, rule by rule: which texts name an identity, and what is said about the others.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::collections::{BTreeMap, HashMap};

use hauberk_core::identity::{
    IdentityKind, MAX_SPIFFE_ID_BYTES, ResourceName, ResourceNameError, SERVER_NAME_SUFFIX,
    SpiffeId, SpiffeIdError, TrustDomain,
};
use proptest::prelude::*;

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn td(text: &str) -> TrustDomain {
    text.parse().unwrap()
}

fn refusal(text: &str) -> SpiffeIdError {
    text.parse::<SpiffeId>().unwrap_err()
}

fn s(text: &str) -> String {
    text.to_owned()
}

#[test]
fn a_valid_id_is_taken_apart_into_trust_domain_and_path() {
    let cases = [
        ("workload", "spiffe://prod.example/ns/shop/sa/web", "prod.example", "/ns/shop/sa/web"),
        ("no path", "spiffe://prod.example", "prod.example", ""),
        ("one segment", "spiffe://a/b", "a", "/b"),
        ("every path character", "spiffe://a/AZaz09._-", "a", "/AZaz09._-"),
        ("every trust domain character", "spiffe://az09._-/x", "az09._-", "/x"),
        ("dots that are no relative segment", "spiffe://a/.../..b/c..", "a", "/.../..b/c.."),
    ];
    for (name, text, trust_domain, path) in cases {
        let id = id(text);
        assert_eq!(id.as_str(), text, "{name}");
        assert_eq!(id.trust_domain().as_str(), trust_domain, "{name}");
        assert_eq!(id.path(), path, "{name}");
    }
}

#[test]
fn another_scheme_is_refused() {
    for text in [
        "",
        "spiffe",
        "spiffe:/a/b",
        "http://a/b",
        "https://a/b",
        "://a/b",
        "a/b",
        " spiffe://a/b",
        "SPIFFE://a/b",
        "Spiffe://a/b",
    ] {
        assert_eq!(refusal(text), SpiffeIdError::Scheme { id: s(text) });
    }
}

#[test]
fn an_empty_trust_domain_is_refused() {
    for text in ["spiffe://", "spiffe:///", "spiffe:///ns//sa/", "spiffe:///path"] {
        assert_eq!(refusal(text), SpiffeIdError::TrustDomainEmpty, "{text}");
    }
}

#[test]
fn a_query_is_refused() {
    for (text, query) in [
        ("spiffe://a/b?c=d", "?c=d"),
        ("spiffe://a?", "?"),
        ("spiffe://?", "?"),
        ("spiffe://a/b?c#d", "?c#d"),
    ] {
        assert_eq!(refusal(text), SpiffeIdError::Query { query: s(query) });
    }
}

#[test]
fn a_fragment_is_refused() {
    for (text, fragment) in
        [("spiffe://a/b#c", "#c"), ("spiffe://a#", "#"), ("spiffe://a/b#c?d", "#c?d")]
    {
        assert_eq!(refusal(text), SpiffeIdError::Fragment { fragment: s(fragment) });
    }
}

#[test]
fn a_user_part_is_refused() {
    for (text, userinfo) in [
        ("spiffe://root@a/b", "root@"),
        ("spiffe://@a/b", "@"),
        ("spiffe://root:secret@a/b", "root:secret@"),
    ] {
        assert_eq!(refusal(text), SpiffeIdError::UserInfo { userinfo: s(userinfo) });
    }
}

#[test]
fn a_port_is_refused_even_when_empty() {
    for (text, port) in
        [("spiffe://a:8443/b", ":8443"), ("spiffe://a:/b", ":"), ("spiffe://:1/b", ":1")]
    {
        assert_eq!(refusal(text), SpiffeIdError::Port { port: s(port) });
    }
}

#[test]
fn upper_case_in_the_trust_domain_is_refused() {
    assert_eq!(
        refusal("spiffe://Prod.example/b"),
        SpiffeIdError::TrustDomainUpperCase { trust_domain: s("Prod.example") }
    );
}

#[test]
fn other_characters_in_the_trust_domain_are_refused() {
    for (trust_domain, character) in
        [("a b", ' '), ("a~b", '~'), ("prôd", 'ô'), ("a\0b", '\0'), ("a\\b", '\\'), ("[a]", '[')]
    {
        assert_eq!(
            refusal(&format!("spiffe://{trust_domain}/b")),
            SpiffeIdError::TrustDomainCharacter { trust_domain: s(trust_domain), character }
        );
    }
}

#[test]
fn an_ipv6_address_as_trust_domain_is_refused_and_an_ipv4_address_is_a_name_like_others() {
    assert_eq!(refusal("spiffe://[::1]/b"), SpiffeIdError::Port { port: s("::1]") });
    assert_eq!(id("spiffe://192.0.2.1/b").trust_domain().as_str(), "192.0.2.1");
    assert_eq!(id("spiffe://999.0.2.1/b").trust_domain().as_str(), "999.0.2.1");
}

#[test]
fn percent_encoding_is_refused_in_the_trust_domain() {
    assert_eq!(refusal("spiffe://pr%6fd/b"), SpiffeIdError::PercentEncoded { part: s("pr%6fd") });
}

#[test]
fn percent_encoding_is_refused_in_the_path() {
    for segment in ["%2e%2e", "a%2fb", "%", "%zz"] {
        assert_eq!(
            refusal(&format!("spiffe://a/x/{segment}")),
            SpiffeIdError::PercentEncoded { part: s(segment) }
        );
    }
}

#[test]
fn empty_path_segments_are_refused() {
    for path in ["//", "//b", "/b//c", "/b//", "///"] {
        assert_eq!(
            refusal(&format!("spiffe://a{path}")),
            SpiffeIdError::EmptySegment { path: s(path) }
        );
    }
}

#[test]
fn relative_path_segments_are_refused() {
    for (path, segment) in
        [("/.", "."), ("/..", ".."), ("/b/../c", ".."), ("/./b", "."), ("/b/..", "..")]
    {
        assert_eq!(
            refusal(&format!("spiffe://a{path}")),
            SpiffeIdError::RelativeSegment { path: s(path), segment: s(segment) }
        );
    }
}

#[test]
fn a_trailing_slash_is_refused() {
    for path in ["/", "/b/", "/ns/shop/sa/web/"] {
        assert_eq!(
            refusal(&format!("spiffe://a{path}")),
            SpiffeIdError::TrailingSlash { path: s(path) }
        );
    }
}

#[test]
fn other_characters_in_the_path_are_refused() {
    for (segment, character) in [
        ("b c", ' '),
        ("b~", '~'),
        ("b:c", ':'),
        ("b@c", '@'),
        ("*", '*'),
        ("wéb", 'é'),
        ("b\\c", '\\'),
        ("b\0", '\0'),
        ("b\n", '\n'),
    ] {
        assert_eq!(
            refusal(&format!("spiffe://a/{segment}")),
            SpiffeIdError::PathCharacter { segment: s(segment), character }
        );
    }
}

#[test]
fn ids_up_to_2048_bytes_are_supported_and_longer_ones_refused() {
    let longest = format!("spiffe://a/{}", "b".repeat(MAX_SPIFFE_ID_BYTES - 11));
    assert_eq!(longest.len(), 2_048);
    assert_eq!(id(&longest).as_str(), longest);
    assert_eq!(refusal(&format!("{longest}b")), SpiffeIdError::TooLong { length: 2_049 });
}

#[test]
fn trust_domains_up_to_255_bytes_are_supported_and_longer_ones_refused() {
    let longest = "a".repeat(255);
    assert_eq!(td(&longest).as_str(), longest);
    assert_eq!(id(&format!("spiffe://{longest}/b")).trust_domain().as_str(), longest);
    let longer = "a".repeat(256);
    let expected = SpiffeIdError::TrustDomainTooLong { length: 256 };
    assert_eq!(longer.parse::<TrustDomain>(), Err(expected.clone()));
    assert_eq!(refusal(&format!("spiffe://{longer}/b")), expected);
}

#[test]
fn a_trust_domain_alone_obeys_the_same_rules() {
    let cases = [
        ("", SpiffeIdError::TrustDomainEmpty),
        ("A", SpiffeIdError::TrustDomainUpperCase { trust_domain: s("A") }),
        ("a:1", SpiffeIdError::Port { port: s(":1") }),
        ("a/b", SpiffeIdError::TrustDomainCharacter { trust_domain: s("a/b"), character: '/' }),
        ("a?b", SpiffeIdError::TrustDomainCharacter { trust_domain: s("a?b"), character: '?' }),
    ];
    for (text, expected) in cases {
        assert_eq!(text.parse::<TrustDomain>(), Err(expected), "{text}");
    }
}

#[test]
fn every_refusal_says_the_offending_part_in_one_line_without_full_stop() {
    for text in [
        "http://a/b",
        "spiffe:///b",
        "spiffe://A/b",
        "spiffe://a:1/b",
        "spiffe://u@a/b",
        "spiffe://a b/c",
        "spiffe://a%20/c",
        "spiffe://a/b?c",
        "spiffe://a/b#c",
        "spiffe://a/b/",
        "spiffe://a//b",
        "spiffe://a/../b",
        "spiffe://a/b\nc",
    ] {
        let message = refusal(text).to_string();
        assert!(!message.ends_with('.') && !message.contains('\n'), "{message}");
        assert!(message.starts_with(|c: char| !c.is_uppercase()), "{message}");
    }
    assert_eq!(
        refusal("spiffe://a/b c").to_string(),
        "the path segment \"b c\" contains ' ': only a-z, A-Z, 0-9, \".\", \"_\" and \"-\" are \
         allowed"
    );
}

#[test]
fn the_kind_is_read_from_the_whole_path() {
    use IdentityKind::{ControlPlane, Machine, Node, Other, Workload};
    let cases = [
        ("/ns/shop/sa/web", Workload { namespace: "shop", service_account: "web" }),
        ("/machine/db-1", Machine { name: "db-1" }),
        ("/node/worker-1", Node { name: "worker-1" }),
        ("/control-plane", ControlPlane),
        ("", Other),
        ("/ns/shop/sa", Other),
        ("/ns/shop/sa/web/x", Other),
        ("/NS/shop/sa/web", Other),
        ("/sa/web/ns/shop", Other),
        ("/machine", Other),
        ("/machine/a/b", Other),
        ("/node/a/b", Other),
        ("/control-plane/x", Other),
        ("/Control-Plane", Other),
    ];
    for (path, kind) in cases {
        assert_eq!(id(&format!("spiffe://a{path}")).kind(), kind, "{path}");
    }
}

#[test]
fn builders_make_what_parsing_reads() {
    let a = td("a");
    assert_eq!(SpiffeId::workload(&a, "shop", "web").unwrap(), id("spiffe://a/ns/shop/sa/web"));
    assert_eq!(SpiffeId::machine(&a, "db").unwrap(), id("spiffe://a/machine/db"));
    assert_eq!(SpiffeId::node(&a, "n1").unwrap(), id("spiffe://a/node/n1"));
    assert_eq!(SpiffeId::control_plane(&a), id("spiffe://a/control-plane"));
    assert_eq!(SpiffeId::of_trust_domain(&a), id("spiffe://a"));
    let longest = td(&"a".repeat(255));
    assert_eq!(SpiffeId::control_plane(&longest), id(SpiffeId::control_plane(&longest).as_str()));
}

#[test]
fn a_builder_refuses_a_name_that_is_more_than_one_segment() {
    let a = td("a");
    let cases = [
        ("slash", "web/x", SpiffeIdError::PathCharacter { segment: s("web/x"), character: '/' }),
        ("empty", "", SpiffeIdError::EmptySegment { path: s("/ns/shop/sa/") }),
        (
            "dots",
            "..",
            SpiffeIdError::RelativeSegment { path: s("/ns/shop/sa/.."), segment: s("..") },
        ),
        ("encoded slash", "web%2fx", SpiffeIdError::PercentEncoded { part: s("web%2fx") }),
    ];
    for (name, service_account, expected) in cases {
        assert_eq!(SpiffeId::workload(&a, "shop", service_account), Err(expected), "{name}");
    }
    let refused = SpiffeId::workload(&a, "shop/sa/admin", "x").unwrap_err();
    let segment = s("shop/sa/admin");
    assert_eq!(refused, SpiffeIdError::PathCharacter { segment, character: '/' });
}

#[test]
fn a_builder_refuses_what_becomes_too_long() {
    let name = "b".repeat(2_032);
    assert!(SpiffeId::node(&td("aaaaa"), &name[1..]).is_err());
    assert_eq!(SpiffeId::node(&td("a"), &name), Ok(id(&format!("spiffe://a/node/{name}"))));
    assert_eq!(SpiffeId::node(&td("aa"), &name), Err(SpiffeIdError::TooLong { length: 2_049 }));
}

#[test]
fn the_server_name_is_fixed_for_all_releases() {
    // Computed with: printf 'hauberk server name v1\0<id>' | sha256sum, first 20 bytes in base32.
    assert_eq!(
        id("spiffe://prod.example/ns/shop/sa/web").server_name(),
        "o5ohybekwwp7ekjmzbxf6iujjm6l5qmw.svid.hauberk.internal"
    );
}

#[test]
fn ids_are_found_in_maps_by_their_text() {
    let web = id("spiffe://a/ns/shop/sa/web");
    let hashed = HashMap::from([(web.clone(), 1)]);
    let ordered = BTreeMap::from([(web.clone(), 1)]);
    assert_eq!(hashed.get(web.as_str()), Some(&1));
    assert_eq!(ordered.get(web.as_str()), Some(&1));
}

#[test]
fn serde_reads_and_writes_the_text_and_refuses_what_parsing_refuses() {
    let web = id("spiffe://a/ns/shop/sa/web");
    assert_eq!(serde_json::to_string(&web).unwrap(), "\"spiffe://a/ns/shop/sa/web\"");
    assert_eq!(serde_json::from_str::<SpiffeId>("\"spiffe://a/ns/shop/sa/web\"").unwrap(), web);
    let refused = serde_json::from_str::<SpiffeId>("\"spiffe://a/b/\"").unwrap_err().to_string();
    assert!(refused.starts_with("the path \"/b/\" ends in \"/\": remove it"), "{refused}");
    assert!(serde_json::from_str::<TrustDomain>("\"A\"").is_err());
    assert!(serde_json::from_str::<ResourceName>("\"-a\"").is_err());
}

#[test]
fn resource_names_are_lower_case_with_letters_or_digits_at_both_ends() {
    for name in ["a", "0", "web-1", "web.v2", "a--b", &"a".repeat(253)] {
        assert_eq!(name.parse::<ResourceName>().unwrap().as_str(), name);
    }
    let character =
        |name: &str, character| ResourceNameError::Character { name: s(name), character };
    let cases = [
        ("", ResourceNameError::Empty),
        ("Web", character("Web", 'W')),
        ("a_b", character("a_b", '_')),
        ("a/b", character("a/b", '/')),
        ("a b", character("a b", ' ')),
        ("é", character("é", 'é')),
        ("-a", ResourceNameError::Edge { name: s("-a") }),
        ("a-", ResourceNameError::Edge { name: s("a-") }),
        (".a", ResourceNameError::Edge { name: s(".a") }),
        ("a.", ResourceNameError::Edge { name: s("a.") }),
        (".", ResourceNameError::Edge { name: s(".") }),
        ("..", ResourceNameError::Edge { name: s("..") }),
        (&"a".repeat(254), ResourceNameError::TooLong { length: 254 }),
    ];
    for (name, expected) in cases {
        assert_eq!(name.parse::<ResourceName>(), Err(expected), "{name:?}");
    }
}

/// The grammar of the standard, written once more in another way.
const VALID: &str =
    "spiffe://[a-z0-9._-]{1,40}(/([A-Za-z0-9_-][A-Za-z0-9._-]{0,12}|\\.\\.\\.)){0,6}";

proptest! {
    #[test]
    fn parse_and_display_are_inverse(text in VALID) {
        let id = id(&text);
        prop_assert_eq!(id.to_string(), text.clone());
        let rebuilt = format!("spiffe://{}{}", id.trust_domain(), id.path());
        prop_assert_eq!(rebuilt, text);
        let json = serde_json::to_string(&id).unwrap();
        prop_assert_eq!(serde_json::from_str::<SpiffeId>(&json).unwrap(), id);
    }

    #[test]
    fn arbitrary_text_never_panics_and_is_kept_as_it_is_when_accepted(text in "\\PC{0,60}") {
        if let Ok(id) = text.parse::<SpiffeId>() {
            prop_assert_eq!(id.as_str(), text.as_str());
        }
        if let Ok(name) = text.parse::<ResourceName>() {
            prop_assert_eq!(name.as_str(), text.as_str());
        }
    }

    #[test]
    fn near_misses_never_panic_and_nothing_accepted_can_be_spelled_in_two_ways(
        text in "spiffe://[a-zA%:@?#/. _-]{0,12}(/[a-zA%:@?#. _-]{0,3}){0,4}",
    ) {
        if let Ok(id) = text.parse::<SpiffeId>() {
            prop_assert!(text.chars().all(|c| c.is_ascii_alphanumeric() || ":/._-".contains(c)));
            prop_assert!(!id.path().contains("//") && !id.path().ends_with('/'));
            prop_assert!(id.path().split('/').all(|segment| segment != "." && segment != ".."));
            prop_assert!(!id.trust_domain().as_str().contains(|c: char| c.is_uppercase()));
        }
    }

    #[test]
    fn what_a_builder_makes_parses_to_the_same_kind(
        trust_domain in "[a-z0-9._-]{1,20}", namespace in "\\PC{0,10}", account in "\\PC{0,10}",
    ) {
        if let Ok(built) = SpiffeId::workload(&td(&trust_domain), &namespace, &account) {
            prop_assert_eq!(&id(built.as_str()), &built);
            let expected =
                IdentityKind::Workload { namespace: &namespace, service_account: &account };
            prop_assert_eq!(built.kind(), expected);
        }
    }

    #[test]
    fn server_names_are_dns_labels_that_differ_between_ids(a in VALID, b in VALID) {
        let (name, other) = (id(&a).server_name(), id(&b).server_name());
        prop_assert_eq!(name == other, a == b);
        let label = name.strip_suffix(SERVER_NAME_SUFFIX).unwrap();
        prop_assert_eq!(label.len(), 32);
        prop_assert!(label.chars().all(|c| matches!(c, 'a'..='z' | '2'..='7')));
    }
}
