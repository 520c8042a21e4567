//! What the page says of multiplexed sessions, and of moving.

use hauberk_core::session::{
    FrameError, FrameType, Header, INITIAL_CREDIT, NUMBERED_HEADER_LENGTH,
};

use super::Proof;

/// As [`super::SENTENCES`].
pub(crate) const SENTENCES: &[(&str, &[Proof])] = &[
    (
        "The *session name* is 16 bytes, derived in the same way with the channel binding as the input and the info `session name`.",
        &[Proof::Test("both_ends_know_each_other_and_share_a_value_that_no_other_connection_has")],
    ),
    (
        "On a multiplexed session a frame has the number of its stream.",
        &[Proof::Here(a_header_has_a_number)],
    ),
    (
        "frame = type (1 byte) ‖ length (3 bytes, big endian) ‖ stream (4 bytes, big endian) ‖ body (length bytes)",
        &[Proof::Here(a_header_has_a_number)],
    ),
    ("| 1 to 5, 7, 8 | as above | | | |", &[Proof::Here(most_types_are_the_same)]),
    ("| 6 | Reset | both | cause (1) | 1 |", &[Proof::Here(reset_is_shorter)]),
    ("| 10 | Credit | both | number of bytes (4) | 4 |", &[Proof::Here(credit_has_its_type)]),
    ("| 11 | Bulk | destination | none | 0 |", &[Proof::Here(bulk_has_its_type)]),
    ("| 12 | Moved | both | none | 0 |", &[Proof::Here(moved_has_its_type)]),
    (
        "GoingAway and Reauthenticate are about no stream and have the number 0; no other frame has it.",
        &[Proof::Here(what_is_about_no_stream_has_no_number)],
    ),
    (
        "An Open has the number after the last one.",
        &[Proof::Test("what_breaks_the_protocol_ends_the_session")],
    ),
    (
        "Streams begin, go on and end beside each other, each by the rules above.",
        &[
            Proof::Test("streams_go_on_beside_each_other_and_end_by_themselves"),
            Proof::Test("a_refused_stream_takes_no_other_with_it"),
            Proof::Test("streams_of_one_session_are_decided_each_by_itself"),
        ],
    ),
    (
        "A direction of a stream has a credit of 65,536 bytes of data; Credit adds to that of its receiver.",
        &[Proof::Here(a_credit_is_64_kib), Proof::Test("no_more_is_sent_than_the_peer_takes")],
    ),
    (
        "More data than that ends the session.",
        &[
            Proof::Test("no_more_is_sent_than_the_peer_takes"),
            Proof::Test("a_session_that_sends_more_than_is_taken_is_given_up"),
        ],
    ),
    (
        "So does a Credit that makes it more than 4,294,967,295.",
        &[Proof::Test("what_breaks_the_protocol_ends_the_session")],
    ),
    (
        "Credit and Bulk may have crossed the end of their stream and are ignored then.",
        &[Proof::Test("what_crossed_the_end_of_a_stream_is_ignored")],
    ),
    ("A stream with much to say is better off on a session of its own.", &[Proof::Explains]),
    (
        "A source MAY have a dedicated session carry on with it: there it sends Continue in place of Open, with the name of the multiplexed session.",
        &[Proof::Test("a_stream_with_much_to_say_moves_and_a_small_one_does_not")],
    ),
    (
        "Once that is accepted it sends Moved on the multiplexed one, which ends its direction as Fin does but is no end-of-stream.",
        &[
            Proof::Test("a_stream_moves_one_way_after_the_other"),
            Proof::Test("a_stream_with_much_to_say_moves_and_a_small_one_does_not"),
        ],
    ),
    (
        "The destination answers Continue as it does Open, and sends Moved in its turn.",
        &[Proof::Test("a_destination_carries_on_with_nobody_elses_stream")],
    ),
    (
        "What follows in each direction comes on the dedicated session, and is read once the Moved of that direction has come.",
        &[Proof::Test("a_stream_with_much_to_say_moves_and_a_small_one_does_not")],
    ),
    (
        "A direction that was over before has no Moved: its sender repeats the Fin on the dedicated session.",
        &[Proof::Test("a_stream_moves_that_is_half_closed")],
    ),
    (
        "A destination that has much to say itself sends Bulk, which is a wish and no more.",
        &[Proof::Test("an_answer_with_much_to_say_moves")],
    ),
    (
        "A destination MUST NOT carry on with a stream whose session has another source or another destination than the dedicated one: it refuses, as it does if the stream is over.",
        &[Proof::Test("a_destination_carries_on_with_nobody_elses_stream")],
    ),
    (
        "A stream is at its end, and its application sees a reset, if Moved comes without an accepted Continue, or if the dedicated session ends before Continue is answered.",
        &[
            Proof::Test("a_stream_that_moves_nowhere_is_at_its_end"),
            Proof::Test("a_stream_whose_move_is_not_answered_is_at_its_end"),
        ],
    ),
    (
        "| the same on a multiplexed session | 30 s, then the session is given up |",
        &[Proof::Test("a_caller_that_does_not_end_what_was_refused_is_given_up")],
    ),
    (
        "| frames that wait on a multiplexed session for a peer that asks for more of them and does not read | 16 MiB, then the session is given up |",
        &[
            Proof::Source("agent", "const MOST_UNREAD: usize = 16 * 1024 * 1024;"),
            Proof::Test("a_peer_that_asks_and_does_not_read_is_given_up"),
        ],
    ),
    (
        "| streams of a multiplexed session at a time | 16,384 |",
        &[Proof::Test("streams_at_a_time_are_bounded")],
    ),
    (
        "`hauberk/2` is no successor of `hauberk/1`: both are in use.",
        &[Proof::Test("a_stream_with_much_to_say_moves_and_a_small_one_does_not")],
    ),
];

