//! Certificates: who gets which, how they are renewed under load, and what stolen ones are worth.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::Output,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use hauberk_core::{
    identity::SpiffeId,
    session::{ALPN, ALPN_MULTIPLEXED},
};
use hauberk_proto::v1::{
    IssueRequest, JoinRequest, enrollment_client::EnrollmentClient,
    workload_identity_client::WorkloadIdentityClient,
};
use hauberk_tests::{
    mesh::{Mesh, is},
    stolen::Stolen,
};
use hauberk_tls::signing_request;
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};

use crate::policy::is_cut;

crate::trials!(
    ten_renewals_under_load_cost_no_connection,
    a_connection_ends_with_its_certificate_if_that_is_not_renewed,
    a_join_token_is_good_once,
    an_expired_or_damaged_join_token_is_refused,
    a_join_token_that_names_another_root_is_refused_and_stays_good,
    a_node_gets_no_certificate_of_another_nodes_workload,
    a_request_cannot_name_its_identity_or_become_a_ca,
    garbage_instead_of_a_request_is_refused_and_audited,
    a_cloned_node_credential_is_refused_and_locks_the_node,
    a_flood_of_requests_for_certificates_slows_down_its_node_only,
    a_call_without_certificate_is_refused,
    loose_file_modes_are_refused,
    no_key_or_token_is_in_any_log,
    no_core_file_can_hold_a_key,
);

pub(crate) const LEDGER: &str = "spiffe://example.org/ns/payments/sa/ledger";
const WEB: &str = "spiffe://example.org/ns/shop/sa/web";

/// A certificate chain with its key.
pub(crate) struct Forged {
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
}

impl Forged {
    /// A server that shows this certificate to everybody and asks nobody for one.
    pub(crate) fn server_config(self) -> anyhow::Result<rustls::ServerConfig> {
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        let mut config =
            rustls::ServerConfig::builder_with_provider(hauberk_tls::provider().clone())
                .with_protocol_versions(&[&rustls::version::TLS13])?
                .with_no_client_auth()
                .with_single_cert(self.chain, key.into())?;
        config.alpn_protocols = vec![ALPN_MULTIPLEXED.to_vec(), ALPN.to_vec()];
        Ok(config)
    }

    /// For who makes a credential of it.
    pub(crate) fn chain_and_key(self) -> (Vec<CertificateDer<'static>>, Vec<u8>) {
        (self.chain, self.key.serialize_der())
    }

    /// A client that shows it, and takes whatever certificate the server shows.
    pub(crate) fn client_config(
        forged: Option<Self>,
        protocols: &[&[u8]],
    ) -> anyhow::Result<rustls::ClientConfig> {
        let builder = rustls::ClientConfig::builder_with_provider(hauberk_tls::provider().clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TakesAnybody));
        let mut config = match forged {
            None => builder.with_no_client_auth(),
            Some(forged) => {
                let key = PrivatePkcs8KeyDer::from(forged.key.serialize_der());
                builder.with_client_auth_cert(forged.chain, key.into())?
            }
        };
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(config)
    }
}

