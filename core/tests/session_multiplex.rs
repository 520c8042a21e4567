//! The state of a session with many streams at a time: what may come when, and that two honest sides always understand
//! each other, whatever they do and however the bytes between them are cut.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod session_samples;

use std::collections::{BTreeMap, BTreeSet};

use hauberk_core::session::{
    FrameError, FrameType, Header, INITIAL_CREDIT, MAX_AT_A_TIME, Multiplex, OfStream, ResetCause,
    Role,
};
use proptest::prelude::*;
use session_samples::{open, refusal};

/// What a session makes of bytes, in words: the stream, and what came of it.
fn events(session: &mut Multiplex, mut bytes: &[u8]) -> Vec<String> {
    let mut words = Vec::new();
    while !bytes.is_empty() {
        let came = session.receive(bytes).unwrap();
        bytes = &bytes[came.used..];
        words.extend(came.event.map(|(stream, event)| {
            let word = match event {
                OfStream::Open(_) => "open".to_owned(),
                OfStream::Accept => "accept".to_owned(),
                OfStream::Refuse(refusal) => format!("refuse {}", refusal.owner),
                OfStream::Data(bytes) => format!("data {}", bytes.len()),
                OfStream::Credit => "credit".to_owned(),
                OfStream::Fin => "fin".to_owned(),
                OfStream::Moved => "moved".to_owned(),
                OfStream::Bulk => "bulk".to_owned(),
                OfStream::Reset(cause) => format!("reset {cause:?}"),
                OfStream::Reauthenticate(_) => "reauthenticate".to_owned(),
                OfStream::GoingAway { not_taken } => format!("going away without {not_taken:?}"),
            };
            format!("{stream} {word}")
        }));
    }
    words
}

