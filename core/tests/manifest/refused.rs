use hauberk_core::manifest::{ManifestError, parse};

use super::{object, policy};

const AWFUL: &str = include_str!("../manifests/awful.yaml");

#[test]
fn every_mistake_of_a_file_is_told_at_once_with_its_place_and_mend() {
    let errors = parse("awful.yaml", AWFUL).unwrap_err();
    let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
    insta::with_settings!({ prepend_module_to_snapshot => false, snapshot_path => "../snapshots" }, {
        insta::assert_snapshot!("awful_manifest", lines.join("\n"));
    });
}

#[test]
fn an_error_is_written_with_file_line_column_field_and_mend() {
    let text = policy("\n  rules:\n  - ports: [443, 70000]");
    let errors = parse("file.yaml", &text).unwrap_err();
    let port = errors.iter().find(|error| error.problem.contains("70000")).unwrap();
    let expected = "file.yaml:6:18: spec.rules[0].ports[1]: 70000 is not a port; mend: give a \
                    whole number from 1 to 65535, without quotes";
    assert_eq!(port.to_string(), expected);
}

#[test]
fn a_mistake_in_a_policy_is_refused_with_its_field() {
    const OWNER: &str = "owner: {team: a, contact: b}";
    const TARGET: &str = "target: {machine: a}";
    let spec = |owner: &str, target: &str, rules: &str, more: &str| {
        policy(&format!("{{{owner}, {target}, rules: {rules}{more}}}"))
    };
    let target = |target: &str| spec(OWNER, &format!("target: {{{target}}}"), "[]", "");
    let rule = |rule: &str| spec(OWNER, TARGET, &format!("[{{{rule}}}]"), "");
    let from = |from: &str| rule(&format!("name: a, ports: [1], from: [{{{from}}}]"));
    let also = |more: &str| rule(&format!("name: a, ports: [1], from: [{{machine: a}}], {more}"));
    let test = |test: &str| {
        let rules = "[{name: r, ports: [1], from: [{machine: a}]}]";
        spec(OWNER, TARGET, rules, &format!(", tests: [{{{test}}}]"))
    };
    let control = "owner: {team: \"a\\e[31m\", contact: b}";
    let cases = [
        (spec("mode: Audit", TARGET, "[]", ""), "spec", "owner is missing"),
        (spec("owner: a", TARGET, "[]", ""), "spec.owner", "\"a\" stands where fields"),
        (spec("owner: {team: a}", TARGET, "[]", ""), "spec.owner", "contact is missing"),
        (spec("owner: {team: '', contact: b}", TARGET, "[]", ""), "spec.owner.team", "empty"),
        (spec(control, TARGET, "[]", ""), "spec.owner.team", "control character"),
        (spec(OWNER, "mode: Audit", "[]", ""), "spec", "target is missing"),
        (target(""), "spec.target", "none of selector, serviceAccount, machine"),
        (target("machine: a, serviceAccount: b"), "spec.target", "serviceAccount and machine are"),
        (target("selector: {}"), "spec.target.selector", "matchLabels is missing"),
        (target("selector: {matchLabels: {}}"), "spec.target.selector.matchLabels", "no label"),
        (
            target("selector: {matchLabels: {app: [a]}}"),
            "spec.target.selector.matchLabels.app",
            "a list",
        ),
        (
            target("selector: {matchLabels: {app: a b}}"),
            "spec.target.selector.matchLabels.app",
            "\"a b\" is not the value",
        ),
        (
            target("selector: {matchLabels: {/x: a}}"),
            "spec.target.selector.matchLabels[\"/x\"]",
            "not the key",
        ),
        (
            target("selector: {matchExpressions: []}"),
            "spec.target.selector.matchExpressions",
            "not a field",
        ),
        (target("machine: A"), "spec.target.machine", "\"A\" contains 'A'"),
        (target("machine: {nam: a}"), "spec.target.machine.nam", "\"nam\" is not a field here"),
        (target("serviceAccount: 12"), "spec.target.serviceAccount", "12 is not text"),
        (spec(OWNER, TARGET, "[]", ", mode: Warn"), "spec.mode", "\"Warn\" is not known"),
        (spec(OWNER, TARGET, "[]", ", mode: off"), "spec.mode", "\"off\" is not known"),
        (spec(OWNER, TARGET, "", ""), "spec", "rules is missing"),
        (spec(OWNER, TARGET, "{}", ""), "spec.rules", "a map stands where a list"),
        (rule("ports: [1], from: [{machine: a}]"), "spec.rules[0]", "name is missing"),
        (rule("name: a, from: [{machine: a}]"), "spec.rules[0]", "ports is missing"),
        (
            rule("name: a, ports: [], from: [{machine: a}]"),
            "spec.rules[0].ports",
            "the list is empty",
        ),
        (
            rule("name: a, ports: [0], from: [{machine: a}]"),
            "spec.rules[0].ports[0]",
            "0 is not a port",
        ),
        (rule("name: a, ports: [65536], from: [{machine: a}]"), "spec.rules[0].ports[0]", "65536"),
        (rule("name: a, ports: [-1], from: [{machine: a}]"), "spec.rules[0].ports[0]", "-1 is not"),
        (rule("name: a, ports: [0x50], from: [{machine: a}]"), "spec.rules[0].ports[0]", "0x50"),
        (rule("name: a, ports: [080], from: [{machine: a}]"), "spec.rules[0].ports[0]", "080"),
        (rule("name: a, ports: [80.0], from: [{machine: a}]"), "spec.rules[0].ports[0]", "80.0"),
        (rule("name: a, ports: ['80'], from: [{machine: a}]"), "spec.rules[0].ports[0]", "\"80\""),
        (
            rule("name: a, ports: [http], from: [{machine: a}]"),
            "spec.rules[0].ports[0]",
            "\"http\"",
        ),
        (
            rule("name: a, ports: [1, 1], from: [{machine: a}]"),
            "spec.rules[0].ports[1]",
            "1 stands twice",
        ),
        (
            rule("name: a, ports: 80, from: [{machine: a}]"),
            "spec.rules[0].ports",
            "80 stands where a list",
        ),
        (rule("name: a, ports: [1]"), "spec.rules[0]", "from is missing"),
        (rule("name: a, ports: [1], from: []"), "spec.rules[0].from", "the list is empty"),
        (rule("name: a, ports: [1], from: ~"), "spec.rules[0]", "from is missing"),
        (from(""), "spec.rules[0].from[0]", "none of serviceAccount, machine, spiffeId, anyIn"),
        (from("machine: a, anyIn: {namespace: b}"), "spec.rules[0].from[0]", "machine and anyIn"),
        (from("serviceAccount: a"), "spec.rules[0].from[0].serviceAccount", "\"a\" stands where"),
        (from("serviceAccount: {name: a}"), "spec.rules[0].from[0].serviceAccount", "namespace is"),
        (from("anyIn: {namespace: '*'}"), "spec.rules[0].from[0].anyIn.namespace", "\"*\""),
        (from("anyIn: {}"), "spec.rules[0].from[0].anyIn", "namespace is missing"),
        (from("ip: 10.0.0.1"), "spec.rules[0].from[0].ip", "\"ip\" is not a field"),
        (from("spiffeId: https://a/b"), "spec.rules[0].from[0].spiffeId", "\"spiffe://\""),
        (from("spiffeId: spiffe://a/ns/X/sa/y"), "spec.rules[0].from[0].spiffeId", "\"X\""),
        (from("spiffeId: spiffe://a/ns//sa/"), "spec.rules[0].from[0].spiffeId", "\"/ns//sa/\""),
        (also("reason: ''"), "spec.rules[0].reason", "the text is empty"),
        (
            also("notAfter: 2027-01-31"),
            "spec.rules[0].notAfter",
            "\"2027-01-31\" is not an RFC 3339",
        ),
        (also("expectedEvery: 90"), "spec.rules[0].expectedEvery", "\"90\" is not a duration"),
        (also("expectedEvery: 0d"), "spec.rules[0].expectedEvery", "\"0d\""),
        (also("expectedEvery: 3w"), "spec.rules[0].expectedEvery", "\"3w\""),
        (also("expectedEvery: 99999999999999999999d"), "spec.rules[0].expectedEvery", "is not a"),
        (also("notBefore: 1"), "spec.rules[0].notBefore", "\"notBefore\" is not a field"),
        (
            spec(
                OWNER,
                TARGET,
                "[{name: a, ports: [1], from: [{machine: a}]}, {name: a, ports: [2], from: [{machine: b}]}]",
                "",
            ),
            "spec.rules[1]",
            "named \"a\" too",
        ),
        (
            test("from: {anyIn: {namespace: a}}, port: 1, expect: deny"),
            "spec.tests[0].from",
            "anyIn is not one caller",
        ),
        (test("from: {machine: a}, port: 1"), "spec.tests[0]", "expect is missing"),
        (test("from: {machine: a}, port: 1, expect: Allow"), "spec.tests[0].expect", "\"Allow\""),
        (
            test("from: {machine: a}, port: 1, expect: deny"),
            "spec.tests[0]",
            "machine a on port 1 should be denied, but the rule \"r\" allows it",
        ),
        (
            test("from: {machine: a}, port: 2, expect: allow"),
            "spec.tests[0]",
            "this caller have other ports",
        ),
        (
            test("from: {machine: b}, port: 1, expect: allow"),
            "spec.tests[0]",
            "this port have other callers",
        ),
        (
            test("from: {machine: b}, port: 2, expect: allow"),
            "spec.tests[0]",
            "no rule has this caller",
        ),
    ];
    for (text, path, problem) in cases {
        refused(&text, path, problem);
    }
}

