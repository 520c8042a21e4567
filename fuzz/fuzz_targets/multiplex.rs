//! Sessions with many streams at a time. A peer that says anything, in pieces of any size, while this side does anything
//! that it may: no panic, and no event that the state before it does not allow. And two sides that do anything that
//! they may: neither ever says what the other one refuses.
#![no_main]

use std::collections::VecDeque;

use hauberk_core::session::{
    INITIAL_CREDIT, MAX_AT_A_TIME, Multiplex, OfStream, Open, Refusal, RefusalCause, ResetCause,
    Role,
};

libfuzzer_sys::fuzz_target!(|input: (u8, Vec<(u8, u8, Vec<u8>)>)| {
    let (who, steps) = input;
    match who % 3 {
        0 => against_anything(Role::Source, &steps),
        1 => against_anything(Role::Destination, &steps),
        _ => between_two(&steps),
    }
});

fn against_anything(role: Role, steps: &[(u8, u8, Vec<u8>)]) {
    let mut machine = Multiplex::new(role);
    let mut out = Vec::new();
    for (call, number, bytes) in steps {
        out.clear();
        local(&mut machine, *call, u32::from(*number), bytes.len(), &mut out);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let Ok(came) = machine.receive(rest) else { return };
            assert!(came.used > 0 && came.used <= rest.len());
            if let Some((number, event)) = came.event {
                check(role, number, &event);
            }
            rest = &rest[came.used..];
            assert!(machine.open_streams() <= MAX_AT_A_TIME);
        }
    }
}

fn between_two(steps: &[(u8, u8, Vec<u8>)]) {
    let mut sides = [Role::Source, Role::Destination].map(|role| (Multiplex::new(role), role));
    // What each has said and the other one has not read.
    let mut said = [VecDeque::new(), VecDeque::new()];
    for (call, number, bytes) in steps {
        let side = usize::from(call & 1);
        let mut out = Vec::new();
        local(&mut sides[side].0, call >> 1, u32::from(*number), bytes.len(), &mut out);
        said[side].extend(out);
        let length =
            usize::from(bytes.first().copied().unwrap_or(u8::MAX)).min(said[1 - side].len());
        let read: Vec<u8> = said[1 - side].drain(..length).collect();
        hear(&mut sides[side], &read);
    }
    for side in [0, 1, 0, 1] {
        let read: Vec<u8> = said[1 - side].drain(..).collect();
        hear(&mut sides[side], &read);
    }
}

fn hear((machine, role): &mut (Multiplex, Role), mut rest: &[u8]) {
    while !rest.is_empty() {
        let came = machine.receive(rest).expect("what one side says, the other one takes");
        if let Some((number, event)) = came.event {
            check(*role, number, &event);
        }
        rest = &rest[came.used..];
    }
}

fn local(machine: &mut Multiplex, call: u8, number: u32, length: usize, out: &mut Vec<u8>) {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
    let _misuse = match call % 11 {
        0 => machine
            .open(
                &Open {
                    connection_id: [1; 16],
                    trace_id: [0; 16],
                    original_destination: address,
                    source_address: address,
                },
                out,
            )
            .map(|_| ()),
        1 => machine.accept(number, out),
        2 => machine.refuse(
            number,
            &Refusal {
                cause: RefusalCause::Unreachable,
                policy: String::new(),
                rule: String::new(),
                owner: String::new(),
                nearest_miss: String::new(),
                mend: String::new(),
            },
            out,
        ),
        3 => machine.fin(number, out),
        4 => machine.moved(number, out),
        5 => machine.bulk(number, out),
        6 => machine.go_away(out),
        7 => {
            machine.reset(number, ResetCause::Application, out);
            Ok(())
        }
        8 => {
            // As much as a credit can be, so that its end is met.
            machine.credit(number, u32::try_from(length).unwrap_or(1) * INITIAL_CREDIT / 8, out);
            Ok(())
        }
        9 => {
            let room = machine.may_send(number).unwrap_or(0);
            let length = (length * 4096).min(room);
            machine.data(number, length).map(|header| {
                out.extend_from_slice(&header);
                out.resize(out.len() + length, 0);
            })
        }
        _ => Ok(()),
    };
}

fn check(role: Role, number: u32, event: &OfStream<'_>) {
    let is_source = role == Role::Source;
    match event {
        OfStream::Open(_) => assert!(!is_source && number > 0),
        OfStream::Accept | OfStream::Refuse(_) | OfStream::Bulk => assert!(is_source && number > 0),
        OfStream::Data(bytes) => assert!(number > 0 && !bytes.is_empty()),
        OfStream::Credit | OfStream::Fin | OfStream::Moved | OfStream::Reset(_) => {
            assert!(number > 0);
        }
        OfStream::GoingAway { not_taken } => {
            assert!(is_source && number == 0 && not_taken.iter().all(|number| *number > 0));
        }
        OfStream::Reauthenticate(_) => assert!(number == 0),
    }
}
