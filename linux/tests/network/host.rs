use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use hauberk_linux::{
    Error,
    capture::{self, Before, HostRules, HostWorkload, ProcessMatch, Unroutable},
    socket::outbound_socket,
};

use crate::support::*;

const WEB: u16 = 8080;
const DATABASE: u16 = 5432;
const WEB_OUTBOUND: u16 = 15101;
const DATABASE_OUTBOUND: u16 = 15102;
const WEB_USER: u32 = 61_001;
const DATABASE_USER: u32 = 61_002;

fn rules(web: ProcessMatch, database: ProcessMatch) -> HostRules {
    let workload = |process: ProcessMatch, outbound_port, port| HostWorkload {
        name: format!("{process:?}"),
        process: Some(process),
        outbound_port: Some(outbound_port),
        service_ports: vec![port],
        unroutable: Unroutable::Refuse,
    };
    HostRules {
        mesh_port: MESH,
        mesh_listener: Some(MESH_LISTENER),
        plaintext_port: Some(PLAINTEXT),
        workloads: vec![
            workload(web, WEB_OUTBOUND, WEB),
            workload(database, DATABASE_OUTBOUND, DATABASE),
        ],
    }
}

fn by_user(web: u32, database: u32) -> HostRules {
    rules(ProcessMatch::User(web), ProcessMatch::User(database))
}

/// The user the test runs as, inside its user namespace.
fn me() -> u32 {
    nix::unistd::getuid().as_raw()
}

#[test]
fn an_undeclared_process_is_left_alone() {
    let network = Network::new();
    network.in_workload(|| install(&by_user(WEB_USER, DATABASE_USER).ruleset().unwrap()));
    for family in families() {
        let server = listen(&network.remote, family.any, 80);
        let mut client = connect(&network.workload, family.remote, 80).unwrap();
        assert_joined(&mut client, &mut accept(&server).0);

        let own = listen(&network.workload, family.any, 9999);
        for (netns, address) in [
            (&network.workload, family.loopback),
            (&network.workload, family.workload),
            (&network.remote, family.workload),
        ] {
            let mut client = connect(netns, address, 9999).unwrap();
            assert_joined(&mut client, &mut accept(&own).0);
        }
    }
}

/// What comes in for a port that nobody declared is no business of the mesh, however often the rules are put in
/// place; neither is what was open before a workload was declared, and both ways work.
#[test]
fn connections_on_undeclared_ports_outlive_any_change_of_the_rules() {
    let network = Network::new();
    let family = families()[0];
    let before = listen(&network.workload, family.any, 9998);
    let mut older = connect(&network.remote, family.workload, 9998).unwrap();
    let (mut older_served, _) = accept(&before);
    let rules = by_user(me(), DATABASE_USER).ruleset().unwrap();
    let known = network.in_workload(|| install(&rules)).older;
    assert_eq!(known.len(), 1, "{known:?}");
    let exporter = listen(&network.workload, family.any, 9187);
    let mut scraper = connect(&network.remote, family.workload, 9187).unwrap();
    let (mut served, _) = accept(&exporter);
    for _ in 0..3 {
        let healed = network.in_workload(|| {
            command("nft flush ruleset");
            rules.install(&Before::Known(&rules, &known)).unwrap()
        });
        assert!(healed.cut.is_empty(), "{healed:?}");
        assert_joined(&mut scraper, &mut served);
        assert_joined(&mut older, &mut older_served);
    }
}

