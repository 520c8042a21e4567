//! A mesh to test: `shop/web` and `shop/checkout` on machine-a, `payments/ledger` on machine-b, and
//! `outside`, a machine that is not in the mesh. `checkout` may reach `ledger` on [`PORTS`].

use std::{
    ffi::OsString,
    fs,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    ops::{Deref, DerefMut},
    path::PathBuf,
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, bail};
use hauberk_cli::lab::{Lab, ipv4, ipv6};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use serde_json::Value;

/// The ports that `checkout` may reach.
pub const PORTS: &str = "80, 2525, 5432, 6379, 8080";

/// The number of `web` in the lab's networks.
pub const WEB: u8 = 11;
/// The number of `checkout`.
pub const CHECKOUT: u8 = 12;
/// The number of `ledger`.
pub const LEDGER: u8 = 21;
/// The number of the machine outside.
pub const OUTSIDE: u8 = 99;

/// How long anything may take to show.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// The mesh. Everything of [`Lab`] works on it.
pub struct Mesh {
    lab: Lab,
}

impl Deref for Mesh {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl DerefMut for Mesh {
    fn deref_mut(&mut self) -> &mut Lab {
        &mut self.lab
    }
}

/// The policy that lets `checkout` in, with any further rules.
#[must_use]
pub fn ledger_policy(more_rules: &str) -> String {
    format!(
        "apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: ledger, namespace: payments}}
spec:
  owner: {{team: payments, contact: '#payments-oncall'}}
  target: {{selector: {{matchLabels: {{app: ledger}}}}}}
  rules:
  - name: checkout
    ports: [{PORTS}]
    from: [{{serviceAccount: {{namespace: shop, name: checkout}}}}]
{more_rules}"
    )
}

/// A workload in a network namespace of its own.
#[must_use]
pub fn workload(namespace: &str, name: &str, machine: &str, number: u8, ports: &str) -> String {
    format!(
        "---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  machine: {machine}
  serviceAccount: {name}
  process: {{networkNamespace: {name}}}
  addresses: ['{}', '{}']
  ports: [{ports}]
",
        ipv4(number),
        ipv6(number)
    )
}

fn machine(name: &str, number: u8) -> String {
    format!(
        "---
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {{name: {name}}}
spec: {{addresses: ['{}', '{}']}}
",
        ipv4(number),
        ipv6(number)
    )
}

impl Mesh {
    /// Starts everything and waits until it is ready.
    ///
    /// # Errors
    /// If it does not become ready; with the logs.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(&[])
    }

    /// The same, with more arguments for the control plane.
    ///
    /// # Errors
    /// If it does not become ready; with the logs.
    pub fn start_with(control_plane: &[&str]) -> anyhow::Result<Self> {
        Self::start_with_agents(control_plane, &[])
    }