#[test]
fn a_mistake_in_a_guardrail_is_refused_with_its_field() {
    let spec = |more: &str| {
        object("Guardrail", "{name: a}", &format!("{{owner: {{team: a, contact: b}}, {more}}}"))
    };
    const TARGET: &str = "target: {namespace: a}";
    const DENIES: &str = "denyFrom: [{machine: a}]";
    let cases = [
        (format!("{TARGET}, {DENIES}"), "spec", "none of ports, allPorts is given"),
        (
            format!("{TARGET}, {DENIES}, ports: [1], allPorts: true"),
            "spec",
            "ports and allPorts are",
        ),
        (format!("{TARGET}, {DENIES}, ports: []"), "spec.ports", "the list is empty"),
        (format!("{TARGET}, {DENIES}, allPorts: false"), "spec.allPorts", "false is not true"),
        (format!("{TARGET}, {DENIES}, allPorts: yes"), "spec.allPorts", "\"yes\" is not true"),
        (format!("{TARGET}, allPorts: true"), "spec", "none of denyFrom, denyUnlessFrom"),
        (format!("{TARGET}, allPorts: true, {DENIES}, denyUnlessFrom: []"), "spec", "denyFrom and"),
        (format!("{TARGET}, allPorts: true, denyUnlessFrom: []"), "spec.denyUnlessFrom", "empty"),
        (format!("{TARGET}, allPorts: true, denyFrom: [{{}}]"), "spec.denyFrom[0]", "none of"),
        (format!("target: {{}}, allPorts: true, {DENIES}"), "spec.target", "none of namespace"),
        (
            format!("target: {{selector: a}}, allPorts: true, {DENIES}"),
            "spec.target.selector",
            "not a field",
        ),
        (
            format!("target: {{serviceAccount: a}}, allPorts: true, {DENIES}"),
            "spec.target.serviceAccount",
            "fields belong",
        ),
    ];
    for (more, path, problem) in cases {
        refused(&spec(&more), path, problem);
    }
    let owned = object("Guardrail", "{name: a}", "{allPorts: true}");
    refused(&owned, "spec", "owner is missing");
    let placed = object("Guardrail", "{name: a, namespace: b}", "{}");
    refused(&placed, "metadata.namespace", "belongs to the whole cluster");
}