/// Over loopback, too: what was opened there while the rules were missing is ended. What is older goes on, and so does
/// what needs no agent: the agent's own, and what a workload opens to itself.
#[test]
fn what_was_opened_over_loopback_without_the_rules_is_cut() {
    let network = Network::new();
    for family in families() {
        let server = listen(&network.workload, family.any, WEB);
        let open = || {
            let client = connect(&network.workload, family.loopback, WEB).unwrap();
            (client, accept(&server).0)
        };
        let of_agent = || {
            let to = SocketAddr::new(family.loopback, WEB);
            let client = network.in_workload(|| connect_socket(outbound_socket(to)?, to)).unwrap();
            (client, accept(&server).0)
        };
        let mut older = open();
        let rules = by_user(WEB_USER, DATABASE_USER).ruleset().unwrap();
        let known = network.in_workload(|| install(&rules)).older;
        let mut agents = of_agent();
        network.in_workload(|| command("nft flush ruleset"));
        let (mut intruder, mut served) = open();
        assert_joined(&mut intruder, &mut served);
        let healed = network.in_workload(|| rules.install(&Before::Known(&rules, &known)).unwrap());
        let cut: Vec<_> =
            healed.cut.iter().map(|socket| (socket.local.port(), socket.remote)).collect();
        assert_eq!(cut, [(WEB, intruder.local_addr().unwrap())], "{family:?}");
        let error = std::io::Read::read(&mut intruder, &mut [0]).expect_err("it goes on");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        // One that nobody has accepted yet.
        network.in_workload(|| command("nft flush ruleset"));
        let _waiting = connect(&network.workload, family.loopback, WEB).unwrap();
        let healed = network.in_workload(|| rules.install(&Before::Known(&rules, &known)).unwrap());
        assert_eq!(healed.cut.len(), 1, "{healed:?}");
        drop(accept(&server));
        assert_joined(&mut older.0, &mut older.1);
        assert_joined(&mut agents.0, &mut agents.1);

        // Its own.
        let rules = by_user(me(), DATABASE_USER).ruleset().unwrap();
        network.in_workload(|| install(&rules));
        let mut own = open();
        network.in_workload(|| {
            command("nft flush ruleset");
            let healed = rules.install(&Before::Known(&rules, &known)).unwrap();
            assert!(healed.cut.is_empty(), "{healed:?}");
        });
        assert_joined(&mut own.0, &mut own.1);
        network.in_workload(|| capture::remove().unwrap());
    }
}

#[test]
fn a_declared_user_is_redirected_to_its_own_port() {
    let network = Network::new();
    network.in_workload(|| install(&by_user(me(), DATABASE_USER).ruleset().unwrap()));
    for family in families() {
        let agent = listen_captured(&network.workload, family, WEB_OUTBOUND);
        for (address, port) in [
            (family.remote, 80),
            (family.beyond, DATABASE),
            // Over loopback: what another workload serves.
            (family.loopback, DATABASE),
            (family.workload, DATABASE),
        ] {
            let _client = connect(&network.workload, address, port).unwrap();
            let (accepted, _) = accept(&agent);
            let expected = SocketAddr::new(address, port);
            assert_eq!(accepted.local_addr().unwrap(), expected);
        }
        // Over loopback: its own service, and what nobody declared.
        for port in [WEB, 9999] {
            let server = listen(&network.workload, family.any, port);
            let mut client = connect(&network.workload, family.loopback, port).unwrap();
            assert_joined(&mut client, &mut accept(&server).0);
        }
        // The agent's own connections, also as that user.
        let server = listen(&network.remote, family.any, 80);
        let to = SocketAddr::new(family.remote, 80);
        let mut client = network.in_workload(|| connect_socket(outbound_socket(to)?, to)).unwrap();
        assert_joined(&mut client, &mut accept(&server).0);
        assert!(nobody_came(&agent));
    }
}

#[test]
fn a_service_port_is_redirected_from_outside_and_from_undeclared_processes() {
    let network = Network::new();
    network.in_workload(|| install(&by_user(WEB_USER, DATABASE_USER).ruleset().unwrap()));
    for family in families() {
        let service = listen(&network.workload, family.any, WEB);
        let plaintext = listen_captured(&network.workload, family, PLAINTEXT);
        for (netns, address) in [
            (&network.remote, family.workload),
            (&network.workload, family.workload),
            (&network.workload, family.loopback),
        ] {
            let _client = connect(netns, address, WEB).unwrap();
            let (accepted, _) = accept(&plaintext);
            let expected = SocketAddr::new(address, WEB);
            assert_eq!(accepted.local_addr().unwrap(), expected);
        }
        assert!(nobody_came(&service));
        // The agent reaches the service.
        let to = SocketAddr::new(family.workload, WEB);
        let mut client = network.in_workload(|| connect_socket(outbound_socket(to)?, to)).unwrap();
        assert_joined(&mut client, &mut accept(&service).0);
    }
}

