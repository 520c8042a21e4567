//! A CA that is renewed and replaced, as replicas and agents live through it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

mod agreement;
mod cluster;

use std::os::unix::fs::PermissionsExt;

use hauberk_tls::{
    TrustBundle,
    files::{private_folder, write_private},
    signing_request, verify_chain,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tempfile::TempDir;
use time::OffsetDateTime;

use super::*;
use crate::{ca::Issued, kubernetes::pem};

const SECOND: Duration = Duration::from_secs(1);

/// As with certificates of 20 s.
const PACE: Pace = Pace { look: Duration::from_secs(5), lifetime: Duration::from_secs(20) };

const WEB: &str = "spiffe://prod.example/ns/shop/sa/web";

type Ca = CertifiedIssuer<'static, KeyPair>;

fn start() -> Timestamp {
    "2026-07-01T12:00:00Z".parse().unwrap()
}

fn after(seconds: u32) -> Timestamp {
    start().saturating_add(SECOND * seconds)
}

fn trust_domain() -> TrustDomain {
    "prod.example".parse().unwrap()
}

/// A CA that is valid from then on.
fn parameters(name: &str, from: Timestamp) -> CertificateParams {
    let date = |time: Timestamp| OffsetDateTime::from_unix_timestamp(time.unix_seconds()).unwrap();
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    parameters.not_before = date(from);
    parameters.not_after = date(from.saturating_add(Duration::from_secs(90 * 24 * 3600)));
    parameters
}

fn root(name: &str) -> Ca {
    let early = start().saturating_sub(Duration::from_secs(3600));
    CertifiedIssuer::self_signed(parameters(name, early), KeyPair::generate().unwrap()).unwrap()
}

fn below(upper: &Ca, from: Timestamp) -> Ca {
    let key = KeyPair::generate().unwrap();
    CertifiedIssuer::signed_by(parameters("mesh", from), key, &**upper).unwrap()
}

/// What somebody brings.
fn files(ca: &Ca, root: &Ca) -> [(&'static str, Vec<u8>); 3] {
    [
        (ca::CERTIFICATE, pem(ca.der()).into_bytes()),
        (ca::KEY, private(ca)),
        (ca::ROOTS, pem(root.der()).into_bytes()),
    ]
}

/// A folder with what somebody brings, and one with the data.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        private_folder(&place.brought()).unwrap();
        private_folder(&place.data()).unwrap();
        place
    }

    fn brought(&self) -> PathBuf {
        self.0.path().join("brought")
    }

    fn data(&self) -> PathBuf {
        self.0.path().join("data")
    }

    fn bring(&self, ca: &Ca, root: &Ca) {
        for (name, bytes) in files(ca, root) {
            write_private(&self.brought().join(name), &bytes).unwrap();
        }
    }

    /// One that is started at that time.
    fn custody(&self, now: Timestamp) -> Custody {
        let brought = self.brought();
        Custody::alone(trust_domain(), &self.data(), Some(&brought), PACE, now).unwrap()
    }
}

/// A control plane without its calls.
struct Replica {
    custody: Custody,
    authority: Option<Authority>,
}

impl Replica {
    fn new(custody: Custody) -> Self {
        Self { custody, authority: None }
    }

    /// Looks, and returns what people are told.
    async fn look(&mut self, now: Timestamp) -> Vec<String> {
        let active = self.authority.as_ref().map(Authority::signer);
        let look = self.custody.look(active.as_deref(), now).await;
        let notes = self.custody.tell(&look);
        match &self.authority {
            Some(authority) => {
                look.put(authority);
            }
            None => {
                let roots = look.roots;
                self.authority = look.signer.map(|signer| {
                    let authority = Authority::new(trust_domain(), signer);
                    authority.trust(roots);
                    authority
                });
            }
        }
        notes
    }

    fn authority(&self) -> &Authority {
        self.authority.as_ref().unwrap()
    }

    fn issue(&self, now: Timestamp) -> Issued {
        let request = signing_request().unwrap().1;
        self.authority().issue(&WEB.parse().unwrap(), &request, PACE.lifetime, now).unwrap()
    }