#[test]
fn a_mistake_in_a_machine_or_workload_is_refused_with_its_field() {
    let machine = |spec: &str| object("Machine", "{name: a}", &format!("{{{spec}}}"));
    let workload = |spec: &str| {
        let spec = format!("{{machine: a, serviceAccount: b, {spec}}}");
        object("Workload", "{name: a, namespace: b}", &spec)
    };
    let process = |process: &str| workload(&format!("process: {{{process}}}, ports: [1]"));
    let address = |address: &str| machine(&format!("addresses: ['{address}']"));
    let cases = [
        (address("a"), "spec.addresses[0]", "\"a\" is not an IP address"),
        (address("10.0.0.1/8"), "spec.addresses[0]", "not an IP address"),
        (address("127.0.0.2"), "spec.addresses[0]", "127.0.0.2 is a loopback address"),
        (address("::"), "spec.addresses[0]", ":: is the unspecified address"),
        (address("ff02::1"), "spec.addresses[0]", "ff02::1 is a multicast address"),
        (address("255.255.255.255"), "spec.addresses[0]", "is the broadcast address"),
        (address("::ffff:10.0.0.5"), "spec.addresses[0]", "an IPv4 address in disguise"),
        (
            machine("addresses: ['fd00::1', 'fd00:0::1']"),
            "spec.addresses[1]",
            "fd00::1 stands twice",
        ),
        (machine("ports: [22]"), "spec.ports", "spec.process is missing"),
        (machine("mode: Audit"), "spec.mode", "spec.process is missing"),
        (machine("process: {user: a}"), "spec", "ports is missing"),
        (machine("process: {}, ports: []"), "spec.process", "none of user, cgroup"),
        (
            machine("process: {networkNamespace: a}, ports: []"),
            "spec.process.networkNamespace",
            "not a field",
        ),
        (workload("ports: [1]"), "spec", "process is missing"),
        (workload("process: {user: a}"), "spec", "ports is missing"),
        (process("user: a, cgroup: b"), "spec.process", "user and cgroup are given"),
        (process("user: a b"), "spec.process.user", "\"a b\" is not a Unix user"),
        (process("user: '007'"), "spec.process.user", "\"007\" is not a Unix user"),
        (process("user: 4294967295"), "spec.process.user", "4294967295"),
        (process("user: -1"), "spec.process.user", "\"-1\""),
        (process("cgroup: /a"), "spec.process.cgroup", "\"/a\" is not the path"),
        (process("cgroup: a/../b"), "spec.process.cgroup", "\"a/../b\""),
        (process("cgroup: a/"), "spec.process.cgroup", "\"a/\""),
        (process("cgroup: ''"), "spec.process.cgroup", "\"\""),
        (process("networkNamespace: a"), "spec", "addresses is missing"),
        (
            workload("process: {networkNamespace: a/b}, addresses: [10.0.0.1], ports: []"),
            "spec.process.networkNamespace",
            "\"a/b\" is not the name",
        ),
        (
            workload("process: {networkNamespace: a}, addresses: [], ports: []"),
            "spec.addresses",
            "the list is empty",
        ),
        (
            workload("process: {user: a}, addresses: [10.0.0.1], ports: []"),
            "spec.addresses",
            "told apart by user",
        ),
        (object("Workload", "{name: a}", "{}"), "metadata", "namespace is missing"),
        (object("Workload", "{name: a, namespace: b}", "{}"), "spec", "machine is missing"),
        (object("Workload", "{name: a, namespace: b}", "{}"), "spec", "serviceAccount is missing"),
        (object("Machine", "{namespace: a}", "{}"), "metadata", "name is missing"),
        (object("Machine", "{name: a, labels: [b]}", "{}"), "metadata.labels", "a list stands"),
        (
            object("Machine", "{name: a, labels: {b: 1}}", "{}"),
            "metadata.labels.b",
            "1 is not text",
        ),
        (
            object("Machine", "{name: a, generateName: b}", "{}"),
            "metadata.generateName",
            "not a field",
        ),
    ];
    for (text, path, problem) in cases {
        refused(&text, path, problem);
    }
}

