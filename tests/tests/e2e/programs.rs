//! Real programs through the mesh, unmodified.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, ensure};
use hauberk_tests::mesh::{Mesh, PATIENCE};
use serde_json::Value;

crate::trials!(
    nginx_serves_curl_and_wrk,
    postgresql_serves_psql_and_pgbench,
    redis_serves_redis_benchmark,
    a_mail_server_takes_a_letter_of_curl,
    iperf3_moves_bytes_both_ways_at_once,
    users_of_a_host_are_captured,
    cgroups_of_a_host_are_captured,
    one_process_is_a_whole_mesh,
);

fn reachable(mesh: &Mesh, port: u16) -> anyhow::Result<()> {
    // From the ledger's own namespace, where its loopback is its own.
    mesh.wait("the server", PATIENCE, |mesh| mesh.connect("ledger", mesh.ledger(port)).map(drop))
}

fn nginx_serves_curl_and_wrk() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let folder = mesh.folder().join("nginx");
    fs::create_dir(&folder)?;
    let configuration = folder.join("nginx.conf");
    fs::write(
        &configuration,
        format!(
            "daemon off; worker_processes 1; pid {0}/pid; error_log {0}/error.log;
             events {{ worker_connections 1024; }}
             http {{ access_log off; client_body_temp_path {0}; proxy_temp_path {0};
               fastcgi_temp_path {0}; uwsgi_temp_path {0}; scgi_temp_path {0};
               server {{ listen 80; listen [::]:80; location / {{ return 200 'served by nginx'; }} }} }}",
            folder.display()
        ),
    )?;
    let _nginx = mesh.spawn(
        "ledger",
        "nginx",
        Command::new("/usr/sbin/nginx").arg("-c").arg(&configuration).arg("-p").arg(&folder),
    )?;
    reachable(&mesh, 80)?;
    let url = format!("http://{}/", mesh.ledger(80).ip());
    let body =
        mesh.run("checkout", Command::new("curl").args(["-sS", "--max-time", "10", &url]))?;
    ensure!(body == "served by nginx", "got {body:?}");
    let denied =
        mesh.output("web", Command::new("curl").args(["-sS", "--max-time", "10", &url]))?;
    ensure!(!denied.status.success(), "web was served");
    let wrk = mesh.run("checkout", Command::new("wrk").args(["-t1", "-c16", "-d3s", &url]))?;
    ensure!(wrk.contains("Requests/sec") && !wrk.contains("Socket errors"), "{wrk}");
    ensure!(!wrk.contains("Non-2xx"), "{wrk}");
    Ok(())
}

fn postgresql_serves_psql_and_pgbench() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let binaries = fs::read_dir("/usr/lib/postgresql")
        .context("PostgreSQL is missing; ./test installs it")?
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .max()
        .context("PostgreSQL is missing; ./test installs it")?;
    let user = nix::unistd::User::from_name("postgres")?.context("there is no user postgres")?;
    let data = PathBuf::from(format!("/tmp/hauberk-pg-{}", std::process::id()));
    let _removed = Removed(data.clone());
    fs::create_dir(&data)?;
    // PostgreSQL refuses to run as root.
    nix::unistd::chown(&data, Some(user.uid), Some(user.gid))
        .context("this test needs real root, to run PostgreSQL as its own user")?;
    let postgres = |program: &str| {
        let mut command = Command::new(binaries.join(program));
        command
            .uid(user.uid.as_raw())
            .gid(user.gid.as_raw())
            .current_dir("/tmp")
            .env("LC_ALL", "C");
        command
    };
    let cluster = data.join("cluster");
    mesh.run("ledger", postgres("initdb").arg("-D").arg(&cluster).args(["-A", "trust", "-N"]))?;
    fs::write(
        cluster.join("pg_hba.conf"),
        "local all all trust\nhost all all 10.77.0.0/24 trust\nhost all all fd77::/64 trust\n",
    )?;
    let _server = mesh.spawn(
        "ledger",
        "postgres",
        postgres("postgres").arg("-D").arg(&cluster).args(["-h", "*", "-k"]).arg(&data),
    )?;
    reachable(&mesh, 5432)?;
    let host = mesh.ledger(5432).ip().to_string();
    let psql = |sql: &str| {
        let mut command = Command::new(binaries.join("psql"));
        command.args(["-h", &host, "-U", "postgres", "-d", "postgres", "-Atc", sql]);
        command
    };
    mesh.wait("PostgreSQL", PATIENCE, |mesh| {
        mesh.run("checkout", &mut psql("select 1")).map(drop)
    })?;
    let seen = mesh.run("checkout", &mut psql("select host(inet_client_addr())"))?;
    ensure!(seen.trim() == "10.77.0.12", "PostgreSQL sees {seen:?}");
    let pgbench = |arguments: &[&str]| {
        let mut command = Command::new(binaries.join("pgbench"));
        command.args(["-h", &host, "-U", "postgres"]).args(arguments).arg("postgres");
        command
    };
    mesh.run("checkout", &mut pgbench(&["-i", "-q", "-s", "1"]))?;
    let steady = mesh.run("checkout", &mut pgbench(&["-c", "4", "-t", "200"]))?;
    ensure!(steady.contains("number of failed transactions: 0"), "{steady}");
    let connecting = mesh.run("checkout", &mut pgbench(&["-C", "-S", "-c", "4", "-t", "50"]))?;
    ensure!(connecting.contains("number of failed transactions: 0"), "{connecting}");
    ensure!(!mesh.output("web", &mut psql("select 1"))?.status.success(), "web was served");
    Ok(())
}

struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn redis_serves_redis_benchmark() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let host = mesh.ledger(6379).ip().to_string();
    let _redis = mesh.spawn(
        "ledger",
        "redis",
        Command::new("redis-server")
            .args(["--port", "6379", "--bind", &host, "--save", "", "--appendonly", "no"])
            .args(["--protected-mode", "no", "--dir"])
            .arg(mesh.folder()),
    )?;
    reachable(&mesh, 6379)?;
    let pong = mesh.run("checkout", Command::new("redis-cli").args(["-h", &host, "ping"]))?;
    ensure!(pong.trim() == "PONG", "got {pong:?}");
    let report = mesh.run(
        "checkout",
        Command::new("redis-benchmark")
            .args(["-h", &host, "-n", "5000", "-c", "20", "-t", "set,get", "--csv"]),
    )?;
    ensure!(report.contains("\"SET\"") && report.contains("\"GET\""), "{report}");
    let denied =
        mesh.output("web", Command::new("redis-cli").args(["-h", &host, "-t", "5", "ping"]))?;
    ensure!(!String::from_utf8_lossy(&denied.stdout).contains("PONG"), "web was served");
    Ok(())
}

/// It opens a connection for its orders and then one for each way, which the server tells apart by their order.
fn iperf3_moves_bytes_both_ways_at_once() -> anyhow::Result<()> {
    const ROUNDS: usize = 20;
    let mesh = Mesh::start()?;
    let host = mesh.ledger(8080).ip().to_string();
    let mut server = Command::new("iperf3");
    let _server = mesh.spawn("ledger", "iperf3", server.args(["-s", "-p", "8080", "-B", &host]))?;
    reachable(&mesh, 8080)?;
    for round in 0..ROUNDS {
        let mut client = Command::new("iperf3");
        client.args(["-c", &host, "-p", "8080", "--bidir", "-t", "1", "-J"]);
        // The server may still be busy with the end of the round before, and closes its listener after it.
        let mut report = Value::Null;
        mesh.wait("the server", PATIENCE, |mesh| {
            report = serde_json::from_str(&mesh.run("checkout", &mut client)?)?;
            let error = report["error"].as_str().unwrap_or_default();
            let again = ["busy", "reset", "refused"].iter().any(|word| error.contains(word));
            ensure!(!again, "{error}");
            Ok(())
        })?;
        for way in ["sum_received", "sum_received_bidir_reverse"] {
            let bytes = report["end"][way]["bytes"].as_u64().unwrap_or_default();
            ensure!(bytes > 1 << 20, "round {round}, {way}: {report}");
        }
    }
    Ok(())
}

/// In mail the server speaks first: whoever waits for the caller's first bytes waits for ever.
fn a_mail_server_takes_a_letter_of_curl() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let address = mesh.ledger(2525).to_string();
    // The system's own Python, which has the package.
    let _server = mesh.spawn(
        "ledger",
        "mail",
        Command::new("/usr/bin/python3")
            .args(["-u", "-m", "aiosmtpd", "--nosetuid", "--listen"])
            .arg(&address),
    )?;
    reachable(&mesh, 2525).with_context(|| {
        let log = fs::read_to_string(mesh.log("mail")).unwrap_or_default();
        format!("aiosmtpd, which ./test installs: {log}")
    })?;
    let lines: Vec<String> = (0..1_000).map(|number| format!("line {number} of it")).collect();
    let letter = mesh.folder().join("letter");
    fs::write(&letter, format!("Subject: an order\r\n\r\n{}\r\n", lines.join("\r\n")))?;
    let curl = || {
        let mut command = Command::new("curl");
        command
            .args(["-sS", "--max-time", "10", "--mail-from", "checkout@shop.example.org"])
            .args(["--mail-rcpt", "ledger@payments.example.org", "--upload-file"])
            .arg(&letter)
            .arg(format!("smtp://{address}/"));
        command
    };
    mesh.run("checkout", &mut curl())?;
    // It writes down what it takes, and who brought it.
    let taken = fs::read_to_string(mesh.log("mail"))?;
    ensure!(taken.contains(&lines.join("\n")), "the letter is another:\n{taken}");
    ensure!(taken.contains("X-Peer: ('10.77.0.12', "), "somebody else brought it:\n{taken}");
    let denied = mesh.output("web", &mut curl())?;
    ensure!(!denied.status.success(), "web was served");
    let taken = fs::read_to_string(mesh.log("mail"))?.matches("MESSAGE FOLLOWS").count();
    ensure!(taken == 1, "{taken} letters were taken");
    Ok(())
}