/// Makes certificates that no honest issuer would.
pub(crate) struct Forger {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Forger {
    /// With a CA of its own, named like the mesh's.
    pub(crate) fn foreign() -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut parameters = CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        parameters.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let certificate = parameters.self_signed(&key)?.der().clone();
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self { certificate, issuer })
    }

    /// With the mesh's own intermediate, taken from the disk of its control plane.
    pub(crate) fn with_the_key_of(mesh: &Mesh) -> anyhow::Result<Self> {
        let folder = mesh.folder().join("control-plane/ca");
        let certificate = CertificateDer::from(fs::read(folder.join("intermediate.crt.der"))?);
        let key = fs::read(folder.join("intermediate.key.der"))?;
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key.as_slice()))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self { certificate, issuer })
    }

    /// A leaf as it should be, but for a change.
    pub(crate) fn leaf(
        &self,
        id: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> anyhow::Result<Forged> {
        let key = KeyPair::generate()?;
        let chain = self.chain_for(&key, id, change)?;
        Ok(Forged { chain, key })
    }

    /// The chain of such a leaf, for a key that is there.
    pub(crate) fn chain_for(
        &self,
        key: &KeyPair,
        id: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> anyhow::Result<Vec<CertificateDer<'static>>> {
        let now = time::OffsetDateTime::now_utc();
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.subject_alt_names = vec![rcgen::SanType::URI(id.try_into()?)];
        parameters.is_ca = rcgen::IsCa::ExplicitNoCa;
        parameters.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![
            rcgen::ExtendedKeyUsagePurpose::ServerAuth,
            rcgen::ExtendedKeyUsagePurpose::ClientAuth,
        ];
        parameters.not_before = now - time::Duration::minutes(10);
        parameters.not_after = now + time::Duration::minutes(10);
        change(&mut parameters);
        let leaf = parameters.signed_by(key, &self.issuer)?.der().clone();
        Ok(vec![leaf, self.certificate.clone()])
    }
}

/// Tries to open a session to the ledger with this certificate. TLS 1.3 tells a refused client only
/// when it reads.
pub(crate) fn tls_attempt(mesh: &Mesh, forged: Option<Forged>) -> anyhow::Result<()> {
    let mut stream = tls_stream(mesh, forged)?;
    stream.write_all(b"\x01\0\0\0")?;
    match stream.read(&mut [0])? {
        0 => bail!("closed"),
        _ => Ok(()),
    }
}

/// A TLS connection that we make ourselves.
pub(crate) type TlsStream = rustls::StreamOwned<rustls::ClientConnection, TcpStream>;

/// A TLS connection from outside to the ledger's agent with this certificate, taking whatever the
/// ledger shows. Its handshake comes with the first byte.
pub(crate) fn tls_stream(mesh: &Mesh, forged: Option<Forged>) -> anyhow::Result<TlsStream> {
    tls_stream_to(mesh, forged, LEDGER, mesh.ledger(15_008), &[ALPN])
}

/// The same to anybody's agent, with these application protocols.
pub(crate) fn tls_stream_to(
    mesh: &Mesh,
    forged: Option<Forged>,
    id: &str,
    agent: SocketAddr,
    protocols: &[&[u8]],
) -> anyhow::Result<TlsStream> {
    let config = Arc::new(Forged::client_config(forged, protocols)?);
    let name = ServerName::try_from(id.parse::<SpiffeId>()?.server_name())?;
    let connection = rustls::ClientConnection::new(config, name)?;
    Ok(rustls::StreamOwned::new(connection, mesh.connect("outside", agent)?))
}

/// What a caller of the ledger says first, if everything about it is in order.
pub(crate) fn client_hello() -> anyhow::Result<Vec<u8>> {
    let config = Arc::new(Forged::client_config(None, &[ALPN])?);
    let name = ServerName::try_from(LEDGER.parse::<SpiffeId>()?.server_name())?;
    let mut hello = Vec::new();
    rustls::ClientConnection::new(config, name)?.write_tls(&mut hello)?;
    Ok(hello)
}

#[derive(Debug)]
struct TakesAnybody;

impl rustls::client::danger::ServerCertVerifier for TakesAnybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("no TLS 1.2".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        hauberk_tls::provider().signature_verification_algorithms.supported_schemes()
    }
}

