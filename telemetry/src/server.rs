//! The small HTTP server for Prometheus and for probes.
//!
//! Serves `/metrics`, `/readyz` and `/livez` to whoever reaches its port, and nothing else. It
//! reads no request body and is bounded in connections and in time, as its port may be open to
//! the node's network.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Registry, TEXT_FORMAT, TextEncoder};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::fields;
use crate::health::Health;

/// A few scrapers and probes; more wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 64;

/// A scraper sends its request at once; who does not is holding a place.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Ends connections whose peer does not read the answer.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);

/// What requests in progress get at a shutdown: within the drain of any process manager.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// Pause after a failed accept, so that being out of descriptors does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

const PLAIN_TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const METRICS_TEXT: HeaderValue = HeaderValue::from_static(TEXT_FORMAT);

/// Serves the registries and the checks until `shutdown` is ready, then lets requests in
/// progress finish for a few seconds.
///
/// A metric must be in one of the registries only.
pub async fn serve(
    listener: TcpListener,
    registries: Vec<Registry>,
    health: Health,
    shutdown: impl Future<Output = ()>,
) {
    let pages = Arc::new(Pages { registries, health });
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (closing, closed) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let (stream, place) = tokio::select! {
            () = &mut shutdown => break,
            // Takes finished tasks out of the set as they end.
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &places) => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!({ fields::ERROR } = %error, "metrics connection not accepted");
                    sleep(ACCEPT_RETRY).await;
                    continue;
                }
            },
        };
        connections.spawn(serve_connection(stream, place, Arc::clone(&pages), closed.clone()));
    }
    drop(listener);
    drop(closing);
    let drained =
        timeout(SHUTDOWN_GRACE, async { while connections.join_next().await.is_some() {} });
    if drained.await.is_err() {
        connections.abort_all();
    }
}

/// Takes a place before a connection, so that nothing over the limit is accepted and held.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

async fn serve_connection(
    stream: TcpStream,
    place: OwnedSemaphorePermit,
    pages: Arc<Pages>,
    mut closed: watch::Receiver<()>,
) {
    let service = service_fn(move |request| {
        let pages = Arc::clone(&pages);
        async move { Ok::<_, Infallible>(pages.answer(&request).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_READ_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
    );
    let served = timeout(CONNECTION_LIFETIME, async {
        tokio::select! {
            result = connection.as_mut() => return result,
            // An error means that the server drops its end: it is shutting down.
            _ = closed.changed() => connection.as_mut().graceful_shutdown(),
        }
        connection.as_mut().await
    });
    if let Ok(Err(error)) = served.await {
        tracing::debug!({ fields::ERROR } = %error, "metrics connection failed");
    }
    drop(place);
}

struct Pages {
    registries: Vec<Registry>,
    health: Health,
}

impl Pages {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "use GET or HEAD\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/metrics" => self.metrics().await,
            "/readyz" if self.health.is_ready() => text(StatusCode::OK, self.health.report()),
            "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, self.health.report()),
            // Answering is being alive. A part that is not ready is no reason to be restarted:
            // that would cut live connections and mend nothing.
            "/livez" => text(StatusCode::OK, self.health.report()),
            _ => text(StatusCode::NOT_FOUND, "try /metrics, /readyz or /livez\n"),
        }
    }

    async fn metrics(&self) -> Response<Full<Bytes>> {
        let registries = self.registries.clone();
        // Thousands of series take milliseconds, which connections on this thread would feel.
        let encoded = tokio::task::spawn_blocking(move || encode(&registries)).await;
        let failure = match encoded {
            Ok(Ok(page)) => {
                let mut response = text(StatusCode::OK, page);
                response.headers_mut().insert(CONTENT_TYPE, METRICS_TEXT);
                return response;
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::error!({ fields::ERROR } = failure, "metrics cannot be written");
        text(StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be written, see the log\n")
    }
}

fn encode(registries: &[Registry]) -> prometheus::Result<String> {
    let mut page = String::new();
    for registry in registries {
        TextEncoder::new().encode_utf8(&registry.gather(), &mut page)?;
    }
    Ok(page)
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, PLAIN_TEXT);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