    fn issues_under(&self, root: &Ca) -> bool {
        self.authority().root() == *root.der()
    }

    fn trusts(&self, roots: &[&Ca]) -> bool {
        let trusted = self.authority().roots();
        trusted.len() == roots.len() && roots.iter().all(|root| trusted.contains(root.der()))
    }
}

/// One that was started with this CA.
async fn started(place: &Place, ca: &Ca, root: &Ca) -> Replica {
    place.bring(ca, root);
    let mut replica = Replica::new(place.custody(start()));
    assert_eq!(replica.look(start()).await, Vec::<String>::new());
    replica
}

#[tokio::test]
async fn the_first_ca_issues_at_once_and_its_key_is_written_nowhere() {
    let place = Place::new();
    let root = root("one");
    let replica = started(&place, &root, &root).await;
    assert!(replica.issues_under(&root) && replica.trusts(&[&root]));
    let kept = fs::read_to_string(place.data().join(ROOTS_FILE)).unwrap();
    assert!(!kept.contains("handover"), "{kept}");
    let files: Vec<_> = fs::read_dir(place.data()).unwrap().collect();
    assert_eq!(files.len(), 1, "{files:?}");
}

#[tokio::test]
async fn a_renewed_ca_under_the_same_root_is_taken_up_once_no_clock_refuses_it() {
    let place = Place::new();
    let root = root("one");
    let (first, next) = (below(&root, start()), below(&root, after(100)));
    let mut replica = started(&place, &first, &root).await;
    let before = replica.issue(start());
    place.bring(&next, &root);
    for (second, taken) in [(105, false), (219, false), (220, true), (225, true)] {
        let notes = replica.look(after(second)).await;
        let issued = replica.issue(after(second));
        let is_taken = issued.chain.contains(next.der());
        assert_eq!(is_taken, taken, "second {second}");
        assert_eq!(notes.is_empty(), taken, "{notes:?}");
        assert!(replica.issues_under(&root) && replica.trusts(&[&root]), "second {second}");
    }
    assert!(before.chain.contains(first.der()));
}

#[tokio::test]
async fn what_cannot_be_used_is_told_and_changes_nothing() {
    let place = Place::new();
    let (root, other) = (root("one"), root("other"));
    let mut replica = started(&place, &root, &root).await;
    let first = replica.authority().signer();
    let cases: [(&str, &dyn Fn(), &str); 3] = [
        (
            "another key",
            &|| write_private(&place.brought().join(ca::KEY), &private(&other)).unwrap(),
            "tls.key is not the key of the first certificate of tls.crt",
        ),
        (
            "a loose mode",
            &|| {
                let key = place.brought().join(ca::KEY);
                fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap();
            },
            "chmod 0600",
        ),
        (
            "nothing at all",
            &|| fs::remove_file(place.brought().join(ca::CERTIFICATE)).unwrap(),
            "tls.crt is missing",
        ),
    ];
    for (number, (name, break_it, wanted)) in cases.into_iter().enumerate() {
        place.bring(&root, &root);
        break_it();
        let second = 5 * u32::try_from(number + 1).unwrap();
        let notes = replica.look(after(second)).await;
        assert!(notes.iter().any(|note| note.contains(wanted)), "{name}: {notes:?}");
        assert!(notes.iter().any(|note| note.contains("(--ca) is not taken up")), "{notes:?}");
        assert!(Arc::ptr_eq(&replica.authority().signer(), &first), "{name}");
        replica.issue(after(second));
    }
    place.bring(&root, &root);
    assert_eq!(replica.look(after(30)).await, Vec::<String>::new());
    // One that starts with it does not start, and says the same.
    fs::remove_file(place.brought().join(ca::CERTIFICATE)).unwrap();
    let refused = place.custody(after(35)).begin(&Health::new(&[])).await.err().unwrap();
    assert!(format!("{refused:#}").contains("tls.crt is missing"), "{refused:#}");
}

fn private(ca: &Ca) -> Vec<u8> {
    ca.key().serialize_pem().into_bytes()
}