fn ten_renewals_under_load_cost_no_connection() -> anyhow::Result<()> {
    const RENEWALS: f64 = 10.0;
    let mesh = Mesh::start_with(&["--workload-certificate-lifetime", "10s"])?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count) = stream.read(&mut buffer) {
                    if count == 0 || stream.write_all(&buffer[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let mut long = mesh.connect("checkout", mesh.ledger(8080))?;
    let echo = |stream: &mut TcpStream, number: u32| -> anyhow::Result<()> {
        stream.write_all(&number.to_be_bytes())?;
        let mut back = [0; 4];
        stream.read_exact(&mut back)?;
        ensure!(back == number.to_be_bytes(), "got something else back");
        Ok(())
    };
    let renewals = |machine| {
        let parts = ["kind=\"install\"", "result=\"success\""];
        mesh.metric(machine, "hauberk_certificate_renewals_total", &parts)
    };
    let started = Instant::now();
    for number in 0_u32.. {
        echo(&mut long, number).with_context(|| {
            format!("the long connection, after {:?}\n{}", started.elapsed(), mesh.logs())
        })?;
        let mut short = mesh.connect("checkout", mesh.ledger(8080))?;
        echo(&mut short, number).with_context(|| {
            format!("a new connection, after {:?}\n{}", started.elapsed(), mesh.logs())
        })?;
        thread::sleep(Duration::from_millis(50));
        // machine-a has two workloads, machine-b one.
        if number % 20 == 0
            && renewals("machine-b")? > RENEWALS
            && renewals("machine-a")? > 2.0 * RENEWALS
        {
            break;
        }
        ensure!(started.elapsed() < Duration::from_secs(150), "the certificates are not renewed");
    }
    Ok(())
}

fn a_connection_ends_with_its_certificate_if_that_is_not_renewed() -> anyhow::Result<()> {
    let mut mesh = Mesh::start_with(&["--workload-certificate-lifetime", "10s"])?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
    client.write_all(b"x")?;
    let (mut server, _) = listener.accept()?;
    server.read_exact(&mut [0])?;
    mesh.stop("control-plane");
    let stopped = Instant::now();
    client.set_read_timeout(Some(Duration::from_secs(20)))?;
    is_cut(&mut client)?;
    ensure!(stopped.elapsed() < Duration::from_secs(12), "cut after {:?}", stopped.elapsed());
    let cut = |record: &serde_json::Value| is(record, "reason", "expired_cert");
    let record = mesh.record("machine-a", cut).or_else(|_| mesh.record("machine-b", cut))?;
    ensure!(is(&record, "decision", "allow"), "{record}");
    // And no new one opens.
    let mut late = mesh.connect("checkout", mesh.ledger(8080));
    let answered = late.as_mut().is_ok_and(|late| matches!(late.read(&mut [0]), Ok(n) if n > 0));
    ensure!(!answered, "a connection without a certificate was opened");
    Ok(())
}

fn join(mesh: &Mesh, token: &str, data: &str) -> anyhow::Result<Output> {
    let mut command = mesh.hauberk()?;
    command
        .args([
            "agent",
            "--stop-with-stdin",
            "--metrics",
            "127.0.0.1:0",
            "--join-token",
            token,
            "--data",
        ])
        .arg(mesh.folder().join(data))
        .stdin(std::process::Stdio::null());
    mesh.output("outside", &mut command)
}

fn a_join_token_is_good_once() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let token = mesh.token("machine-a")?;
    let first = join(&mesh, &token, "first")?;
    ensure!(first.status.success(), "{first:?}");
    let second = join(&mesh, &token, "second")?;
    ensure!(!second.status.success(), "the token was good twice");
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    ensure!(error.contains("has been used before") && error.contains("token create"), "{error}");
    ensure!(!mesh.folder().join("second/node.json").exists(), "an identity was kept");
    let refusal = ["a join token was refused: unknown or used before", "addr=\"10.77.0.99:"];
    ensure!(audited(&mesh, &refusal)? == 1, "the refusal was not audited");
    Ok(())
}

/// How many lines the control plane has written for auditors that have all these parts.
fn audited(mesh: &Mesh, parts: &[&str]) -> anyhow::Result<usize> {
    let log = fs::read_to_string(mesh.log("control-plane"))?;
    let lines = log.lines().filter(|line| line.contains(" hauberk.audit: "));
    Ok(lines.filter(|line| parts.iter().all(|part| line.contains(part))).count())
}

fn an_expired_or_damaged_join_token_is_refused() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let made = mesh.ask(&["token", "create", "--node", "machine-a", "--ttl", "1s"])?;
    let token = String::from_utf8(made.stdout)?.trim().to_owned();
    thread::sleep(Duration::from_millis(1_500));
    let late = join(&mesh, &token, "late")?;
    ensure!(String::from_utf8_lossy(&late.stderr).contains("has expired"), "{late:?}");
    let refusal = ["a join token was refused: expired", "addr=\"10.77.0.99:"];
    ensure!(audited(&mesh, &refusal)? == 1, "the refusal was not audited");
    let cut = join(&mesh, &token[..token.len() - 4], "cut")?;
    ensure!(String::from_utf8_lossy(&cut.stderr).contains("not a join token"), "{cut:?}");
    let unknown = mesh.ask(&["token", "create", "--node", "machine-z"])?;
    let error = String::from_utf8_lossy(&unknown.stderr).into_owned();
    ensure!(!unknown.status.success() && error.contains("machine-a, machine-b"), "{error}");
    Ok(())
}