fn frame(frame_type: FrameType, stream: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Header::encode_numbered(frame_type, stream, body.len()).unwrap().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn refused(session: &mut Multiplex, mut bytes: &[u8]) -> FrameError {
    loop {
        match session.receive(bytes) {
            Ok(came) => bytes = &bytes[came.used..],
            Err(error) => return error,
        }
        assert!(!bytes.is_empty(), "it was taken");
    }
}

fn both() -> (Multiplex, Multiplex) {
    (Multiplex::new(Role::Source), Multiplex::new(Role::Destination))
}

/// Two sides with so many streams that were taken.
fn taken(count: u32) -> (Multiplex, Multiplex) {
    let (mut source, mut destination) = both();
    for _ in 0..count {
        let mut wire = Vec::new();
        let number = source.open(&open(), &mut wire).unwrap();
        assert_eq!(events(&mut destination, &wire), [format!("{number} open")]);
        wire.clear();
        destination.accept(number, &mut wire).unwrap();
        assert_eq!(events(&mut source, &wire), [format!("{number} accept")]);
    }
    (source, destination)
}

fn say(session: &mut Multiplex, stream: u32, bytes: &[u8]) -> Vec<u8> {
    let mut wire = session.data(stream, bytes.len()).unwrap().to_vec();
    wire.extend_from_slice(bytes);
    wire
}

#[test]
fn streams_go_on_beside_each_other_and_end_by_themselves() {
    let (mut source, mut destination) = taken(3);
    let mut wire = [say(&mut source, 2, b"two"), say(&mut source, 1, b"one!")].concat();
    source.fin(2, &mut wire).unwrap();
    assert_eq!(events(&mut destination, &wire), ["2 data 3", "1 data 4", "2 fin"]);
    let mut wire = Vec::new();
    destination.fin(2, &mut wire).unwrap();
    destination.reset(3, ResetCause::Application, &mut wire);
    assert_eq!(events(&mut source, &wire), ["2 fin", "3 reset Application"]);
    assert!(source.is_over(2) && destination.is_over(2));
    assert!(!source.is_over(3), "it owes the end of its own direction");
    let mut wire = Vec::new();
    source.reset(3, ResetCause::Answer, &mut wire);
    assert_eq!(events(&mut destination, &wire), [""; 0]);
    assert_eq!((source.open_streams(), destination.open_streams()), (1, 1));
    assert_eq!(events(&mut source, &say(&mut destination, 1, b"x")), ["1 data 1"]);
}

#[test]
fn a_refused_stream_takes_no_other_with_it() {
    let (mut source, mut destination) = taken(1);
    let mut to_destination = Vec::new();
    let number = source.open(&open(), &mut to_destination).unwrap();
    to_destination.extend(say(&mut source, number, b"too early"));
    let mut to_source = Vec::new();
    // The data is still under way when it is refused.
    let (first, rest) = to_destination.split_at(8 + open().encode().len());
    assert_eq!(events(&mut destination, first), ["2 open"]);
    destination.refuse(number, &refusal(), &mut to_source).unwrap();
    assert_eq!(events(&mut destination, rest), [""; 0], "nobody wants it");
    assert_eq!(events(&mut source, &to_source), ["2 refuse payments"]);
    let mut wire = Vec::new();
    source.reset(number, ResetCause::Answer, &mut wire);
    assert_eq!(events(&mut destination, &wire), [""; 0]);
    assert_eq!((source.open_streams(), destination.open_streams()), (1, 1));
}

#[test]
fn no_more_is_sent_than_the_peer_takes() {
    let (mut source, mut destination) = taken(2);
    let all = usize::try_from(INITIAL_CREDIT).unwrap();
    assert_eq!(source.may_send(1), Some(all));
    let wire = say(&mut source, 1, &vec![1; all]);
    assert_eq!(source.may_send(1), Some(0));
    source.data(1, 1).unwrap_err();
    assert_eq!(source.may_send(2), Some(all), "another has its own");
    assert_eq!(events(&mut destination, &wire).len(), 1);
    let mut wire = Vec::new();
    destination.credit(1, 10, &mut wire);
    assert_eq!(events(&mut source, &wire), ["1 credit"]);
    assert_eq!(source.may_send(1), Some(10));
    assert_eq!(events(&mut destination, &say(&mut source, 1, &[2; 10])), ["1 data 10"]);
    let beyond = frame(FrameType::Data, 1, b"!");
    assert_eq!(refused(&mut destination, &beyond), FrameError::OverCredit { length: 1, credit: 0 });
}

#[test]
fn a_stream_moves_one_way_after_the_other() {
    let (mut source, mut destination) = taken(1);
    let mut wire = Vec::new();
    destination.bulk(1, &mut wire).unwrap();
    source.bulk(1, &mut Vec::new()).unwrap_err();
    assert_eq!(events(&mut source, &wire), ["1 bulk"]);
    let mut wire = say(&mut source, 1, b"the last here");
    source.moved(1, &mut wire).unwrap();
    source.data(1, 1).unwrap_err();
    assert_eq!(events(&mut destination, &wire), ["1 data 13", "1 moved"]);
    assert_eq!(events(&mut source, &say(&mut destination, 1, b"still here")), ["1 data 10"]);
    let mut wire = Vec::new();
    destination.moved(1, &mut wire).unwrap();
    assert_eq!(events(&mut source, &wire), ["1 moved"]);
    assert!(source.is_over(1) && destination.is_over(1));
}

#[test]
fn what_crossed_the_end_of_a_stream_is_ignored() {
    let (mut source, mut destination) = taken(1);
    let (mut to_destination, mut to_source) = (Vec::new(), Vec::new());
    source.reset(1, ResetCause::PolicyRevoked, &mut to_destination);
    destination.reset(1, ResetCause::Application, &mut to_source);
    destination.credit(1, 5, &mut to_source);
    assert_eq!(events(&mut destination, &to_destination), [""; 0]);
    assert_eq!(events(&mut source, &to_source), [""; 0]);
    assert!(source.is_over(1) && destination.is_over(1));
    let late = [frame(FrameType::Credit, 1, &[0, 0, 0, 9]), frame(FrameType::Bulk, 1, &[])];
    assert_eq!(events(&mut source, &late.concat()), [""; 0]);
}

#[test]
fn what_was_opened_too_late_is_not_taken_and_not_looked_at() {
    let (mut source, mut destination) = taken(2);
    let (mut to_destination, mut to_source) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let number = source.open(&open(), &mut to_destination).unwrap();
        to_destination.extend(say(&mut source, number, b"early"));
    }
    destination.go_away(&mut to_source).unwrap();
    destination.go_away(&mut to_source).unwrap();
    assert_eq!(events(&mut destination, &to_destination), [""; 0]);
    let words = events(&mut source, &to_source);
    assert!(
        ["0 going away without [3, 4]", "0 going away without [4, 3]"].contains(&words[0].as_str()),
        "{words:?}"
    );
    assert_eq!(words.len(), 1);
    assert!(source.is_used_up() && !source.may_open());
    source.open(&open(), &mut Vec::new()).unwrap_err();
    assert_eq!(events(&mut destination, &say(&mut source, 1, b"on")), ["1 data 2"]);
}

