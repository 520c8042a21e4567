//! What an application sees of the mesh: nothing but its peer.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_tests::mesh::{CHECKOUT, LEDGER, Mesh, PATIENCE, addresses, is};
use socket2::{Domain, Protocol, Socket, Type};

use crate::policy::{expect_refused, is_cut};

crate::trials!(
    both_families_carry_data_and_show_the_real_client,
    a_server_that_speaks_first_is_heard_at_once,
    half_close_is_carried_both_ways,
    a_reset_is_carried_as_a_reset,
    a_gibibyte_arrives_unchanged_both_ways,
    a_transfer_goes_on_over_many_renewals_of_its_keys,
    bulk_streams_pass_ten_renewals_unchanged,
    a_thousand_connections_at_once_all_succeed,
    an_idle_connection_outlives_the_keep_alive,
    a_reader_that_pauses_for_longer_than_any_timeout_loses_nothing,
    an_urgent_byte_arrives_among_the_others,
    a_refused_application_port_looks_refused,
    an_answer_before_the_end_of_the_upload_arrives,
    connections_are_accepted_in_the_order_in_which_they_were_opened,
);

fn both_families_carry_data_and_show_the_real_client() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    for (destination, source) in addresses(LEDGER).into_iter().zip(addresses(CHECKOUT)) {
        let destination = SocketAddr::new(destination, 8080);
        let listener = mesh.listen("ledger", destination)?;
        let mut client = mesh.connect("checkout", destination)?;
        let own = client.local_addr()?;
        client.write_all(b"question")?;
        let (mut server, seen) = listener.accept()?;
        ensure!(seen == own && seen.ip() == source, "the ledger saw {seen}, the client is {own}");
        let mut question = [0; 8];
        server.read_exact(&mut question)?;
        ensure!(&question == b"question", "got {question:?}");
        server.write_all(b"answer")?;
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer)?;
        ensure!(answer == "answer", "got {answer:?}");
        drop(client);
        let ip = source.to_string();
        let from_here = |record: &serde_json::Value| {
            record["src"]["addr"].as_str().is_some_and(|address| address.contains(&ip))
                && is(record, "decision", "allow")
        };
        let there = mesh.record("machine-b", from_here)?;
        let here = mesh.record("machine-a", from_here)?;
        ensure!(here["conn_id"] == there["conn_id"], "{here} {there}");
        ensure!(here["bytes_sent"] == 8 && here["bytes_received"] == 6, "{here}");
        ensure!(is(&here, "close_reason", "complete") && is(&here, "rule", "checkout"), "{here}");
    }
    Ok(())
}

fn a_server_that_speaks_first_is_heard_at_once() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(2525))?;
    let server = thread::spawn(move || -> anyhow::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b"220 mail.example.org ESMTP\r\n")?;
        let mut quit = [0; 6];
        stream.read_exact(&mut quit)?;
        Ok(stream.write_all(b"221 bye\r\n")?)
    });
    let mut client = mesh.connect("checkout", mesh.ledger(2525))?;
    let mut greeting = [0; 28];
    client.read_exact(&mut greeting)?;
    ensure!(greeting.starts_with(b"220 mail"), "got {greeting:?}");
    client.write_all(b"QUIT\r\n")?;
    let mut bye = String::new();
    client.read_to_string(&mut bye)?;
    ensure!(bye == "221 bye\r\n", "got {bye:?}");
    server.join().unwrap()
}

fn half_close_is_carried_both_ways() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    // The client ends first; the server still answers for a while.
    let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
    client.write_all(b"all of it")?;
    client.shutdown(Shutdown::Write)?;
    let (mut server, _) = listener.accept()?;
    let mut request = String::new();
    server.read_to_string(&mut request)?;
    ensure!(request == "all of it", "got {request:?}");
    thread::sleep(Duration::from_millis(300));
    server.write_all(b"late answer")?;
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    ensure!(answer == "late answer", "got {answer:?}");
    // The server ends first; the client still sends.
    let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
    let (mut server, _) = listener.accept()?;
    server.write_all(b"banner")?;
    server.shutdown(Shutdown::Write)?;
    let mut banner = String::new();
    client.read_to_string(&mut banner)?;
    ensure!(banner == "banner", "got {banner:?}");
    client.write_all(b"still talking")?;
    drop(client);
    let mut rest = String::new();
    server.set_read_timeout(Some(PATIENCE))?;
    server.read_to_string(&mut rest)?;
    ensure!(rest == "still talking", "got {rest:?}");
    Ok(())
}

