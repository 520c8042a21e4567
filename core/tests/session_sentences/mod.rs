//! The table of [`super`], and those of its cases that need nothing but the state machine of a dedicated session.
//! `multiplexed.rs` has what is said of the other kind.

pub(crate) mod multiplexed;

use std::net::SocketAddr;

use hauberk_core::{
    policy::Reason,
    session::{
        ALPN, ALPN_MULTIPLEXED, Continue, Event, FrameError, FrameType, HEADER_LENGTH, Header,
        Machine, Misuse, Open, Reauthenticate, Refusal, RefusalCause, ResetCause, Role,
    },
};

/// What shows that a sentence holds.
pub(crate) enum Proof {
    /// This, which runs here.
    Here(fn()),
    /// A test of this name, in this crate, `tls`, `agent` or `tests`.
    Test(&'static str),
    /// This line of a crate: for numbers that nothing observable depends on, and for waits that no test waits for.
    Source(&'static str, &'static str),
    /// Nothing has to: it says how the page is to be read.
    Explains,
}

/// Every sentence of the page, in its order, and what shows it.
pub(crate) const SENTENCES: &[(&str, &[Proof])] = &[
    (
        "What two Hauberk agents say to each other inside one mutual TLS connection.",
        &[Proof::Explains],
    ),
    (
        "`hauberk_core::session` is the implementation, `hauberk_tls::channel` the records below it; where this page and they differ, that is a bug.",
        &[Proof::Explains],
    ),
    (
        "`core/tests/session_conformance.rs` names for every sentence the test that shows it.",
        &[Proof::Explains],
    ),
    ("The words MUST, MUST NOT and MAY are meant as in RFC 2119.", &[Proof::Explains]),
    (
        "TCP to port 15008 of the destination's address.",
        &[Proof::Source("agent", "MESH_PORT: u16 = 15_008;")],
    ),
    (
        "The side that connects is the *source* (the caller's agent), the other the *destination*.",
        &[Proof::Explains],
    ),
    (
        "TLS 1.3 only, with client certificate; both certificates are X.509-SVIDs of workloads.",
        &[
            Proof::Test("a_caller_that_speaks_tls_12_is_refused"),
            Proof::Test("a_peer_without_certificate_is_refused"),
            Proof::Test("expired_and_malformed_certificates_are_refused_each_with_its_reason"),
        ],
    ),
    (
        "Key exchange X25519MLKEM768 is offered first.",
        &[Proof::Test("both_ends_know_each_other_and_share_a_value_that_no_other_connection_has")],
    ),
    (
        "No resumption, no 0-RTT, no session tickets: a ticket ends the connection.",
        &[
            Proof::Test("a_server_resumes_nothing_and_takes_no_early_data"),
            Proof::Test("session_tickets_are_refused"),
        ],
    ),
    (
        "After the handshake the only handshake message that may come is KeyUpdate.",
        &[Proof::Test("key_updates_are_those_of_tls"), Proof::Test("session_tickets_are_refused")],
    ),
    (
        "ALPN `hauberk/1` for a *dedicated* session, which carries one stream after another, and `hauberk/2` for a *multiplexed* one, which carries many at a time.",
        &[Proof::Here(the_protocols_have_their_names)],
    ),
    (
        "A source MAY offer both, and a destination that knows both takes the multiplexed one.",
        &[
            Proof::Test("connections_at_once_share_a_session"),
            Proof::Source("agent", "const SERVED: [&[u8]; 2] = [ALPN_MULTIPLEXED, ALPN];"),
        ],
    ),
    (
        "A peer that agrees to neither is not spoken to.",
        &[Proof::Test("a_caller_without_our_protocol_is_refused")],
    ),
    (
        "The server name stands for the SPIFFE ID that the source expects ([ADR 1](../docs/adr/0001-server-name-names-the-identity.md)); the source MUST compare the ID itself after the handshake.",
        &[
            Proof::Test("a_server_with_anothers_certificate_is_refused"),
            Proof::Test("a_destination_with_a_bad_certificate_is_refused_by_its_callers"),
        ],
    ),
    (
        "The *channel binding* is 32 bytes that only the two ends of this connection know: HKDF-SHA256 with the salt `hauberk/1`, the input `client key ‖ client iv ‖ server key ‖ server iv` of the first application traffic keys, and the info `channel binding`.",
        &[Proof::Test("both_ends_know_each_other_and_share_a_value_that_no_other_connection_has")],
    ),
    (
        "The *caller token* is 16 bytes that only the two ends of this connection know: derived in the same way with the channel binding as the input and the info `caller token`.",
        &[Proof::Test("the_hello_of_a_later_connection_has_the_token_of_the_one_before")],
    ),
    (
        "A source MAY have the token of its newest connection to a destination in the ClientHello of the next one, as an ALPN protocol: the text `hauberk/1 caller ` and the token.",
        &[Proof::Test("a_source_tells_who_it_was_in_its_next_hello")],
    ),
    (
        "It says whose room a handshake takes while many are unfinished ([ADR 15](../docs/adr/0015-handshakes-give-way.md)).",
        &[Proof::Test("a_caller_that_is_known_keeps_its_place_in_a_flood")],
    ),
    (
        "A destination that does not know it takes it for none.",
        &[Proof::Test("a_known_caller_has_room_of_its_own_at_the_address_of_a_flood")],
    ),
    (
        "frame = type (1 byte) ‖ length (3 bytes, big endian) ‖ body (length bytes)",
        &[Proof::Here(a_header_is_a_type_and_a_length)],
    ),
    (
        "Frames do not align with TLS records: a record may hold several, a frame may span many.",
        &[Proof::Here(frames_are_read_however_they_are_cut)],
    ),
    ("| Type | Name | Sent by | Body | Length |", &[Proof::Explains]),
    (
        "| 1 | Open | source | the wish, below | 1 to 16,384 |",
        &[Proof::Here(open_has_its_type_and_bounds)],
    ),
    ("| 2 | Accept | destination | none | 0 |", &[Proof::Here(accept_has_its_type_and_bounds)]),
    (
        "| 3 | Refuse | destination | the refusal, below | 1 to 16,384 |",
        &[Proof::Here(refuse_has_its_type_and_bounds)],
    ),
    (
        "| 4 | Data | both | application bytes | 1 to 16,777,215 |",
        &[Proof::Here(data_has_its_type_and_bounds)],
    ),
    ("| 5 | Fin | both | none | 0 |", &[Proof::Here(fin_has_its_type_and_bounds)]),
    (
        "| 6 | Reset | both | stream number (4), cause (1) | 5 |",
        &[Proof::Here(reset_has_its_type_and_bounds)],
    ),
    (
        "| 7 | Reauthenticate | both | the proof, below | 1 to 16,384 |",
        &[Proof::Here(reauthenticate_has_its_type_and_bounds)],
    ),
    (
        "| 8 | GoingAway | destination | number of streams taken (4) | 4 |",
        &[Proof::Here(going_away_has_its_type_and_bounds)],
    ),
    (
        "| 9 | Continue | source | session name (16), stream number (4) | 20 |",
        &[Proof::Here(continue_has_its_type_and_bounds)],
    ),
    (
        "An unknown type, a length outside its bounds, or a frame out of turn ends the session.",
        &[
            Proof::Here(what_breaks_the_protocol_ends_the_session),
            Proof::Test("frames_out_of_turn_end_the_session"),
            Proof::Test("a_frame_out_of_turn_ends_the_session"),
        ],
    ),
    (
        "Length and turn are checked on the header, before any of the body is kept; a body is kept as it arrives, never allocated by what the header says.",
        &[
            Proof::Test("a_length_over_the_limit_of_its_type_is_refused_on_the_header_alone"),
            Proof::Test("a_header_out_of_turn_is_refused_before_its_body"),
        ],
    ),
    ("Data is passed on as it arrives.", &[Proof::Here(data_is_passed_on_as_it_arrives)]),
    (
        "**Open**: connection id (16 bytes), trace id (16 bytes, all zero: none), original destination, source address.",
        &[Proof::Here(open_is_laid_out_as_written)],
    ),
    (
        "An address is a family byte (4 or 6), the IP address (4 or 16 bytes), the port (2 bytes).",
        &[Proof::Here(open_is_laid_out_as_written)],
    ),
    (
        "**Refuse**: six texts, each with a length of 2 bytes before it, at most 1,024 bytes of UTF-8 without control characters: the reason (a word of the closed set, or `unreachable`), policy, rule, owner, nearest miss, mend.",
        &[
            Proof::Here(refuse_is_laid_out_as_written),
            Proof::Test("a_refusal_reads_back_without_control_characters"),
        ],
    ),
    (
        "An unknown reason ends the session.",
        &[Proof::Test("a_refusal_with_an_unknown_reason_is_refused")],
    ),
    (
        "**Reset** causes: 1 the application's connection broke, 2 a policy change, 3 the peer's certificate ended, 4 the agent stops, 5 the peer broke the protocol, 6 answer to the other side's Refuse or Reset.",
        &[Proof::Here(reset_causes_have_their_numbers)],
    ),
    (
        "**Reauthenticate**: sequence (4), TLS signature scheme (2), signature (2 + n), then one to four certificates (2 + n each), leaf first.",
        &[Proof::Here(a_proof_is_laid_out_as_written)],
    ),
    (
        "The signature is over the text `hauberk/1 reauthenticate`, a zero byte, 1 if the source sends and 0 if the destination does, the channel binding, the sequence, and each certificate with its length ([ADR 2](../docs/adr/0002-reauthentication-in-a-session.md)).",
        &[
            Proof::Here(a_proof_is_signed_as_written),
            Proof::Test("a_proof_is_good_for_one_connection_one_side_and_one_identity"),
        ],
    ),
    (
        "A dedicated session carries one stream after another.",
        &[Proof::Here(a_session_carries_one_stream_after_another)],
    ),
    (
        "Streams are numbered from 1 by counting Opens and Continues.",
        &[Proof::Here(a_session_carries_one_stream_after_another)],
    ),
    (
        "source destination idle ── Open ──────────────────────────────────────► idle opening Data, Fin, Reset may follow at once answering ◄─────────────────────────────── Accept ── open ◄─────────────────────────────── Refuse ── its direction is over open Data … Fin | Reset Data … Fin | Reset idle when both directions are over idle",
        &[
            Proof::Here(a_session_carries_one_stream_after_another),
            Proof::Here(a_refused_stream_leaves_the_session_idle),
            Proof::Test("two_honest_sides_always_understand_each_other"),
        ],
    ),
    (
        "The source sends Open when the session is idle.",
        &[Proof::Here(open_is_sent_on_an_idle_session)],
    ),
    (
        "Data, Fin and Reset may follow without waiting for the answer; what follows MUST be kept by the source until the answer, if it wants to open the stream again elsewhere.",
        &[
            Proof::Here(what_follows_open_does_not_wait),
            Proof::Test("a_stream_that_is_opened_on_a_leaving_session_is_opened_again"),
        ],
    ),
    (
        "This implementation waits: its application's `connect` succeeds when Accept has come.",
        &[Proof::Test("connect_succeeds_when_the_application_has_accepted")],
    ),
    (
        "The destination decides anew for each stream, as if it were the first, and answers with exactly one of Accept, Refuse or Reset before anything else of the stream.",
        &[
            Proof::Here(an_answer_comes_first),
            Proof::Test("a_second_stream_is_decided_like_the_first"),
        ],
    ),
    (
        "Before Accept nothing of the stream may reach the application.",
        &[Proof::Test("a_second_stream_is_decided_like_the_first")],
    ),
    (
        "Each direction ends with one frame: Fin, or Reset, or, at the destination, Refuse.",
        &[Proof::Here(each_direction_ends_once)],
    ),
    (
        "After Fin a Reset may still follow while the other direction is open.",
        &[Proof::Test("a_reset_after_the_own_end_still_reaches_the_peer")],
    ),
    (
        "Whoever sends Reset or Refuse throws away what still comes of that stream.",
        &[
            Proof::Test("a_reset_is_answered_once_and_what_crossed_it_is_thrown_away"),
            Proof::Test("a_refused_source_ends_its_direction_and_the_session_is_free_again"),
        ],
    ),
    (
        "Whoever receives Reset or Refuse MUST end its own direction if that is open: by Reset with cause 6.",
        &[
            Proof::Here(a_reset_is_answered),
            Proof::Test("a_reset_is_answered_once_and_what_crossed_it_is_thrown_away"),
        ],
    ),
    (
        "When both directions are over, the stream is over and the session is idle again.",
        &[Proof::Here(a_session_carries_one_stream_after_another)],
    ),
    (
        "A Reset that names a stream that is over crossed the end of that stream and is ignored.",
        &[
            Proof::Here(a_reset_of_a_stream_that_is_over_is_ignored),
            Proof::Test("a_reset_that_crosses_the_end_of_its_stream_harms_no_later_one"),
        ],
    ),
    (
        "One that names stream 0 or a stream to come ends the session.",
        &[Proof::Here(a_reset_of_no_stream_ends_the_session)],
    ),
    (
        "An agent whose application takes no more reads on what that application has said before, sends it, and then sends Reset with cause 1.",
        &[Proof::Test("an_answer_before_the_end_of_the_upload_arrives")],
    ),
    (
        "Its peer delivers what came before the Reset, and then resets its own application.",
        &[Proof::Test("an_answer_before_the_end_of_the_upload_arrives")],
    ),
    (
        "End-of-stream is Fin and nothing else.",
        &[
            Proof::Test("half_close_is_carried_both_ways"),
            Proof::Test("a_reset_is_carried_as_a_reset"),
        ],
    ),
    (
        "A TCP or TLS end before both directions are over is a truncation, and the application MUST see a reset.",
        &[Proof::Test("a_killed_agent_leaves_no_open_connection_hanging")],
    ),
    (
        "A destination that takes no further streams sends GoingAway once, with the number of streams it has taken.",
        &[Proof::Here(going_away_is_said_once)],
    ),
    (
        "A stream under way goes on.",
        &[Proof::Test("a_stream_under_way_goes_on_while_the_destination_goes_away")],
    ),
    (
        "What is opened afterwards is not looked at: a source whose Open has a higher number knows that nothing of it was used and MAY open the stream again on another session.",
        &[
            Proof::Test("a_stream_that_crosses_the_going_away_was_not_taken"),
            Proof::Test("a_stream_that_is_opened_on_a_leaving_session_is_opened_again"),
        ],
    ),
    (
        "The same goes for a session that ended before the answer, if nothing but Open was sent of the stream.",
        &[
            Proof::Test("a_stream_that_was_not_answered_is_opened_again"),
            Proof::Test("a_restarted_destination_costs_no_later_connection"),
        ],
    ),
    (
        "In no other case may it: without GoingAway the application may have seen the first bytes.",
        &[Proof::Here(only_going_away_says_that_a_stream_was_not_taken)],
    ),
    (
        "A source that wants no more streams closes the connection when it is idle.",
        &[
            Proof::Test("a_policy_change_closes_idle_sessions"),
            Proof::Test("a_rotation_closes_idle_sessions"),
        ],
    ),
    (
        "The side that closes sends close_notify.",
        &[Proof::Test("a_close_is_told_from_a_fatal_alert")],
    ),
    (
        "At each renewal of its certificate an agent sends Reauthenticate on sessions that carry a stream, and closes idle ones.",
        &[
            Proof::Test("bulk_streams_pass_ten_renewals_unchanged"),
            Proof::Test("a_rotation_closes_idle_sessions"),
        ],
    ),
    (
        "It SHOULD spread these over time, well before the certificate that the peer was shown ends: this implementation over a quarter of what is left, at most 10 s, and on a multiplexed session within 5 s.",
        &[
            Proof::Source("agent", "const LOOK: Duration = Duration::from_secs(5);"),
            Proof::Test("a_proof_comes_well_before_the_certificate_that_it_follows_has_ended"),
        ],
    ),
    (
        "Sequences go up, and may leave numbers out.",
        &[Proof::Test("the_sequences_of_proofs_go_up_and_may_leave_numbers_out")],
    ),
    (
        "When the peer's certificate ends without a valid proof of a newer one, the stream is cut; so it is if a proof is not valid or comes too often, and a session without a stream ends then.",
        &[
            Proof::Test("a_connection_ends_with_its_certificate_if_that_is_not_renewed"),
            Proof::Test("a_failed_proof_is_a_bad_svid_whether_a_stream_is_open_or_not"),
            Proof::Test("proofs_without_end_are_cut_off"),
        ],
    ),
    (
        "While the application does not read, the proof may be waiting behind data: then nothing is sent either, and the proof has 10 seconds from when the application reads on.",
        &[
            Proof::Source("agent", "if relay.held_back {"),
            Proof::Source("agent", "const PROOF_GRACE: Duration = Duration::from_secs(10);"),
        ],
    ),
    (
        "The source address in Open, unless the directory has it for the proven identity.",
        &[Proof::Source(
            "agent",
            "if snapshot.owns_address(peer, claimed.ip()) { claimed } else { from }",
        )],
    ),
    (
        "The original destination: it must be an address of the workload that the session was made with.",
        &[Proof::Test("a_session_carries_nothing_to_another_workload")],
    ),
    (
        "Any length, before its bound is checked; any number of streams, proofs or empty records.",
        &[
            Proof::Test("a_length_over_the_limit_of_its_type_is_refused_on_the_header_alone"),
            Proof::Test("proofs_without_end_are_cut_off"),
            Proof::Test("a_peer_that_only_renews_its_key_is_cut_off"),
        ],
    ),
    (
        "That a peer which accepted one stream may have another.",
        &[Proof::Test("a_second_stream_is_decided_like_the_first")],
    ),
    ("| What | Limit |", &[Proof::Explains]),
    ("| ClientHello | 8 KiB |", &[Proof::Source("tls", "const MAX_HELLO: usize = 8 * 1024;")]),
    (
        "The caller token: whoever saw it on the wire can repeat it, so nothing is decided by it.",
        &[Proof::Test("a_known_caller_has_room_of_its_own_at_the_address_of_a_flood")],
    ),
    (
        "| handshake, each direction | 64 KiB, 10 s |",
        &[
            Proof::Test("a_handshake_that_never_ends_is_cut_off"),
            Proof::Source("tls", "const MAX_HANDSHAKE: usize = 64 * 1024;"),
            Proof::Source("agent", "HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);"),
        ],
    ),
    (
        "| answer to Open | 15 s |",
        &[Proof::Source("agent", "OPEN_TIMEOUT: Duration = Duration::from_secs(15);")],
    ),
    (
        "| end of a stream after Reset or Refuse, at both sides | 1 s, then the session is given up |",
        &[Proof::Source("agent", "const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);")],
    ),
    (
        "| connections without a whole ClientHello, unfinished handshakes | 4,096 and 2,048; above it, the oldest of whoever has most is closed |",
        &[
            Proof::Source("tls", "SILENT: usize = 4_096;"),
            Proof::Source("tls", "UNFINISHED: usize = 2_048;"),
            Proof::Test("silent_connections_displace_only_their_own_oldest"),
        ],
    ),
    (
        "| idle sessions of all callers at a destination, of one identity of one node | 8,192 and 1,024; above it, the oldest of whoever has most is closed |",
        &[
            Proof::Source("agent", "MAX_IDLE: usize = 8_192;"),
            Proof::Test("the_idle_sessions_of_one_identity_take_no_room_of_anothers"),
        ],
    ),
    (
        "| streams of all callers to one workload or host, of one identity of one node | 24,576, two thirds of it; a stream more is refused with `rate_limited` |",
        &[
            Proof::Source("agent", "MAX_STREAMS: usize = 24_576;"),
            Proof::Test("whoever_takes_all_it_gets_leaves_some_for_others"),
        ],
    ),
    (
        "| caller tokens at a destination, of one identity of one node | 16,384 and 256, for 1 h |",
        &[
            Proof::Source("tls", "CAPACITY: usize = 16_384;"),
            Proof::Test("one_caller_has_a_share_of_them_the_newest"),
            Proof::Test("a_token_is_known_for_its_time"),
        ],
    ),
    (
        "| idle session | closed after 60 s by the source, 90 s by the destination |",
        &[
            Proof::Source("agent", "const MAX_IDLE: Duration = Duration::from_secs(60);"),
            Proof::Source("agent", "const IDLE_TIMEOUT: Duration = Duration::from_secs(90);"),
        ],
    ),
    (
        "| age of a session for new streams | 10 min |",
        &[Proof::Source("agent", "const MAX_AGE: Duration = Duration::from_secs(600);")],
    ),
    (
        "| streams of a session | 4,294,967,295 |",
        &[
            Proof::Source("core", "self.is_idle() && !self.going_away && self.stream < u32::MAX"),
            Proof::Source("agent", "session.machine.streams() == u32::MAX"),
        ],
    ),
    (
        "| TLS records without a byte of frames in a row: empty ones, key updates | 16 |",
        &[
            Proof::Test("a_peer_that_only_renews_its_key_is_cut_off"),
            Proof::Source("tls", "const FRUITLESS: u8 = 16;"),
        ],
    ),
    (
        "| proofs of one side | 16 at once, and one a second |",
        &[
            Proof::Test("sixteen_proofs_may_come_at_once_and_then_one_a_second"),
            Proof::Test("proofs_without_end_are_cut_off"),
        ],
    ),
    (
        "| records under one key | the cipher's limit (2²⁴ for AES-GCM), less 64 |",
        &[
            Proof::Test("keys_are_renewed_before_their_limit_in_both_directions"),
            Proof::Source("tls", "const BURST: u64 = 64;"),
        ],
    ),
    ("The ALPN name is the version.", &[Proof::Here(the_protocols_have_their_names)]),
    (
        "A change that an older peer would refuse gets a new name (`hauberk/3`), offered beside the old one; unknown frames are never skipped.",
        &[Proof::Here(what_breaks_the_protocol_ends_the_session)],
    ),
];

fn open() -> Open {
    Open {
        connection_id: [1; 16],
        trace_id: [2; 16],
        original_destination: "10.0.0.1:80".parse().unwrap(),
        source_address: "[fd00::1]:4000".parse().unwrap(),
    }
}

fn refusal() -> Refusal {
    Refusal {
        cause: RefusalCause::Denied(Reason::NoMatchingRule),
        policy: "p".to_owned(),
        rule: "r".to_owned(),
        owner: "o".to_owned(),
        nearest_miss: "n".to_owned(),
        mend: "m".to_owned(),
    }
}

fn proof() -> Reauthenticate {
    Reauthenticate {
        sequence: 7,
        scheme: 0x0403,
        signature: vec![8; 3],
        chain: vec![vec![9; 2], vec![10; 1]],
    }
}

fn frame(frame_type: FrameType, body: &[u8]) -> Vec<u8> {
    [&Header::encode(frame_type, body.len()).unwrap(), body].concat()
}

/// What a machine makes of bytes, or how they break the protocol.
fn hear(machine: &mut Machine, mut bytes: &[u8]) -> Result<Vec<String>, FrameError> {
    let mut said = Vec::new();
    while !bytes.is_empty() {
        let received = machine.receive(bytes)?;
        bytes = &bytes[received.used..];
        said.extend(received.event.map(|event| match event {
            Event::Open(_) => "Open".to_owned(),
            Event::Continue(_) => "Continue".to_owned(),
            Event::Accept => "Accept".to_owned(),
            Event::Refuse(_) => "Refuse".to_owned(),
            Event::Data(bytes) => format!("Data {}", bytes.len()),
            Event::Fin => "Fin".to_owned(),
            Event::Reset(cause) => format!("Reset {cause:?}"),
            Event::Reauthenticate(_) => "Reauthenticate".to_owned(),
            Event::GoingAway => "GoingAway".to_owned(),
            Event::NotTaken => "NotTaken".to_owned(),
        }));
    }
    Ok(said)
}

/// A source and a destination, between which nothing has been said.
fn fresh() -> (Machine, Machine) {
    (Machine::new(Role::Source), Machine::new(Role::Destination))
}

/// A source and a destination whose stream is open at both sides.
fn opened() -> (Machine, Machine) {
    let (mut source, mut destination) = fresh();
    let mut wire = Vec::new();
    source.open(&open(), &mut wire).unwrap();
    assert_eq!(hear(&mut destination, &wire).unwrap(), ["Open"]);
    wire.clear();
    destination.accept(&mut wire).unwrap();
    assert_eq!(hear(&mut source, &wire).unwrap(), ["Accept"]);
    (source, destination)
}

fn the_protocols_have_their_names() {
    assert_eq!((ALPN, ALPN_MULTIPLEXED), (&b"hauberk/1"[..], &b"hauberk/2"[..]));
}

fn a_header_is_a_type_and_a_length() {
    let bytes = Header::encode(FrameType::Data, 0x01_02_03).unwrap();
    assert_eq!((HEADER_LENGTH, bytes), (4, [4, 1, 2, 3]));
    let read = Header { frame_type: FrameType::Data, length: 0x01_02_03, stream: 0 };
    assert_eq!(Header::decode(bytes), Ok(read));
}

fn frames_are_read_however_they_are_cut() {
    let mut wire = frame(FrameType::Open, &open().encode());
    wire.extend(frame(FrameType::Data, b"abc"));
    wire.extend(frame(FrameType::Fin, &[]));
    let (_, mut destination) = fresh();
    assert_eq!(hear(&mut destination, &wire).unwrap(), ["Open", "Data 3", "Fin"]);
    let (_, mut destination) = fresh();
    let said: Vec<String> =
        wire.iter().flat_map(|byte| hear(&mut destination, &[*byte]).unwrap()).collect();
    assert_eq!(said, ["Open", "Data 1", "Data 1", "Data 1", "Fin"]);
}

/// The number of a type, its bounds, and who may send it: what the other side takes at the right time.
fn has(frame_type: FrameType, number: u8, least: usize, most: usize) {
    let [first, ..] = Header::encode(frame_type, least).unwrap();
    assert_eq!(first, number);
    for (length, is_allowed) in
        [(least, true), (most, true), (least.wrapping_sub(1), false), (most + 1, false)]
    {
        let Ok(length) = u32::try_from(length) else { continue };
        // What three bytes cannot say cannot be sent.
        let [0, a, b, c] = length.to_be_bytes() else { continue };
        let header = Header::decode([number, a, b, c]);
        assert_eq!(header.is_ok(), is_allowed, "{frame_type:?} of {length} bytes");
    }
}

/// It is out of turn at this side, whenever it comes.
fn is_never_heard_by(role: Role, frame_type: FrameType, body: &[u8]) {
    let (source, destination) = opened();
    let opened = if role == Role::Source { source } else { destination };
    for mut machine in [Machine::new(role), opened] {
        let error = hear(&mut machine, &frame(frame_type, body)).unwrap_err();
        assert_eq!(error, FrameError::OutOfTurn(frame_type));
    }
}

fn open_has_its_type_and_bounds() {
    has(FrameType::Open, 1, 1, 16_384);
    is_never_heard_by(Role::Source, FrameType::Open, &open().encode());
}

fn accept_has_its_type_and_bounds() {
    has(FrameType::Accept, 2, 0, 0);
    is_never_heard_by(Role::Destination, FrameType::Accept, &[]);
}

fn refuse_has_its_type_and_bounds() {
    has(FrameType::Refuse, 3, 1, 16_384);
    is_never_heard_by(Role::Destination, FrameType::Refuse, &refusal().encode());
}

fn both_send(body: &[u8], frame_type: FrameType, said: &str) {
    let (mut source, mut destination) = opened();
    for machine in [&mut source, &mut destination] {
        assert_eq!(hear(machine, &frame(frame_type, body)).unwrap(), [said]);
    }
}

fn data_has_its_type_and_bounds() {
    has(FrameType::Data, 4, 1, 16_777_215);
    both_send(b"x", FrameType::Data, "Data 1");
}

fn fin_has_its_type_and_bounds() {
    has(FrameType::Fin, 5, 0, 0);
    both_send(&[], FrameType::Fin, "Fin");
}

fn reset_has_its_type_and_bounds() {
    has(FrameType::Reset, 6, 5, 5);
    both_send(&[0, 0, 0, 1, 4], FrameType::Reset, "Reset Draining");
}

fn reauthenticate_has_its_type_and_bounds() {
    has(FrameType::Reauthenticate, 7, 1, 16_384);
    both_send(&proof().encode(), FrameType::Reauthenticate, "Reauthenticate");
}

fn going_away_has_its_type_and_bounds() {
    has(FrameType::GoingAway, 8, 4, 4);
    is_never_heard_by(Role::Destination, FrameType::GoingAway, &[0, 0, 0, 0]);
}

fn continue_has_its_type_and_bounds() {
    let body = Continue { session: [7; 16], stream: 3 }.encode();
    assert_eq!(body, [&[7; 16][..], &[0, 0, 0, 3]].concat());
    has(FrameType::Continue, 9, 20, 20);
    let (mut source, mut destination) = fresh();
    let wire = frame(FrameType::Continue, &body);
    assert_eq!(hear(&mut destination, &wire).unwrap(), ["Continue"]);
    assert_eq!(hear(&mut source, &wire).unwrap_err(), FrameError::OutOfTurn(FrameType::Continue));
}

fn what_breaks_the_protocol_ends_the_session() {
    let cases = [
        (vec![13, 0, 0, 0], FrameError::UnknownType(13)),
        (
            vec![4, 0, 0, 0],
            FrameError::TooShort { frame_type: FrameType::Data, length: 0, least: 1 },
        ),
        (frame(FrameType::Data, b"x"), FrameError::OutOfTurn(FrameType::Data)),
    ];
    for (bytes, wanted) in cases {
        assert_eq!(hear(&mut Machine::new(Role::Destination), &bytes).unwrap_err(), wanted);
    }
}

fn data_is_passed_on_as_it_arrives() {
    let (mut source, _) = opened();
    // The first byte of very many.
    let header = Header::encode(FrameType::Data, 16_777_215).unwrap();
    assert_eq!(hear(&mut source, &[&header[..], b"x"].concat()).unwrap(), ["Data 1"]);
}

fn open_is_laid_out_as_written() {
    let mut wanted = [[1; 16], [2; 16]].concat();
    wanted.extend([4, 10, 0, 0, 1, 0, 80]);
    wanted.push(6);
    let source: SocketAddr = open().source_address;
    let SocketAddr::V6(source) = source else { panic!("another family") };
    wanted.extend(source.ip().octets());
    wanted.extend(4000_u16.to_be_bytes());
    assert_eq!(open().encode(), wanted);
}

fn refuse_is_laid_out_as_written() {
    let mut wanted = vec![0, 16];
    wanted.extend(b"no_matching_rule");
    for letter in [b'p', b'r', b'o', b'n', b'm'] {
        wanted.extend([0, 1, letter]);
    }
    assert_eq!(refusal().encode(), wanted);
    let unreachable = Refusal { cause: RefusalCause::Unreachable, ..refusal() }.encode();
    assert!(unreachable.starts_with(b"\0\x0bunreachable"), "{unreachable:?}");
    let long = Refusal { mend: "a".repeat(2_000), ..refusal() }.encode();
    assert_eq!(Refusal::decode(&long).unwrap().mend.len(), 1_024);
    // 1,025 bytes, and a line end: neither is taken.
    let with = |text: &[u8]| {
        let mut body = refusal().encode();
        body.truncate(body.len() - 3);
        body.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
        body.extend(text);
        Refusal::decode(&body)
    };
    assert!(with(&[b'a'; 1_024]).is_ok());
    for text in [&[b'a'; 1_025][..], b"a\nb", b"\xff"] {
        assert_eq!(with(text), Err(FrameError::NotText("mend")));
    }
}

fn reset_causes_have_their_numbers() {
    let causes = [
        ResetCause::Application,
        ResetCause::PolicyRevoked,
        ResetCause::CertificateExpired,
        ResetCause::Draining,
        ResetCause::Protocol,
        ResetCause::Answer,
    ];
    for (number, cause) in (1..).zip(causes) {
        assert_eq!((cause.byte(), ResetCause::from_byte(number)), (number, Ok(cause)));
    }
    for unknown in [0, 7] {
        let error = ResetCause::from_byte(unknown).unwrap_err();
        assert_eq!(error, FrameError::UnknownResetCause(unknown));
    }
}

fn a_proof_is_laid_out_as_written() {
    let mut wanted = vec![0, 0, 0, 7, 4, 3, 0, 3, 8, 8, 8];
    wanted.extend([0, 2, 9, 9, 0, 1, 10]);
    assert_eq!(proof().encode(), wanted);
    for (certificates, is_taken) in [(0, false), (1, true), (4, true), (5, false)] {
        let chain = vec![vec![1]; certificates];
        let body = Reauthenticate { chain, ..proof() }.encode();
        assert_eq!(Reauthenticate::decode(&body).is_ok(), is_taken, "{certificates}");
    }
}

fn a_proof_is_signed_as_written() {
    for (from_source, byte) in [(true, 1), (false, 0)] {
        let mut wanted = b"hauberk/1 reauthenticate\0".to_vec();
        wanted.push(byte);
        wanted.extend([3; 32]);
        wanted.extend(7_u32.to_be_bytes());
        wanted.extend([0, 2, 9, 9, 0, 1, 10]);
        let message = Reauthenticate::signed_message(&[3; 32], from_source, 7, &proof().chain);
        assert_eq!(message, wanted);
    }
}

fn a_session_carries_one_stream_after_another() {
    let (mut source, mut destination) = fresh();
    for number in 1..=3 {
        let (mut there, mut back) = (Vec::new(), Vec::new());
        source.open(&open(), &mut there).unwrap();
        // Not beside the one under way.
        assert_eq!(source.open(&open(), &mut there), Err(Misuse(FrameType::Open)));
        assert_eq!(hear(&mut destination, &there).unwrap(), ["Open"]);
        destination.accept(&mut back).unwrap();
        back.extend(frame(FrameType::Data, b"answer"));
        destination.fin(&mut back).unwrap();
        assert_eq!(hear(&mut source, &back).unwrap(), ["Accept", "Data 6", "Fin"]);
        assert!(!source.is_idle() && !destination.is_idle(), "one direction is open");
        there.clear();
        source.fin(&mut there).unwrap();
        assert_eq!(hear(&mut destination, &there).unwrap(), ["Fin"]);
        assert!(source.is_idle() && destination.is_idle());
        assert_eq!((source.streams(), destination.streams()), (number, number));
    }
}

fn a_refused_stream_leaves_the_session_idle() {
    let (mut source, mut destination) = fresh();
    let (mut there, mut back) = (Vec::new(), Vec::new());
    source.open(&open(), &mut there).unwrap();
    hear(&mut destination, &there).unwrap();
    destination.refuse(&refusal(), &mut back).unwrap();
    assert_eq!(hear(&mut source, &back).unwrap(), ["Refuse"]);
    assert!(!source.is_idle(), "its own direction is open");
    there.clear();
    source.reset(ResetCause::Answer, &mut there);
    assert!(hear(&mut destination, &there).unwrap().is_empty());
    assert!(source.is_idle() && destination.is_idle());
}

fn open_is_sent_on_an_idle_session() {
    let (mut source, mut destination) = opened();
    assert_eq!(source.open(&open(), &mut Vec::new()), Err(Misuse(FrameType::Open)));
    let error = hear(&mut destination, &frame(FrameType::Open, &open().encode())).unwrap_err();
    assert_eq!(error, FrameError::OutOfTurn(FrameType::Open));
}

fn what_follows_open_does_not_wait() {
    type End = fn(&mut Machine, &mut Vec<u8>);
    let ends: [(End, &str); 2] = [
        (|machine, out| machine.fin(out).unwrap(), "Fin"),
        (|machine, out| machine.reset(ResetCause::Application, out), "Reset Application"),
    ];
    for (end, said) in ends {
        let (mut source, mut destination) = fresh();
        let mut wire = Vec::new();
        source.open(&open(), &mut wire).unwrap();
        wire.extend(source.data(1).unwrap());
        wire.push(b'x');
        end(&mut source, &mut wire);
        assert_eq!(hear(&mut destination, &wire).unwrap(), ["Open", "Data 1", said]);
    }
}

fn an_answer_comes_first() {
    let answers: [fn(&mut Machine, &mut Vec<u8>); 3] = [
        |machine, out| machine.accept(out).unwrap(),
        |machine, out| machine.refuse(&refusal(), out).unwrap(),
        |machine, out| machine.reset(ResetCause::Draining, out),
    ];
    for answer in answers {
        let (_, mut destination) = fresh();
        hear(&mut destination, &frame(FrameType::Open, &open().encode())).unwrap();
        let mut out = Vec::new();
        assert_eq!(destination.data(1), Err(Misuse(FrameType::Data)));
        assert_eq!(destination.fin(&mut out), Err(Misuse(FrameType::Fin)));
        answer(&mut destination, &mut out);
        // Exactly one.
        assert_eq!(destination.accept(&mut out), Err(Misuse(FrameType::Accept)));
        assert_eq!(destination.refuse(&refusal(), &mut out), Err(Misuse(FrameType::Refuse)));
    }
    let (mut source, _) = fresh();
    source.open(&open(), &mut Vec::new()).unwrap();
    let error = hear(&mut source, &frame(FrameType::Data, b"x")).unwrap_err();
    assert_eq!(error, FrameError::OutOfTurn(FrameType::Data));
}

fn each_direction_ends_once() {
    for end in [frame(FrameType::Fin, &[]), frame(FrameType::Reset, &[0, 0, 0, 1, 1])] {
        for more in [frame(FrameType::Data, b"x"), frame(FrameType::Fin, &[])] {
            let (mut source, _) = opened();
            hear(&mut source, &end).unwrap();
            hear(&mut source, &more).unwrap_err();
        }
    }
}

fn a_reset_is_answered() {
    for received in [frame(FrameType::Reset, &[0, 0, 0, 1, 1]), Vec::new()] {
        let (mut source, mut destination) = opened();
        let mut back = received;
        if back.is_empty() {
            destination.reset(ResetCause::PolicyRevoked, &mut back);
        }
        hear(&mut source, &back).unwrap();
        let mut there = Vec::new();
        source.reset(ResetCause::Answer, &mut there);
        assert_eq!(there, frame(FrameType::Reset, &[0, 0, 0, 1, 6]));
        assert!(source.is_idle());
    }
}

fn a_reset_of_a_stream_that_is_over_is_ignored() {
    let (mut source, mut destination) = opened();
    let (mut there, mut back) = (Vec::new(), Vec::new());
    source.fin(&mut there).unwrap();
    destination.fin(&mut back).unwrap();
    hear(&mut source, &back).unwrap();
    hear(&mut destination, &there).unwrap();
    let late = frame(FrameType::Reset, &[0, 0, 0, 1, 1]);
    for machine in [&mut source, &mut destination] {
        assert!(hear(machine, &late).unwrap().is_empty());
        assert!(machine.is_reusable());
    }
    // Nor does it harm the stream after it.
    there.clear();
    source.open(&open(), &mut there).unwrap();
    hear(&mut destination, &there).unwrap();
    assert!(hear(&mut destination, &late).unwrap().is_empty());
    destination.accept(&mut Vec::new()).unwrap();
}

fn a_reset_of_no_stream_ends_the_session() {
    for (number, last) in [(0, 1), (2, 1), (u32::MAX, 1)] {
        let body = [&u32::to_be_bytes(number)[..], &[1]].concat();
        // While a stream is open, and when the session is idle.
        let (mut open, _) = opened();
        let (mut idle, mut destination) = opened();
        let mut wire = Vec::new();
        idle.fin(&mut Vec::new()).unwrap();
        destination.fin(&mut wire).unwrap();
        hear(&mut idle, &wire).unwrap();
        assert!(idle.is_idle());
        for machine in [&mut open, &mut idle] {
            let error = hear(machine, &frame(FrameType::Reset, &body)).unwrap_err();
            assert_eq!(error, FrameError::UnknownStream { got: number, last });
        }
    }
    for machine in <[Machine; 2]>::from(fresh()) {
        let mut machine = machine;
        hear(&mut machine, &frame(FrameType::Reset, &[0, 0, 0, 0, 1])).unwrap_err();
    }
}

fn going_away_is_said_once() {
    let (mut source, mut destination) = opened();
    let mut wire = Vec::new();
    destination.go_away(&mut wire).unwrap();
    destination.go_away(&mut wire).unwrap();
    assert_eq!(wire, frame(FrameType::GoingAway, &[0, 0, 0, 1]));
    assert_eq!(hear(&mut source, &wire).unwrap(), ["GoingAway"]);
    let error = hear(&mut source, &wire).unwrap_err();
    assert_eq!(error, FrameError::OutOfTurn(FrameType::GoingAway));
}

fn only_going_away_says_that_a_stream_was_not_taken() {
    let (mut source, _) = fresh();
    source.open(&open(), &mut Vec::new()).unwrap();
    // It counts the stream: the application may have seen it.
    let counted = frame(FrameType::GoingAway, &[0, 0, 0, 1]);
    assert_eq!(hear(&mut source, &counted).unwrap(), ["GoingAway"]);
    assert!(source.awaits_answer());
}
