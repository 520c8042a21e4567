//! A CA that is renewed and replaced, as replicas and agents live through it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

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

use cluster::{FakeCluster, PUBLISHED, ROOTS};

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
    for (second, taken) in [(105, false), (159, false), (160, true), (165, true)] {
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

const SECRET: &str = "mesh-ca";

fn bring(cluster: &FakeCluster, ca: &Ca) {
    cluster.put_secret(SECRET, &files(ca, ca));
}

/// A replica of several, with a CA from a Secret of this name.
fn replica_of(cluster: &FakeCluster, secret: &str) -> Replica {
    let source = Source::Secret(cluster.shared(), secret.to_owned());
    Replica::new(Custody::new(trust_domain(), source, Keep::Cluster(cluster.shared()), PACE))
}

/// One that looks when all clocks say the same.
async fn look(cluster: &FakeCluster, replica: &mut Replica, second: u32) -> Vec<String> {
    cluster.set_time(after(second));
    replica.look(after(second)).await
}

/// Two replicas that issue under this root.
async fn running(cluster: &FakeCluster, root: &Ca) -> [Replica; 2] {
    bring(cluster, root);
    let mut replicas = [replica_of(cluster, SECRET), replica_of(cluster, SECRET)];
    for replica in &mut replicas {
        assert_eq!(look(cluster, replica, 0).await, Vec::<String>::new());
        assert!(replica.issues_under(root));
    }
    assert_eq!(cluster.published(), Some(pem(root.der())));
    replicas
}

fn tells(notes: &[String], wanted: &str) {
    assert!(notes.iter().any(|note| note.contains(wanted)), "no {wanted:?} in {notes:?}");
}

#[tokio::test]
async fn a_replica_whose_clock_is_wrong_writes_nothing_and_takes_no_root_up() {
    let cluster = FakeCluster::new(start());
    let (old, new) = (root("old"), root("new"));
    let [mut right, mut wrong] = running(&cluster, &old).await;
    let before = cluster.objects();
    cluster.set_time(after(5));
    tells(&wrong.look(after(3605)).await, "more than 10 s ahead of the Kubernetes API server's");
    cluster.set_time(after(3605));
    tells(&wrong.look(after(5)).await, "more than 10 s behind the Kubernetes API server's");
    assert_eq!(cluster.objects(), before);

    // What others say is heard, and believed when both clocks say so.
    bring(&cluster, &new);
    look(&cluster, &mut right, 10).await;
    let from = right.custody.roots.known_from(new.der()).unwrap();
    assert!(from <= after(10).saturating_add(PACE.reach() * 5 / 4), "{from}");
    wrong.look(after(3610)).await;
    assert!(wrong.issues_under(&old) && wrong.trusts(&[&old, &new]));

    for replica in [&mut right, &mut wrong] {
        assert_eq!(look(&cluster, replica, 120).await, Vec::<String>::new());
        assert!(replica.issues_under(&new));
    }
}

#[tokio::test]
async fn an_old_root_is_not_forgotten_by_a_clock_that_is_ahead() {
    let cluster = FakeCluster::new(start());
    let (old, new) = (root("old"), root("new"));
    let mut replicas = running(&cluster, &old).await;
    bring(&cluster, &new);
    for second in [5, 120] {
        for replica in &mut replicas {
            look(&cluster, replica, second).await;
        }
    }
    for replica in &mut replicas {
        assert!(replica.issues_under(&new));
        cluster.set_time(after(125));
        replica.look(after(3725)).await;
        assert!(replica.trusts(&[&old, &new]), "what was issued under the old one is in use");
    }
    assert_eq!(cluster.published(), Some(pem(old.der()) + &pem(new.der())));
    for replica in &mut replicas {
        look(&cluster, replica, 300).await;
        assert!(replica.trusts(&[&new]));
    }
    assert_eq!(cluster.published(), Some(pem(new.der())));
}

#[tokio::test]
async fn an_older_word_never_takes_the_place_of_a_newer_one() {
    let cluster = FakeCluster::new(start());
    let (old, new) = (root("old"), root("new"));
    let [mut first, mut second] = running(&cluster, &old).await;
    let earlier = cluster.objects();
    bring(&cluster, &new);
    look(&cluster, &mut first, 5).await;
    let both = Some(pem(old.der()) + &pem(new.der()));
    assert_eq!(cluster.published(), both);
    // The second one looks before the first one does, and writes after it.
    let later = cluster.objects();
    cluster.restore(earlier);
    cluster.put_published("spoiled");
    cluster.write_meanwhile(PUBLISHED, later);
    look(&cluster, &mut second, 5).await;
    assert_eq!(cluster.published(), both);
    assert!(second.trusts(&[&old, &new]));
}

#[tokio::test]
async fn what_is_published_is_mended_and_stays_deleted() {
    let cluster = FakeCluster::new(start());
    let old = root("old");
    let [mut replica, _] = running(&cluster, &old).await;
    cluster.put_published("spoiled");
    assert_eq!(look(&cluster, &mut replica, 5).await, Vec::<String>::new());
    assert_eq!(cluster.published(), Some(pem(old.der())));
    cluster.delete(PUBLISHED);
    assert_eq!(look(&cluster, &mut replica, 10).await, Vec::<String>::new());
    assert_eq!(cluster.published(), None);
}

#[tokio::test]
async fn roots_that_are_lost_are_written_again_by_a_replica_that_runs() {
    let cluster = FakeCluster::new(start());
    let (old, new) = (root("old"), root("new"));
    let [mut runs, _] = running(&cluster, &old).await;
    bring(&cluster, &new);
    look(&cluster, &mut runs, 5).await;
    cluster.delete(ROOTS);
    let mut starts = replica_of(&cluster, SECRET);
    tells(&look(&cluster, &mut starts, 6).await, "the Secret hauberk-roots is gone");
    assert!(starts.authority.is_none() && cluster.roots().is_none());
    look(&cluster, &mut runs, 10).await;
    look(&cluster, &mut starts, 12).await;
    for replica in [&runs, &starts] {
        assert!(replica.issues_under(&old) && replica.trusts(&[&old, &new]));
    }
}

#[tokio::test]
async fn without_any_memory_only_the_one_root_that_is_published_issues_at_once() {
    let cluster = FakeCluster::new(start());
    let (old, new) = (root("old"), root("new"));
    drop(running(&cluster, &old).await);
    cluster.delete(ROOTS);
    let mut same = replica_of(&cluster, SECRET);
    tells(&look(&cluster, &mut same, 5).await, "the Secret hauberk-roots is gone");
    assert!(same.authority.is_none() && cluster.roots().is_none());
    assert_eq!(look(&cluster, &mut same, 15).await, Vec::<String>::new());
    assert!(same.issues_under(&old) && same.trusts(&[&old]));

    // One that agents may not know waits until nothing else is in use.
    cluster.delete(ROOTS);
    bring(&cluster, &new);
    let mut other = replica_of(&cluster, SECRET);
    look(&cluster, &mut other, 20).await;
    tells(&look(&cluster, &mut other, 30).await, "nothing is issued by this replica");
    look(&cluster, &mut other, 69).await;
    assert!(other.authority.is_none());
    assert_eq!(look(&cluster, &mut other, 71).await, Vec::<String>::new());
    assert!(other.issues_under(&new) && other.trusts(&[&new]));

    // One of two that are published may be the one that agents do not know.
    cluster.delete(ROOTS);
    cluster.put_published(&(pem(old.der()) + &pem(new.der())));
    let mut third = replica_of(&cluster, SECRET);
    look(&cluster, &mut third, 80).await;
    look(&cluster, &mut third, 90).await;
    assert!(third.authority.is_none());
}

#[tokio::test]
async fn without_a_ca_nothing_is_written() {
    let cluster = FakeCluster::new(start());
    let mut replica = replica_of(&cluster, SECRET);
    tells(&look(&cluster, &mut replica, 0).await, "there is no such Secret");
    assert!(cluster.objects().is_empty());
}

/// As in an upgrade that names another Secret.
#[tokio::test]
async fn a_root_that_only_another_replica_wants_is_not_forgotten() {
    let cluster = FakeCluster::new(start());
    let (old, new) = (root("old"), root("new"));
    let [mut before, _] = running(&cluster, &old).await;
    cluster.put_secret("another-ca", &files(&new, &new));
    let mut next = replica_of(&cluster, "another-ca");
    look(&cluster, &mut next, 5).await;
    // What is renewed under the same root is nothing to forget another one for.
    cluster.put_secret(SECRET, &files(&below(&old, start()), &old));
    look(&cluster, &mut before, 6).await;
    look(&cluster, &mut next, 8).await;
    for replica in [&before, &next] {
        assert!(replica.issues_under(&old) && replica.trusts(&[&old, &new]));
    }
}
