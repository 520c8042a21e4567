//! What people and their tools ask of the running programs: denials as they come, answers in JSON,
//! completions, probes and scrapes; and what `agent cleanup` leaves of the capture rules.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    net::SocketAddr,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_core::time::Timestamp;
use hauberk_proto::token::JoinToken;
use hauberk_tests::mesh::{Mesh, PATIENCE, is};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::policy::expect_refused;

crate::trials!(
    denied_follows_what_comes_until_it_is_interrupted,
    answers_in_json_have_their_fields,
    completions_name_every_subcommand,
    a_reader_that_has_read_enough_ends_a_command_without_a_word,
    a_name_that_nobody_has_is_answered_with_the_nearest,
    a_probe_says_by_its_exit_what_is_wrong,
    cleanup_leaves_no_rule_and_no_route_of_a_host,
    probes_and_scrapers_are_answered,
);

/// Longer than anything that a test waits for takes: only against hanging.
const BOUND: Duration = Duration::from_secs(60);

/// A program that runs beside a test, all that it writes in one file. Ends with its handle.
pub(crate) struct Beside {
    child: Child,
    log: PathBuf,
}

impl Beside {
    pub(crate) fn start(command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let file = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// What it has written so far.
    pub(crate) fn text(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.log)?).into_owned())
    }

    /// Waits until `wanted` holds for what it has written, and gives that.
    pub(crate) fn says(
        &mut self,
        what: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        let deadline = Instant::now() + BOUND;
        loop {
            // Before the look: of one that has ended, all is there.
            let ended = self.child.try_wait()?;
            let text = self.text()?;
            if wanted(&text) {
                return Ok(text);
            }
            if let Some(status) = ended {
                bail!("{what} did not come, it ended with {status}:\n{text}");
            }
            ensure!(Instant::now() < deadline, "{what} did not come in {BOUND:?}:\n{text}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Waits for its end, but not for ever.
    pub(crate) fn end(&mut self) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + BOUND;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("it did not end in {BOUND:?}:\n{}", self.text()?);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A folder of a test's own, gone after it.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn create(name: &str) -> anyhow::Result<Self> {
        let name = format!("hauberk-e2e-{}-{name}", std::process::id());
        let path = std::env::temp_dir().canonicalize()?.join(name);
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn denied_follows_what_comes_until_it_is_interrupted() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
    // Whoever starts the tests in the background may have them ignore SIGINT, and their children too.
    let mut command = Command::new("env");
    let hauberk = mesh.hauberk()?;
    command
        .arg("--default-signal=INT")
        .arg(hauberk.get_program())
        .args(hauberk.get_args())
        .args(["denied", "-f", "--socket"])
        .arg(mesh.socket());
    let mut follower = Beside::start(&mut command, &mesh.log("denied"))?;
    let past = "shop/web -> payments/ledger:8080  no_matching_rule";
    follower.says("the past denial", |text| text.contains(past))?;
    // It listens by now: what comes next, comes while it runs.
    expect_refused(mesh.connect("checkout", mesh.ledger(9999)))?;
    let new = "shop/checkout -> payments/ledger:9999  no_matching_rule";
    // Its last line is the mend.
    let text = follower.says("the new denial", |text| {
        text.split_once(new)
            .is_some_and(|(_, rest)| rest.contains("mend: ") && rest.ends_with('\n'))
    })?;
    ensure!(text.matches(past).count() == 1 && text.matches(new).count() == 1, "{text}");
    ensure!(text.matches("owner: payments (#payments-oncall)").count() == 2, "{text}");
    follower.signal(Signal::SIGINT)?;
    let status = follower.end()?;
    // Ended by the signal is what a shell calls 130.
    let interrupted = status.signal() == Some(Signal::SIGINT as i32);
    ensure!(interrupted || matches!(status.code(), Some(0 | 130)), "it ended with {status}");
    ensure!(follower.text()? == text, "it complains of the signal:\n{}", follower.text()?);
    Ok(())
}

/// What a command wrote, as one JSON value a line.
fn json_lines(output: &Output) -> anyhow::Result<Vec<Value>> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("{line:?} is not JSON")))
        .collect()
}

fn text<'a>(value: &'a Value, field: &str) -> anyhow::Result<&'a str> {
    value[field].as_str().with_context(|| format!("no text {field} in {value}"))
}

const MACHINE_C: &str = "apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: machine-c}
spec: {addresses: ['10.77.0.4']}
";

