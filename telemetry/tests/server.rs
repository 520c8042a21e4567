//! The server over real TCP.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hauberk_telemetry::metrics::process_registry;
use hauberk_telemetry::{AgentMetrics, Health, State, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

struct Server {
    addr: SocketAddr,
    health: Health,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn start() -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let health = Health::new(&["control_plane", "policy"]);
    let metrics = AgentMetrics::new().unwrap();
    let registries = vec![metrics.registry().clone(), process_registry().unwrap()];
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move { drop(stopped.await) };
    let task = tokio::spawn(serve(listener, registries, health.clone(), shutdown));
    Server { addr, health, stop, task }
}

async fn send(addr: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn request(addr: SocketAddr, method: &str, path: &str) -> (String, String) {
    let text = format!("{method} {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n");
    let answer = send(addr, &text).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[tokio::test]
async fn metrics_are_served_as_prometheus_text() {
    let server = start().await;
    let (head, body) = request(server.addr, "GET", "/metrics").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    assert!(body.contains("\nhauberk_records_lost_total 0\n"), "{body}");
    assert!(body.contains("\nprocess_open_fds "), "{body}");
}

#[tokio::test]
async fn a_head_request_gets_the_length_and_no_body() {
    let server = start().await;
    let (head, body) = request(server.addr, "HEAD", "/metrics").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("content-length: "), "{head}");
    assert_eq!(body, "");
}

#[tokio::test]
async fn readiness_follows_the_checks_and_names_what_is_missing() {
    let server = start().await;
    server.health.set("policy", State::Ready);
    server.health.set("control_plane", State::NotReady("no route to cp:8443".to_owned()));
    let (head, body) = request(server.addr, "GET", "/readyz").await;
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    assert_eq!(body, "control_plane: not ready: no route to cp:8443\npolicy: ready\n");
    let (head, _) = request(server.addr, "GET", "/livez").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "not ready is no reason to be restarted: {head}");

    server.health.set("control_plane", State::Ready);
    let (head, body) = request(server.addr, "GET", "/readyz").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(body, "control_plane: ready\npolicy: ready\n");
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let server = start().await;
    let (head, _) = request(server.addr, "GET", "/debug").await;
    assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
    let (head, _) = request(server.addr, "POST", "/metrics").await;
    assert!(head.starts_with("HTTP/1.1 405 "), "{head}");
    assert!(head.contains("allow: GET, HEAD"), "{head}");
}

#[tokio::test]
async fn silent_connections_fill_the_places_for_five_seconds_only() {
    let server = start().await;
    let mut silent = Vec::new();
    for number in 0..64 {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        if number % 2 == 0 {
            stream.write_all(b"GET /met").await.unwrap();
        }
        silent.push(stream);
    }
    let start = Instant::now();
    let answer = timeout(Duration::from_secs(20), request(server.addr, "GET", "/livez")).await;
    let (head, _) = answer.unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let waited = start.elapsed();
    assert!(waited > Duration::from_secs(4), "more than 64 connections are served: {waited:?}");
    assert!(waited < Duration::from_secs(10), "silent connections are kept: {waited:?}");
}

#[tokio::test]
async fn a_shutdown_closes_the_port_and_idle_connections() {
    let server = start().await;
    let mut idle = TcpStream::connect(server.addr).await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nhost: agent\r\n\r\n").await.unwrap();
    let mut first = [0; 15];
    idle.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    let start = Instant::now();
    server.stop.send(()).unwrap();
    server.task.await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "waited for an idle connection");
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).await.unwrap();
    TcpStream::connect(server.addr).await.unwrap_err();
}