fn a_join_token_that_names_another_root_is_refused_and_stays_good() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let token = mesh.token("machine-a")?;
    // The right control plane, but the token names another root: whoever sits there is not trusted,
    // and is not told the secret.
    let mut parts: Vec<String> = token.split('.').map(str::to_owned).collect();
    parts[2] = "A".repeat(43);
    let refused = join(&mesh, &parts.join("."), "other-root")?;
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "another root was taken: {error}");
    ensure!(error.contains("not the one that the join token names"), "{error}");
    ensure!(!mesh.folder().join("other-root/node.json").exists(), "an identity was kept");
    let joined = join(&mesh, &token, "right-root")?;
    ensure!(joined.status.success(), "{}", String::from_utf8_lossy(&joined.stderr));
    Ok(())
}

/// A connection to the control plane's port for agents, from a machine of the mesh.
fn control_plane(mesh: &Mesh) -> anyhow::Result<TcpStream> {
    let address = SocketAddr::new(hauberk_cli::lab::ipv4(hauberk_cli::lab::CONTROL_PLANE), 8443);
    mesh.connect("machine-a", address)
}

/// Somebody with the credential that a machine's agent keeps.
fn thief_of(mesh: &Mesh, machine: &str) -> anyhow::Result<Stolen> {
    let kept = fs::read(mesh.folder().join(machine).join("node.json"))?;
    Stolen::open(&kept, control_plane(mesh)?)
}

/// Many requests, 64 at once; after the first refusal no more are made. Those under way are waited
/// for: a client that gives up dozens of calls at once is cut off by HTTP/2 itself.
fn flood(thief: &Stolen, workload: &str, request: &[u8], count: usize) -> Option<tonic::Status> {
    use futures_util::StreamExt;
    let over = std::cell::Cell::new(false);
    let calls = (0..count).map(|_| {
        let mut client = WorkloadIdentityClient::new(thief.channel());
        let request =
            IssueRequest { workload: workload.to_owned(), certificate_request: request.to_vec() };
        let over = &over;
        async move {
            if over.get() {
                return None;
            }
            let refused = client.issue(request).await.err();
            over.set(over.get() || refused.is_some());
            refused
        }
    });
    let all = futures_util::stream::iter(calls).buffer_unordered(64).collect::<Vec<_>>();
    thief.runtime().block_on(all).into_iter().flatten().next()
}