fn a_header_has_a_number() {
    let bytes = Header::encode_numbered(FrameType::Data, 0x05_06_07_08, 0x01_02_03).unwrap();
    assert_eq!((NUMBERED_HEADER_LENGTH, bytes), (8, [4, 1, 2, 3, 5, 6, 7, 8]));
    let read = Header { frame_type: FrameType::Data, length: 0x01_02_03, stream: 0x05_06_07_08 };
    assert_eq!(Header::decode_numbered(bytes), Ok(read));
}

/// The type, and whether so many bytes may follow.
fn takes(frame_type: FrameType, stream: u32, length: usize) -> (u8, bool) {
    let bytes = Header::encode_numbered(frame_type, stream, length).unwrap();
    let read = Header::decode_numbered(bytes);
    if let Err(error) = &read {
        let is_length = matches!(error, FrameError::TooLong { .. } | FrameError::TooShort { .. });
        assert!(is_length, "{error}");
    }
    (bytes[0], read.is_ok())
}

fn has(frame_type: FrameType, number: u8, length: usize) {
    assert_eq!(takes(frame_type, 1, length), (number, true));
    assert_eq!(takes(frame_type, 1, length + 1), (number, false));
    if let Some(less) = length.checked_sub(1) {
        assert_eq!(takes(frame_type, 1, less), (number, false));
    }
}

fn most_types_are_the_same() {
    let types = [
        (FrameType::Open, 1, 1, 1, 16_384),
        (FrameType::Accept, 2, 1, 0, 0),
        (FrameType::Refuse, 3, 1, 1, 16_384),
        (FrameType::Data, 4, 1, 1, 16_777_215),
        (FrameType::Fin, 5, 1, 0, 0),
        (FrameType::Reauthenticate, 7, 0, 1, 16_384),
        (FrameType::GoingAway, 8, 0, 4, 4),
    ];
    for (frame_type, number, stream, least, most) in types {
        assert_eq!(takes(frame_type, stream, least), (number, true));
        assert_eq!(takes(frame_type, stream, most), (number, true));
        if most < 16_777_215 {
            assert_eq!(takes(frame_type, stream, most + 1), (number, false));
        }
    }
}

fn reset_is_shorter() {
    has(FrameType::Reset, 6, 1);
}

fn credit_has_its_type() {
    has(FrameType::Credit, 10, 4);
}

fn bulk_has_its_type() {
    has(FrameType::Bulk, 11, 0);
}

fn moved_has_its_type() {
    has(FrameType::Moved, 12, 0);
}

fn what_is_about_no_stream_has_no_number() {
    let of = |frame_type, stream, length| {
        Header::decode_numbered(Header::encode_numbered(frame_type, stream, length).unwrap())
    };
    for (frame_type, length) in [(FrameType::Reauthenticate, 9), (FrameType::GoingAway, 4)] {
        assert!(of(frame_type, 0, length).is_ok());
        let error = FrameError::WrongNumber { frame_type, stream: 1 };
        assert_eq!(of(frame_type, 1, length), Err(error));
    }
    for (frame_type, length) in [(FrameType::Data, 9), (FrameType::Fin, 0), (FrameType::Credit, 4)]
    {
        let error = FrameError::WrongNumber { frame_type, stream: 0 };
        assert_eq!(of(frame_type, 0, length), Err(error));
    }
}

fn a_credit_is_64_kib() {
    assert_eq!(INITIAL_CREDIT, 65_536);
}
