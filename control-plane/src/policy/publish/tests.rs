#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

use std::fs;

use tempfile::TempDir;

use super::*;

const MACHINE: &str = "
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: machine-a}
spec: {addresses: [10.0.0.1]}
";

fn workload(name: &str) -> String {
    format!(
        "
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: shop}}
spec: {{machine: machine-a, serviceAccount: {name}, process: {{user: {name}}}, ports: []}}
"
    )
}

/// A data folder and a manifest folder; control planes start in them one after the other.
struct Place {
    folder: TempDir,
    metrics: Arc<ControlPlaneMetrics>,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("manifests")).unwrap();
        Self { folder, metrics: Arc::new(ControlPlaneMetrics::new().unwrap()) }
    }

    fn manifests(&self) -> PathBuf {
        self.folder.path().join("manifests")
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.manifests().join(name), text).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.manifests().join(name)).unwrap();
    }

    fn store(&self) -> Store {
        Store::open(&self.folder.path().join("store.redb")).unwrap()
    }

    fn start(&self, emptied: Emptied) -> Arc<Publisher> {
        let (store, metrics) = (Arc::new(self.store()), self.metrics.clone());
        let trust_domain = "example.org".parse().unwrap();
        Publisher::start(Some(self.manifests()), emptied, trust_domain, store, metrics).unwrap()
    }

    fn reload(&self, publisher: &Publisher) {
        publisher.reload(&self.manifests(), Emptied::Refused).unwrap();
    }

    fn error_metric(&self) -> u64 {
        let families = self.metrics.registry().gather();
        let family = families.iter().find(|family| family.name() == "hauberk_manifest_errors");
        let value = family.unwrap().get_metric()[0].get_gauge().get_value();
        format!("{value}").parse().unwrap()
    }
}

fn names(publisher: &Publisher) -> Vec<String> {
    publisher.current().workloads.iter().map(MeshWorkload::key).collect()
}

fn refused(publisher: &Publisher) -> String {
    publisher.errors().join("\n")
}

#[test]
fn workloads_that_all_vanish_stay_in_force_over_a_restart_until_it_is_confirmed() {
    let place = Place::new();
    place.write("machine.yaml", MACHINE);
    place.write("web.yaml", &workload("web"));
    place.write("cart.yaml", &workload("cart"));
    let publisher = place.start(Emptied::Refused);
    let before = publisher.current().revision;
    for name in ["machine.yaml", "web.yaml", "cart.yaml"] {
        place.remove(name);
    }
    place.reload(&publisher);
    let held = |publisher: &Publisher, metric: u64| {
        assert_eq!(names(publisher), ["shop/cart", "shop/web"]);
        assert_eq!((publisher.current().revision, metric), (before, 1));
        assert!(refused(publisher).starts_with("the folder has no workload"), "{metric}");
    };
    held(&publisher, place.error_metric());
    insta::assert_snapshot!(refused(&publisher), @"the folder has no workload any more, and the last good manifests have 2 workloads: a missing mount and a failed sync look the same; restore the files, or start the control plane once with --allow-empty to confirm it");
    // Looked at again and again, and by another process.
    place.reload(&publisher);
    held(&publisher, place.error_metric());
    drop(publisher);
    let publisher = place.start(Emptied::Refused);
    held(&publisher, place.error_metric());
    place.reload(&publisher);
    held(&publisher, place.error_metric());
    drop(publisher);

    let publisher = place.start(Emptied::Confirmed);
    assert_eq!((names(&publisher), refused(&publisher)), (Vec::new(), String::new()));
    assert_eq!((publisher.current().revision, place.error_metric()), (before + 1, 0));
    drop(publisher);
    let publisher = place.start(Emptied::Refused);
    assert_eq!((names(&publisher), refused(&publisher)), (Vec::new(), String::new()));
}

