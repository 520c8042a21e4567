//! What real programs feel: three of them, unmodified, straight and through the mesh. Servers and clients run on CPU 0, as
//! every load does.

use std::{
    fs,
    net::IpAddr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};
use hauberk_cli::lab::{Lab, Running};

/// A program, and what is measured with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum App {
    /// One connection with small exchanges: `pgbench -S` on PostgreSQL.
    Pgbench,
    /// Sixty-four clients: `redis-benchmark` on Redis.
    Redis,
    /// Bulk: `iperf3` with four streams.
    Iperf,
}

/// Redis answers no fewer requests a second than this, so that a measurement ends.
const REQUESTS_A_SECOND: f64 = 15_000.0;

/// How long a server may take to answer its first client.
const START_PATIENCE: Duration = Duration::from_secs(20);

impl App {
    pub(crate) const ALL: [Self; 3] = [Self::Pgbench, Self::Redis, Self::Iperf];

    /// Where its server listens.
    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Pgbench => 5432,
            Self::Redis => 6379,
            Self::Iperf => 5201,
        }
    }

    /// The name of its figure, and the unit.
    pub(crate) fn figure(self) -> (&'static str, &'static str) {
        match self {
            Self::Pgbench => ("pgbench -S, 1 client", "transactions/s"),
            Self::Redis => ("redis-benchmark GET, 64 clients", "requests/s"),
            Self::Iperf => ("iperf3, 4 streams up", "Gbit/s"),
        }
    }

    /// One measurement, from a client's namespace.
    pub(crate) fn measure(
        self,
        lab: &Lab,
        client: &str,
        server: IpAddr,
        seconds: f64,
    ) -> anyhow::Result<f64> {
        let host = server.to_string();
        let whole = seconds.max(1.0).round().to_string();
        match self {
            Self::Pgbench => {
                let mut command = pinned(postgres_binaries()?.join("pgbench"));
                command
                    .args(["-h", &host, "-U", "postgres", "-S", "-n", "-c", "1", "-T", &whole])
                    .arg("postgres");
                let text = output(lab, client, &mut command)?;
                number_in(&text, "tps = ")
            }
            Self::Redis => {
                let requests = (REQUESTS_A_SECOND * seconds).round().to_string();
                let mut command = pinned("redis-benchmark");
                command.args(["-h", &host, "-c", "64", "-t", "get", "-q", "-n", &requests]);
                let text = output(lab, client, &mut command)?;
                // Progress comes before it, on the same line.
                let last = text.rsplit("GET: ").find(|part| part.contains("requests per second"));
                number_in(last.context("redis-benchmark told no result")?, "")
            }
            Self::Iperf => {
                let mut command = pinned("iperf3");
                command.args(["-c", &host, "-P", "4", "-t", &whole, "-J"]);
                let text = output(lab, client, &mut command)?;
                let told: serde_json::Value = serde_json::from_str(&text)?;
                let bits = told["end"]["sum_received"]["bits_per_second"].as_f64();
                Ok(bits.context("iperf3 told no result")? / 1e9)
            }
        }
    }
}

/// The servers of one lab, in one of its namespaces.
pub(crate) struct Servers {
    _running: Vec<Running>,
    _data: Removed,
}

struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("error: remove {}: {error}", self.0.display());
        }
    }
}

impl Servers {
    /// Starts them for a contender and waits until they answer.
    pub(crate) fn start(
        lab: &Lab,
        contender: &str,
        namespace: &str,
        address: IpAddr,
    ) -> anyhow::Result<Self> {
        let host = address.to_string();
        let user =
            nix::unistd::User::from_name("postgres")?.context("there is no user postgres")?;
        // Of the server's own user, who may not look into the lab's folder.
        let data = PathBuf::from(format!("/tmp/hauberk-apps-{}-{contender}", std::process::id()));
        fs::create_dir(&data)?;
        let removed = Removed(data.clone());
        // PostgreSQL refuses to run as root.
        nix::unistd::chown(&data, Some(user.uid), Some(user.gid))
            .context("this needs real root, to run PostgreSQL as its own user")?;
        let binaries = postgres_binaries()?;
        let postgres = |program: &str| {
            let mut command = pinned(binaries.join(program));
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).current_dir("/tmp");
            command.env("LC_ALL", "C");
            command
        };
        let cluster = data.join("cluster");
        let mut init = postgres("initdb");
        init.arg("-D").arg(&cluster).args(["-A", "trust", "-N"]);
        output(lab, namespace, &mut init)?;
        fs::write(cluster.join("pg_hba.conf"), "local all all trust\nhost all all all trust\n")?;
        let mut database = postgres("postgres");
        database.arg("-D").arg(&cluster).args(["-h", &host, "-k"]).arg(&data);
        let mut redis = pinned("redis-server");
        redis
            .args(["--port", &App::Redis.port().to_string(), "--bind", &host, "--save", ""])
            .args(["--appendonly", "no", "--protected-mode", "no", "--dir"])
            .arg(&data);
        let mut iperf = pinned("iperf3");
        iperf.args(["-s", "-B", &host]);
        let mut running = Vec::new();
        for (name, command) in
            [("postgres", &mut database), ("redis", &mut redis), ("iperf3", &mut iperf)]
        {
            running.push(lab.spawn(namespace, &format!("{namespace}-{name}"), command)?);
        }
        let servers = Self { _running: running, _data: removed };
        servers.fill(lab, namespace, &data, &host)?;
        Ok(servers)
    }

    /// The tables of pgbench, and a key for Redis.
    fn fill(&self, lab: &Lab, namespace: &str, data: &Path, host: &str) -> anyhow::Result<()> {
        let pgbench = postgres_binaries()?.join("pgbench");
        lab.wait("PostgreSQL", START_PATIENCE, |lab| {
            let mut command = pinned(&pgbench);
            command.arg("-h").arg(data).args(["-U", "postgres", "-i", "-q", "-s", "1"]);
            output(lab, namespace, command.arg("postgres")).map(drop)
        })?;
        lab.wait("Redis", START_PATIENCE, |lab| {
            let mut command = pinned("redis-cli");
            output(lab, namespace, command.args(["-h", host, "ping"])).and_then(|answer| {
                ensure!(answer.trim() == "PONG", "it answers {answer:?}");
                Ok(())
            })
        })
    }
}

fn pinned(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]).arg(program);
    command
}

/// Debian keeps those of each version in a folder of its own: the newest.
fn postgres_binaries() -> anyhow::Result<PathBuf> {
    fs::read_dir("/usr/lib/postgresql")
        .context("PostgreSQL is missing; ./test installs it")?
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .max()
        .context("PostgreSQL is missing; ./test installs it")
}

fn output(lab: &Lab, namespace: &str, command: &mut Command) -> anyhow::Result<String> {
    let output = lab.namespace(namespace)?.run(|| command.output())?;
    let output =
        output.with_context(|| format!("run {command:?}; ./test installs what it needs"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The number behind these words.
fn number_in(text: &str, before: &str) -> anyhow::Result<f64> {
    let told = || format!("no number behind {before:?} in {text:?}");
    let (_, rest) = text.split_once(before).with_context(told)?;
    rest.split_whitespace().next().with_context(told)?.parse().with_context(told)
}