fn a_reset_is_carried_as_a_reset() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    for client_resets in [true, false] {
        let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
        client.write_all(b"x")?;
        let (mut server, _) = listener.accept()?;
        server.set_read_timeout(Some(PATIENCE))?;
        server.read_exact(&mut [0])?;
        let (resets, mut sees) = if client_resets { (client, server) } else { (server, client) };
        socket2::SockRef::from(&resets).set_linger(Some(Duration::ZERO))?;
        drop(resets);
        is_cut(&mut sees)?;
    }
    let record =
        mesh.record("machine-a", |record| is(record, "close_reason", "application_reset"))?;
    ensure!(is(&record, "decision", "allow"), "{record}");
    Ok(())
}

/// Bytes that repeat only after a long while, and a sum over them that minds their order.
struct Pattern {
    state: u64,
    sum: u64,
}

impl Pattern {
    fn new(seed: u64) -> Self {
        Self { state: seed, sum: 0 }
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            chunk.copy_from_slice(&self.state.to_le_bytes()[..chunk.len()]);
        }
        self.add(buffer);
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.sum = self.sum.rotate_left(5) ^ u64::from(*byte);
            self.sum = self.sum.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
}

const GIBIBYTE: usize = 1 << 30;

fn send_pattern(mut stream: &TcpStream, seed: u64, length: usize) -> anyhow::Result<u64> {
    let mut pattern = Pattern::new(seed);
    let mut buffer = vec![0; 256 * 1024];
    for _ in 0..length / buffer.len() {
        pattern.fill(&mut buffer);
        stream.write_all(&buffer)?;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(pattern.sum)
}

fn receive_pattern(mut stream: &TcpStream) -> anyhow::Result<(usize, u64)> {
    let mut pattern = Pattern::new(0);
    let mut buffer = vec![0; 256 * 1024];
    let mut length = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok((length, pattern.sum)),
            count => {
                length += count;
                pattern.add(&buffer[..count]);
            }
        }
    }
}

fn a_gibibyte_arrives_unchanged_both_ways() -> anyhow::Result<()> {
    arrives_both_ways(&Mesh::start()?, GIBIBYTE)
}

fn a_transfer_goes_on_over_many_renewals_of_its_keys() -> anyhow::Result<()> {
    const LENGTH: usize = 128 << 20;
    let mesh = Mesh::start_with_agents(&[], &["--records-per-key", "512"])?;
    arrives_both_ways(&mesh, LENGTH)?;
    // At most 16 KiB are in a record, and at most a burst of 64 records goes unused of a key.
    let at_least = LENGTH as f64 / 16_384.0 / 512.0;
    for machine in ["machine-a", "machine-b"] {
        mesh.wait("the renewals", PATIENCE, |mesh| {
            let renewed = mesh.metric(machine, "hauberk_session_keys_renewed_total", &[])?;
            ensure!(renewed >= at_least, "{machine}: {renewed} of at least {at_least}");
            Ok(())
        })?;
    }
    Ok(())
}

fn arrives_both_ways(mesh: &Mesh, length: usize) -> anyhow::Result<()> {
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let client = mesh.connect("checkout", mesh.ledger(8080))?;
    let (server, _) = listener.accept()?;
    thread::scope(|scope| {
        let up = scope.spawn(|| send_pattern(&client, 1, length));
        let down = scope.spawn(|| send_pattern(&server, 2, length));
        let at_server = scope.spawn(|| receive_pattern(&server));
        let at_client = scope.spawn(|| receive_pattern(&client));
        let up = up.join().unwrap()?;
        let down = down.join().unwrap()?;
        ensure!(at_server.join().unwrap()? == (length, up), "the ledger got something else");
        ensure!(at_client.join().unwrap()? == (length, down), "checkout got something else");
        Ok(())
    })
}