fn a_node_gets_no_certificate_of_another_nodes_workload() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let stolen = thief_of(&mesh, "machine-a")?;
    let request = || Ok::<_, anyhow::Error>(signing_request()?.1);
    stolen.issue("shop/web", request()?).context("its own workload")?;
    for foreign in ["payments/ledger", "payments/nobody", "machine/machine-b"] {
        let status = stolen.issue(foreign, request()?).expect_err("a foreign identity was issued");
        ensure!(status.code() == tonic::Code::PermissionDenied, "{foreign}: {status}");
        let workload = format!("workload=\"{foreign}\"");
        let refusal = ["an identity was refused", "node=\"machine-a\"", &workload];
        ensure!(audited(&mesh, &refusal)? == 1, "{foreign}: the refusal was not audited");
    }
    Ok(())
}

/// What a request asks for beside a certificate for its key.
type Wish = fn(&mut CertificateParams);

fn a_request_cannot_name_its_identity_or_become_a_ca() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let stolen = thief_of(&mesh, "machine-a")?;
    let cases: [(&str, Wish); 4] = [
        ("names of another", |wish| {
            wish.subject_alt_names.push(rcgen::SanType::URI(LEDGER.try_into().unwrap()));
            wish.distinguished_name.push(rcgen::DnType::CommonName, "root");
        }),
        ("the usage of a CA", |wish| {
            wish.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        }),
        ("the flag of a CA", |wish| {
            wish.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        }),
        ("the flag of a CA, not critical", |wish| {
            // Basic constraints of which cA is true.
            let flag = vec![0x30, 0x03, 0x01, 0x01, 0xff];
            let flag = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 19], flag);
            wish.custom_extensions.push(flag);
        }),
    ];
    let spiffe_id = format!("spiffe_id={WEB}");
    let issued = ["an identity was issued", "node=\"machine-a\"", &spiffe_id];
    for (name, wishes) in cases {
        let before = audited(&mesh, &issued)?;
        let mut wish = CertificateParams::new(vec!["ledger.payments.svc".to_owned()])?;
        wishes(&mut wish);
        let request = wish.serialize_request(&KeyPair::generate()?)?.der().to_vec();
        let chain = stolen.issue("shop/web", request).context(name)?;
        let leaf = chain.first().context("no certificate")?;
        // Refuses whatever is flagged as a CA or may sign certificates.
        let facts = hauberk_core::svid::check_leaf(leaf, hauberk_tls::now()).context(name)?;
        ensure!(facts.id().as_str() == WEB, "{name}: {facts:?}");
        let text = String::from_utf8_lossy(leaf);
        ensure!(!text.contains("ledger"), "{name}: the certificate carries a wish of the request");
        ensure!(audited(&mesh, &issued)? == before + 1, "{name}: it was not audited as web's");
    }
    Ok(())
}

fn garbage_instead_of_a_request_is_refused_and_audited() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let stolen = thief_of(&mesh, "machine-a")?;
    // As it should be, but for a bit of its signature.
    let mut unproven = signing_request()?.1;
    *unproven.last_mut().context("an empty request")? ^= 1;
    let cases = [Vec::new(), vec![0x30; 64], vec![0; 100_000], unproven];
    for (garbage, refusals) in cases.into_iter().zip(1_usize..) {
        let status = stolen.issue("shop/web", garbage).expect_err("garbage was signed");
        ensure!(status.code() == tonic::Code::InvalidArgument, "{status}");
        let refusal = ["refused", "node=\"machine-a\"", "workload=\"shop/web\""];
        let told = audited(&mesh, &refusal)?;
        ensure!(told == refusals, "{told} of {refusals} refusals were audited");
    }
    Ok(())
}

/// What auditors are told of a call of machine-a, once that is locked.
const LOCKED: [&str; 2] = ["a call of a locked node was refused", "node=machine-a"];

