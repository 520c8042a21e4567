//! The state of a session: what may come when, and that two honest sides always understand each
//! other, whatever they do and however the bytes between them are cut.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod session_samples;

use std::collections::{BTreeMap, VecDeque};

use hauberk_core::session::{
    Event, FrameError, FrameType, Header, Machine, Misuse, ResetCause, Role,
};
use proptest::prelude::*;
use session_samples::{open, refusal};

/// Two sides with a taken stream.
fn taken() -> (Machine, Machine) {
    let (mut source, mut destination) =
        (Machine::new(Role::Source), Machine::new(Role::Destination));
    let mut wire = Vec::new();
    source.open(&open(), &mut wire).unwrap();
    assert_eq!(events(&mut destination, &wire), ["open"]);
    wire.clear();
    destination.accept(&mut wire).unwrap();
    assert_eq!(events(&mut source, &wire), ["accept"]);
    (source, destination)
}

/// What a machine makes of bytes, in words.
fn events(machine: &mut Machine, mut bytes: &[u8]) -> Vec<String> {
    let mut words = Vec::new();
    while !bytes.is_empty() {
        let received = machine.receive(bytes).unwrap();
        bytes = &bytes[received.used..];
        words.extend(received.event.map(|event| match event {
            Event::Open(_) => "open".to_owned(),
            Event::Continue(_) => "continue".to_owned(),
            Event::Accept => "accept".to_owned(),
            Event::Refuse(refusal) => format!("refuse {}", refusal.owner),
            Event::Data(bytes) => format!("data {}", bytes.len()),
            Event::Fin => "fin".to_owned(),
            Event::Reset(cause) => format!("reset {cause:?}"),
            Event::Reauthenticate(_) => "reauthenticate".to_owned(),
            Event::GoingAway => "going away".to_owned(),
            Event::NotTaken => "not taken".to_owned(),
        }));
    }
    words
}

