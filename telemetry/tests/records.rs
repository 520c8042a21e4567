//! Records on disk: their shape, and that none goes missing uncounted.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use hauberk_telemetry::record::{
    ConnectionRecord, Decision, Denial, DenialEdge, DenialSummary, Destination, FloodLimits,
    Path as BytesPath, Peer, RecordError, RecordLine, RecordOptions, RecordSink, Side, TlsInfo,
};
use prometheus::IntCounter;

const PATIENCE: Duration = Duration::from_secs(20);

fn record(decision: Decision) -> ConnectionRecord {
    let opened = UNIX_EPOCH + Duration::from_millis(1_795_517_624_120);
    let some = |text: &str| Some(text.to_owned());
    ConnectionRecord {
        src: Peer {
            spiffe_id: some("spiffe://corp.example/ns/shop/sa/checkout"),
            node: some("node-3"),
            namespace: some("shop"),
            workload: some("checkout"),
            addr: Some("10.0.3.7:41822".parse().unwrap()),
        },
        dst: Peer {
            spiffe_id: some("spiffe://corp.example/ns/payments/sa/ledger"),
            node: some("node-9"),
            namespace: some("payments"),
            workload: some("ledger"),
            addr: Some("10.0.9.2:5432".parse().unwrap()),
        },
        original_dst: Some("10.96.0.12:5432".parse().unwrap()),
        tls: Some(TlsInfo {
            version: some("TLSv1.3"),
            group: some("X25519MLKEM768"),
            local_serial: some("5f0c"),
            peer_serial: some("71aa"),
            peer_not_after: some("2026-11-24T11:53:44Z"),
        }),
        mode: some("enforce"),
        policy: some("payments/ledger"),
        policy_revision: Some(42),
        owner: some("payments"),
        ..ConnectionRecord::new("a1b2c3d4e5f60718".to_owned(), opened, Side::Destination, decision)
    }
}

fn allowed() -> ConnectionRecord {
    ConnectionRecord {
        rule: Some("checkout".to_owned()),
        grant: Some("payments/incident-7".to_owned()),
        path: Some(BytesPath::Mtls),
        bytes_sent: 1_204,
        bytes_received: 88_213,
        duration_ms: 5_120,
        open_ms: Some(2),
        close_reason: Some("peer_closed".to_owned()),
        ..record(Decision::Allow)
    }
}

fn denied() -> ConnectionRecord {
    ConnectionRecord {
        reason: Some("no_matching_rule".to_owned()),
        detail: Some("no rule of payments/ledger allows shop/checkout on port 5432".to_owned()),
        nearest_miss: Some("checkout: port is 5433, not 5432".to_owned()),
        mend: Some("add 5432 to ports of rule checkout".to_owned()),
        duration_ms: 3,
        close_reason: Some("denied".to_owned()),
        ..record(Decision::Deny)
    }
}

fn lost_counter() -> IntCounter {
    IntCounter::new("lost_total", "Lost.").unwrap()
}

fn sink(path: &Path, window: Duration, lost: &IntCounter) -> RecordSink {
    let flood = FloodLimits { window, ..FloodLimits::default() };
    let options = RecordOptions { destination: Destination::File(path.to_owned()), flood };
    RecordSink::start(options, lost.clone()).unwrap()
}

const LONG: Duration = Duration::from_secs(3_600);
const SHORT: Duration = Duration::from_millis(50);

fn lines(path: &Path) -> Vec<RecordLine> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| RecordLine::parse(line).unwrap()).collect()
}