fn a_cloned_node_credential_is_refused_and_locks_the_node() -> anyhow::Result<()> {
    // A late call of the node itself is no clone: for a tenth of this, 2 s.
    let mesh = Mesh::start_with(&["--node-certificate-lifetime", "20s"])?;
    let before = fs::read(mesh.folder().join("machine-a/node.json"))?;
    // A copy renews, and uses what it got; the original's next call shows the copy.
    let copy = Stolen::open(&before, control_plane(&mesh)?)?;
    let (key, request) = signing_request()?;
    let renewed = copy.renew(request).context("the copy renews first")?;
    let kept = serde_json::json!({
        "key": STANDARD.encode(key.pkcs8()),
        "chain": renewed.certificate_chain.iter().map(|c| STANDARD.encode(c)).collect::<Vec<_>>(),
        "bundle": renewed.trust_bundle.iter().map(|c| STANDARD.encode(c)).collect::<Vec<_>>(),
    });
    let renewed = Stolen::open(&serde_json::to_vec(&kept)?, control_plane(&mesh)?)?;
    renewed.issue("shop/web", signing_request()?.1).context("the renewed certificate")?;
    let original = Stolen::open(&before, control_plane(&mesh)?)?;
    let status = original.issue("shop/web", signing_request()?.1).expect_err("both are good");
    ensure!(status.message().contains("superseded"), "{status}");
    std::thread::sleep(std::time::Duration::from_secs(3));
    let status = original.issue("shop/web", signing_request()?.1).expect_err("both are good");
    ensure!(status.message().contains("is locked"), "{status}");
    let status = renewed.issue("shop/web", signing_request()?.1).expect_err("the copy lives on");
    ensure!(status.message().contains("is locked"), "{status}");
    // Nor does it live longer than its certificate.
    let told = audited(&mesh, &LOCKED)?;
    for (name, holder) in [("the original", &original), ("the copy", &renewed)] {
        let status = holder
            .renew(signing_request()?.1)
            .err()
            .with_context(|| format!("{name} renewed the certificate of a locked node"))?;
        ensure!(status.code() == tonic::Code::PermissionDenied, "{name}: {status}");
        ensure!(status.message().contains("is locked"), "{name}: {status}");
    }
    ensure!(audited(&mesh, &LOCKED)? >= told + 2, "the refusals were not audited");
    let answer = mesh.ask(&["check", "-o", "json"])?;
    let findings = String::from_utf8_lossy(&answer.stdout).into_owned();
    ensure!(findings.contains("node machine-a is locked"), "{findings}");
    // Its streams were cut, so no state goes to whoever holds the copy.
    mesh.wait("the stream to be cut", hauberk_tests::mesh::PATIENCE, |mesh| {
        let status = mesh.status()?;
        let node = status.nodes.iter().find(|node| node.name == "machine-a").context("no node")?;
        ensure!(!node.connected && !node.locked.is_empty(), "{node:?}");
        Ok(())
    })?;
    // A new token, used by the real machine, opens it again.
    let made = mesh.ask(&["token", "create", "--node", "machine-a"])?;
    let token = String::from_utf8(made.stdout)?;
    let joined = join(&mesh, token.trim(), "joined-anew")?;
    ensure!(joined.status.success(), "{}", String::from_utf8_lossy(&joined.stderr));
    let answer = mesh.ask(&["check", "-o", "json"])?;
    let findings = String::from_utf8_lossy(&answer.stdout).into_owned();
    ensure!(!findings.contains("is locked"), "{findings}");
    ensure!(audited(&mesh, &["a node was locked", "two hold its"])? >= 1, "it was not audited");
    Ok(())
}

fn a_flood_of_requests_for_certificates_slows_down_its_node_only() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let flooder = thief_of(&mesh, "machine-a")?;
    let other = thief_of(&mesh, "machine-b")?;
    let request = signing_request()?.1;
    // Bounded: more than the burst and all that is earned meanwhile.
    let refused = flood(&flooder, "shop/web", &request, 4_000).context("none was refused")?;
    ensure!(refused.code() == tonic::Code::ResourceExhausted, "{refused}");
    other.issue("payments/ledger", request.clone()).context("another node")?;
    let log = fs::read_to_string(mesh.log("control-plane"))?;
    ensure!(log.matches("faster than any node needs").count() == 1, "told once");
    // It heals by itself.
    mesh.wait("the flooder to be served again", hauberk_tests::mesh::PATIENCE, |_| {
        flooder.issue("shop/web", request.clone())?;
        Ok(())
    })
}

