//! A panic in the stack, wherever it begins: the network ends, the log says with which flow it began, every flow's end is
//! told, and peers see a reset. The process goes on.

use std::io::ErrorKind;
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, poll};

use super::*;
use crate::defect::At;
use crate::engine;
use crate::flow::TimerKey;
use crate::shared::Token;
use crate::{FlowEventKind, FlowLog};

/// What came of it.
struct Outcome {
    log: String,
    ends: Vec<String>,
    ended: Result<usize, ErrorKind>,
}

/// Lets the engine live after `prepare`, and `provoke` it until it has failed.
fn fail(trap: fn(At) -> bool, provoke: impl FnOnce(&Script, &mut Peer, &mut TcpStream)) -> Outcome {
    let ends = Arc::<Mutex<Vec<String>>>::default();
    let told = Arc::clone(&ends);
    let mut spec = spec();
    spec.flow_log = Some(FlowLog::new(move |event| {
        if let FlowEventKind::Closed { reason, .. } = event.kind {
            told.lock().expect("no panic meanwhile").push(format!("{} {reason}", event.guest));
        }
    }));
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec, true);
    let mut peer = Peer::new(false, port);
    peer.open(&mut script);
    let mut server = accept(&listener);
    // Something for the retransmission timer to do.
    server.write_all(b"data").expect("write");
    script.expect_tcp("data", |segment| !segment.payload().is_empty());
    script.engine.set_trap(trap);
    provoke(&script, &mut peer, &mut server);
    let Script { engine, wire, control, now, .. } = script;
    let (mut log, writer) = std::io::pipe().expect("pipe");
    let thread = std::thread::spawn(move || {
        let writer = Mutex::new(writer);
        let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false).finish();
        // Its timers are due.
        tracing::subscriber::with_default(subscriber, || {
            engine::live(engine, || now + Duration::from_secs(5));
        });
    });
    // If nothing fails, the end of the wire ends it, and there is nothing to read.
    let _ = poll(&mut [PollFd::new(log.as_fd(), PollFlags::POLLIN)], 10_000u16);
    drop(wire);
    let mut text = String::new();
    log.read_to_string(&mut text).expect("log");
    assert!(thread.join().is_ok(), "the panic stays in the stack");
    assert!(control.flows(1).is_err(), "who asks it hears that it is gone");
    let ended = server.read(&mut [0; 100]).map_err(|error| error.kind());
    let ends = std::mem::take(&mut *ends.lock().expect("no panic meanwhile"));
    Outcome { log: text, ends, ended }
}

#[test]
fn a_panic_ends_the_network_alone_and_says_with_which_flow_it_began() {
    type Provoke = fn(&Script, &mut Peer, &mut TcpStream);
    let nothing: Provoke = |_, _, _| {};
    let segment: Provoke =
        |script, peer, _| script.send_ip(&peer.segment(TcpControl::None, b"from the guest"));
    let datagram: Provoke =
        |script, _, _| script.send_ip(&udp((GUEST_V6, 5_000), ("2001:db8::1", 9), b"datagram"));
    let garbage: Provoke = |script, _, _| script.send_frame(false, 0x0800, &[0; 3]);
    let answer: Provoke = |_, _, server| server.write_all(b"from the host").expect("write");
    let command: Provoke = |script, _, _| script.control.stop();
    for (trap, provoke, at) in [
        ((|at| at == At::Frame) as fn(At) -> bool, garbage, "a frame from inside"),
        (|at| matches!(at, At::Packet(_)), segment, "a TCP packet from 10.0.2.100:40000 to 10.0.2.2:"),
        (|at| matches!(at, At::Packet(_)), datagram, "a UDP packet from [fd00::100]:5000 to [2001:db8::1]:9"),
        (
            |at| matches!(at, At::Event(Token::Tcp(_))),
            answer,
            "TCP connection between 10.0.2.100:40000 and 10.0.2.2:",
        ),
        (|at| matches!(at, At::Flow(_)), segment, "TCP connection between 10.0.2.100:40000 and 10.0.2.2:"),
        (
            |at| matches!(at, At::Timer(TimerKey::Tcp(_))),
            nothing,
            "TCP connection between 10.0.2.100:40000 and 10.0.2.2:",
        ),
        (|at| at == At::Command, command, "a command"),
    ] {
        let outcome = fail(trap, provoke);
        let log = &outcome.log;
        assert!(log.contains("ERROR") && log.contains("no network from here on"), "{log}");
        assert!(log.contains(at) && log.contains("part of the test"), "{at}: {log}");
        assert_eq!(outcome.ends, ["10.0.2.100:40000 failed"], "{at}");
        assert_eq!(outcome.ended, Err(ErrorKind::ConnectionReset), "{at}");
    }
}

#[test]
fn a_panic_at_the_very_end_stays_in_the_stack_too() {
    struct Bad;
    impl Drop for Bad {
        fn drop(&mut self) {
            panic!("part of the test");
        }
    }
    for after_defect in [false, true] {
        let bad = Bad;
        let mut spec = spec();
        spec.flow_log = Some(FlowLog::new(move |_| {
            let _ = &bad;
        }));
        let mut script = Script::new(&spec, true);
        // The engine is the last that has the log.
        drop(spec);
        if after_defect {
            script.engine.set_trap(|at| at == At::Command);
        }
        let Script { engine, control, now, wire, .. } = script;
        control.stop();
        assert!(!engine::live(engine, || now), "{after_defect}");
        drop(wire);
    }
}