fn summaries(lines: &[RecordLine]) -> Vec<&DenialSummary> {
    let summary = |line| match line {
        &RecordLine::Connection(_) => None,
        RecordLine::Summary(summary) => Some(summary),
    };
    lines.iter().filter_map(summary).collect()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_allowed_connection_reads_like_this() {
    insta::assert_snapshot!(serde_json::to_string_pretty(&allowed()).unwrap());
}

#[test]
fn a_denied_connection_reads_like_this() {
    insta::assert_snapshot!(serde_json::to_string_pretty(&denied()).unwrap());
}

#[test]
fn a_summary_reads_like_this() {
    let summary = DenialSummary {
        time: "2026-11-24T10:54:44.120Z".to_owned(),
        since: "2026-11-24T10:53:44.120Z".to_owned(),
        edge: DenialEdge::of(&denied()),
        suppressed: 9_950,
    };
    insta::assert_snapshot!(serde_json::to_string_pretty(&summary).unwrap());
}

#[test]
fn what_is_written_reads_back_the_same() {
    let empty = ConnectionRecord::new("00".into(), UNIX_EPOCH, Side::Source, Decision::WouldDeny);
    for record in [allowed(), denied(), empty] {
        let line = serde_json::to_string(&record).unwrap();
        assert_eq!(RecordLine::parse(&line).unwrap(), RecordLine::Connection(Box::new(record)));
    }
}

#[test]
fn a_line_of_another_type_is_refused_and_named() {
    let line = serde_json::to_string(&allowed()).unwrap().replace("hauberk.connection", "other");
    assert_eq!(
        RecordLine::parse(&line).unwrap_err().to_string(),
        "record type \"other\" is unknown, expected \"hauberk.connection\" or \
         \"hauberk.connection.summary\""
    );
}

#[test]
fn a_destination_that_cannot_be_opened_is_refused_at_the_start() {
    let options = RecordOptions::new(Destination::File("/nowhere/records.jsonl".into()));
    let error = RecordSink::start(options, lost_counter()).unwrap_err();
    assert!(matches!(&error, RecordError::Open { .. }));
    assert_eq!(error.to_string(), "open /nowhere/records.jsonl for connection records");
}

#[test]
fn a_shutdown_writes_what_is_queued_and_later_records_are_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.jsonl");
    let lost = lost_counter();
    let sink = sink(&path, LONG, &lost);
    for _ in 0..1_000 {
        sink.submit(allowed());
    }
    sink.shutdown(PATIENCE).unwrap();
    assert_eq!((lines(&path).len(), lost.get()), (1_000, 0));
    sink.submit(allowed());
    sink.submit(denied());
    assert_eq!(lost.get(), 2);
}

#[test]
fn a_flood_of_denials_is_fifty_records_and_an_exact_count() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.jsonl");
    let lost = lost_counter();
    let sink = sink(&path, LONG, &lost);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..2_500).for_each(|_| sink.submit(denied())));
        }
    });
    let other = ConnectionRecord { reason: Some("lock".to_owned()), ..denied() };
    sink.submit(other);
    sink.shutdown(PATIENCE).unwrap();
    let lines = lines(&path);
    let summaries = summaries(&lines);
    assert_eq!(lines.len() - summaries.len(), 51);
    assert_eq!(summaries.len(), 1);
    assert_eq!(summaries[0].suppressed, 9_950);
    assert_eq!(summaries[0].edge, DenialEdge::of(&denied()));
    assert_eq!((sink.recent_denials().len(), lost.get()), (51, 0));
}

#[test]
fn a_flood_over_several_windows_loses_count_of_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.jsonl");
    let lost = lost_counter();
    let sink = sink(&path, SHORT, &lost);
    let end = Instant::now() + SHORT * 10;
    let mut submitted = 0;
    while Instant::now() < end {
        sink.submit(denied());
        submitted += 1;
    }
    sink.shutdown(PATIENCE).unwrap();
    let lines = lines(&path);
    let summaries = summaries(&lines);
    assert!(summaries.len() > 1, "a summary only at the end");
    let verbatim = u64::try_from(lines.len() - summaries.len()).unwrap();
    let suppressed: u64 = summaries.iter().map(|summary| summary.suppressed).sum();
    assert_eq!(verbatim + suppressed + lost.get(), submitted);
}

#[test]
fn a_denial_in_audit_mode_is_never_only_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.jsonl");
    let sink = sink(&path, LONG, &lost_counter());
    (0..200).for_each(|_| sink.submit(record(Decision::WouldDeny)));
    sink.shutdown(PATIENCE).unwrap();
    assert_eq!(lines(&path).len(), 200);
    assert!(sink.recent_denials().is_empty());
}

#[test]
fn the_last_thousand_denials_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let sink = sink(&folder.path().join("records.jsonl"), LONG, &lost_counter());
    for number in 0..1_100 {
        let conn_id = format!("{number:x}");
        let reason = Some(format!("{}", number / 50));
        sink.submit(ConnectionRecord { conn_id, reason, ..denied() });
    }
    let recent = sink.recent_denials();
    assert_eq!(recent.len(), 1_000);
    assert_eq!(recent[0].conn_id, "64");
    assert_eq!(recent[999].conn_id, "44b");
}