/// A block every now and then, until it is enough. Gives what was sent, as [`receive_pattern`] does.
fn send_paced(
    mut stream: &TcpStream,
    seed: u64,
    enough: &AtomicBool,
) -> anyhow::Result<(usize, u64)> {
    // About 3 MB/s: never idle for long, and time left for whatever is tested beside this.
    const PACE: Duration = Duration::from_millis(20);
    let mut pattern = Pattern::new(seed);
    let mut block = vec![0; 64 * 1024];
    let mut length = 0;
    while !enough.load(Ordering::Relaxed) {
        pattern.fill(&mut block);
        stream.write_all(&block)?;
        length += block.len();
        thread::sleep(PACE);
    }
    stream.shutdown(Shutdown::Write)?;
    Ok((length, pattern.sum))
}

/// Waits until every workload has ten certificates behind it; not on if the streams have ended.
fn wait_for_ten_renewals(mesh: &Mesh, ended: impl Fn() -> bool) -> anyhow::Result<()> {
    const RENEWALS: f64 = 10.0;
    let renewals = |machine| {
        let parts = ["kind=\"install\"", "result=\"success\""];
        mesh.metric(machine, "hauberk_certificate_renewals_total", &parts)
    };
    let started = Instant::now();
    while !ended() {
        // machine-a has two workloads, machine-b one.
        let (here, there) = (renewals("machine-a")?, renewals("machine-b")?);
        if here > 2.0 * RENEWALS && there > RENEWALS {
            break;
        }
        let late = started.elapsed() > Duration::from_secs(150);
        ensure!(!late, "{here} and {there} certificates are not enough\n{}", mesh.logs());
        thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

fn bulk_streams_pass_ten_renewals_unchanged() -> anyhow::Result<()> {
    let mesh = Mesh::start_with(&["--workload-certificate-lifetime", "10s"])?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let client = mesh.connect("checkout", mesh.ledger(8080))?;
    let (server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    server.set_write_timeout(Some(PATIENCE))?;
    let enough = AtomicBool::new(false);
    let (up, down) = thread::scope(|scope| {
        let up = scope.spawn(|| send_paced(&client, 4, &enough));
        let down = scope.spawn(|| send_paced(&server, 5, &enough));
        let at_server = scope.spawn(|| receive_pattern(&server));
        let at_client = scope.spawn(|| receive_pattern(&client));
        let renewed = wait_for_ten_renewals(&mesh, || up.is_finished() || down.is_finished());
        enough.store(true, Ordering::Relaxed);
        let (up, down) = (up.join().unwrap(), down.join().unwrap());
        let (at_server, at_client) = (at_server.join().unwrap(), at_client.join().unwrap());
        let up = up.with_context(|| format!("checkout sends\n{}", mesh.logs()))?;
        let down = down.with_context(|| format!("the ledger sends\n{}", mesh.logs()))?;
        renewed?;
        ensure!(at_server.context("the ledger reads")? == up, "the ledger got something else");
        ensure!(at_client.context("checkout reads")? == down, "checkout got something else");
        Ok::<_, anyhow::Error>((up.0, down.0))
    })?;
    drop((client, server));
    // All of it on one connection.
    let record = mesh.record("machine-a", |record| is(record, "close_reason", "complete"))?;
    ensure!(record["bytes_sent"].as_u64() == Some(up as u64), "{up} bytes and {record}");
    ensure!(record["bytes_received"].as_u64() == Some(down as u64), "{down} bytes and {record}");
    Ok(())
}

/// As many connections as wanted, none of which waits for another to be open. Whether they are shows
/// in using them.
fn connect_all(
    mesh: &Mesh,
    from: &str,
    to: SocketAddr,
    count: usize,
) -> anyhow::Result<Vec<TcpStream>> {
    let opening = mesh.namespace(from)?.run(|| -> std::io::Result<Vec<Socket>> {
        let mut sockets = Vec::new();
        for _ in 0..count {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            match socket.connect(&to.into()) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => {}
                Err(error) => return Err(error),
            }
            sockets.push(socket);
        }
        Ok(sockets)
    })??;
    let mut streams = Vec::new();
    for socket in opening {
        // From here on, writing waits until it is open.
        socket.set_nonblocking(false)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        streams.push(stream);
    }
    Ok(streams)
}

fn a_thousand_connections_at_once_all_succeed() -> anyhow::Result<()> {
    const AT_ONCE: usize = 1_000;
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    socket2::SockRef::from(&listener).listen(4096)?;
    let server = thread::spawn(move || -> anyhow::Result<()> {
        let mut open = Vec::new();
        for _ in 0..AT_ONCE {
            let (mut stream, _) = listener.accept()?;
            let mut request = [0; 4];
            stream.read_exact(&mut request)?;
            open.push((stream, request));
        }
        // Not before all are there, so that none of them has waited for the end of another.
        for (stream, request) in &mut open {
            request.reverse();
            stream.write_all(request)?;
        }
        Ok(())
    });
    let mut clients = connect_all(&mesh, "checkout", mesh.ledger(8080), AT_ONCE)?;
    for (number, client) in (0_u32..).zip(&mut clients) {
        let request = number.to_be_bytes();
        client.write_all(&request).with_context(|| format!("opening connection {number}"))?;
    }
    for (number, client) in (0_u32..).zip(&mut clients) {
        let mut answer = [0; 4];
        let read = client.read_exact(&mut answer).with_context(|| format!("connection {number}"));
        if let Err(error) = read {
            let reason = if server.is_finished() { server.join().unwrap() } else { Ok(()) };
            return Err(error).with_context(|| format!("the server: {reason:?}\n{}", mesh.logs()));
        }
        ensure!(answer == number.to_le_bytes(), "connection {number} got {answer:?}");
    }
    server.join().unwrap()
}

fn an_idle_connection_outlives_the_keep_alive() -> anyhow::Result<()> {
    // Longer than idle time and all probes of the agents' sockets would take on a dead one.
    const IDLE: Duration = Duration::from_secs(65);
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
    client.write_all(b"a")?;
    let (mut server, _) = listener.accept()?;
    server.read_exact(&mut [0])?;
    thread::sleep(IDLE);
    client.write_all(b"b")?;
    let mut byte = [0];
    server.set_read_timeout(Some(PATIENCE))?;
    server.read_exact(&mut byte)?;
    ensure!(&byte == b"b", "got {byte:?}");
    Ok(())
}

/// Longer than any timeout of the agents' sockets.
const PAUSE: Duration = Duration::from_secs(45);

/// One end sends more than agents and sockets on the way hold. The other is busy meanwhile, which
/// no timeout may take for a peer that is gone, and reads all of it afterwards.
fn read_after_a_pause(sender: &TcpStream, reader: &TcpStream) -> anyhow::Result<()> {
    const LENGTH: usize = 64 << 20;
    for end in [sender, reader] {
        end.set_read_timeout(Some(2 * PAUSE))?;
        end.set_write_timeout(Some(2 * PAUSE))?;
    }
    thread::scope(|scope| {
        let sent = scope.spawn(|| send_pattern(sender, 3, LENGTH));
        thread::sleep(PAUSE);
        let received = receive_pattern(reader);
        let sent = sent.join().unwrap().context("sending")?;
        let received = received.context("reading after the pause")?;
        ensure!(received == (LENGTH, sent), "{} bytes came, or others", received.0);
        Ok(())
    })
}

fn a_reader_that_pauses_for_longer_than_any_timeout_loses_nothing() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let connect = || -> anyhow::Result<(TcpStream, TcpStream)> {
        let client = mesh.connect("checkout", mesh.ledger(8080))?;
        let (server, _) = listener.accept()?;
        Ok((client, server))
    };
    let (down, up) = (connect()?, connect()?);
    thread::scope(|scope| {
        let at_client = scope.spawn(|| read_after_a_pause(&down.1, &down.0));
        let at_server = scope.spawn(|| read_after_a_pause(&up.0, &up.1));
        let (at_client, at_server) = (at_client.join().unwrap(), at_server.join().unwrap());
        at_client.context("the ledger sends, and checkout pauses")?;
        at_server.context("checkout sends, and the ledger pauses")
    })
}

/// Both ways, in the place where it was sent; also if everything has come before the first of it is read.
fn an_urgent_byte_arrives_among_the_others() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let client = mesh.connect("checkout", mesh.ledger(8080))?;
    let (server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    client.set_read_timeout(Some(PATIENCE))?;
    for (mut from, mut to) in [(&client, &server), (&server, &client)] {
        for at_once in [false, true] {
            let socket = socket2::SockRef::from(from);
            socket.set_tcp_cork(at_once)?;
            from.write_all(b"before")?;
            ensure!(socket.send_out_of_band(b"!")? == 1);
            from.write_all(b"after")?;
            socket.set_tcp_cork(false)?;
            let mut got = [0; 12];
            let read = to.read_exact(&mut got);
            read.with_context(|| format!("in one packet: {at_once}"))?;
            ensure!(&got == b"before!after", "got {got:?}");
        }
    }
    Ok(())
}

fn a_refused_application_port_looks_refused() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    // Allowed, but nobody listens.
    expect_refused(mesh.connect("checkout", mesh.ledger(8080)))?;
    let record = mesh.record("machine-a", |record| is(record, "close_reason", "unreachable"))?;
    ensure!(is(&record, "decision", "allow"), "{record}");
    Ok(())
}