fn frame(frame_type: FrameType, body: &[u8]) -> Vec<u8> {
    let mut bytes = Header::encode(frame_type, body.len()).unwrap().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn refused(machine: &mut Machine, mut bytes: &[u8]) -> FrameError {
    loop {
        match machine.receive(bytes) {
            Ok(received) => bytes = &bytes[received.used..],
            Err(error) => return error,
        }
        assert!(!bytes.is_empty(), "it was taken");
    }
}

#[test]
fn a_stream_after_the_other_uses_one_session() {
    let (mut source, mut destination) =
        (Machine::new(Role::Source), Machine::new(Role::Destination));
    for number in 1..=3 {
        let mut wire = Vec::new();
        source.open(&open(), &mut wire).unwrap();
        // The first bytes and the end ride along.
        wire.extend_from_slice(&source.data(5).unwrap());
        wire.extend_from_slice(b"hello");
        source.fin(&mut wire).unwrap();
        assert_eq!(events(&mut destination, &wire), ["open", "data 5", "fin"]);
        wire.clear();
        destination.accept(&mut wire).unwrap();
        destination.fin(&mut wire).unwrap();
        assert!(destination.is_reusable() && !source.is_idle());
        assert_eq!(events(&mut source, &wire), ["accept", "fin"]);
        assert!(source.is_reusable());
        assert_eq!((source.streams(), destination.streams()), (number, number));
    }
}

#[test]
fn a_refused_source_ends_its_direction_and_the_session_is_free_again() {
    let (mut source, mut destination) =
        (Machine::new(Role::Source), Machine::new(Role::Destination));
    let mut to_destination = Vec::new();
    source.open(&open(), &mut to_destination).unwrap();
    to_destination.extend_from_slice(&source.data(3).unwrap());
    let mut to_source = Vec::new();
    assert_eq!(events(&mut destination, &to_destination), ["open"]);
    destination.refuse(&refusal(), &mut to_source).unwrap();
    // The rest of the data is still under way, and nobody wants it.
    assert_eq!(events(&mut destination, b"abc"), [""; 0]);
    assert_eq!(events(&mut source, &to_source), ["refuse payments"]);
    assert!(!destination.is_idle() && !source.is_idle());
    let mut to_destination = Vec::new();
    source.reset(ResetCause::Answer, &mut to_destination);
    assert_eq!(events(&mut destination, &to_destination), [""; 0]);
    assert!(destination.is_reusable() && source.is_reusable());
}

#[test]
fn a_reset_is_answered_once_and_what_crossed_it_is_thrown_away() {
    let (mut source, mut destination) = taken();
    let (mut to_destination, mut to_source) = (Vec::new(), Vec::new());
    source.reset(ResetCause::Application, &mut to_destination);
    source.reset(ResetCause::Application, &mut to_destination);
    to_source.extend_from_slice(&destination.data(4).unwrap());
    to_source.extend_from_slice(b"late");
    assert_eq!(events(&mut destination, &to_destination), ["reset Application"]);
    destination.reset(ResetCause::Answer, &mut to_source);
    assert_eq!(events(&mut source, &to_source), [""; 0]);
    assert!(destination.is_reusable() && source.is_reusable());
}

#[test]
fn a_reset_after_the_own_end_still_reaches_the_peer() {
    let (mut source, mut destination) = taken();
    let mut wire = Vec::new();
    source.fin(&mut wire).unwrap();
    source.reset(ResetCause::Application, &mut wire);
    assert_eq!(events(&mut destination, &wire), ["fin", "reset Application"]);
    wire.clear();
    destination.reset(ResetCause::Answer, &mut wire);
    assert_eq!(events(&mut source, &wire), [""; 0]);
    assert!(destination.is_reusable() && source.is_reusable());
}

#[test]
fn a_reset_that_crosses_the_end_of_its_stream_harms_no_later_one() {
    let (mut source, mut destination) = taken();
    let (mut to_destination, mut to_source) = (Vec::new(), Vec::new());
    // The destination has ended; the source's end is still under way when the destination resets.
    destination.fin(&mut to_source).unwrap();
    assert_eq!(events(&mut source, &to_source), ["fin"]);
    source.fin(&mut to_destination).unwrap();
    source.open(&open(), &mut to_destination).unwrap();
    to_source.clear();
    destination.reset(ResetCause::Application, &mut to_source);
    assert_eq!(events(&mut source, &to_source), [""; 0], "stream 1 is over, stream 2 is not meant");
    assert_eq!(events(&mut destination, &to_destination), ["open"]);
    to_source.clear();
    destination.accept(&mut to_source).unwrap();
    assert_eq!(events(&mut source, &to_source), ["accept"]);
}

#[test]
fn a_stream_that_crosses_the_going_away_was_not_taken() {
    let (mut source, mut destination) =
        (Machine::new(Role::Source), Machine::new(Role::Destination));
    let (mut to_destination, mut to_source) = (Vec::new(), Vec::new());
    destination.go_away(&mut to_source).unwrap();
    destination.go_away(&mut to_source).unwrap();
    source.open(&open(), &mut to_destination).unwrap();
    to_destination.extend_from_slice(&source.data(2).unwrap());
    to_destination.extend_from_slice(b"hi");
    assert_eq!(events(&mut destination, &to_destination), [""; 0]);
    assert_eq!(events(&mut source, &to_source), ["not taken"]);
    assert!(source.is_idle() && !source.is_reusable());
    assert_eq!(source.open(&open(), &mut to_destination), Err(Misuse(FrameType::Open)));
}

#[test]
fn a_stream_under_way_goes_on_while_the_destination_goes_away() {
    let (mut source, mut destination) = taken();
    let mut wire = Vec::new();
    destination.go_away(&mut wire).unwrap();
    wire.extend_from_slice(&destination.data(2).unwrap());
    wire.extend_from_slice(b"hi");
    destination.fin(&mut wire).unwrap();
    assert_eq!(events(&mut source, &wire), ["going away", "data 2", "fin"]);
    wire.clear();
    source.fin(&mut wire).unwrap();
    assert_eq!(events(&mut destination, &wire), ["fin"]);
    assert!(destination.is_idle() && source.is_idle());
    assert!(!destination.is_reusable() && !source.is_reusable());
}

/// Its name, who reads, what was sent before, what comes, and what it is refused with.
type OutOfTurn<'a> = (&'a str, Role, &'a [FrameType], Vec<u8>, FrameError);

#[test]
fn frames_out_of_turn_end_the_session() {
    let stale_reset = frame(FrameType::Reset, &[0, 0, 0, 2, 1]);
    let cases: [OutOfTurn<'_>; 10] = [
        (
            "more streams taken than were opened",
            Role::Source,
            &[FrameType::Open],
            frame(FrameType::GoingAway, &[0, 0, 0, 2]),
            FrameError::UnknownStream { got: 2, last: 1 },
        ),
        (
            "data before the open frame",
            Role::Destination,
            &[],
            frame(FrameType::Data, b"x"),
            FrameError::OutOfTurn(FrameType::Data),
        ),
        (
            "an answer that was not asked for",
            Role::Source,
            &[],
            frame(FrameType::Accept, &[]),
            FrameError::OutOfTurn(FrameType::Accept),
        ),
        (
            "a destination that opens",
            Role::Source,
            &[],
            frame(FrameType::Open, &open().encode()),
            FrameError::OutOfTurn(FrameType::Open),
        ),
        (
            "data before the answer",
            Role::Source,
            &[FrameType::Open],
            frame(FrameType::Data, b"x"),
            FrameError::OutOfTurn(FrameType::Data),
        ),
        (
            "an end before the answer",
            Role::Source,
            &[FrameType::Open],
            frame(FrameType::Fin, &[]),
            FrameError::OutOfTurn(FrameType::Fin),
        ),
        (
            "a stream within a stream",
            Role::Destination,
            &[FrameType::Open],
            [frame(FrameType::Open, &open().encode()), frame(FrameType::Open, &open().encode())]
                .concat(),
            FrameError::OutOfTurn(FrameType::Open),
        ),
        (
            "a reset before any stream",
            Role::Destination,
            &[],
            stale_reset.clone(),
            FrameError::OutOfTurn(FrameType::Reset),
        ),
        (
            "a reset of a stream to come",
            Role::Source,
            &[FrameType::Open],
            stale_reset,
            FrameError::UnknownStream { got: 2, last: 1 },
        ),
        (
            "a source that goes away",
            Role::Destination,
            &[],
            frame(FrameType::GoingAway, &[0, 0, 0, 0]),
            FrameError::OutOfTurn(FrameType::GoingAway),
        ),
    ];
    for (name, role, first, bytes, wanted) in cases {
        let mut machine = Machine::new(role);
        if role == Role::Source && first == [FrameType::Open] {
            machine.open(&open(), &mut Vec::new()).unwrap();
        }
        assert_eq!(refused(&mut machine, &bytes), wanted, "{name}");
    }
}

#[test]
fn data_after_the_end_is_refused() {
    let (_, mut destination) = taken();
    let bytes = [frame(FrameType::Fin, &[]), frame(FrameType::Data, b"more")].concat();
    assert_eq!(refused(&mut destination, &bytes), FrameError::OutOfTurn(FrameType::Data));
}

#[test]
fn a_header_out_of_turn_is_refused_before_its_body() {
    let mut destination = Machine::new(Role::Destination);
    let header = Header::encode(FrameType::Refuse, 16_000).unwrap();
    assert_eq!(destination.receive(&header).unwrap_err(), FrameError::OutOfTurn(FrameType::Refuse));
}

#[test]
fn what_is_sent_out_of_turn_is_our_own_error() {
    let mut source = Machine::new(Role::Source);
    let mut out = Vec::new();
    assert_eq!(source.data(1), Err(Misuse(FrameType::Data)));
    assert_eq!(source.fin(&mut out), Err(Misuse(FrameType::Fin)));
    assert_eq!(source.accept(&mut out), Err(Misuse(FrameType::Accept)));
    assert_eq!(source.go_away(&mut out), Err(Misuse(FrameType::GoingAway)));
    source.reset(ResetCause::Application, &mut out);
    assert!(out.is_empty(), "there was nothing to break off");
    let mut destination = Machine::new(Role::Destination);
    assert_eq!(destination.open(&open(), &mut out), Err(Misuse(FrameType::Open)));
}

/// What the state does not allow is no step.
fn try_to(result: Result<(), Misuse>) {
    assert!(matches!(result, Ok(()) | Err(Misuse(_))));
}

/// Everything a side can do or get.
#[derive(Debug, Clone, Copy)]
enum Step {
    Open,
    Accept,
    Refuse,
    Data { from_source: bool, length: usize },
    Fin { from_source: bool },
    Reset { from_source: bool },
    GoAway,
    Deliver { to_source: bool, length: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let length = 1..40_usize;
    prop_oneof![
        3 => Just(Step::Open),
        3 => Just(Step::Accept),
        1 => Just(Step::Refuse),
        4 => (any::<bool>(), length.clone())
            .prop_map(|(from_source, length)| Step::Data { from_source, length }),
        2 => any::<bool>().prop_map(|from_source| Step::Fin { from_source }),
        1 => any::<bool>().prop_map(|from_source| Step::Reset { from_source }),
        1 => Just(Step::GoAway),
        12 => (any::<bool>(), length)
            .prop_map(|(to_source, length)| Step::Deliver { to_source, length }),
    ]
}

/// One side of the model: what its application sent on each stream, and got on the one under way.
struct Side {
    machine: Machine,
    wire: VecDeque<u8>,
    sent: BTreeMap<u32, Vec<u8>>,
    got: Vec<u8>,
    got_fin: bool,
}

impl Side {
    fn new(role: Role) -> Self {
        Self {
            machine: Machine::new(role),
            wire: VecDeque::new(),
            sent: BTreeMap::new(),
            got: Vec::new(),
            got_fin: false,
        }
    }

    fn say(&mut self, say: impl FnOnce(&mut Machine, &mut Vec<u8>)) {
        let mut out = Vec::new();
        say(&mut self.machine, &mut out);
        self.wire.extend(out);
    }

    fn send(&mut self, length: usize) {
        let Ok(header) = self.machine.data(length) else { return };
        // Every byte names its stream, so that none can get into another unseen.
        let stream = u8::try_from(self.machine.streams() % 251).unwrap();
        let sent = self.sent.entry(self.machine.streams()).or_default();
        let from = sent.len();
        let bytes = (from..from + length).map(|n| stream ^ u8::try_from(n % 256).unwrap());
        let bytes: Vec<u8> = bytes.collect();
        self.wire.extend(header);
        self.wire.extend(&bytes);
        sent.extend(bytes);
    }

    /// Takes bytes off the peer's wire. What the protocol owes at once is sent at once.
    fn hear(&mut self, peer: &mut Side, length: usize) {
        let length = length.min(peer.wire.len());
        let bytes: Vec<u8> = peer.wire.drain(..length).collect();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let received = self.machine.receive(rest).expect("two honest sides");
            assert!(received.used > 0);
            rest = &rest[received.used..];
            let sent = peer.sent.entry(self.machine.streams()).or_default();
            match received.event {
                Some(Event::Data(data)) => {
                    assert!(!self.got_fin, "data after the end");
                    self.got.extend_from_slice(data);
                    assert!(sent.starts_with(&self.got), "bytes that nobody sent");
                }
                Some(Event::Fin) => {
                    assert_eq!(self.got, *sent, "an end before the last byte");
                    self.got_fin = true;
                }
                Some(Event::Open(_) | Event::Continue(_)) => {
                    (self.got, self.got_fin) = (Vec::new(), false)
                }
                Some(Event::Reset(_) | Event::Refuse(_)) => {
                    self.say(|machine, out| machine.reset(ResetCause::Answer, out));
                }
                Some(
                    Event::Accept | Event::GoingAway | Event::NotTaken | Event::Reauthenticate(_),
                )
                | None => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn two_honest_sides_always_understand_each_other(
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let mut source = Side::new(Role::Source);
        let mut destination = Side::new(Role::Destination);
        for step in steps {
            match step {
                Step::Open => {
                    if source.machine.is_reusable() {
                        source.say(|machine, out| machine.open(&open(), out).unwrap());
                        (source.got, source.got_fin) = (Vec::new(), false);
                    }
                }
                Step::Accept => destination.say(|machine, out| try_to(machine.accept(out))),
                Step::Refuse => {
                    destination.say(|machine, out| try_to(machine.refuse(&refusal(), out)));
                }
                Step::Data { from_source: true, length } => source.send(length),
                Step::Data { from_source: false, length } => destination.send(length),
                Step::Fin { from_source: true } => {
                    source.say(|machine, out| try_to(machine.fin(out)));
                }
                Step::Fin { from_source: false } => {
                    destination.say(|machine, out| try_to(machine.fin(out)));
                }
                Step::Reset { from_source: true } => {
                    source.say(|machine, out| machine.reset(ResetCause::Application, out));
                }
                Step::Reset { from_source: false } => {
                    destination.say(|machine, out| machine.reset(ResetCause::Draining, out));
                }
                Step::GoAway => destination.say(|machine, out| try_to(machine.go_away(out))),
                Step::Deliver { to_source: true, length } => source.hear(&mut destination, length),
                Step::Deliver { to_source: false, length } => {
                    destination.hear(&mut source, length);
                }
            }
        }
        // However it stands: everything that is under way arrives, both break off what is left, and
        // the session is free again.
        for _ in 0..3 {
            source.hear(&mut destination, usize::MAX);
            destination.hear(&mut source, usize::MAX);
            source.say(|machine, out| machine.reset(ResetCause::Application, out));
            destination.say(|machine, out| machine.reset(ResetCause::Application, out));
        }
        prop_assert!(source.machine.is_idle() && destination.machine.is_idle());
        prop_assert!(source.machine.streams() >= destination.machine.streams());
        prop_assert!(source.machine.is_reusable() == destination.machine.is_reusable());
        if source.machine.is_reusable() {
            prop_assert_eq!(source.machine.streams(), destination.machine.streams());
        }
    }

    #[test]
    fn no_bytes_make_a_machine_panic(
        is_source: bool,
        bytes in prop::collection::vec(0..12_u8, 0..200),
    ) {
        let role = if is_source { Role::Source } else { Role::Destination };
        let mut machine = Machine::new(role);
        if is_source {
            machine.open(&open(), &mut Vec::new()).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let Ok(received) = machine.receive(rest) else { return Ok(()) };
            prop_assert!(received.used > 0);
            rest = &rest[received.used..];
        }
    }
}