fn answers_in_json_have_their_fields() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let fine = mesh.ask(&["check", "-o", "json"])?;
    ensure!(fine.status.success() && json_lines(&fine)? == [Value::Array(Vec::new())], "{fine:?}");

    let made =
        mesh.ask(&["token", "create", "--node", "machine-a", "--ttl", "1h", "-o", "json"])?;
    ensure!(made.status.success(), "{made:?}");
    let answers = json_lines(&made)?;
    ensure!(answers.len() == 1, "{answers:?}");
    let token: JoinToken = text(&answers[0], "token")?.parse()?;
    ensure!(token.control_plane == "10.77.0.1:8443", "{token:?}");
    let root = fs::read(mesh.folder().join("control-plane/ca/root.crt.der"))?;
    ensure!(token.root_sha256 == hauberk_tls::sha256(&root), "{token:?}");
    let expires: Timestamp = text(&answers[0], "expires_at")?.parse()?;
    let left = expires.since(hauberk_tls::now());
    ensure!((3_500..=3_600).contains(&left.as_secs()), "the token is good for {left:?}");

    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
    expect_refused(mesh.connect("checkout", mesh.ledger(9999)))?;
    let mut denials = Vec::new();
    mesh.wait("the denials", PATIENCE, |mesh| {
        denials = json_lines(&mesh.ask(&["denied", "-o", "json"])?)?;
        ensure!(denials.len() == 2, "{denials:?}");
        Ok(())
    })?;
    for (denial, (workload, port)) in denials.iter().zip([("web", 8080), ("checkout", 9999)]) {
        ensure!(is(denial, "type", "hauberk.connection"), "{denial}");
        ensure!(is(denial, "decision", "deny") && is(denial, "side", "source"), "{denial}");
        ensure!(is(denial, "reason", "no_matching_rule"), "{denial}");
        ensure!(
            is(denial, "policy", "payments/ledger") && is(denial, "rule", "checkout"),
            "{denial}"
        );
        ensure!(is(denial, "owner", "payments (#payments-oncall)"), "{denial}");
        ensure!(is(denial, "original_dst", &mesh.ledger(port).to_string()), "{denial}");
        ensure!(is(&denial["src"], "workload", workload), "{denial}");
        ensure!(is(&denial["dst"], "workload", "ledger"), "{denial}");
        ensure!(denial["policy_revision"].is_u64() && denial["duration_ms"].is_u64(), "{denial}");
        for field in ["conn_id", "nearest_miss", "mend"] {
            ensure!(!text(denial, field)?.is_empty(), "{denial}");
        }
        let opened: Timestamp = text(denial, "time")?.parse()?;
        ensure!(hauberk_tls::now().since(opened) < BOUND, "{denial}");
    }
    let last = json_lines(&mesh.ask(&["denied", "-n", "1", "-o", "json"])?)?;
    ensure!(last == denials[1..], "{last:?} {denials:?}");

    mesh.write_manifest("machine-c.yaml", MACHINE_C)?;
    mesh.wait("the finding", PATIENCE, |mesh| {
        let found = mesh.ask(&["check", "-o", "json"])?;
        let answers = json_lines(&found)?;
        ensure!(found.status.code() == Some(1) && answers.len() == 1, "{found:?}");
        let findings = answers[0].as_array().context("not a list")?;
        ensure!(findings.len() == 1, "{findings:?}");
        ensure!(is(&findings[0], "problem", "node machine-c has not joined"), "{findings:?}");
        ensure!(text(&findings[0], "hint")?.contains("hauberk token create"), "{findings:?}");
        Ok(())
    })
}

fn a_probe_says_by_its_exit_what_is_wrong() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let roots = folder.path().join("roots.pem");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let probe = || -> anyhow::Result<(Option<i32>, String)> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(crate::AS_HAUBERK).args([
            "probe",
            "--timeout",
            "1s",
            "--control-plane",
            &nobody,
        ]);
        let output = command.arg("--trust-bundle").arg(&roots).output()?;
        Ok((output.status.code(), String::from_utf8(output.stderr)?))
    };
    let (code, text) = probe()?;
    ensure!(code == Some(2) && text.contains("roots.pem"), "{code:?}: {text}");
    fs::write(&roots, "no certificate")?;
    let (code, text) = probe()?;
    ensure!(code == Some(1) && text.contains("has no certificate"), "{code:?}: {text}");
    fs::write(&roots, rcgen::generate_simple_self_signed(["x".to_owned()])?.cert.pem())?;
    let (code, text) = probe()?;
    ensure!(code == Some(1) && text.contains(&nobody), "{code:?}: {text}");
    Ok(())
}

/// What a command writes to standard error, and how it ends, whose reader has gone.
fn unread(command: &mut Command) -> anyhow::Result<(String, Option<i32>)> {
    let (reader, writer) = nix::unistd::pipe()?;
    drop(reader);
    let output = command.stdout(writer).stderr(Stdio::piped()).output()?;
    Ok((String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code()))
}

