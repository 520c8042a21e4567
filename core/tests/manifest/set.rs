use hauberk_core::manifest::{check_set, parse};

use super::{object, policy};

#[test]
fn clashes_are_told_at_the_later_object_and_name_the_earlier() {
    let machine = |name: &str, spec: &str| object("Machine", &format!("{{name: {name}}}"), spec);
    let workload = |name: &str, spec: &str| {
        let spec = format!("{{machine: m, serviceAccount: a, {spec}}}");
        object("Workload", &format!("{{name: {name}, namespace: n}}"), &spec)
    };
    let m = machine("m", "{}");
    let user =
        |name, user, ports| workload(name, &format!("process: {{user: {user}}}, ports: {ports}"));
    let space = |name, space, address| {
        workload(
            name,
            &format!("process: {{networkNamespace: {space}}}, addresses: [{address}], ports: [1]"),
        )
    };
    let empty_policy = || policy("{owner: {team: a, contact: b}, target: {machine: c}, rules: []}");
    let cases = [
        (
            "the same name",
            vec![empty_policy(), empty_policy()],
            "metadata.name: AccessPolicy payments/ledger stands twice, first at 0.yaml:1",
        ),
        ("no machine", vec![user("a", "a", "[]")], "spec.machine: there is no Machine m"),
        (
            "the same process",
            vec![m.clone(), user("a", "x", "[1]"), user("b", "x", "[2]")],
            "spec.process: user x of machine m is a workload already, at 1.yaml:1",
        ),
        (
            "the same process, once as number",
            vec![m.clone(), user("a", "1000", "[]"), user("b", "'1000'", "[]")],
            "spec.process: user 1000 of machine m is a workload already, at 1.yaml:1",
        ),
        (
            "the process of the machine itself",
            vec![machine("m", "{process: {user: x}, ports: []}"), user("a", "x", "[]")],
            "spec.process: user x of machine m is a workload already, at 0.yaml:1",
        ),
        (
            "the same network namespace",
            vec![m.clone(), space("a", "x", "10.0.0.1"), space("b", "x", "10.0.0.2")],
            "spec.process: network namespace x of machine m is a workload already, at 1.yaml:1",
        ),
        (
            "the same address in two network namespaces",
            vec![m.clone(), space("a", "x", "10.0.0.1"), space("b", "y", "10.0.0.1")],
            "spec.addresses: 10.0.0.1 is an address of network namespace x of machine m already, \
             at 1.yaml:1",
        ),
        (
            "the same address in a network namespace and a machine",
            vec![m.clone(), space("a", "x", "10.0.0.1"), machine("o", "{addresses: [10.0.0.1]}")],
            "spec.addresses: 10.0.0.1 is an address of network namespace x of machine m already, \
             at 1.yaml:1",
        ),
        (
            "the same address in two machines",
            vec![machine("o", "{addresses: [10.0.0.1]}"), machine("m", "{addresses: [10.0.0.1]}")],
            "spec.addresses: 10.0.0.1 is an address of machine o already, at 0.yaml:1",
        ),
        (
            "the same port",
            vec![m.clone(), user("a", "x", "[1, 2]"), user("b", "y", "[2, 3]")],
            "spec.ports: port 2 of machine m is served already, at 1.yaml:1",
        ),
    ];
    for (name, texts, expected) in cases {
        let later = texts.len() - 1;
        let errors = check(&texts).expect_err(name);
        let [error] = errors.as_slice() else { panic!("{name}: {errors:#?}") };
        let expected = format!("{later}.yaml:1:1: {expected}; mend: ");
        assert!(error.starts_with(&expected), "{name}: {error}");
    }
}

#[test]
fn what_does_not_clash_is_accepted() {
    let machine = |name: &str, spec: &str| object("Machine", &format!("{{name: {name}}}"), spec);
    let workload = |name: &str, machine: &str, process: &str| {
        let spec = format!("{{machine: {machine}, serviceAccount: a, {process}}}");
        object("Workload", &format!("{{name: {name}, namespace: n}}"), &spec)
    };
    let user = "process: {user: a}, ports: [1]";
    let space = |name, address| {
        format!("process: {{networkNamespace: {name}}}, addresses: [{address}], ports: [1]")
    };
    let texts = [
        // A workload may stand before its machine.
        workload("a", "m", user),
        machine("m", "{}"),
        machine("o", "{}"),
        // The same user, port and network namespace on another machine.
        workload("b", "o", user),
        workload("c", "m", &space("x", "10.0.0.1")),
        workload("d", "o", &space("x", "10.0.0.2")),
        // A machine and a workload of the same name.
        workload("m", "m", "process: {cgroup: a}, ports: []"),
    ];
    check(&texts).unwrap();
}

/// Each text is a file, named by its number.
fn check(texts: &[String]) -> Result<(), Vec<String>> {
    let parse = |(number, text): (usize, &String)| {
        parse(&format!("{number}.yaml"), text).unwrap_or_else(|errors| panic!("{errors:?}"))
    };
    let objects: Vec<_> = texts.iter().enumerate().flat_map(parse).collect();
    check_set(&objects).map_err(|errors| errors.iter().map(ToString::to_string).collect())
}