#[test]
fn what_breaks_the_protocol_ends_the_session() {
    let reset = |stream| frame(FrameType::Reset, stream, &[1]);
    let at_destination: [(Vec<u8>, FrameError); 9] = [
        (
            frame(FrameType::Open, 3, &open().encode()),
            FrameError::UnknownStream { got: 3, last: 1 },
        ),
        (frame(FrameType::Open, 1, &open().encode()), FrameError::OutOfTurn(FrameType::Open)),
        (frame(FrameType::Accept, 1, &[]), FrameError::OutOfTurn(FrameType::Accept)),
        (frame(FrameType::Data, 2, b"x"), FrameError::UnknownStream { got: 2, last: 1 }),
        (reset(2), FrameError::UnknownStream { got: 2, last: 1 }),
        (reset(0), FrameError::WrongNumber { frame_type: FrameType::Reset, stream: 0 }),
        (frame(FrameType::Bulk, 1, &[]), FrameError::OutOfTurn(FrameType::Bulk)),
        (frame(FrameType::Credit, 1, &u32::MAX.to_be_bytes()), FrameError::TooMuchCredit),
        (frame(FrameType::Continue, 1, &[0; 20]), FrameError::UnknownType(9)),
    ];
    for (bytes, error) in at_destination {
        let (_, mut destination) = taken(1);
        assert_eq!(refused(&mut destination, &bytes), error);
    }
    let (mut source, _) = taken(1);
    let away = frame(FrameType::GoingAway, 0, &[0, 0, 0, 2]);
    assert_eq!(refused(&mut source, &away), FrameError::UnknownStream { got: 2, last: 1 });
    let (mut source, mut destination) = taken(1);
    let mut wire = Vec::new();
    source.fin(1, &mut wire).unwrap();
    wire.extend(frame(FrameType::Data, 1, b"after the end"));
    assert_eq!(refused(&mut destination, &wire), FrameError::OutOfTurn(FrameType::Data));
    let moved = frame(FrameType::Moved, 1, &[]);
    let (mut source, mut destination) = taken(1);
    let mut wire = Vec::new();
    source.fin(1, &mut wire).unwrap();
    wire.extend(moved);
    assert_eq!(refused(&mut destination, &wire), FrameError::OutOfTurn(FrameType::Moved));
    // Nothing of a stream comes before its answer.
    let (mut source, _) = both();
    source.open(&open(), &mut Vec::new()).unwrap();
    let credit = frame(FrameType::Credit, 1, &[0, 0, 0, 1]);
    assert_eq!(refused(&mut source, &credit), FrameError::OutOfTurn(FrameType::Credit));
}

#[test]
fn streams_at_a_time_are_bounded() {
    let (mut source, mut destination) = both();
    let mut wire = Vec::new();
    for _ in 0..MAX_AT_A_TIME {
        source.open(&open(), &mut wire).unwrap();
    }
    source.open(&open(), &mut Vec::new()).unwrap_err();
    assert_eq!(events(&mut destination, &wire).len(), MAX_AT_A_TIME);
    let number = u32::try_from(MAX_AT_A_TIME).unwrap() + 1;
    assert_eq!(
        refused(&mut destination, &frame(FrameType::Open, number, &open().encode())),
        FrameError::TooManyAtATime(MAX_AT_A_TIME)
    );
}

#[derive(Debug, Clone)]
enum Act {
    Open,
    Say { source: bool, stream: u32, length: usize },
    End { source: bool, stream: u32, moved: bool },
    Break { source: bool, stream: u32 },
    Answer { stream: u32, yes: bool },
    Credit { source: bool, stream: u32 },
    Arrive { at_source: bool, length: usize },
}

fn act() -> impl Strategy<Value = Act> {
    let stream = 1..5u32;
    prop_oneof![
        Just(Act::Open),
        (any::<bool>(), stream.clone(), 1..30_000usize)
            .prop_map(|(source, stream, length)| Act::Say { source, stream, length }),
        (any::<bool>(), stream.clone(), any::<bool>())
            .prop_map(|(source, stream, moved)| Act::End { source, stream, moved }),
        (any::<bool>(), stream.clone()).prop_map(|(source, stream)| Act::Break { source, stream }),
        (stream.clone(), any::<bool>()).prop_map(|(stream, yes)| Act::Answer { stream, yes }),
        (any::<bool>(), stream).prop_map(|(source, stream)| Act::Credit { source, stream }),
        (any::<bool>(), 1..70_000usize)
            .prop_map(|(at_source, length)| Act::Arrive { at_source, length }),
    ]
}

/// One side, and what is on its way to it.
struct Side {
    session: Multiplex,
    coming: Vec<u8>,
    /// Bytes that came of each stream, and those that its peer was not told of yet.
    came: BTreeMap<u32, (usize, u32)>,
    /// Streams that owe an answer to a refusal or a reset.
    owes: Vec<u32>,
}

