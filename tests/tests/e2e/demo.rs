//! The demonstration as people run it: what it shows, the commands it prints to play with, and that it
//! leaves nothing behind.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Instant,
};

use anyhow::{Context, bail, ensure};
use hauberk_tests::mesh::is;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::command::{Beside, Folder};

crate::trials!(
    the_demo_shows_what_is_allowed_denied_and_protected,
    the_demo_needs_no_root,
    the_demo_tells_programs_in_one_value,
    a_demo_that_is_kept_can_be_played_with,
    a_demo_of_an_ordinary_user_can_be_played_with,
);

/// The name of the command.
const COMMAND: &str = "hauberk";

/// What the ledger answers, and nobody else may see.
const PAYLOAD: &str = "balance-of-account-4711";

/// The user and the group of nobody in particular.
const ORDINARY: u32 = 65_534;

/// Whether this is a copy of the tests' program by the name of the command, which it is then. The
/// demonstration starts its own program anew, with no word for who that is to be.
pub(crate) fn is_the_command() -> bool {
    std::env::current_exe().is_ok_and(|path| path.file_name() == Some(OsStr::new(COMMAND)))
}

/// Who runs the demonstration.
#[derive(Clone, Copy)]
enum Who {
    Us,
    OrdinaryUser,
}

/// A copy of the command, and a temporary folder that nobody but the demonstration uses.
struct Stage {
    folder: Folder,
    who: Who,
}

impl Stage {
    fn set(name: &str, who: Who) -> anyhow::Result<Self> {
        let stage = Self { folder: Folder::create(name)?, who };
        // Not by ourselves: what another test starts meanwhile would hold the file open for writing
        // until it is another program, and nobody can run it as long.
        let mut copy = Command::new("cp");
        copy.arg(std::env::current_exe()?).arg(stage.program());
        ensure!(copy.status()?.success(), "{copy:?} failed");
        for path in [stage.folder.path(), stage.program().as_path()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        }
        fs::create_dir(stage.temporary())?;
        match who {
            Who::Us => {}
            Who::OrdinaryUser => chown(stage.temporary(), Some(ORDINARY), Some(ORDINARY))
                .context("this test needs real root, to run the demo as an ordinary user")?,
        }
        Ok(stage)
    }

    fn program(&self) -> PathBuf {
        self.folder.path().join(COMMAND)
    }

    fn temporary(&self) -> PathBuf {
        self.folder.path().join("tmp")
    }

    /// A program as whoever runs the demonstration.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = match self.who {
            Who::Us => Command::new(program),
            Who::OrdinaryUser => {
                let mut command = Command::new("setpriv");
                command
                    .arg(format!("--reuid={ORDINARY}"))
                    .arg(format!("--regid={ORDINARY}"))
                    .arg("--clear-groups")
                    .arg(program);
                command
            }
        };
        command.current_dir("/").env("HOME", self.temporary()).env("TMPDIR", self.temporary());
        command
    }

    fn start(&self, arguments: &[&str]) -> anyhow::Result<Beside> {
        let mut command = self.command(self.program());
        Beside::start(command.arg("demo").args(arguments), &self.folder.path().join("output"))
    }

    /// A printed command, as from another terminal.
    fn follow(&self, line: &str) -> anyhow::Result<Output> {
        let mut command = self.command("timeout");
        command.args(["20", "sh", "-c", line]);
        command.output().with_context(|| format!("run {line:?}"))
    }

    /// A namespace lives as long as a process has it, by being in it or by an open file, or a mount.
    fn nothing_is_left(&self) -> anyhow::Result<()> {
        let running = processes(&self.program())?;
        ensure!(running.is_empty(), "processes {running:?} go on");
        let mut left = Vec::new();
        for entry in fs::read_dir(self.temporary())? {
            left.push(entry?.file_name());
        }
        ensure!(left.is_empty(), "{left:?} is left");
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let folder = self.folder.path().display().to_string();
        ensure!(!mounts.contains(&folder), "a mount is left:\n{mounts}");
        Ok(())
    }
}