fn a_reader_that_has_read_enough_ends_a_command_without_a_word() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
    mesh.wait("the denial", PATIENCE, |mesh| {
        ensure!(!mesh.ask(&["denied"])?.stdout.is_empty(), "nothing was denied");
        Ok(())
    })?;
    let why = ["why", "shop/checkout", "payments/ledger:8080"];
    let asking: [&[&str]; 5] = [&["status"], &["denied"], &["check"], &["learn"], &why];
    for arguments in asking {
        for more in [&[][..], &["-o", "json"]] {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg(crate::AS_HAUBERK).args(arguments).args(more);
            let ended = unread(command.arg("--socket").arg(mesh.socket()))?;
            // As shells show a program that a closed pipe has ended.
            ensure!(ended == (String::new(), Some(141)), "{arguments:?} {more:?}: {ended:?}");
        }
    }
    let mut command = Command::new(std::env::current_exe()?);
    let ended = unread(command.args([crate::AS_HAUBERK, "completions", "bash"]))?;
    ensure!(ended == (String::new(), Some(141)), "completions: {ended:?}");
    Ok(())
}

fn a_name_that_nobody_has_is_answered_with_the_nearest() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    for (source, destination, field, name) in [
        ("shop/chekout", "payments/ledger:8080", "source", "shop/chekout"),
        ("shop/checkout", "payment/ledger:8080", "destination", "payment/ledger"),
    ] {
        let output = mesh.ask(&["why", source, destination])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let right =
            ["shop/checkout", "payments/ledger"].map(|right| format!("nearest are {right}"));
        ensure!(output.status.code() == Some(2), "{output:?}");
        ensure!(said.contains(&format!("{field}: no workload \"{name}\"")), "{said}");
        ensure!(right.iter().any(|right| said.contains(right)), "{said}");
        ensure!(said.lines().count() == 1 && said.len() < 400, "not short: {said}");
    }
    Ok(())
}