/// What tells a process of a host from the others there.
pub(crate) enum Process {
    User(u32),
    Cgroup(Cgroup),
}

impl Process {
    pub(crate) fn in_cgroup(name: &str) -> anyhow::Result<Self> {
        Ok(Self::Cgroup(Cgroup::create(name)?))
    }

    /// As a manifest writes it.
    pub(crate) fn selector(&self) -> String {
        match self {
            Self::User(user) => format!("{{user: '{user}'}}"),
            Self::Cgroup(cgroup) => format!("{{cgroup: {}}}", cgroup.name),
        }
    }

    /// A program as such a process.
    pub(crate) fn command(&self, program: &str) -> Command {
        match self {
            Self::User(user) => {
                let mut command = Command::new(program);
                command.uid(*user).gid(*user);
                command
            }
            Self::Cgroup(cgroup) => {
                // The shell goes into the cgroup, and becomes the program there.
                let mut command = Command::new("sh");
                command
                    .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
                    .arg(cgroup.folder.join("cgroup.procs"))
                    .arg(program);
                command
            }
        }
    }
}

/// A cgroup that is gone after the test.
pub(crate) struct Cgroup {
    /// Its path below the root.
    name: String,
    pub(crate) folder: PathBuf,
}

impl Cgroup {
    fn create(name: &str) -> anyhow::Result<Self> {
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .map(Path::new)
            .find(|root| root.join("cgroup.procs").exists())
            .context("there is no cgroup2 file system")?;
        // Other tests of this process have such a one, too.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hauberk-e2e-{}-{number}-{name}", std::process::id());
        let folder = root.join(&name);
        fs::create_dir_all(&folder)
            .with_context(|| format!("make {}; this test needs real root", folder.display()))?;
        Ok(Self { name, folder })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The kernel lets go of the last process a moment after its end.
        for _ in 0..50 {
            if fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A batch on machine-a that may call a store on machine-b.
fn hosts(batch: &Process, store: &Process) -> String {
    format!(
        "apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {{name: batch, namespace: jobs, labels: {{app: batch}}}}
spec:
  machine: machine-a
  serviceAccount: batch
  process: {}
  ports: []
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {{name: store, namespace: jobs, labels: {{app: store}}}}
spec:
  machine: machine-b
  serviceAccount: store
  process: {}
  ports: [7070]
---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: store, namespace: jobs}}
spec:
  owner: {{team: jobs, contact: '#jobs'}}
  target: {{serviceAccount: store}}
  rules:
  - name: batch
    ports: [7070]
    from: [{{serviceAccount: {{namespace: jobs, name: batch}}}}]
",
        batch.selector(),
        store.selector()
    )
}

fn users_of_a_host_are_captured() -> anyhow::Result<()> {
    let [batch, store, stranger] = [4242, 4343, 4444].map(Process::User);
    processes_of_a_host_are_captured(&batch, &store, &stranger)
}

fn cgroups_of_a_host_are_captured() -> anyhow::Result<()> {
    let batch = Process::in_cgroup("batch")?;
    let store = Process::in_cgroup("store")?;
    let stranger = Process::in_cgroup("stranger")?;
    processes_of_a_host_are_captured(&batch, &store, &stranger)
}

fn processes_of_a_host_are_captured(
    batch: &Process,
    store: &Process,
    stranger: &Process,
) -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    mesh.write_manifest("hosts.yaml", &hosts(batch, store))?;
    mesh.wait_revision(before)?;
    mesh.wait_ready().with_context(|| mesh.logs())?;
    let page = mesh.folder().join("page");
    fs::create_dir(&page)?;
    fs::write(page.join("index.html"), "from the store\n")?;
    for path in [mesh.folder().to_owned(), page.clone()] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    let _store = mesh
        .spawn(
            "machine-b",
            "store",
            store
                .command("python3")
                .args(["-m", "http.server", "7070", "--bind", "::", "--directory"])
                .arg(&page),
        )
        .context("this test needs real root, to run programs as other users")?;
    let curl = |process: &Process, url: &str| {
        let mut command = process.command("curl");
        command.args(["-sS", "--globoff", "--max-time", "8", url]);
        command
    };
    // The store on both families, and how its callers look there.
    let families = [("http://10.77.0.3:7070/", "10.77.0.2"), ("http://[fd77::3]:7070/", "fd77::2")];
    for (url, caller) in families {
        mesh.wait("the store", Duration::from_secs(20), |mesh| {
            let body = mesh.run("machine-a", &mut curl(batch, url))?;
            ensure!(body == "from the store\n", "{url}: got {body:?}");
            Ok(())
        })?;
        // It writes down whom it has served, over IPv4 as ::ffff:10.77.0.2.
        let log = fs::read_to_string(mesh.log("store"))?;
        let served = log.lines().rfind(|line| line.contains("GET / ")).unwrap_or_default();
        let address = served.split(' ').next().unwrap_or_default();
        ensure!(address.trim_start_matches("::ffff:") == caller, "{url}: it served {served:?}");
        // Another process of the same machine is nobody to the mesh; so is one of the store's machine.
        for machine in ["machine-a", "machine-b", "outside"] {
            let denied = mesh.output(machine, &mut curl(stranger, url))?;
            ensure!(!denied.status.success(), "a stranger on {machine} was served: {denied:?}");
        }
    }
    let record = mesh.record("machine-b", |record| {
        record["src"]["workload"] == "batch" && record["decision"] == "allow"
    })?;
    ensure!(record["src"]["spiffe_id"] == "spiffe://example.org/ns/jobs/sa/batch", "{record}");
    let plain =
        mesh.metric("machine-b", "hauberk_connections_denied_total", &["reason=\"plaintext\""])?;
    ensure!(plain >= 6.0, "counted {plain} plaintext connections");
    Ok(())
}