    /// The same, with more arguments for the agents, too.
    ///
    /// # Errors
    /// If it does not become ready; with the logs.
    pub fn start_with_agents(control_plane: &[&str], agents: &[&str]) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let mut lab = Lab::new(vec![OsString::from(program), OsString::from("--as-hauberk")])?;
        for (name, number) in [
            ("machine-a", 2),
            ("machine-b", 3),
            ("web", WEB),
            ("checkout", CHECKOUT),
            ("ledger", LEDGER),
            ("outside", OUTSIDE),
        ] {
            lab.add(name, number)?;
        }
        let machines = machine("machine-a", 2) + &machine("machine-b", 3);
        lab.write_manifest("machines.yaml", &machines)?;
        let workloads = workload("shop", "web", "machine-a", WEB, "")
            + &workload("shop", "checkout", "machine-a", CHECKOUT, "8080")
            + &workload("payments", "ledger", "machine-b", LEDGER, PORTS);
        lab.write_manifest("workloads.yaml", &workloads)?;
        lab.write_manifest("ledger.yaml", &ledger_policy(""))?;
        let mut mesh = Self { lab };
        mesh.start_control_plane(control_plane)?;
        for machine in ["machine-a", "machine-b"] {
            mesh.start_agent(machine, agents)?;
        }
        mesh.wait_ready().with_context(|| mesh.logs())?;
        Ok(mesh)
    }

    /// Tries again until it works.
    ///
    /// # Errors
    /// With the last error when the time is over.
    pub fn wait(
        &self,
        what: &str,
        patience: Duration,
        mut ready: impl FnMut(&Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.lab.wait(what, patience, |_| ready(self))
    }

    /// Everything that the programs wrote, for the message of a failure.
    #[must_use]
    pub fn logs(&self) -> String {
        ["control-plane", "machine-a", "machine-b"]
            .map(|name| {
                let text = fs::read_to_string(self.log(name)).unwrap_or_default();
                format!("--- {name}\n{text}")
            })
            .concat()
    }

    /// The ledger's IPv4 address and a port.
    #[must_use]
    pub fn ledger(&self, port: u16) -> SocketAddr {
        SocketAddr::new(ipv4(LEDGER), port)
    }

    /// A listener in a namespace.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn listen(&self, namespace: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
        Ok(self.namespace(namespace)?.run(|| TcpListener::bind(address))??)
    }

    /// A connection from a namespace. To a captured caller, `connect` says whether it was reached and allowed.
    ///
    /// # Errors
    /// If it cannot connect.
    pub fn connect(&self, namespace: &str, address: SocketAddr) -> anyhow::Result<TcpStream> {
        let stream = self
            .namespace(namespace)?
            .run(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))??;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// A program in a namespace, to its end.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn output(&self, namespace: &str, command: &mut Command) -> anyhow::Result<Output> {
        let output = self.namespace(namespace)?.run(|| command.output())?;
        output.with_context(|| format!("run {command:?}; ./test installs what the tests need"))
    }

    /// The same, for its output; fails if the program does.
    ///
    /// # Errors
    /// If it cannot be started or fails.
    pub fn run(&self, namespace: &str, command: &mut Command) -> anyhow::Result<String> {
        let output = self.output(namespace, command)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!(
                "{command:?} failed: {text}{}\n{}",
                String::from_utf8_lossy(&output.stderr),
                self.logs()
            );
        }
        Ok(text)
    }

    /// `hauberk` with arguments and the lab's socket.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn ask(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        Ok(self.hauberk()?.args(arguments).arg("--socket").arg(self.socket()).output()?)
    }

    /// Waits for a record of an agent for which `wanted` holds.
    ///
    /// # Errors
    /// If none comes; with all records that did.
    pub fn record(&self, machine: &str, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let mut found = None;
        self.wait("a record", PATIENCE, |mesh| {
            let records = mesh.all_records(machine)?;
            found = records.iter().find(|record| wanted(record)).cloned();
            if found.is_none() {
                let lines: Vec<String> = records.iter().map(Value::to_string).collect();
                bail!("records of {machine}:\n{}", lines.join("\n"));
            }
            Ok(())
        })?;
        found.context("no record")
    }

    /// What an agent has told so far, in its order.
    ///
    /// # Errors
    /// If it has told nothing yet.
    pub fn all_records(&self, machine: &str) -> anyhow::Result<Vec<Value>> {
        let text = fs::read_to_string(self.records(machine))?;
        // The last line may be on its way.
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// A metric's value: the sum over all series whose line has all the parts.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn metric(&self, machine: &str, name: &str, parts: &[&str]) -> anyhow::Result<f64> {
        let page = self.get(machine, SocketAddr::from(([127, 0, 0, 1], 9465)), "/metrics")?;
        Ok(page
            .lines()
            .filter(|line| line.starts_with(name) && parts.iter().all(|part| line.contains(part)))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }

    /// What `during` gives, which runs while the program of `name` (an agent's machine or `control-plane`) stands still.
    ///
    /// # Errors
    ///
    /// If there is no such program.
    pub fn while_held_up<T>(
        &self,
        name: &str,
        during: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let process = self.process(name).with_context(|| format!("nothing runs as {name}"))?;
        let process = Pid::from_raw(process.cast_signed());
        signal::kill(process, Signal::SIGSTOP)?;
        let got = during();
        signal::kill(process, Signal::SIGCONT)?;
        got
    }

    /// What the kernel tells of a child of the lab: its folder under `/proc`.
    ///
    /// # Errors
    /// If it does not run.
    pub fn proc_folder(&self, name: &str) -> anyhow::Result<PathBuf> {
        let process = self.process(name).with_context(|| format!("{name} does not run"))?;
        Ok(PathBuf::from(format!("/proc/{process}")))
    }

    /// The memory of a child that is resident now.
    ///
    /// # Errors
    /// If it does not run.
    pub fn resident_bytes(&self, name: &str) -> anyhow::Result<u64> {
        let status = fs::read_to_string(self.proc_folder(name)?.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes: u64 = line
            .and_then(|line| line.trim().strip_suffix(" kB"))
            .with_context(|| format!("{name} has no resident memory:\n{status}"))?
            .trim()
            .parse()?;
        Ok(kibibytes * 1024)
    }

    /// How many files a child has open now.
    ///
    /// # Errors
    /// If it does not run.
    pub fn open_files(&self, name: &str) -> anyhow::Result<usize> {
        Ok(fs::read_dir(self.proc_folder(name)?.join("fd"))?.count())
    }

    /// Cuts the wire to some of the lab's namespaces, by their numbers: nothing gets through any more,
    /// and nobody is told of it.
    ///
    /// # Errors
    /// If the kernel does not do it.
    pub fn cut(&self, numbers: &[u8]) -> anyhow::Result<()> {
        self.set_links(numbers, "down")
    }

    /// Undoes [`Self::cut`].
    ///
    /// # Errors
    /// If the kernel does not do it.
    pub fn mend(&self, numbers: &[u8]) -> anyhow::Result<()> {
        self.set_links(numbers, "up")
    }

    fn set_links(&self, numbers: &[u8], state: &str) -> anyhow::Result<()> {
        for number in numbers {
            let mut command = Command::new("ip");
            command.args(["link", "set", &format!("veth{number}"), state]);
            let done = self.wire().run(|| command.status())??;
            if !done.success() {
                bail!("{command:?} failed");
            }
        }
        Ok(())
    }

    /// Removes a manifest.
    ///
    /// # Errors
    /// If it cannot.
    pub fn remove_manifest(&self, name: &str) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.manifests().join(name))?)
    }

    /// Waits until every agent enforces the newest revision, which must be over `revision`.
    ///
    /// # Errors
    /// If they do not.
    pub fn wait_revision(&self, over: u64) -> anyhow::Result<u64> {
        let mut reached = 0;
        self.wait("the new revision", PATIENCE, |mesh| {
            let status = mesh.status()?;
            let behind = status.nodes.iter().any(|node| node.enforced_revision != status.revision);
            if status.revision <= over || behind {
                bail!("{status:?}");
            }
            reached = status.revision;
            Ok(())
        })?;
        Ok(reached)
    }
}

/// Whether a record's field has a text.
#[must_use]
pub fn is(record: &Value, field: &str, text: &str) -> bool {
    record.get(field).and_then(Value::as_str) == Some(text)
}

/// A namespace's addresses, IPv4 first.
#[must_use]
pub fn addresses(number: u8) -> [IpAddr; 2] {
    [ipv4(number), ipv6(number)]
}