/// What a server says that takes no more of an upload.
const REFUSAL: &[u8] =
    b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\n\r\nthat is too much\n";

/// Answers each connection after its first bytes and closes it at once, whatever else has come.
fn refusing(listener: TcpListener) {
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A client that is gone gets no answer.
            if stream.read(&mut [0; 512]).is_ok() {
                drop(stream.write_all(REFUSAL));
            }
        }
    });
}

/// Uploads until it may no longer, and then reads what the server had to say.
fn upload(mut client: TcpStream) -> anyhow::Result<Vec<u8>> {
    let chunk = [7; 16 * 1024];
    for _ in 0..64 {
        if client.write_all(&chunk).is_err() {
            break;
        }
    }
    let mut answer = Vec::new();
    match client.read_to_end(&mut answer) {
        Ok(_) => Ok(answer),
        // After the answer, as without the mesh.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(answer),
        Err(error) => Err(error.into()),
    }
}

/// Counts the uploads that got no answer, or only a part of it.
pub(crate) fn answers_lost(mesh: &Mesh, from: &str, to: SocketAddr) -> anyhow::Result<usize> {
    const ROUNDS: usize = 200;
    let owner = if to.ip() == ipv4(CHECKOUT) { "checkout" } else { "ledger" };
    refusing(mesh.listen(owner, to)?);
    let mut lost = 0;
    for round in 0..ROUNDS {
        let told = || format!("round {round}\n{}", mesh.logs());
        let client = mesh.connect(from, to).with_context(told)?;
        let answer = upload(client).with_context(told)?;
        lost += usize::from(answer != REFUSAL);
    }
    Ok(lost)
}