fn completions_name_every_subcommand() -> anyhow::Result<()> {
    let hauberk = |arguments: &[&str]| -> anyhow::Result<String> {
        let mut command = Command::new(std::env::current_exe()?);
        let output = command.arg(crate::AS_HAUBERK).args(arguments).output()?;
        ensure!(output.status.success(), "{arguments:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let help = hauberk(&["-h"])?;
    let subcommands: BTreeSet<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        // A text goes on in lines that are further in.
        .filter(|line| !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    for known in
        ["demo", "up", "control-plane", "agent", "join", "token", "status", "why", "denied"]
    {
        ensure!(subcommands.contains(known), "{known} is not in\n{help}");
    }
    let folder = Folder::create("completions")?;
    for shell in ["bash", "zsh", "fish"] {
        let script = hauberk(&["completions", shell])?;
        let words: BTreeSet<&str> =
            script.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').collect();
        let missing: Vec<&&str> = subcommands.difference(&words).collect();
        ensure!(missing.is_empty(), "{shell} does not complete {missing:?}");
        fs::write(folder.path().join(shell), script)?;
    }
    let read = Command::new("bash").arg("-n").arg(folder.path().join("bash")).output()?;
    ensure!(read.status.success() && read.stderr.is_empty(), "{read:?}");
    Ok(())
}

/// What the kernel's own tools are asked, and how a trace of ours looks in their answer.
const TRACES: [(&str, &str); 5] = [
    ("nft list tables", "inet hauberk"),
    ("ip rule", "lookup 18502"),
    ("ip -6 rule", "lookup 18502"),
    ("ip route show table 18502", "local default"),
    ("ip -6 route show table 18502", "local default"),
];

/// Where we are still to be seen in a namespace.
fn traces(mesh: &Mesh, namespace: &str) -> anyhow::Result<Vec<&'static str>> {
    let mut found = Vec::new();
    for (question, trace) in TRACES {
        let mut words = question.split(' ');
        let mut command = Command::new(words.next().context("no program")?);
        // A routing table without routes is none, of which `ip` complains.
        let answer = mesh.output(namespace, command.args(words))?;
        if String::from_utf8_lossy(&answer.stdout).contains(trace) {
            found.push(question);
        }
    }
    Ok(found)
}

const ON_HOST: &str = "apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: batch, namespace: jobs}
spec: {machine: machine-a, serviceAccount: batch, process: {user: '4242'}, ports: [7070]}
";

fn cleanup_leaves_no_rule_and_no_route_of_a_host() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    ensure!(traces(&mesh, "machine-a")?.is_empty(), "the host has rules without a workload");
    mesh.write_manifest("host.yaml", ON_HOST)?;
    mesh.wait_revision(before)?;
    mesh.wait_ready().with_context(|| mesh.logs())?;
    for machine in ["machine-a", "machine-b"] {
        mesh.stop(machine);
    }
    let captured = ["machine-a", "web", "checkout", "ledger"];
    for namespace in captured {
        let found = traces(&mesh, namespace)?;
        ensure!(found.len() == TRACES.len(), "{namespace} has only {found:?}");
    }
    let mut command = mesh.hauberk()?;
    command.args(["agent", "--netns-dir"]).arg(mesh.folder().join("netns")).arg("cleanup");
    let told = mesh.run("machine-a", &mut command)?;
    ensure!(told.contains("nothing left in the host's network namespace"), "{told}");
    for namespace in captured {
        let found = traces(&mesh, namespace)?;
        ensure!(found.is_empty(), "{namespace} still has {found:?}");
    }
    // Once more there is nothing to do, which is no error.
    mesh.run("machine-a", &mut command).map(drop)
}

fn probes_and_scrapers_are_answered() -> anyhow::Result<()> {
    const DAY: f64 = 24.0 * 3_600.0;
    let mut mesh = Mesh::start()?;
    let agent = SocketAddr::from(([127, 0, 0, 1], 9465));
    let control_plane = SocketAddr::from(([127, 0, 0, 1], 9464));
    for machine in ["machine-a", "machine-b"] {
        let ready = mesh.get(machine, agent, "/readyz")?;
        let wanted = "captures: ready\nnode_certificate: ready\npolicy: ready\n";
        ensure!(ready == wanted, "{machine}: {ready}");
    }
    let ready = mesh.get("control", control_plane, "/readyz")?;
    ensure!(ready == "certificate_authority: ready\nstore: ready\n", "{ready}");

    let status = mesh.status()?;
    let page = mesh.get("control", control_plane, "/metrics")?;
    let value = |name: &str, parts: &[&str]| -> anyhow::Result<f64> {
        let line = page
            .lines()
            .find(|line| line.starts_with(name) && parts.iter().all(|part| line.contains(part)))
            .with_context(|| format!("no {name} with {parts:?} in\n{page}"))?;
        Ok(line.rsplit(' ').next().context("no value")?.parse()?)
    };
    let issued =
        |kind: &str| value("hauberk_issued_certificates_total", &[kind, "result=\"success\""]);
    ensure!(value("hauberk_state_revision", &[])? == status.revision as f64, "{page}");
    ensure!(value("hauberk_agents_connected", &[])? == 2.0, "{page}");
    ensure!(value("hauberk_manifest_errors", &[])? == 0.0, "{page}");
    ensure!(value("hauberk_join_attempts_total", &["result=\"success\""])? == 2.0, "{page}");
    ensure!(issued("kind=\"node\"")? == 2.0 && issued("kind=\"workload\"")? >= 3.0, "{page}");
    let now = hauberk_tls::now().unix_seconds() as f64;
    let read = value("hauberk_manifest_last_good_timestamp_seconds", &[])?;
    ensure!((now - 300.0..=now).contains(&read), "{page}");
    let cas = [
        ("root", status.root_not_after_unix_ms, 9.0 * 365.0 * DAY, 10.0 * 366.0 * DAY),
        ("intermediate", status.intermediate_not_after_unix_ms, 6.0 * DAY, 7.0 * DAY),
    ];
    for (name, told, least, most) in cas {
        let end = value("hauberk_ca_expiry_timestamp_seconds", &[&format!("ca=\"{name}\"")])?;
        ensure!((end * 1_000.0 - told as f64).abs() <= 1_000.0, "{name}: {end} and {told}");
        ensure!((least..=most).contains(&(end - now)), "{name}: {page}");
    }
    let revision = mesh.metric("machine-a", "hauberk_policy_revision", &[])?;
    ensure!(revision == status.revision as f64, "machine-a enforces {revision}");
    let expiry = "hauberk_certificate_expiry_timestamp_seconds";
    let end = mesh.metric("machine-a", expiry, &["\"checkout\""])?;
    ensure!((0.0..=3_600.0).contains(&(end - now)), "checkout's certificate ends at {end}");

    // Without any policy an agent is alive and not ready.
    mesh.stop("control-plane");
    mesh.stop("machine-a");
    fs::remove_file(mesh.folder().join("machine-a/state.bin"))?;
    mesh.start_agent("machine-a", &[])?;
    mesh.wait("the probe", PATIENCE, |mesh| {
        let alive = mesh.get("machine-a", agent, "/livez")?;
        ensure!(alive.contains("policy: not ready: starting"), "{alive}");
        Ok(())
    })?;
    let error = mesh.get("machine-a", agent, "/readyz").expect_err("ready without a policy");
    ensure!(error.to_string().contains("503"), "got {error}");
    Ok(())
}
