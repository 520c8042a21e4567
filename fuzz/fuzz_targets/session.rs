//! A peer that says anything, in pieces of any size, while this side does anything that it may: no
//! panic, and no event that the state before it does not allow.
#![no_main]

use hauberk_core::session::{Event, Machine, Open, Refusal, RefusalCause, ResetCause, Role};

libfuzzer_sys::fuzz_target!(|input: (bool, Vec<(u8, Vec<u8>)>)| {
    let (is_source, steps) = input;
    let mut machine = Machine::new(if is_source { Role::Source } else { Role::Destination });
    let mut out = Vec::new();
    for (call, bytes) in &steps {
        local(&mut machine, *call, &mut out);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let before = (machine.is_idle(), machine.expects_data(), machine.awaits_answer());
            let Ok(received) = machine.receive(rest) else { return };
            assert!(received.used > 0 && received.used <= rest.len());
            check(received.event.as_ref(), is_source, before);
            rest = &rest[received.used..];
        }
    }
});

fn local(machine: &mut Machine, call: u8, out: &mut Vec<u8>) {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
    out.clear();
    let _misuse = match call % 8 {
        0 => machine.open(
            &Open {
                connection_id: [1; 16],
                trace_id: [0; 16],
                original_destination: address,
                source_address: address,
            },
            out,
        ),
        1 => machine.accept(out),
        2 => machine.refuse(
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
        3 => machine.fin(out),
        4 => machine.go_away(out),
        5 => {
            machine.reset(ResetCause::Application, out);
            Ok(())
        }
        6 => machine.data(1).map(|_| ()),
        _ => Ok(()),
    };
}

fn check(event: Option<&Event<'_>>, is_source: bool, before: (bool, bool, bool)) {
    let (idle, expects_data, awaits_answer) = before;
    match event {
        Some(Event::Open(_) | Event::Continue(_)) => assert!(!is_source && !expects_data),
        Some(Event::Accept | Event::Refuse(_) | Event::NotTaken) => {
            assert!(is_source && awaits_answer);
        }
        Some(Event::Data(bytes)) => assert!(expects_data && !awaits_answer && !bytes.is_empty()),
        Some(Event::Fin) => assert!(expects_data && !awaits_answer),
        Some(Event::Reset(_)) => assert!(!idle),
        Some(Event::GoingAway) => assert!(is_source),
        Some(Event::Reauthenticate(_)) | None => {}
    }
}
