#!/usr/bin/env bash
# kube (the Rust client) 5.0.0: a call that the API server answers with 503 does not fail, nor say anything, for minutes.
#
# The client that `Client::try_from(config)` makes tries answers of 429, 503 and 504 again by itself (`Config::default_retry`, on by
# default): 15 times, with pauses that double from 5 ms up to a ceiling of 1,000 s, 164 s in all without chance. A caller that has a
# backoff of its own adds that on top, and a change that waits for one such call comes up to half of the outage late. With
# `default_retry = false` the same call fails at once, after one request.
#
# Seen with kube 5.0.0: after 20 s the call had not returned, and the server had seen 12 requests.
set -euo pipefail
command -v cargo >/dev/null && command -v python3 >/dev/null || { echo "needs cargo and python3" >&2; exit 2; }
work="$(mktemp -d)"
server=""
trap 'kill $server 2>/dev/null || true; rm -rf "$work"' EXIT
cd "$work"
cat >server.py <<'PY'
import http.server

class Away(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with open("requests", "a") as requests:
            requests.write("one\n")
        body = b'{"kind":"Status","apiVersion":"v1","status":"Failure","message":"away","reason":"ServiceUnavailable","code":503}'
        self.send_response(503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Away)
with open("port", "w") as port:
    port.write(str(server.server_port))
server.serve_forever()
PY
python3 server.py &
server=$!
mkdir -p trial/src
cat >trial/Cargo.toml <<'TOML'
[package]
name = "trial"
version = "0.0.0"
edition = "2024"
[dependencies]
kube = { version = "=5.0.0", default-features = false, features = ["aws-lc-rs", "client", "rustls-tls"] }
k8s-openapi = { version = "=0.29.0", features = ["v1_33"] }
tokio = { version = "1", features = ["macros", "rt", "time"] }
TOML
cat >trial/src/main.rs <<'RS'
use std::time::{Duration, Instant};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let port = std::env::args().nth(1).unwrap();
    let mut config = kube::Config::new(format!("http://127.0.0.1:{port}").parse().unwrap());
    config.default_retry = std::env::args().nth(2).unwrap() == "default";
    let pods = kube::Api::<k8s_openapi::api::core::v1::Pod>::default_namespaced(
        kube::Client::try_from(config).unwrap(),
    );
    let since = Instant::now();
    let answered = tokio::time::timeout(Duration::from_secs(20), pods.get("any")).await;
    let text = match answered {
        Ok(Ok(_)) => "a pod".to_owned(),
        Ok(Err(error)) => format!("an error ({error})"),
        Err(_) => "nothing".to_owned(),
    };
    println!("{text} after {:.1} s", since.elapsed().as_secs_f64());
}
RS
cargo build --quiet --manifest-path trial/Cargo.toml
ask() {
    : >requests
    told="$(trial/target/debug/trial "$(cat port)" "$1")"
    count="$(wc -l <requests)"
    echo "$1: $told, $count requests"
}
ask none
[[ "$told" == "an error"* && "$count" == 1 ]]
ask default
[[ "$told" == "nothing after 20"* && "$count" -ge 8 && "$count" -le 16 ]]