#[test]
fn the_applications_view_of_the_client_works_on_a_host_too() {
    let network = Network::new();
    network.in_workload(|| install(&by_user(WEB_USER, DATABASE_USER).ruleset().unwrap()));
    for family in families() {
        let service = listen(&network.workload, family.any, WEB);
        let source = SocketAddr::new(family.beyond, 45678);
        let to = SocketAddr::new(family.workload, WEB);
        let mut inbound = network
            .in_workload(|| connect_socket(hauberk_linux::socket::transparent_socket(source)?, to))
            .unwrap();
        let (mut accepted, peer) = accept(&service);
        assert_eq!(peer, source);
        assert_joined(&mut inbound, &mut accepted);
    }
}

#[test]
fn without_the_agent_declared_traffic_is_refused() {
    let network = Network::new();
    network.in_workload(|| install(&by_user(me(), DATABASE_USER).ruleset().unwrap()));
    for family in families() {
        let _server = listen(&network.remote, family.any, 80);
        let _service = listen(&network.workload, family.any, WEB);
        assert_refused(connect(&network.workload, family.remote, 80));
        assert_refused(connect(&network.remote, family.workload, WEB));
        assert_refused(connect(&network.workload, family.loopback, DATABASE));
    }
}

#[test]
fn the_agents_listeners_cannot_be_dialled_from_outside() {
    let network = Network::new();
    network.in_workload(|| install(&by_user(me(), DATABASE_USER).ruleset().unwrap()));
    for family in families() {
        let agent = listen_captured(&network.workload, family, WEB_OUTBOUND);
        assert_refused(connect(&network.remote, family.workload, WEB_OUTBOUND));
        assert!(nobody_came(&agent));
    }
}

#[test]
fn traffic_that_passes_through_the_machine_is_left_alone() {
    let network = Network::new();
    let inner = hauberk_linux::Netns::create().unwrap();
    network.in_workload(|| {
        hauberk_linux::links::create_veth("inner", "eth0", &inner).unwrap();
        hauberk_linux::links::sysctl("ipv4/ip_forward", "1").unwrap();
        let address: IpAddr = "10.8.0.1".parse().unwrap();
        hauberk_linux::links::add_address("inner", address, 24).unwrap();
        hauberk_linux::links::set_up("inner").unwrap();
        // After the interface, as an agent does when there is a new one.
        install(&by_user(WEB_USER, DATABASE_USER).ruleset().unwrap());
    });
    let address: IpAddr = "10.8.0.2".parse().unwrap();
    inner
        .run(|| {
            hauberk_linux::links::add_address("eth0", address, 24).unwrap();
            hauberk_linux::links::set_up("eth0").unwrap();
            hauberk_linux::links::add_default_route("10.8.0.1".parse().unwrap()).unwrap();
        })
        .unwrap();
    let gateway = families()[0].workload;
    network.in_remote(|| {
        hauberk_linux::links::add_route("10.8.0.0".parse().unwrap(), 24, gateway).unwrap();
    });
    let server = listen(&network.remote, families()[0].any, WEB);
    let mut client = connect(&inner, families()[0].remote, WEB).unwrap();
    let (mut served, _) = accept(&server);
    assert_joined(&mut client, &mut served);
    // The second line knows other hosts' packets from its own, though they are of the same port.
    network.in_workload(|| command("nft flush ruleset"));
    assert_joined(&mut client, &mut served);
    let mut client = connect(&inner, families()[0].remote, WEB).unwrap();
    assert_joined(&mut client, &mut accept(&server).0);
}

/// What a port answers that somebody serves stays here without nftables, however many other ports there are.
#[test]
fn a_flushed_host_answers_nobody_in_clear() {
    let network = Network::new();
    network.in_workload(|| install(&by_user(WEB_USER, DATABASE_USER).ruleset().unwrap()));
    network.in_workload(|| command("nft flush ruleset"));
    for family in families() {
        let _served = listen(&network.workload, family.any, WEB);
        let to = SocketAddr::new(family.workload, WEB);
        let wait = std::time::Duration::from_millis(500);
        let answer = network.in_remote(|| std::net::TcpStream::connect_timeout(&to, wait));
        assert!(answer.is_err(), "{to} answers in clear");
    }
}

