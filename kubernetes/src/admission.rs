//! What the API server asks before it stores a custom resource, and what it is answered: always that it may,
//! and what whoever wrote the object should know of it.

use kube::core::{
    DynamicObject, GroupVersionKind,
    admission::{AdmissionResponse, AdmissionReview},
};

use crate::objects::ManifestObject;

/// The group of our kinds.
const GROUP: &str = "hauberk.dev";

/// Our kinds.
const KINDS: [&str; 4] = ["AccessPolicy", "Guardrail", "Machine", "Workload"];

/// It is no question of an API server.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// It cannot be read.
    #[error("it is not an AdmissionReview: {0}")]
    NotReadable(#[source] serde_json::Error),
    /// It is not a question.
    #[error("the AdmissionReview has no request")]
    NoRequest,
}

/// A question: may this be stored?
#[derive(Debug)]
pub struct Review {
    /// The object, if there is something to say of it: it is one of ours, stays, and has its name already.
    pub object: Option<ManifestObject>,
    /// The way to answer.
    pub answer: Answer,
}

/// The answer to one question.
#[derive(Debug)]
pub struct Answer(AdmissionResponse);

impl Review {
    /// Reads an `AdmissionReview`.
    ///
    /// # Errors
    /// If it is none, or one without a question.
    pub fn read(body: &[u8]) -> Result<Self, ReviewError> {
        let review: AdmissionReview<DynamicObject> =
            serde_json::from_slice(body).map_err(ReviewError::NotReadable)?;
        let mut request = review.request.ok_or(ReviewError::NoRequest)?;
        request.types = review.types;
        let answer = Answer(AdmissionResponse::from(&request));
        let kind = ours(&request.kind);
        let object = kind.zip(request.object).and_then(|(kind, object)| declared(kind, object));
        Ok(Self { object, answer })
    }
}

impl Answer {
    /// It may be stored; whoever stores it is told these. As JSON.
    #[must_use]
    pub fn allow(self, warnings: Vec<String>) -> Vec<u8> {
        let mut response = self.0;
        response.warnings = (!warnings.is_empty()).then_some(warnings);
        serde_json::to_vec(&response.into_review()).unwrap_or_default()
    }
}

fn ours(asked: &GroupVersionKind) -> Option<&'static str> {
    let mut kinds = KINDS.into_iter().filter(|_| asked.group == GROUP);
    kinds.find(|kind| asked.kind == **kind)
}

/// What is about to go needs no word, and what has no name yet (`metadata.generateName`) is no manifest.
fn declared(kind: &'static str, object: DynamicObject) -> Option<ManifestObject> {
    let meta = &object.metadata;
    let goes = meta.deletion_timestamp.is_some();
    let named = meta.name.as_ref().is_some_and(|name| !name.is_empty());
    (named && !goes).then(|| ManifestObject::new(kind, object))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn question(kind: &str, object: Value) -> Value {
        json!({
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "request": {
                "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
                "kind": {"group": "hauberk.dev", "version": "v1alpha1", "kind": kind},
                "resource": {"group": "hauberk.dev", "version": "v1alpha1", "resource": "some"},
                "name": "ledger",
                "namespace": "payments",
                "operation": "CREATE",
                "userInfo": {"username": "somebody"},
                "object": object,
                "oldObject": null,
                "dryRun": false,
            },
        })
    }

    fn policy(metadata: Value) -> Value {
        json!({
            "apiVersion": "hauberk.dev/v1alpha1",
            "kind": "AccessPolicy",
            "metadata": metadata,
            "spec": {"rules": []},
            "status": {"lastAccepted": "made up"},
        })
    }

    fn read(question: &Value) -> Review {
        Review::read(question.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn the_object_is_read_as_one_that_is_stored() {
        let metadata =
            json!({"name": "ledger", "namespace": "payments", "uid": "1", "labels": {"a": "b"}});
        let object = read(&question("AccessPolicy", policy(metadata))).object.unwrap();
        assert_eq!(object.source(), "AccessPolicy payments/ledger");
        let manifest: Value = serde_json::from_str(&object.text).unwrap();
        let wanted = json!({
            "apiVersion": "hauberk.dev/v1alpha1",
            "kind": "AccessPolicy",
            "metadata": {"name": "ledger", "namespace": "payments", "labels": {"a": "b"}},
            "spec": {"rules": []},
        });
        assert_eq!(manifest, wanted);
    }

    #[test]
    fn the_answer_is_yes_to_the_same_question_with_the_warnings() {
        let metadata = json!({"name": "ledger", "namespace": "payments"});
        let asked = question("AccessPolicy", policy(metadata));
        let answer = |warnings| -> Value {
            serde_json::from_slice(&read(&asked).answer.allow(warnings)).unwrap()
        };
        let quiet = answer(Vec::new());
        assert_eq!(quiet["apiVersion"], "admission.k8s.io/v1");
        assert_eq!(quiet["kind"], "AdmissionReview");
        assert_eq!(quiet["response"]["uid"], asked["request"]["uid"]);
        assert_eq!(quiet["response"]["allowed"], true);
        assert!(quiet["response"].get("warnings").is_none(), "{quiet}");
        let warned = answer(vec!["beware".to_owned()]);
        assert_eq!(warned["response"]["allowed"], true);
        assert_eq!(warned["response"]["warnings"], json!(["beware"]));
    }

    #[test]
    fn of_what_is_not_ours_or_goes_or_has_no_name_nothing_is_said() {
        let named = json!({"name": "ledger", "namespace": "payments"});
        let going = json!({
            "name": "ledger",
            "namespace": "payments",
            "deletionTimestamp": "2026-11-01T00:00:00Z",
        });
        let unnamed = json!({"generateName": "ledger-", "namespace": "payments"});
        let mut foreign = question("AccessPolicy", policy(named.clone()));
        foreign["request"]["kind"]["group"] = json!("example.org");
        for asked in [
            foreign,
            question("Secret", policy(named)),
            question("AccessPolicy", policy(going)),
            question("AccessPolicy", policy(unnamed)),
            question("AccessPolicy", Value::Null),
        ] {
            assert!(read(&asked).object.is_none(), "{asked}");
        }
    }

    #[test]
    fn what_is_no_question_is_refused() {
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"});
        let error = Review::read(review.to_string().as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "the AdmissionReview has no request");
        for body in ["", "{", "[]", "{\"kind\": \"AdmissionReview\", \"request\": 1}"] {
            let error = Review::read(body.as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with("it is not an AdmissionReview: "), "{error}");
        }
    }
}
