use std::path::Path;

use hauberk_linux::{Error, Netns, NetnsWorker};

#[test]
fn a_new_namespace_is_another_with_loopback_up() {
    let outside = Netns::current().unwrap();
    let netns = Netns::create().unwrap();
    assert_ne!(netns, outside);
    assert_eq!(netns.run(Netns::current).unwrap().unwrap(), netns);
    assert_eq!(Netns::current().unwrap(), outside);
    let bound = netns.run(|| std::net::TcpListener::bind("[::1]:1").is_ok());
    assert!(bound.unwrap());
}

#[test]
fn a_namespace_is_opened_by_path_and_by_its_proc_path() {
    let netns = Netns::create().unwrap();
    assert_eq!(Netns::open(&netns.proc_path()).unwrap(), netns);
    let current = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
    assert_eq!(current.inode(), Netns::current().unwrap().inode());
}

#[test]
fn another_file_or_namespace_is_refused() {
    for path in ["/proc/self/status", "/etc", "/proc/self/ns/mnt"] {
        let error = Netns::open(Path::new(path)).unwrap_err();
        assert!(matches!(error, Error::NotANetworkNamespace { .. }), "{path}: {error:?}");
    }
}

#[test]
fn a_worker_stays_inside_and_survives_a_panic() {
    let netns = Netns::create().unwrap();
    let worker = NetnsWorker::start(&netns, "inside").unwrap();
    let inode = || Netns::current().unwrap().inode();
    assert_eq!(worker.call(inode).unwrap(), netns.inode());
    let error = worker.call(|| panic!("on purpose")).unwrap_err();
    assert!(matches!(error, Error::TaskPanicked { .. }));
    assert_eq!(worker.call(inode).unwrap(), netns.inode());
}