#[test]
fn contradictions_and_missing_cgroups_are_refused() {
    let cgroup = |level, path: &str| ProcessMatch::Cgroup { level, path: path.to_owned() };
    let other = ProcessMatch::User(1);
    for (name, rules) in [
        ("same user", by_user(1, 1)),
        ("wrong level", rules(cgroup(2, "no-such-cgroup"), other.clone())),
        ("climbing", rules(cgroup(2, "../etc"), other.clone())),
        ("the root", rules(cgroup(0, "/"), other.clone())),
        ("mesh port served", {
            let mut rules = by_user(1, 2);
            rules.mesh_port = WEB;
            rules
        }),
    ] {
        let error = rules.ruleset().unwrap_err();
        assert!(matches!(error, Error::InvalidRules { .. }), "{name}: {error:?}");
    }
    let missing = rules(cgroup(1, "no-such-cgroup"), other).ruleset();
    assert!(matches!(missing.unwrap_err(), Error::NoSuchCgroup { .. }));
}

/// A shell that connects and then waits, in the calling thread's namespace.
fn dialler(prepare: &str, address: IpAddr, port: u16) -> Command {
    let mut command = Command::new("bash");
    command
        .arg("-c")
        .arg(format!("{prepare} exec 3<>/dev/tcp/{address}/{port}; read -t 5 -u 3"))
        .stderr(Stdio::null());
    command
}

struct Dialling(Child);

impl Drop for Dialling {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn needs_root_other_users_are_told_apart() {
    let network = Network::new();
    network.in_workload(|| install(&by_user(WEB_USER, DATABASE_USER).ruleset().unwrap()));
    for family in families() {
        let web = listen_captured(&network.workload, family, WEB_OUTBOUND);
        let database = listen_captured(&network.workload, family, DATABASE_OUTBOUND);
        let service = listen(&network.workload, family.any, WEB);
        for (user, address, port, expected) in [
            (WEB_USER, family.remote, 80, &*web),
            (WEB_USER, family.loopback, DATABASE, &web),
            (DATABASE_USER, family.remote, 80, &database),
            (DATABASE_USER, family.workload, WEB, &database),
            (WEB_USER, family.loopback, WEB, &service),
        ] {
            let _dialling = Dialling(
                network.in_workload(|| dialler("", address, port).uid(user).spawn().unwrap()),
            );
            let (accepted, _) = accept(expected);
            assert_eq!(accepted.local_addr().unwrap(), SocketAddr::new(address, port));
        }
        assert!(nobody_came(&service));
    }
}

/// A cgroup that is gone after the test.
struct Cgroup(String);

impl Cgroup {
    fn create(name: &str) -> Self {
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .find(|root| fs::exists(format!("{root}/cgroup.procs")).unwrap())
            .unwrap();
        let folder = format!("{root}/{name}");
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..50 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[test]
fn needs_root_a_cgroup_is_redirected_and_its_neighbour_is_not() {
    let parent = format!("hauberk-test-{}", std::process::id());
    let _parent = Cgroup::create(&parent);
    let inside = Cgroup::create(&format!("{parent}/web"));
    let below = Cgroup::create(&format!("{parent}/web/child"));
    let outside = Cgroup::create(&format!("{parent}/other"));

    let network = Network::new();
    let web = ProcessMatch::Cgroup { level: 2, path: format!("{parent}/web") };
    let rules = rules(web, ProcessMatch::User(DATABASE_USER));
    network.in_workload(|| {
        install(&rules.ruleset().unwrap());
        assert_eq!(rules.ruleset().unwrap().drift().unwrap(), []);
    });
    for family in families() {
        let agent = listen_captured(&network.workload, family, WEB_OUTBOUND);
        let server = listen(&network.remote, family.any, 80);
        for (cgroup, expected) in [(&inside, &*agent), (&below, &agent), (&outside, &server)] {
            let prepare = format!("echo $$ > {}/cgroup.procs &&", cgroup.0);
            let _dialling = Dialling(
                network.in_workload(|| dialler(&prepare, family.remote, 80).spawn().unwrap()),
            );
            accept(expected);
        }
    }
    network.in_workload(capture::remove).unwrap();
}