fn a_call_without_certificate_is_refused() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let root = fs::read(mesh.folder().join("control-plane/ca/root.crt.der"))?;
    let tls = hauberk_tls::join_client_config(hauberk_tls::sha256(&root), b"h2")?;
    let nobody = Stolen::connect(Arc::new(tls), &"example.org".parse()?, control_plane(&mesh)?)?;
    let status = nobody.issue("shop/web", signing_request()?.1).expect_err("anybody is served");
    ensure!(status.code() == tonic::Code::Unauthenticated, "{status}");
    let mut client = EnrollmentClient::new(nobody.channel());
    let guess =
        JoinRequest { token_secret: vec![7; 32], certificate_request: signing_request()?.1 };
    let status = nobody.runtime().block_on(client.join(guess)).expect_err("a guess was good");
    ensure!(status.code() == tonic::Code::PermissionDenied, "{status}");
    let refusal = ["a join token was refused: unknown or used before", "addr=\"10.77.0.2:"];
    ensure!(audited(&mesh, &refusal)? == 1, "the refusal was not audited");
    Ok(())
}

fn loose_file_modes_are_refused() -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut mesh = Mesh::start()?;
    mesh.stop("control-plane");
    let key = mesh.folder().join("control-plane/ca/root.key.der");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644))?;
    // The root's key is read to make an intermediate.
    fs::remove_file(mesh.folder().join("control-plane/ca/intermediate.key.der"))?;
    let data = mesh.folder().join("control-plane");
    let mut command = mesh.hauberk()?;
    command
        .args([
            "control-plane",
            "--trust-domain",
            "example.org",
            "--listen",
            "127.0.0.1:0",
            "--data",
        ])
        .arg(&data)
        .arg("--manifests")
        .arg(mesh.manifests());
    let refused = mesh.output("outside", &mut command)?;
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && error.contains("chmod 0600"), "{error}");
    Ok(())
}

fn no_key_or_token_is_in_any_log() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let token = mesh.token("machine-a")?;
    let joined = join(&mesh, &token, "again")?;
    ensure!(joined.status.success(), "{joined:?}");
    let kept: serde_json::Value =
        serde_json::from_slice(&fs::read(mesh.folder().join("machine-b/node.json"))?)?;
    let key = kept["key"].as_str().context("no key")?.to_owned();
    let secret = token.rsplit('.').next().context("no secret")?.to_owned();
    let mut texts = mesh.logs();
    texts += &String::from_utf8_lossy(&joined.stderr);
    texts += &fs::read_to_string(mesh.records("machine-a")).unwrap_or_default();
    for (name, text) in [("token", &secret), ("key", &key)] {
        ensure!(!texts.contains(text.as_str()), "a {name} is in a log");
    }
    ensure!(!texts.contains("PRIVATE KEY"), "a key is in a log");
    let stored = fs::read(mesh.folder().join("control-plane/store.redb"))?;
    ensure!(
        !stored.windows(secret.len()).any(|window| window == secret.as_bytes()),
        "the store has the token in clear"
    );
    Ok(())
}

fn no_core_file_can_hold_a_key() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    for process in ["control-plane", "machine-a", "machine-b"] {
        let limits = fs::read_to_string(mesh.proc_folder(process)?.join("limits"))?;
        let limit = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max core file size"))
            .with_context(|| limits.clone())?;
        // The soft limit; the hard one, so that nobody raises it again; and what they count.
        let values: Vec<&str> = limit.split_whitespace().collect();
        ensure!(values == ["0", "0", "bytes"], "{process}: {limit}");
    }
    Ok(())
}
