//! What an application sees of the mesh: nothing but its peer.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use hauberk_tests::mesh::{CHECKOUT, LEDGER, Mesh, PATIENCE, addresses, is};

crate::trials!(
    both_families_carry_data_and_show_the_real_client,
    a_server_that_speaks_first_is_heard_at_once,
    half_close_is_carried_both_ways,
    a_reset_is_carried_as_a_reset,
    a_gibibyte_arrives_unchanged_both_ways,
    a_thousand_connections_at_once_all_succeed,
    an_idle_connection_outlives_the_keep_alive,
    a_reader_that_pauses_for_longer_than_any_timeout_loses_nothing,
    a_refused_application_port_looks_refused,
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
        let error = sees.read(&mut [0]).expect_err("a reset, not an end of file");
        ensure!(error.kind() == ErrorKind::ConnectionReset, "got {error}");
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
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let client = mesh.connect("checkout", mesh.ledger(8080))?;
    let (server, _) = listener.accept()?;
    thread::scope(|scope| {
        let up = scope.spawn(|| send_pattern(&client, 1, GIBIBYTE));
        let down = scope.spawn(|| send_pattern(&server, 2, GIBIBYTE));
        let at_server = scope.spawn(|| receive_pattern(&server));
        let at_client = scope.spawn(|| receive_pattern(&client));
        let up = up.join().unwrap()?;
        let down = down.join().unwrap()?;
        ensure!(at_server.join().unwrap()? == (GIBIBYTE, up), "the ledger got something else");
        ensure!(at_client.join().unwrap()? == (GIBIBYTE, down), "checkout got something else");
        Ok(())
    })
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
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            stream.write_all(&byte)?;
            open.push(stream);
        }
        Ok(())
    });
    let mut clients = Vec::new();
    for number in 0..AT_ONCE {
        let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
        client.set_read_timeout(Some(Duration::from_secs(60)))?;
        client.write_all(&[number as u8])?;
        clients.push(client);
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        ensure!(byte == [number as u8], "connection {number} got {byte:?}");
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

fn a_refused_application_port_looks_refused() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    // Allowed, but nobody listens.
    let outcome = match mesh.connect("checkout", mesh.ledger(8080)) {
        Ok(mut client) => client.read(&mut [0]),
        Err(error) => Err(error.downcast::<std::io::Error>()?),
    };
    let error = outcome.expect_err("a reset");
    ensure!(error.kind() == ErrorKind::ConnectionReset, "got {error}");
    let record = mesh.record("machine-a", |record| is(record, "close_reason", "unreachable"))?;
    ensure!(is(&record, "decision", "allow"), "{record}");
    Ok(())
}