#[test]
fn what_is_no_object_of_ours_is_refused() {
    let cases = [
        ("hello", "", "\"hello\" stands where fields belong"),
        ("[]", "", "a list stands where"),
        ("{}", "", "apiVersion is missing"),
        ("{}", "", "kind is missing"),
        ("apiVersion: v1", "apiVersion", "\"v1\" is not a supported group"),
        (
            "apiVersion: hauberk.dev/v1",
            "apiVersion",
            "\"hauberk.dev/v1\" is not a supported version",
        ),
        ("kind: Deployment", "kind", "\"Deployment\" is not known here"),
        ("kind: AccessGrant", "kind", "AccessGrant is not supported in manifests yet"),
        ("kind: Lock", "kind", "Lock is not supported in manifests yet"),
        ("kind: Machine", "", "metadata is missing"),
        ("kind: Machine", "", "spec is missing"),
        ("data: {}", "data", "\"data\" is not a field here"),
    ];
    for (text, path, problem) in cases {
        refused(text, path, problem);
    }
}

#[test]
fn yaml_that_hides_what_it_says_is_refused() {
    let deep = "[".repeat(40) + &"]".repeat(40);
    let cases = [
        ("a: 1\na: 2", "", "\"a\" stands twice, first in line 1"),
        ("spec: {a: 1, 'a': 2}", "spec", "\"a\" stands twice"),
        ("spec: &a {}", "spec", "anchors are not supported"),
        ("spec: *a", "spec", "aliases are not supported"),
        ("spec: {<<: *a}", "spec[\"<<\"]", "aliases are not supported"),
        ("spec: !!str 1", "spec", "tags are not supported"),
        ("spec: {true: 1}", "spec", "the key true is not text"),
        ("spec: {[a]: 1}", "spec", "the key is not text"),
        ("spec: {a: b", "spec", "the YAML cannot be read"),
        ("spec:\n\ta: 1", "spec", "the YAML cannot be read"),
        (
            &deep,
            "[0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0]",
            "deeper than 32 levels",
        ),
    ];
    for (text, path, problem) in cases {
        refused(text, path, problem);
    }
    let tab = parse("a.yaml", "spec:\n\ta: 1").unwrap_err();
    assert!(tab.iter().any(|error| error.mend.contains("a tab")), "{tab:?}");
}