#[tokio::test]
async fn what_is_known_of_the_roots_is_written_again_if_it_is_lost_and_told_if_it_is_damaged() {
    let place = Place::new();
    let root = root("one");
    let mut replica = started(&place, &root, &root).await;
    let file = place.data().join(ROOTS_FILE);
    fs::remove_file(&file).unwrap();
    assert_eq!(replica.look(after(5)).await, Vec::<String>::new());
    assert!(file.exists());
    write_private(&file, b"{}").unwrap();
    let notes = replica.look(after(10)).await;
    assert!(notes.iter().any(|note| note.contains("delete the Secret hauberk-roots")), "{notes:?}");
    assert!(replica.issues_under(&root) && replica.trusts(&[&root]));
}

#[tokio::test]
async fn a_replica_that_starts_while_a_root_is_new_goes_on_with_what_another_handed_over() {
    let place = Place::new();
    let (old, new) = (root("old"), root("new"));
    let mut first = started(&place, &old, &old).await;
    place.bring(&new, &new);
    let notes = first.look(after(5)).await;
    assert!(
        notes.iter().any(|note| note.contains("certificates are issued as before")),
        "{notes:?}"
    );
    let mut second = Replica::new(place.custody(after(10)));
    second.look(after(10)).await;
    for replica in [&first, &second] {
        assert!(replica.issues_under(&old) && replica.trusts(&[&old, &new]));
    }
    let bundle = TrustBundle::new(trust_domain(), vec![old.der().clone()], after(10)).unwrap();
    let issued = second.issue(after(10));
    let (leaf, rest) = issued.chain.split_first().unwrap();
    verify_chain(leaf, rest, &bundle, true, after(10)).unwrap();
    // When every agent knows the new root, both issue under it.
    for replica in [&mut first, &mut second] {
        assert_eq!(replica.look(after(120)).await, Vec::<String>::new());
        assert!(replica.issues_under(&new));
    }
}

#[tokio::test]
async fn without_anything_to_go_on_with_a_replica_waits() {
    let place = Place::new();
    let (old, new) = (root("old"), root("new"));
    drop(started(&place, &old, &old).await);
    // Changed while nobody ran.
    place.bring(&new, &new);
    let mut replica = Replica::new(place.custody(after(5)));
    let notes = replica.look(after(5)).await;
    assert!(replica.authority.is_none());
    assert!(
        notes.iter().any(|note| note.contains("nothing is issued by this replica")),
        "{notes:?}"
    );
    assert_eq!(replica.look(after(120)).await, Vec::<String>::new());
    assert!(replica.issues_under(&new));
}

#[tokio::test]
async fn a_brought_ca_takes_the_place_of_the_own_one_and_the_own_one_of_it() {
    let place = Place::new();
    let brought = root("brought");
    let data = place.data();
    let alone = |brought: Option<&Path>, now: Timestamp| {
        Replica::new(Custody::alone(trust_domain(), &data, brought, PACE, now).unwrap())
    };
    let mut own = alone(None, start());
    assert_eq!(own.look(start()).await, Vec::<String>::new());
    let own_root = own.authority().root();
    assert!(!data.join(ROOTS_FILE).exists());

    place.bring(&brought, &brought);
    let folder = place.brought();
    let mut next = alone(Some(&folder), after(10));
    assert!(!next.look(after(10)).await.is_empty());
    assert_eq!(next.authority().root(), own_root, "agents do not know the other root yet");
    assert_eq!(next.authority().roots().len(), 2);
    assert_eq!(next.look(after(120)).await, Vec::<String>::new());
    assert!(next.issues_under(&brought));
    let mut second = 120;
    while next.authority().roots().len() > 1 {
        second += 5;
        next.look(after(second)).await;
        assert!(second < 300, "the old root is trusted for ever");
    }
    assert!(next.trusts(&[&brought]));

    // And back at once: it goes on under the root that agents know.
    drop(next);
    let now = after(second + 5);
    let mut soon = alone(None, now);
    assert!(!soon.look(now).await.is_empty());
    assert!(soon.issues_under(&brought), "it waits for the own root with nothing to issue with");
    assert_eq!(soon.authority().roots().len(), 2);
    let mut back = alone(None, after(900));
    assert_eq!(back.look(after(900)).await, Vec::<String>::new());
    assert_eq!(back.authority().root(), own_root, "nothing was issued for long");
}

