//! A Kubernetes API as replicas agree through it: objects of one namespace with their versions, and a clock.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use hauberk_core::time::Timestamp;
use hauberk_kubernetes::{Client, Shared};
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes},
    header::DATE,
};
use jiff::fmt::rfc2822::DateTimePrinter;
use serde_json::{Value, json};
use tower::Service;

const NAMESPACE: &str = "hauberk-system";
const PATH: &str = "/api/v1/namespaces/hauberk-system/";

pub(super) const ROOTS: &str = "secrets/hauberk-roots";
pub(super) const PUBLISHED: &str = "configmaps/hauberk-trust-bundle";

/// By kind and name.
pub(super) type Objects = BTreeMap<String, Value>;

#[derive(Clone)]
pub(super) struct FakeCluster(Arc<Mutex<State>>);

struct State {
    now: Timestamp,
    version: u64,
    objects: Objects,
    /// What somebody else has written by the time that an object is.
    meanwhile: BTreeMap<String, Objects>,
}

impl FakeCluster {
    pub(super) fn new(now: Timestamp) -> Self {
        let (objects, meanwhile) = (Objects::new(), BTreeMap::new());
        Self(Arc::new(Mutex::new(State { now, version: 0, objects, meanwhile })))
    }

    pub(super) fn shared(&self) -> Shared {
        Shared::new(Client::new(self.clone(), NAMESPACE), NAMESPACE.to_owned())
    }

    pub(super) fn set_time(&self, now: Timestamp) {
        self.state().now = now;
    }

    pub(super) fn objects(&self) -> Objects {
        self.state().objects.clone()
    }

    pub(super) fn restore(&self, objects: Objects) {
        self.state().objects = objects;
    }

    pub(super) fn delete(&self, key: &str) {
        self.state().objects.remove(key);
    }

    /// Somebody else writes all this just before the next write of an object.
    pub(super) fn write_meanwhile(&self, key: &str, objects: Objects) {
        self.state().meanwhile.insert(key.to_owned(), objects);
    }

    pub(super) fn put_secret(&self, name: &str, entries: &[(&str, Vec<u8>)]) {
        let entries = entries.iter().map(|(entry, bytes)| {
            let bytes = STANDARD.encode(bytes);
            ((*entry).to_owned(), Value::String(bytes))
        });
        let data: serde_json::Map<String, Value> = entries.collect();
        self.put(&format!("secrets/{name}"), "Secret", name, &json!(data));
    }

    /// What agents are told.
    pub(super) fn put_published(&self, pem: &str) {
        let data = json!({"roots.pem": pem});
        self.put(PUBLISHED, "ConfigMap", "hauberk-trust-bundle", &data);
    }

    pub(super) fn published(&self) -> Option<String> {
        let objects = self.objects();
        let data = &objects.get(PUBLISHED)?["data"];
        Some(data["roots.pem"].as_str().unwrap().to_owned())
    }

    /// What is kept of the roots.
    pub(super) fn roots(&self) -> Option<String> {
        let objects = self.objects();
        let data = &objects.get(ROOTS)?["data"];
        Some(data["roots.json"].as_str().unwrap().to_owned())
    }

    fn put(&self, key: &str, kind: &str, name: &str, data: &Value) {
        let object = json!({
            "apiVersion": "v1",
            "kind": kind,
            "metadata": {"name": name, "namespace": NAMESPACE},
            "data": data,
        });
        self.state().insert(key.to_owned(), object);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn answer(&self, method: &Method, path: &str, body: &[u8]) -> Response<Full<Bytes>> {
        let mut state = self.state();
        let (status, answer) = state.answer(method, path, body);
        let date = jiff::Timestamp::from_second(state.now.unix_seconds()).unwrap();
        let date = DateTimePrinter::new().timestamp_to_rfc9110_string(&date).unwrap();
        let answer = Full::new(Bytes::from(answer.to_string()));
        Response::builder().status(status).header(DATE, date).body(answer).unwrap()
    }
}

impl State {
    fn answer(&mut self, method: &Method, path: &str, body: &[u8]) -> (StatusCode, Value) {
        let Some(place) = path.strip_prefix(PATH) else { return (StatusCode::OK, json!({})) };
        if *method == Method::GET {
            return match self.objects.get(place) {
                Some(object) => (StatusCode::OK, object.clone()),
                None => refusal(StatusCode::NOT_FOUND, "NotFound"),
            };
        }
        let object: Value = serde_json::from_slice(body).unwrap();
        let metadata = &object["metadata"];
        let is_new = *method == Method::POST;
        let key = match is_new {
            true => format!("{place}/{}", metadata["name"].as_str().unwrap()),
            false => place.to_owned(),
        };
        if let Some(objects) = self.meanwhile.remove(&key) {
            self.objects = objects;
        }
        let version_of = |object: &Value| object["metadata"]["resourceVersion"].clone();
        let there = self.objects.get(&key).map(version_of);
        let read = (!is_new).then(|| version_of(&object));
        if there != read {
            return refusal(StatusCode::CONFLICT, "Conflict");
        }
        (StatusCode::OK, self.insert(key, object))
    }

    fn insert(&mut self, key: String, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(key, object.clone());
        object
    }
}

fn refusal(status: StatusCode, reason: &str) -> (StatusCode, Value) {
    let code = status.as_u16();
    let body = json!({"kind": "Status", "status": "Failure", "reason": reason, "code": code});
    (status, body)
}

/// As it is behind [`Client`], whose bodies are of no type that has a name here.
impl<B> Service<Request<B>> for FakeCluster
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: fmt::Debug,
{
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let cluster = self.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            Ok(cluster.answer(&parts.method, parts.uri.path(), &body))
        })
    }
}
