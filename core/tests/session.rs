//! The frames between agents: what is written reads back, and nothing else is taken.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;

use hauberk_core::{
    policy::Reason,
    session::{
        FrameError, FrameType, Header, MAX_CONTROL, Open, Reauthenticate, Refusal, RefusalCause,
        ResetCause,
    },
};
use proptest::prelude::*;

#[test]
fn a_length_over_the_limit_of_its_type_is_refused_on_the_header_alone() {
    let both = [(1_u8, MAX_CONTROL), (3, MAX_CONTROL), (7, MAX_CONTROL), (2, 0), (5, 0), (8, 4)];
    let header = |frame_type: u8, length: usize, numbered: bool| {
        let [_, a, b, c] = u32::try_from(length).unwrap().to_be_bytes();
        if numbered {
            // Of the session, and of its first stream.
            let number = u8::from(!matches!(frame_type, 7 | 8));
            Header::decode_numbered([frame_type, a, b, c, 0, 0, 0, number])
        } else {
            Header::decode([frame_type, a, b, c])
        }
    };
    for (numbered, own) in
        [(false, &[(6, 5), (9, 20)][..]), (true, &[(6, 1), (10, 4), (11, 0), (12, 0)])]
    {
        for (frame_type, limit) in both.iter().chain(own) {
            let told = format!("type {frame_type}, numbered: {numbered}");
            assert!(header(*frame_type, *limit, numbered).is_ok(), "{told}");
            let over = header(*frame_type, limit + 1, numbered);
            assert!(matches!(over, Err(FrameError::TooLong { .. })), "{told}");
        }
    }
}

#[test]
fn only_what_is_about_a_stream_has_a_number() {
    for (frame_type, length) in [(7_u8, 1), (8, 4)] {
        let header = Header::decode_numbered([frame_type, 0, 0, length, 0, 0, 0, 1]);
        assert!(matches!(header, Err(FrameError::WrongNumber { .. })), "type {frame_type}");
    }
    for (frame_type, length) in
        [(1_u8, 1), (2, 0), (3, 1), (4, 1), (5, 0), (6, 1), (10, 4), (11, 0), (12, 0)]
    {
        let header = Header::decode_numbered([frame_type, 0, 0, length, 0, 0, 0, 0]);
        assert!(matches!(header, Err(FrameError::WrongNumber { .. })), "type {frame_type}");
    }
}

#[test]
fn unknown_types_and_bodies_too_short_are_refused() {
    // What only the other kind of session has is unknown, too.
    for byte in [0_u8, 10, 11, 12, 13, 255] {
        assert_eq!(Header::decode([byte, 0, 0, 0]), Err(FrameError::UnknownType(byte)));
    }
    for byte in [0_u8, 9, 13, 255] {
        let header = Header::decode_numbered([byte, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(header, Err(FrameError::UnknownType(byte)));
    }
    for (byte, length) in [(1_u8, 0), (3, 0), (4, 0), (6, 4), (7, 0), (8, 3), (9, 19)] {
        let header = Header::decode([byte, 0, 0, length]);
        assert!(matches!(header, Err(FrameError::TooShort { .. })), "type {byte}");
    }
    for (byte, length) in [(1_u8, 0), (3, 0), (4, 0), (6, 0), (10, 3)] {
        let header = Header::decode_numbered([byte, 0, 0, length, 0, 0, 0, 1]);
        assert!(matches!(header, Err(FrameError::TooShort { .. })), "type {byte}");
    }
    assert_eq!(ResetCause::from_byte(0), Err(FrameError::UnknownResetCause(0)));
}

#[test]
fn a_refusal_with_an_unknown_reason_is_refused() {
    let mut body = Refusal {
        cause: RefusalCause::Denied(Reason::Lock),
        policy: String::new(),
        rule: String::new(),
        owner: String::new(),
        nearest_miss: String::new(),
        mend: String::new(),
    }
    .encode();
    body[2..6].copy_from_slice(b"luck");
    assert_eq!(Refusal::decode(&body), Err(FrameError::UnknownReason("luck".to_owned())));
}

fn address() -> impl Strategy<Value = SocketAddr> {
    any::<(std::net::IpAddr, u16)>().prop_map(SocketAddr::from)
}

proptest! {
    #[test]
    fn open_reads_back(
        connection_id: [u8; 16],
        trace_id: [u8; 16],
        original_destination in address(),
        source_address in address(),
    ) {
        let open = Open { connection_id, trace_id, original_destination, source_address };
        prop_assert_eq!(Open::decode(&open.encode()), Ok(open.clone()));
        let mut longer = open.encode();
        longer.push(0);
        prop_assert_eq!(Open::decode(&longer), Err(FrameError::Trailing("open", 1)));
    }

    #[test]
    fn a_refusal_reads_back_without_control_characters(
        text in "\\PC{0,200}",
        dirty in any::<String>(),
        place in 0..Reason::ALL.len(),
    ) {
        let refusal = Refusal {
            cause: RefusalCause::Denied(Reason::ALL[place]),
            policy: text.clone(),
            rule: String::new(),
            owner: text.clone(),
            nearest_miss: text,
            mend: dirty,
        };
        let read = Refusal::decode(&refusal.encode()).unwrap();
        prop_assert_eq!(&read.policy, &refusal.policy);
        prop_assert_eq!(read.cause, refusal.cause);
        prop_assert!(!read.mend.chars().any(char::is_control));
    }

    #[test]
    fn a_proof_reads_back(
        sequence: u32,
        scheme: u16,
        signature in prop::collection::vec(any::<u8>(), 0..80),
        chain in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 1..5),
    ) {
        let proof = Reauthenticate { sequence, scheme, signature, chain };
        prop_assert_eq!(Reauthenticate::decode(&proof.encode()), Ok(proof));
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _open = Open::decode(&bytes);
        let _refusal = Refusal::decode(&bytes);
        let _proof = Reauthenticate::decode(&bytes);
        if let Some(header) = bytes.first_chunk() {
            let _header = Header::decode(*header);
        }
    }

    #[test]
    fn headers_read_back(length in 1_usize..(1 << 24)) {
        let header = Header::encode(FrameType::Data, length).unwrap();
        prop_assert_eq!(Header::decode(header), Ok(Header { frame_type: FrameType::Data, stream: 0, length }));
    }
}
