//! What owners may do, and how they ask.

use std::{env, fs, os::unix::fs::symlink, path::Path};

use anyhow::{Context, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    Test,
    install::PATIENCE,
    policy::{POLICY, get},
    trouble::LEDGER,
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("kubernetes_own_roles_cover_policies", kubernetes_own_roles_cover_policies),
    ("kubectl_asks_the_mesh", kubectl_asks_the_mesh),
];

/// Who has one of Kubernetes' own roles in `payments`.
fn bindings() -> String {
    let binding = |(user, role): (&str, &str)| {
        format!(
            "---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: test-{role}, namespace: payments}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {role}}}
subjects: [{{apiGroup: rbac.authorization.k8s.io, kind: User, name: {user}}}]
"
        )
    };
    [("vera", "view"), ("edda", "edit"), ("ada", "admin")].map(binding).concat()
}

fn kubernetes_own_roles_cover_policies(cluster: &Cluster) -> anyhow::Result<()> {
    // Who, what, in which namespace, and whether they may.
    const WANTED: [(&str, &str, &str, bool); 12] = [
        ("vera", "list accesspolicies", "payments", true),
        ("vera", "create accesspolicies", "payments", false),
        ("edda", "get workloads.hauberk.dev", "payments", true),
        ("edda", "patch accesspolicies", "payments", true),
        ("edda", "patch accesspolicies", "shop", false),
        ("edda", "patch accesspolicies --subresource=status", "payments", false),
        ("ada", "create accesspolicies", "payments", true),
        ("ada", "delete accesspolicies", "payments", true),
        ("ada", "create workloads.hauberk.dev", "payments", false),
        ("ada", "create guardrails", "payments", false),
        ("ada", "create machines", "payments", false),
        ("ada", "create accesspolicies", "shop", false),
    ];
    cluster.apply(&bindings())?;
    // The controller that adds roles up takes a moment.
    let judged = cluster.wait_until("the roles", PATIENCE, |cluster| {
        for (user, what, namespace, may) in WANTED {
            let words: Vec<_> = what.split(' ').collect();
            let mut command = cluster.control_command("kubectl");
            command.args(["auth", "can-i", "--as", user, "--namespace", namespace]).args(words);
            let output = cluster.in_control(&mut command)?;
            let answer = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            ensure!(
                answer == if may { "yes" } else { "no" },
                "may {user} {what} in {namespace}? {answer} {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    });
    cluster.delete(&bindings())?;
    judged
}

/// The way that the documentation shows: a link to the program, and `kubectl` finds it.
fn kubectl_asks_the_mesh(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    let folder = cluster.folder().join("plugins");
    fs::create_dir_all(&folder)?;
    let link = folder.join("kubectl-hauberk");
    if !link.exists() {
        symlink(env::current_exe()?, &link)?;
    }
    let kubectl = cluster.programs().path("kubectl");
    let own = kubectl.parent().map(Path::to_owned).context("no folder of programs")?;
    let before = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([folder, own].into_iter().chain(env::split_paths(&before)))?;
    let ask = |arguments: &[&str]| -> anyhow::Result<(Option<i32>, String)> {
        let mut command = cluster.control_command("kubectl");
        command.env("PATH", &path).arg("hauberk").args(arguments);
        let output = cluster.in_control(&mut command)?;
        let told = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8(told)?))
    };
    let (code, told) = ask(&["status"])?;
    ensure!(
        code == Some(0) && told.contains("node-a") && told.contains("checkout"),
        "{code:?}: {told}"
    );
    let (code, told) = ask(&["why", "shop/checkout", "payments/ledger:8080"])?;
    ensure!(code == Some(0) && told.contains("allow"), "{code:?}: {told}");
    // The exit says it as well.
    let (code, told) = ask(&["why", "shop/web", "payments/ledger:8080"])?;
    ensure!(code == Some(1) && told.contains("deny"), "{code:?}: {told}");
    // Whoever asks about the service's port learns which one is meant, and whose was refused sees both.
    let (code, told) = ask(&["why", "shop/checkout", "payments/ledger:80"])?;
    let note = "port 80 is that of the service payments/ledger; connections to it go to port 8080 of the pods";
    ensure!(code == Some(1) && told.contains(note), "{code:?}: {told}");
    cluster.wait_until("the denial", PATIENCE, |cluster| {
        // Again each time: what an agent refuses while it has no control plane, only its own records tell.
        ensure!(get(cluster, "web", LEDGER).is_err(), "nobody allowed it");
        let (code, told) = ask(&["denied"])?;
        let line = told.lines().find(|line| line.contains("shop/web -> payments/ledger:80 "));
        let line = line.with_context(|| format!("{code:?}: {told}"))?;
        ensure!(line.contains(":80 (the pod's 8080)"), "{line}");
        Ok(())
    })?;
    let (code, told) = ask(&["why", "--help"])?;
    ensure!(code == Some(0) && told.contains("Usage: kubectl hauberk why"), "{code:?}: {told}");
    Ok(())
}