/// The numbers of the processes of a program.
fn processes(program: &Path) -> anyhow::Result<Vec<String>> {
    let program = program.as_os_str().as_encoded_bytes();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        // What cannot be read is no process, or one that has just ended.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        if line.split(|byte| *byte == 0).next() == Some(program) {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// The records among all that the demonstration prints, each indented as a whole.
fn records(text: &str) -> anyhow::Result<Vec<Value>> {
    let mut records = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines() {
        if line == "    {" {
            open = Some(String::new());
        }
        if let Some(record) = &mut open {
            record.push_str(line);
        }
        if line == "    }"
            && let Some(record) = open.take()
        {
            records.push(serde_json::from_str(&record).context("a record is not JSON")?);
        }
    }
    Ok(records)
}

fn shows_all(text: &str) -> anyhow::Result<()> {
    let records = records(text)?;
    let [allowed, denied] = records.as_slice() else {
        bail!("{} records in\n{text}", records.len());
    };
    ensure!(is(allowed, "decision", "allow") && is(allowed, "rule", "checkout"), "{allowed}");
    ensure!(is(allowed, "policy", "payments/ledger"), "{allowed}");
    let checkout = "spiffe://example.org/ns/shop/sa/checkout";
    ensure!(is(&allowed["src"], "spiffe_id", checkout), "{allowed}");
    ensure!(is(&allowed["tls"], "version", "TLSv1.3"), "{allowed}");
    ensure!(is(denied, "decision", "deny") && is(denied, "reason", "no_matching_rule"), "{denied}");
    ensure!(is(denied, "rule", "checkout") && is(&denied["src"], "workload", "web"), "{denied}");
    ensure!(is(denied, "owner", "payments (#payments-oncall)"), "{denied}");
    ensure!(denied["mend"].as_str().is_some_and(|mend| mend.contains("name: web")), "{denied}");
    let lines: [&[&str]; 6] = [
        &["-> balance-of-account-4711", "the ledger sees you as 10.77.0.12"],
        &["machine-b", "hauberk_connections_total{", "decision=\"allow\"", "\"checkout\""],
        &["machine-a", "hauberk_connections_denied_total{", "no_matching_rule", "\"web\""],
        &["TLS handshakes between agents"],
        &["offers X25519MLKEM768: yes", "takes TLS 1.3: yes, X25519MLKEM768: yes"],
        &["the payload \"balance-of-account-4711", "in clear: no"],
    ];
    for parts in lines {
        let shown = text.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        ensure!(shown, "no line has {parts:?}:\n{text}");
    }
    Ok(())
}

fn the_demo_tells_programs_in_one_value() -> anyhow::Result<()> {
    let stage = Stage::set("demo-json", Who::Us)?;
    let mut demo = stage.start(&["-o", "json"])?;
    let status = demo.end()?;
    let text = demo.text()?;
    ensure!(status.success(), "it ended with {status}:\n{text}");
    let told: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let (allowed, denied) = (&told["allowed"], &told["denied"]);
    let answer = allowed["answer"].as_str().unwrap_or_default();
    ensure!(answer.contains(PAYLOAD), "{allowed}");
    ensure!(is(&allowed["record"], "decision", "allow"), "{allowed}");
    ensure!(is(&denied["record"], "reason", "no_matching_rule"), "{denied}");
    let metrics = told["metrics"].as_array().context("no metrics")?;
    ensure!(metrics.iter().any(|metric| is(metric, "machine", "machine-a")), "{text}");
    let wire = &told["wire"];
    ensure!(wire["payload_in_clear"] == false && wire["takes_tls_13"] == true, "{wire}");
    stage.nothing_is_left()
}

fn demonstrates(name: &str, who: Who) -> anyhow::Result<()> {
    let stage = Stage::set(name, who)?;
    let started = Instant::now();
    let mut demo = stage.start(&[])?;
    let status = demo.end()?;
    println!("the demo took {:?}", started.elapsed());
    let text = demo.text()?;
    ensure!(status.success(), "it ended with {status}:\n{text}");
    shows_all(&text)?;
    stage.nothing_is_left()
}

fn the_demo_shows_what_is_allowed_denied_and_protected() -> anyhow::Result<()> {
    demonstrates("demo", Who::Us)
}

fn the_demo_needs_no_root() -> anyhow::Result<()> {
    demonstrates("demo-user", Who::OrdinaryUser)
}

/// What stands after a word of the printed text.
fn printed<'a>(text: &'a str, word: &str) -> anyhow::Result<&'a str> {
    text.lines()
        .find_map(|line| line.trim_start().strip_prefix(word))
        .map(str::trim)
        .with_context(|| format!("no {word:?} in\n{text}"))
}

fn can_be_played_with(name: &str, who: Who) -> anyhow::Result<()> {
    let stage = Stage::set(name, who)?;
    let mut demo = stage.start(&["--keep"])?;
    // Its last line.
    let text = demo.says("what to play with", |text| text.ends_with("denied -f\n"))?;
    shows_all(&text)?;
    // Itself, the control plane and two agents.
    let running = processes(&stage.program())?;
    ensure!(running.len() == 4, "{running:?} run");
    let allowed = stage.follow(printed(&text, "allowed:")?)?;
    let answer = String::from_utf8_lossy(&allowed.stdout).into_owned();
    ensure!(allowed.status.success() && answer.contains(PAYLOAD), "{allowed:?}");
    ensure!(answer.contains("the ledger sees you as 10.77.0.12"), "{answer}");
    let denied = stage.follow(printed(&text, "denied:")?)?;
    // What curl says of a reset, as fast or as slow as it comes; not that there is nothing to run.
    ensure!(matches!(denied.status.code(), Some(7 | 52 | 55 | 56)), "{denied:?}");
    ensure!(!String::from_utf8_lossy(&denied.stdout).contains(PAYLOAD), "{denied:?}");
    let export = printed(&text, "ask:")?;
    let program = stage.program().display().to_string();
    let asked = stage.follow(&format!("{export}; {program} {}", printed(&text, &program)?))?;
    let answer = String::from_utf8_lossy(&asked.stdout).into_owned();
    ensure!(asked.status.success() && answer.contains("payments/ledger"), "{asked:?}");
    demo.signal(Signal::SIGINT)?;
    let status = demo.end()?;
    ensure!(status.success(), "it ended with {status}:\n{}", demo.text()?);
    stage.nothing_is_left()
}

fn a_demo_that_is_kept_can_be_played_with() -> anyhow::Result<()> {
    can_be_played_with("kept", Who::Us)
}

fn a_demo_of_an_ordinary_user_can_be_played_with() -> anyhow::Result<()> {
    can_be_played_with("kept-user", Who::OrdinaryUser)
}