/// An agent: what it trusts, and what it shows.
struct Agent {
    roots: Vec<CertificateDer<'static>>,
    issued: Issued,
}

impl Agent {
    fn renewed(replica: &Replica, now: Timestamp) -> Self {
        Self { roots: replica.authority().roots().to_vec(), issued: replica.issue(now) }
    }

    fn accepts(&self, other: &Self, now: Timestamp) {
        let bundle = TrustBundle::new(trust_domain(), self.roots.clone(), now).unwrap();
        let (leaf, rest) = other.issued.chain.split_first().unwrap();
        verify_chain(leaf, rest, &bundle, true, now).unwrap();
    }
}

/// Three roots one after the other, two replicas that look at different times, agents that ask now the
/// one and now the other, each of them as rarely as it may: nobody ever meets a certificate that it refuses.
#[tokio::test]
async fn no_agent_ever_refuses_another_while_roots_come_and_go() {
    let place = Place::new();
    let roots = [root("one"), root("two"), root("three")];
    let [one, two, three] = &roots;
    let mut replicas = [started(&place, one, one).await, Replica::new(place.custody(start()))];
    replicas[1].look(start()).await;
    let mut agents: Vec<Agent> =
        (0..4).map(|number| Agent::renewed(&replicas[number % 2], start())).collect();
    for second in 1..450_usize {
        let now = after(u32::try_from(second).unwrap());
        match second {
            50 => place.bring(two, two),
            200 => place.bring(three, three),
            _ => {}
        }
        for (number, replica) in replicas.iter_mut().enumerate() {
            if second % 5 == number * 2 {
                replica.look(now).await;
            }
        }
        for (number, agent) in agents.iter_mut().enumerate() {
            // At the very end of their lives, not at half of it.
            if second % 20 == number * 5 + 4 {
                *agent = Agent::renewed(&replicas[(second / 20 + number) % 2], now);
            }
        }
        for agent in &agents {
            for other in &agents {
                // The first ones are older than their place in the round.
                if other.issued.not_after > now {
                    agent.accepts(other, now);
                }
            }
        }
    }
    for replica in &replicas {
        assert!(replica.issues_under(three) && replica.trusts(&[three]));
    }
}

#[tokio::test]
async fn a_root_brought_by_mistake_is_forgotten_when_something_else_is_brought() {
    let place = Place::new();
    let (old, mistake, new) = (root("old"), root("mistake"), root("new"));
    let mut replica = started(&place, &old, &old).await;
    place.bring(&mistake, &mistake);
    assert!(!replica.look(after(5)).await.is_empty());
    assert!(replica.issues_under(&old) && replica.trusts(&[&old, &mistake]));
    // As it was before.
    place.bring(&old, &old);
    assert_eq!(replica.look(after(10)).await, Vec::<String>::new());
    assert!(replica.issues_under(&old) && replica.trusts(&[&old]));
    // By the right one, which waits for no more than what was issued.
    place.bring(&mistake, &mistake);
    replica.look(after(15)).await;
    place.bring(&new, &new);
    replica.look(after(20)).await;
    assert!(replica.issues_under(&old) && replica.trusts(&[&old, &new]));
    let from = replica.custody.roots.known_from(new.der()).unwrap();
    assert!(from <= after(20).saturating_add(PACE.reach() * 5 / 4), "{from}");
    assert_eq!(replica.look(after(120)).await, Vec::<String>::new());
    assert!(replica.issues_under(&new));
}

#[tokio::test]
async fn a_root_that_may_have_issued_is_not_forgotten() {
    let place = Place::new();
    let (old, mistake, new) = (root("old"), root("mistake"), root("new"));
    let mut replica = started(&place, &old, &old).await;
    place.bring(&mistake, &mistake);
    replica.look(after(5)).await;
    let from = replica.custody.roots.known_from(mistake.der()).unwrap();
    // By the clock of another replica, which may be ahead, it issues.
    place.bring(&new, &new);
    replica.look(from.saturating_sub(SECOND)).await;
    assert!(replica.trusts(&[&old, &mistake, &new]));
}