#[tokio::test]
async fn a_follower_is_told_of_denials_and_of_what_was_suppressed() {
    let folder = tempfile::tempdir().unwrap();
    let sink = sink(&folder.path().join("records.jsonl"), LONG, &lost_counter());
    let mut follower = sink.follow_denials();
    sink.submit(allowed());
    (0..60).for_each(|_| sink.submit(denied()));
    let stopping = sink.clone();
    tokio::task::spawn_blocking(move || stopping.shutdown(PATIENCE)).await.unwrap().unwrap();
    for _ in 0..50 {
        assert!(matches!(follower.recv().await.unwrap(), Denial::Denied(_)));
    }
    let Denial::Suppressed(summary) = follower.recv().await.unwrap() else {
        panic!("expected a summary");
    };
    assert_eq!(summary.suppressed, 10);
}

#[test]
fn a_full_disk_counts_every_record_and_warns_once_until_it_is_over() {
    let log = captured_log();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.jsonl");
    symlink("/dev/full", &path).unwrap();
    let lost = lost_counter();
    let sink = sink(&path, SHORT, &lost);
    (0..3).for_each(|_| sink.submit(allowed()));
    (0..60).for_each(|_| sink.submit(denied()));
    wait_until("all are counted", || lost.get() >= 63);
    assert_eq!(lost.get(), 63);

    // The disk has room again: a new file takes the place of the full one.
    fs::remove_file(&path).unwrap();
    wait_until("the file is made again", || path.exists());
    sink.submit(allowed());
    sink.shutdown(PATIENCE).unwrap();
    assert_eq!((lines(&path).len(), lost.get()), (1, 63));

    let log = log.text();
    let about = |text: &str| {
        let path = path.display().to_string();
        log.lines().filter(|line| line.contains(text) && line.contains(&path)).count()
    };
    assert_eq!(about("cannot be written"), 1, "{log}");
    assert_eq!(about("are written again"), 1, "{log}");
}

#[test]
fn a_stuck_reader_loses_exactly_what_is_counted_and_blocks_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let (reading, path_to_read) = (Arc::new(Mutex::new(())), path.clone());
    let stuck = reading.lock().unwrap();
    let reader = thread::spawn({
        let reading = Arc::clone(&reading);
        move || {
            let pipe = fs::File::open(path_to_read).unwrap();
            let _wait = reading.lock();
            let lines = BufReader::new(pipe).lines();
            lines.inspect(|line| drop(RecordLine::parse(line.as_ref().unwrap()).unwrap())).count()
        }
    });
    let lost = lost_counter();
    let sink = sink(&path, LONG, &lost);
    let submitted = 20_000;
    let start = Instant::now();
    (0..submitted).for_each(|_| sink.submit(allowed()));
    assert!(start.elapsed() < PATIENCE, "a record waited");
    // The queue, what fits the pipe, and the one being written are not lost yet.
    assert!(lost.get() > 10_000, "{} lost", lost.get());
    sink.shutdown(Duration::from_millis(50)).unwrap_err();

    drop(stuck);
    // The writer ends with the last sink, and with it the reader.
    drop(sink);
    let written = u64::try_from(reader.join().unwrap()).unwrap();
    assert_eq!(written + lost.get(), submitted);
}

#[test]
fn a_denial_is_an_event_on_the_connection_target() {
    let log = captured_log();
    let folder = tempfile::tempdir().unwrap();
    let sink = sink(&folder.path().join("records.jsonl"), LONG, &lost_counter());
    sink.submit(ConnectionRecord { conn_id: "feedf00d".to_owned(), ..denied() });
    sink.shutdown(PATIENCE).unwrap();
    let text = log.text();
    let line = text.lines().find(|line| line.contains("feedf00d")).unwrap();
    let event: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(event["target"], "hauberk.connection");
    assert_eq!(event["level"], "INFO");
    assert_eq!(event["message"], "connection denied");
    assert_eq!(event["src.identity"], "spiffe://corp.example/ns/shop/sa/checkout");
    assert_eq!(event["dst.port"], 5432);
    assert_eq!(event["reason"], "no_matching_rule");
}

/// The log of the whole test process, as JSON.
#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn captured_log() -> Captured {
    static LOG: OnceLock<Captured> = OnceLock::new();
    let start = || {
        let captured = Captured::default();
        let writer = captured.clone();
        tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_writer(move || writer.clone())
            .init();
        captured
    };
    LOG.get_or_init(start).clone()
}
