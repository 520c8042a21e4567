//! What a node certificate is good for after its end, over the real wire: for its own renewal within the grace that
//! the operator sets, and for nothing else.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

mod place;

use std::{fs, time::Duration};

use hauberk_core::{svid::check_leaf, time::Timestamp};
use hauberk_proto::v1::{
    self, enrollment_client::EnrollmentClient, state_client::StateClient,
    workload_identity_client::WorkloadIdentityClient,
};
use hauberk_tls::{PrivateKey, signing_request};
use place::{Joined, PATIENCE, Place};
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use tonic::{Code, Status, transport::Channel};

const MACHINES: &str = "
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: machine-a}
spec: {addresses: [10.0.0.1]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: web, namespace: shop}
spec: {machine: machine-a, serviceAccount: web, process: {user: web}, ports: [80]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: machine-b}
spec: {addresses: [10.0.0.2]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: ledger, namespace: payments}
spec: {machine: machine-b, serviceAccount: ledger, process: {user: ledger}, ports: [5432]}
---
";

const NODE: &str = "spiffe://example.org/node/machine-a";

/// How long ago the certificates of these tests have expired. The intermediates that they are under are dated back
/// by 60 s, and no further.
const AGO: i64 = 20;

/// A moment of that certificate's life.
fn then() -> Timestamp {
    hauberk_tls::now().saturating_sub(Duration::from_secs(AGO.unsigned_abs() + 5))
}

/// A CA: the control plane's own, from its disk, or another of the same name.
struct Ca {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn of(place: &Place) -> Self {
        let folder = place.data().join("ca");
        let read = |name: &str| fs::read(folder.join(name)).unwrap();
        let certificate = CertificateDer::from(read("intermediate.crt.der"));
        let key = read("intermediate.key.der");
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key.as_slice())).unwrap();
        let issuer = Issuer::from_ca_cert_der(&certificate, key).unwrap();
        Self { certificate, issuer }
    }

    fn foreign() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = parameters.self_signed(&key).unwrap().der().clone();
        let issuer = Issuer::from_ca_cert_der(&certificate, key).unwrap();
        Self { certificate, issuer }
    }

    /// The certificate of `joined` as if it had been issued at another time: the same serial and key, valid until
    /// `end` seconds from now.
    fn dated(&self, joined: &Joined, id: &str, (start, end): (i64, i64)) -> Joined {
        let facts = check_leaf(joined.chain.first().unwrap(), hauberk_tls::now()).unwrap();
        let serial = hex::decode(facts.serial().to_string()).unwrap();
        let now = OffsetDateTime::now_utc();
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        parameters.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        parameters.is_ca = IsCa::ExplicitNoCa;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        parameters.serial_number = Some(SerialNumber::from_slice(&serial));
        parameters.not_before = now + time::Duration::seconds(start);
        parameters.not_after = now + time::Duration::seconds(end);
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(joined.key.pkcs8())).unwrap();
        let leaf = parameters.signed_by(&key, &self.issuer).unwrap().der().clone();
        Joined {
            key: PrivateKey::from_pkcs8(joined.key.pkcs8().to_vec()),
            chain: vec![leaf, self.certificate.clone()],
            roots: joined.roots.clone(),
        }
    }

    fn expired(&self, joined: &Joined) -> Joined {
        // As old as the certificate that it stands for, as far as the registry looks at it.
        self.dated(joined, NODE, (-59, -AGO))
    }
}

async fn renew(channel: &Channel) -> Result<Joined, Status> {
    let (key, certificate_request) = signing_request().unwrap();
    let request = v1::RenewNodeRequest { certificate_request };
    let answer = EnrollmentClient::new(channel.clone()).renew_node(request).await?;
    Ok(Joined::new(key, answer.into_inner()))
}

async fn issue(channel: &Channel) -> Result<(), Status> {
    let certificate_request = signing_request().unwrap().1;
    let request = v1::IssueRequest { workload: "shop/web".to_owned(), certificate_request };
    WorkloadIdentityClient::new(channel.clone()).issue(request).await.map(drop)
}

async fn subscribe(channel: &Channel) -> Result<(), Status> {
    let reports = tokio_stream::pending();
    StateClient::new(channel.clone()).subscribe(reports).await.map(drop)
}

/// What the control plane says of machine-a.
async fn standing(place: &Place) -> v1::NodeInfo {
    let status = place.operator().await.get_status(v1::GetStatusRequest {}).await.unwrap();
    status.into_inner().nodes.into_iter().find(|node| node.name == "machine-a").unwrap()
}

/// Runs a test against a control plane with this grace, with the identity of machine-a.
async fn with_grace(seconds: u64, test: impl AsyncFnOnce(&Place, Joined)) {
    let place = Place::new(MACHINES);
    let grace = Duration::from_secs(seconds);
    let running = async {
        let joined = place.join().await;
        test(&place, joined).await;
    };
    place.serve_with(|args| args.node_renewal_grace = grace, running).await;
}