impl Side {
    fn new(role: Role) -> Self {
        Self {
            session: Multiplex::new(role),
            coming: Vec::new(),
            came: BTreeMap::new(),
            owes: Vec::new(),
        }
    }

    fn arrive(&mut self, length: usize) {
        let rest = self.coming.split_off(length.min(self.coming.len()));
        let bytes = std::mem::replace(&mut self.coming, rest);
        let mut bytes = bytes.as_slice();
        while !bytes.is_empty() {
            let came = self.session.receive(bytes).expect("an honest peer");
            bytes = &bytes[came.used..];
            match came.event {
                Some((stream, OfStream::Data(bytes))) => {
                    let (all, waiting) = self.came.entry(stream).or_default();
                    *all += bytes.len();
                    *waiting += u32::try_from(bytes.len()).unwrap();
                }
                Some((stream, OfStream::Refuse(_) | OfStream::Reset(_))) => self.owes.push(stream),
                Some(_) | None => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn honest_sides_understand_each_other(acts in prop::collection::vec(act(), 1..120)) {
        let mut sides = [Side::new(Role::Destination), Side::new(Role::Source)];
        let mut said: [BTreeMap<u32, usize>; 2] = Default::default();
        let mut whole = [BTreeMap::new(), BTreeMap::new()];
        // What either side said before it heard of that may be thrown away.
        let mut broken = BTreeSet::new();
        let all = usize::MAX;
        for act in acts.into_iter().chain([
            Act::Arrive { at_source: false, length: all },
            Act::Arrive { at_source: true, length: all },
        ]) {
            let mut out = Vec::new();
            let from = match act {
                Act::Open => {
                    let _full = sides[1].session.open(&open(), &mut out);
                    1
                }
                Act::Say { source, stream, length } => {
                    let side = &mut sides[usize::from(source)];
                    // Not before its answer, as an agent whose application waits.
                    if !side.session.awaits_answer(stream)
                        && let Ok(header) = side.session.data(stream, length)
                    {
                        out.extend_from_slice(&header);
                        out.resize(out.len() + length, 7);
                        *said[usize::from(source)].entry(stream).or_default() += length;
                    }
                    usize::from(source)
                }
                Act::End { source, stream, moved } => {
                    let session = &mut sides[usize::from(source)].session;
                    let ended = if moved {
                        session.moved(stream, &mut out)
                    } else {
                        session.fin(stream, &mut out)
                    };
                    if ended.is_ok() {
                        let length = said[usize::from(source)].get(&stream).copied();
                        whole[usize::from(source)].insert(stream, length.unwrap_or(0));
                    }
                    usize::from(source)
                }
                Act::Break { source, stream } => {
                    sides[usize::from(source)].session.reset(stream, ResetCause::Application, &mut out);
                    broken.insert(stream);
                    usize::from(source)
                }
                Act::Answer { stream, yes } => {
                    let session = &mut sides[0].session;
                    if yes {
                        let _not_now = session.accept(stream, &mut out);
                    } else if session.refuse(stream, &refusal(), &mut out).is_ok() {
                        broken.insert(stream);
                    }
                    0
                }
                Act::Credit { source, stream } => {
                    let side = &mut sides[usize::from(source)];
                    if let Some((_, waiting)) = side.came.get_mut(&stream) {
                        side.session.credit(stream, std::mem::take(waiting), &mut out);
                    }
                    usize::from(source)
                }
                Act::Arrive { at_source, length } => {
                    let side = &mut sides[usize::from(at_source)];
                    side.arrive(length);
                    for stream in std::mem::take(&mut side.owes) {
                        side.session.reset(stream, ResetCause::Answer, &mut out);
                        broken.insert(stream);
                    }
                    usize::from(at_source)
                }
            };
            sides[1 - from].coming.extend(out);
        }
        for _ in 0..3 {
            for at in [0, 1] {
                let side = &mut sides[at];
                side.arrive(all);
                let mut out = Vec::new();
                for stream in std::mem::take(&mut side.owes) {
                    side.session.reset(stream, ResetCause::Answer, &mut out);
                    broken.insert(stream);
                }
                sides[1 - at].coming.extend(out);
            }
        }
        // What ended well has come whole.
        for from in [0, 1] {
            for (stream, length) in whole[from].iter().filter(|(stream, _)| !broken.contains(*stream)) {
                let came = sides[1 - from].came.get(stream).map_or(0, |(all, _)| *all);
                prop_assert_eq!(came, *length, "stream {} from side {}", stream, from);
            }
        }
        for stream in 1..=sides[1].session.streams() {
            prop_assert_eq!(sides[0].session.is_over(stream), sides[1].session.is_over(stream));
        }
    }
}
