//! Replicas of one cluster agree: with clocks that are wrong, words that are old, and Secrets that are lost.

use super::{
    cluster::{FakeCluster, PUBLISHED, ROOTS},
    *,
};

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