fn expect_refused_handshake<T>(outcome: Result<T, Status>) {
    let Err(status) = outcome else { panic!("it was served") };
    // No service has answered: the connection failed under the call.
    let transport = std::error::Error::source(&status);
    assert!(transport.is_some_and(|error| error.is::<tonic::transport::Error>()), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_good_for_its_renewal_and_for_nothing_else() {
    with_grace(3600, async |place, joined| {
        let expired = Ca::of(place).expired(&joined).channel_as_of(place, then());
        for refused in [issue(&expired).await, subscribe(&expired).await] {
            let status = refused.unwrap_err();
            assert_eq!(status.code(), Code::Unauthenticated, "{status}");
            let told = status.message();
            assert!(told.contains("is good for its renewal at most"), "{told}");
        }
        let renewed = renew(&expired).await.unwrap();
        issue(&renewed.channel(place)).await.unwrap();
        // From its first use on, nobody gets anything for the one before, and nobody can lock the node with it.
        let status = renew(&expired).await.err().unwrap();
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(status.message().contains("has been superseded"), "{status}");
        assert_eq!(standing(place).await.locked, "");
        issue(&renewed.channel(place)).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_whose_answer_was_lost_may_be_repeated() {
    with_grace(3600, async |place, joined| {
        let expired = Ca::of(place).expired(&joined).channel_as_of(place, then());
        drop(renew(&expired).await.unwrap());
        let renewed = renew(&expired).await.unwrap();
        issue(&renewed.channel(place)).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_grace_an_expired_certificate_is_good_for_nothing() {
    with_grace(10, async |place, joined| {
        let expired = Ca::of(place).expired(&joined).channel_as_of(place, then());
        let status = renew(&expired).await.err().unwrap();
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        let told = status.message();
        assert!(told.contains("more than the --node-renewal-grace of 10 s later"), "{told}");
        for refused in [issue(&expired).await, subscribe(&expired).await] {
            assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
        }
        // What is wrong is the certificate's end, and nothing else.
        issue(&joined.channel(place)).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_grace_an_expired_certificate_is_refused_in_the_handshake() {
    with_grace(0, async |place, joined| {
        let expired = Ca::of(place).expired(&joined).channel_as_of(place, then());
        expect_refused_handshake(renew(&expired).await);
        expect_refused_handshake(issue(&expired).await);
        assert_eq!(standing(place).await.renewable_until_unix_ms, 0);
        issue(&joined.channel(place)).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_grace_is_for_certificates_of_the_own_ca_that_have_expired() {
    with_grace(3600, async |place, joined| {
        let foreign = Ca::foreign().expired(&joined).channel_as_of(place, then());
        expect_refused_handshake(renew(&foreign).await);
        let early = Ca::of(place).dated(&joined, NODE, (100, 200));
        let soon = hauberk_tls::now().saturating_add(Duration::from_secs(150));
        expect_refused_handshake(renew(&early.channel_as_of(place, soon)).await);
        // Nor is a workload's certificate renewed by it.
        let workload = "spiffe://example.org/ns/shop/sa/web";
        let workload = Ca::of(place).dated(&joined, workload, (-59, -AGO));
        let status = renew(&workload.channel_as_of(place, then())).await.err().unwrap();
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(status.message().contains("is not a node"), "{status}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_from_before_a_join_is_superseded() {
    with_grace(3600, async |place, joined| {
        let expired = Ca::of(place).expired(&joined).channel_as_of(place, then());
        let anew = place.join().await;
        let status = renew(&expired).await.err().unwrap();
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(status.message().contains("has been superseded"), "{status}");
        assert_eq!(standing(place).await.locked, "");
        issue(&anew.channel(place)).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_declared_no_more_gets_no_certificate_for_an_expired_one() {
    with_grace(3600, async |place, joined| {
        let expired = Ca::of(place).expired(&joined).channel_as_of(place, then());
        let second = MACHINES.rfind("apiVersion").unwrap();
        let second = MACHINES[..second].rfind("apiVersion").unwrap();
        place.put(&MACHINES[second..]);
        let gone = async {
            let mut operator = place.operator().await;
            loop {
                let status = operator.get_status(v1::GetStatusRequest {}).await.unwrap();
                if status.into_inner().nodes.iter().all(|node| node.name != "machine-a") {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.unwrap();
        let status = renew(&expired).await.err().unwrap();
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(status.message().contains("no Machine \"machine-a\" is declared"), "{status}");
        place.put(MACHINES);
        tokio::time::timeout(PATIENCE, async {
            while renew(&expired).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .unwrap();
    })
    .await;
}