fn an_answer_before_the_end_of_the_upload_arrives() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let lost = answers_lost(&mesh, "checkout", mesh.ledger(8080))?;
    ensure!(lost == 0, "{lost} answers were lost\n{}", mesh.logs());
    for (machine, field) in [("machine-a", "bytes_received"), ("machine-b", "bytes_sent")] {
        for record in mesh.all_records(machine)? {
            ensure!(record[field].as_u64() == Some(REFUSAL.len() as u64), "{machine}: {record}");
        }
    }
    Ok(())
}

/// Counts the pairs of connections of one client, opened one after the other, that the server
/// accepts in the other order.
pub(crate) fn pairs_exchanged(
    mesh: &Mesh,
    from: &str,
    listener: &TcpListener,
    pairs: usize,
) -> anyhow::Result<usize> {
    let to = listener.local_addr()?;
    let mut exchanged = 0;
    for pair in 0..pairs {
        let (first, second) = (mesh.connect(from, to)?, mesh.connect(from, to)?);
        let mut seen = Vec::new();
        for _ in 0..2 {
            let (stream, client) = listener.accept().with_context(|| format!("pair {pair}"))?;
            seen.push(client.port());
            drop(stream);
        }
        let opened = [first.local_addr()?.port(), second.local_addr()?.port()];
        ensure!(seen.contains(&opened[0]) && seen.contains(&opened[1]), "{seen:?}, {opened:?}");
        exchanged += usize::from(seen != opened);
    }
    Ok(exchanged)
}

fn connections_are_accepted_in_the_order_in_which_they_were_opened() -> anyhow::Result<()> {
    const PAIRS: usize = 300;
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let exchanged = pairs_exchanged(&mesh, "checkout", &listener, PAIRS)?;
    ensure!(exchanged == 0, "{exchanged} of {PAIRS} pairs were accepted in the other order");
    Ok(())
}