#[test]
fn what_was_confirmed_at_a_start_holds_for_no_later_loss() {
    let place = Place::new();
    let publisher = place.start(Emptied::Confirmed);
    place.write("all.yaml", &[MACHINE, "---", &workload("web")].concat());
    place.reload(&publisher);
    assert_eq!(names(&publisher), ["shop/web"]);
    place.remove("all.yaml");
    place.reload(&publisher);
    assert_eq!(names(&publisher), ["shop/web"]);
    assert!(refused(&publisher).contains("--allow-empty"), "{}", refused(&publisher));
    // The files come back: nothing to confirm.
    place.write("all.yaml", &[MACHINE, "---", &workload("web")].concat());
    place.reload(&publisher);
    assert_eq!((refused(&publisher), place.error_metric()), (String::new(), 0));
}

#[test]
fn workloads_are_removed_one_after_the_other_but_for_the_last() {
    let place = Place::new();
    place.write("machine.yaml", MACHINE);
    for name in ["a", "b", "c"] {
        place.write(&format!("{name}.yaml"), &workload(name));
    }
    let publisher = place.start(Emptied::Refused);
    for (name, left) in [("a", vec!["shop/b", "shop/c"]), ("b", vec!["shop/c"])] {
        place.remove(&format!("{name}.yaml"));
        place.reload(&publisher);
        assert_eq!(
            (names(&publisher), refused(&publisher).as_str()),
            (left.into_iter().map(str::to_owned).collect(), "")
        );
    }
    place.remove("c.yaml");
    place.reload(&publisher);
    assert_eq!(names(&publisher), ["shop/c"]);
    assert!(refused(&publisher).contains("have 1 workload:"), "{}", refused(&publisher));
}

/// Puts something in a folder's place.
type Make = fn(&Path);

#[test]
fn a_folder_that_cannot_be_read_is_not_an_empty_one() {
    let place = Place::new();
    // None was ever good: agents get no state, not an empty one.
    fs::remove_dir(place.manifests()).unwrap();
    let publisher = place.start(Emptied::Confirmed);
    assert_eq!(publisher.current().revision, 0);
    assert!(refused(&publisher).starts_with("read "), "{}", refused(&publisher));
    drop(publisher);

    fs::create_dir(place.manifests()).unwrap();
    place.write("all.yaml", &[MACHINE, "---", &workload("web")].concat());
    let publisher = place.start(Emptied::Refused);
    let kept = fs::read(place.manifests().join("all.yaml")).unwrap();
    let ways: [(&str, Make); 3] = [
        ("missing", |_| {}),
        ("no folder", |path| fs::write(path, "").unwrap()),
        ("a broken link in it", |path| {
            fs::create_dir(path).unwrap();
            std::os::unix::fs::symlink("nowhere", path.join("all.yaml")).unwrap();
        }),
    ];
    for (name, make) in ways {
        drop(fs::remove_dir_all(place.manifests()));
        drop(fs::remove_file(place.manifests()));
        make(&place.manifests());
        place.reload(&publisher);
        assert_eq!(names(&publisher), ["shop/web"], "{name}");
        assert!(refused(&publisher).starts_with("read "), "{name}: {}", refused(&publisher));
    }
    // Nor after a restart, whatever is confirmed.
    drop(publisher);
    let publisher = place.start(Emptied::Confirmed);
    assert_eq!((names(&publisher), place.error_metric()), (vec!["shop/web".to_owned()], 1));
    drop(fs::remove_dir_all(place.manifests()));
    fs::create_dir(place.manifests()).unwrap();
    fs::write(place.manifests().join("all.yaml"), kept).unwrap();
    place.reload(&publisher);
    assert_eq!((refused(&publisher), place.error_metric()), (String::new(), 0));
}

#[test]
fn last_good_manifests_that_this_version_refuses_tell_no_agent_to_open_its_ports() {
    let place = Place::new();
    let older = vec![("all.yaml".to_owned(), "kind: Removed".to_owned())];
    place.store().save_manifests(&older).unwrap();
    for (emptied, revision) in [(Emptied::Refused, 0), (Emptied::Confirmed, 1)] {
        let publisher = place.start(emptied);
        assert_eq!(publisher.current().revision, revision, "{}", refused(&publisher));
        let told = refused(&publisher);
        assert_eq!(told.contains("are not accepted any more"), revision == 0, "{told}");
        assert_eq!(told.contains("workloads that this version cannot read"), revision == 0);
    }
}
