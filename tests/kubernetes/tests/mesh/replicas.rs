//! Three replicas of the control plane, lost one after the other.

use std::{
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    Test,
    control_plane::{NAMESPACE, kill, pods, rolled_out, scale, while_connecting},
    install::PATIENCE,
    pods::address,
    policy::{POLICY, condition, get, ledger_policy},
    trouble::allowed,
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("the_command_asks_through_the_kubeconfig", the_command_asks_through_the_kubeconfig),
    ("replicas_are_killed_and_nobody_notices", replicas_are_killed_and_nobody_notices),
];

/// The address of a replica that is ready.
pub(crate) fn a_replica(cluster: &Cluster) -> anyhow::Result<String> {
    let service = "--selector=kubernetes.io/service-name=hauberk-control-plane";
    let found = cluster.kubectl_json(&["get", "endpointslices", NAMESPACE, service])?;
    let slices = found["items"].as_array().into_iter().flatten();
    let mut endpoints =
        slices.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
    let ready = endpoints.find(|endpoint| endpoint["conditions"]["ready"] == true);
    let address = ready.and_then(|endpoint| endpoint["addresses"][0].as_str());
    Ok(address.with_context(|| format!("no replica is ready: {found:#}"))?.to_owned())
}

/// Denials that come while somebody watches; of a port that nobody was denied before.
fn what_is_denied_is_followed(cluster: &Cluster) -> anyhow::Result<()> {
    let before = told(cluster, &["denied"])?;
    ensure!(!before.contains("payments/ledger:9000"), "{before}");
    let url = format!("http://{}:9000/", address(cluster, "payments", "ledger")?);
    let (over, program) = (AtomicBool::new(false), std::env::current_exe()?);
    let followed = thread::scope(|scope| {
        scope.spawn(|| {
            // By then it may follow or not: one of the next ones it sees come.
            while !over.load(Ordering::Relaxed) {
                drop(get(cluster, "web", &url));
            }
        });
        let mut command = Command::new("timeout");
        command.args(["--signal=INT", "10"]).arg(program).args([crate::AS_HAUBERK, "denied", "-f"]);
        command.env("KUBECONFIG", cluster.kubeconfig()).env_remove("HAUBERK_SOCKET");
        let output = cluster.in_control(&mut command);
        over.store(true, Ordering::Relaxed);
        output
    })?;
    let (out, err) = (String::from_utf8(followed.stdout)?, String::from_utf8(followed.stderr)?);
    let seen = out.lines().filter(|line| line.contains("shop/web -> payments/ledger:9000")).count();
    ensure!(seen > 1, "{seen} denials were followed:\n{out}{err}");
    Ok(())
}

/// The `hauberk` command, as somebody with a kubeconfig runs it.
pub(crate) fn hauberk(
    cluster: &Cluster,
    arguments: &[&str],
) -> anyhow::Result<std::process::Output> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(crate::AS_HAUBERK).args(arguments).env("KUBECONFIG", cluster.kubeconfig());
    command.env_remove("HAUBERK_SOCKET");
    cluster.in_control(&mut command)
}

pub(crate) fn told(cluster: &Cluster, arguments: &[&str]) -> anyhow::Result<String> {
    let output = hauberk(cluster, arguments)?;
    let (out, err) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success(), "{arguments:?}: {}: {out}{err}", output.status);
    Ok(out)
}