const ALONE: &str = "apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: alone}
spec: {addresses: [10.77.0.99]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: batch, namespace: jobs}
spec: {machine: alone, serviceAccount: batch, process: {user: '4242'}, ports: []}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: store, namespace: jobs}
spec: {machine: alone, serviceAccount: store, process: {user: '4343'}, ports: [7070]}
---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: store, namespace: jobs}
spec:
  owner: {team: jobs, contact: '#jobs'}
  target: {serviceAccount: store}
  rules:
  - {name: batch, ports: [7070], from: [{serviceAccount: {namespace: jobs, name: batch}}]}
";

/// `hauberk up` on the machine outside: two users of one host, one of them a service.
fn one_process_is_a_whole_mesh() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let folder = mesh.folder().join("alone");
    fs::create_dir_all(folder.join("manifests"))?;
    fs::write(folder.join("manifests/all.yaml"), ALONE)?;
    fs::write(folder.join("index.html"), "alone\n")?;
    for path in [mesh.folder().to_owned(), folder.clone()] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    let mut command = mesh.hauberk()?;
    command
        .args(["up", "--stop-with-stdin", "--machine", "alone", "--trust-domain", "alone.org"])
        .arg("--manifests")
        .arg(folder.join("manifests"))
        .arg("--data")
        .arg(folder.join("data"))
        .arg("--netns-dir")
        .arg(folder.join("none"));
    let up = mesh.spawn("outside", "up", &mut command)?;
    // Before it has captured the two, they are on their own.
    mesh.wait("the mesh of one", Duration::from_secs(20), |mesh| {
        let socket = folder.join("data/control-plane/operator.sock");
        let check = mesh.hauberk()?.arg("check").arg("--socket").arg(socket).output()?;
        ensure!(check.status.success(), "{check:?}");
        Ok(())
    })?;
    let _store = mesh
        .spawn(
            "outside",
            "store",
            Command::new("python3")
                .args(["-m", "http.server", "7070", "--bind", "0.0.0.0", "--directory"])
                .arg(&folder)
                .uid(4343)
                .gid(4343),
        )
        .context("this test needs real root, to run programs as other users")?;
    let curl = |user: u32| {
        let mut command = Command::new("curl");
        command.args(["-sS", "--max-time", "8", "http://10.77.0.99:7070/"]).uid(user).gid(user);
        command
    };
    mesh.wait("the store", Duration::from_secs(20), |mesh| {
        let log = fs::read_to_string(mesh.log("up"))?;
        let body = mesh.run("outside", &mut curl(4242)).with_context(|| log)?;
        ensure!(body == "alone\n", "got {body:?}");
        Ok(())
    })?;
    ensure!(!mesh.output("outside", &mut curl(4444))?.status.success(), "a stranger was served");
    drop(up);
    ensure!(!mesh.output("outside", &mut curl(4242))?.status.success(), "a stop opened it");
    let log = fs::read_to_string(mesh.log("up"))?;
    ensure!(log.contains("stopping") && !log.contains("error:"), "{log}");
    Ok(())
}