#[test]
fn a_bomb_of_aliases_is_refused_without_going_off() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..30 {
        let aliases = vec![format!("*a{}", level - 1); 9].join(", ");
        bomb += &format!("a{level}: &a{level} [{aliases}]\n");
    }
    refused(&bomb, "a29", "anchors are not supported");
}

#[test]
fn an_unknown_field_gets_the_nearest_known_one() {
    let mend = |text: &str, path: &str| {
        let errors = parse("a.yaml", text).unwrap_err();
        errors.into_iter().find(|error| error.path == path).expect(path).mend
    };
    let known = "known here: apiVersion, kind, metadata, spec, status";
    assert_eq!(mend("metdata: {}", "metdata"), format!("did you mean metadata? {known}"));
    assert_eq!(mend("Spec: {}", "Spec"), format!("did you mean spec? {known}"));
    assert_eq!(mend("data: {}", "data"), format!("remove it; {known}"));
}

#[test]
fn a_file_that_is_too_big_is_refused() {
    refused(&"#".repeat(1024 * 1024 + 1), "", "the file has 1048577 bytes");
    refused(&"--- a\n".repeat(10_001), "", "more than 10000 objects");
}

#[test]
fn so_many_errors_that_nobody_reads_them_are_cut_off() {
    let errors = parse("a.yaml", &format!("[{}]", "*a, ".repeat(5_000))).unwrap_err();
    assert_eq!(errors.len(), 1_001);
    assert_eq!(errors[1_000].problem, "the file has 1000 errors or more");
}

#[test]
fn long_values_are_shortened_in_messages_and_control_characters_escaped() {
    let long = "x".repeat(5_000);
    let escape = "\"\\e[31m\"";
    for text in [format!("kind: {long}"), format!("kind: {escape}"), format!("{escape}: {long}")] {
        for error in parse("a.yaml", &text).unwrap_err() {
            let line = error.to_string();
            assert!(line.len() < 500 && !line.contains('\u{1b}'), "{line}");
        }
    }
}

fn refused(text: &str, path: &str, problem: &str) {
    let errors = parse("a.yaml", text).expect_err(text);
    let named = |error: &&ManifestError| error.path == path && error.problem.contains(problem);
    let Some(error) = errors.iter().find(named) else {
        panic!("no {path:?}: {problem:?} for\n{text}\nbut {errors:#?}")
    };
    assert_eq!(error.source, "a.yaml");
    assert!(error.line > 0 && error.column > 0 && !error.mend.is_empty(), "{error:?}");
}
