//! A workload's namespace, another machine behind its gateway, and small TCP helpers.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use hauberk_linux::{
    Netns,
    capture::{Before, Hold, Installed, NamespaceRules, Ruleset, Unroutable},
    links,
    socket::{self, Peer},
};

pub(crate) const OUTBOUND: u16 = 15001;
pub(crate) const PLAINTEXT: u16 = 15006;
pub(crate) const MESH: u16 = 15008;
pub(crate) const MESH_LISTENER: u16 = 15108;
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// All of a namespace.
pub(crate) const RULES: NamespaceRules = NamespaceRules {
    outbound_port: Some(OUTBOUND),
    plaintext_port: Some(PLAINTEXT),
    mesh_listener: Some(MESH_LISTENER),
    mesh_port: MESH,
    unroutable: Unroutable::Refuse,
    letting_go: false,
};

/// Addresses of one family, so that every test can go through both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    /// The workload's own.
    pub(crate) workload: IpAddr,
    /// The other machine's.
    pub(crate) remote: IpAddr,
    /// One that the other machine routes, but does not have.
    pub(crate) beyond: IpAddr,
    pub(crate) any: IpAddr,
    pub(crate) loopback: IpAddr,
}

pub(crate) fn families() -> [Addresses; 2] {
    let addresses = |texts: [&str; 5]| {
        let [workload, remote, beyond, any, loopback] = texts.map(|text| text.parse().unwrap());
        Addresses { workload, remote, beyond, any, loopback }
    };
    [
        addresses(["10.9.0.2", "10.9.0.1", "198.51.100.9", "0.0.0.0", "127.0.0.1"]),
        addresses(["fd00:9::2", "fd00:9::1", "2001:db8:9::9", "::", "::1"]),
    ]
}

/// `workload` and `remote`, joined by a veth pair; `remote` is the gateway.
pub(crate) struct Network {
    pub(crate) workload: Netns,
    pub(crate) remote: Netns,
}

impl Network {
    pub(crate) fn new() -> Self {
        let network = Self { workload: Netns::create().unwrap(), remote: Netns::create().unwrap() };
        for netns in [&network.workload, &network.remote] {
            // No address that comes up by itself later: the tests compare routes.
            netns.run(|| links::sysctl("ipv6/conf/default/addr_gen_mode", "1").unwrap()).unwrap();
        }
        let remote = network.remote.clone();
        let create = || links::create_veth("eth0", "eth0", &remote).unwrap();
        network.workload.run(create).unwrap();
        let prefix = |address: IpAddr| if address.is_ipv4() { 24 } else { 64 };
        network.in_remote(|| {
            for family in families() {
                let address = family.remote;
                links::add_address("eth0", address, prefix(address)).unwrap();
            }
            links::set_up("eth0").unwrap();
        });
        network.in_workload(|| {
            for family in families() {
                let address = family.workload;
                links::add_address("eth0", address, prefix(address)).unwrap();
            }
            links::set_up("eth0").unwrap();
            for family in families() {
                links::add_default_route(family.remote).unwrap();
            }
        });
        network
    }

    pub(crate) fn in_workload<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.workload.run(work).unwrap()
    }

    pub(crate) fn in_remote<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.remote.run(work).unwrap()
    }
}

pub(crate) fn listen(netns: &Netns, address: IpAddr, port: u16) -> TcpListener {
    let address = SocketAddr::new(address, port);
    netns.run(|| socket::listen(address)).unwrap().unwrap()
}

/// A listener of the agent's, which is on loopback. What is held for it is given back at once.
pub(crate) fn listen_captured(netns: &Netns, family: Addresses, port: u16) -> Listener {
    let address = SocketAddr::new(family.loopback, port);
    let is_outbound = ![PLAINTEXT, MESH_LISTENER].contains(&port);
    let peer = if is_outbound { Peer::Application } else { Peer::Network };
    let listener = netns.run(|| socket::listen_captured(address, peer)).unwrap().unwrap();
    let releasing = is_outbound.then(|| Releasing::start(netns, port));
    Listener { listener, _releasing: releasing }
}

pub(crate) struct Listener {
    listener: TcpListener,
    _releasing: Option<Releasing>,
}

impl std::ops::Deref for Listener {
    type Target = TcpListener;

    fn deref(&self) -> &TcpListener {
        &self.listener
    }
}

/// Gives back what is held, as an agent that allows everything.
struct Releasing(Arc<AtomicBool>, Option<thread::JoinHandle<()>>);

impl Releasing {
    fn start(netns: &Netns, port: u16) -> Self {
        let hold = netns.run(|| Hold::start(port, port)).unwrap().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for opening in hold.take().unwrap().0 {
                    hold.release(&opening).unwrap();
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        Self(stop, Some(task))
    }
}

impl Drop for Releasing {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        if let Some(task) = self.1.take() {
            task.join().unwrap();
        }
    }
}

/// Puts rules in place for the first time, or in place of others.
pub(crate) fn install(rules: &Ruleset) -> Installed {
    rules.install(&Before::Unknown).unwrap().whole().unwrap()
}

pub(crate) fn connect(netns: &Netns, address: IpAddr, port: u16) -> io::Result<TcpStream> {
    let address = SocketAddr::new(address, port);
    let stream = netns.run(|| TcpStream::connect_timeout(&address, PATIENCE)).unwrap()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Connects a socket that the agent made, which is non-blocking.
pub(crate) fn connect_socket(socket: socket2::Socket, to: SocketAddr) -> io::Result<TcpStream> {
    socket.connect_timeout(&to.into(), PATIENCE)?;
    socket.set_nonblocking(false)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

pub(crate) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let (stream, peer) = accept_within(listener, PATIENCE).expect("a connection in time");
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (stream, peer)
}

/// Also asserts that nobody came.
pub(crate) fn nobody_came(listener: &TcpListener) -> bool {
    accept_within(listener, Duration::from_millis(50)).is_none()
}

pub(crate) fn accept_within(
    listener: &TcpListener,
    patience: Duration,
) -> Option<(TcpStream, SocketAddr)> {
    let deadline = Instant::now() + patience;
    loop {
        match listener.accept() {
            Ok(accepted) => return Some(accepted),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() > deadline {
                    return None;
                }
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) => panic!("accept: {error}"),
        }
    }
}

/// Sends something each way.
pub(crate) fn assert_joined(one: &mut TcpStream, other: &mut TcpStream) {
    let mut buffer = [0; 4];
    one.write_all(b"ping").unwrap();
    other.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"ping");
    other.write_all(b"pong").unwrap();
    one.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");
}

pub(crate) fn assert_refused(result: io::Result<TcpStream>) {
    let error = result.expect_err("the connection must be refused");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

/// Runs a command in the calling thread's namespace.
pub(crate) fn command(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// All that rules and routing consist of, in the calling thread's namespace.
pub(crate) fn state() -> String {
    command(
        "nft list ruleset; ip -4 rule; ip -6 rule; \
         ip -4 route show table all; ip -6 route show table all",
    )
}