fn the_command_asks_through_the_kubeconfig(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    cluster.wait_until("the policy", PATIENCE, |cluster| {
        get(cluster, "checkout", "http://ledger.payments/")
    })?;
    let status = told(cluster, &["status"])?;
    for word in
        ["test.example", "node-a", "node-b", "connected", "payments/ledger", "shop/checkout"]
    {
        ensure!(status.contains(word), "no {word}:\n{status}");
    }
    let why = told(cluster, &["why", "shop/checkout", "payments/ledger:8080"])?;
    ensure!(why.starts_with("allow: "), "{why}");
    let output = hauberk(cluster, &["why", "shop/web", "payments/ledger:8080"])?;
    let why = String::from_utf8(output.stdout)?;
    ensure!(output.status.code() == Some(1) && why.starts_with("deny: "), "{why}");
    drop(get(cluster, "web", "http://ledger.payments/"));
    cluster.wait_until("the denied connection", PATIENCE, |cluster| {
        let denied = told(cluster, &["denied"])?;
        ensure!(denied.contains("shop/web -> payments/ledger"), "{denied}");
        Ok(())
    })?;
    what_is_denied_is_followed(cluster)?;
    a_check_finds_what_is_wrong(cluster)?;
    // Another namespace has no control plane, and that is said.
    let output = hauberk(cluster, &["status", "--kube-namespace=default"])?;
    let text = String::from_utf8(output.stderr)?;
    ensure!(!output.status.success() && text.contains("--kube-namespace"), "{text}");
    Ok(())
}

/// What `hauberk check` exits with and says.
pub(crate) fn checked(cluster: &Cluster) -> anyhow::Result<(Option<i32>, String)> {
    let output = hauberk(cluster, &["check"])?;
    let (out, err) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    let code = output.status.code();
    ensure!(code.is_some_and(|code| code < 2), "{code:?}: {out}{err}");
    Ok((code, out))
}

/// Nothing where nothing is wrong: agents tell how they stand every few seconds.
fn a_check_finds_nothing(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.wait_until("nothing to be wrong", PATIENCE, |cluster| {
        let (code, text) = checked(cluster)?;
        ensure!(code == Some(0) && text == "nothing is wrong\n", "{code:?}: {text}");
        Ok(())
    })
}

fn a_check_finds_what_is_wrong(cluster: &Cluster) -> anyhow::Result<()> {
    a_check_finds_nothing(cluster)?;
    let misspelt = POLICY
        .replace("name: ledger, namespace", "name: misspelt, namespace")
        .replace("name: checkout}", "name: chekcout}");
    let wanted = "✗ AccessPolicy payments/misspelt: rule checkout allows \
                  spiffe://test.example/ns/shop/sa/chekcout, which no registered workload has\n    \
                  hint: it says what to mend; where a name is not known, it may be misspelt, or its \
                  namespace not labelled\n";
    cluster.apply(&misspelt)?;
    cluster.wait_until("the finding", PATIENCE, |cluster| {
        let (code, text) = checked(cluster)?;
        ensure!(code == Some(1) && text.contains(wanted), "{code:?}: {text}");
        Ok(())
    })?;
    cluster.delete(&misspelt)?;
    a_check_finds_nothing(cluster)
}

fn replicas_are_killed_and_nobody_notices(cluster: &Cluster) -> anyhow::Result<()> {
    allowed(cluster)?;
    scale(cluster, 3)?;
    while_connecting(cluster, 20, || kill_each(cluster))?;
    scale(cluster, 1)
}

/// One replica after the other; after each, a policy is edited and takes effect, and says so.
fn kill_each(cluster: &Cluster) -> anyhow::Result<()> {
    let names = pods(cluster)?;
    ensure!(names.len() == 3, "{names:?}");
    for (round, name) in names.into_iter().enumerate() {
        kill(cluster, &name)?;
        let wider = POLICY.replace("  - name: checkout", &format!("  - name: round-{round}\n    ports: [700{round}]\n    from: [{{serviceAccount: {{namespace: shop, name: web}}}}]\n  - name: checkout"));
        cluster.apply(&wider)?;
        cluster.wait_until("the edited policy", Duration::from_secs(90), |cluster| {
            let policy = ledger_policy(cluster)?;
            let generation = &policy["metadata"]["generation"];
            ensure!(policy["status"]["observedGeneration"] == *generation, "not looked at yet");
            let (status, message) = condition(&policy, "Programmed")?;
            ensure!(status == "True", "{message}");
            Ok(())
        })?;
        let why = told(cluster, &["why", "shop/web", &format!("payments/ledger:700{round}")])?;
        if !why.starts_with("allow: ") {
            bail!("{why}");
        }
        rolled_out(cluster)?;
    }
    cluster.apply(POLICY)?;
    Ok(())
}
