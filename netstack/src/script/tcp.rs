//! TCP in awkward cases: ends of every kind, windows that close, segments in the wrong place.

use super::*;
use crate::config::FIN_WAIT_PROBE;
use std::net::Shutdown;

/// A connection that is open, and its other end.
struct Open {
    script: Script,
    peer: Peer,
    server: TcpStream,
}

fn open() -> Open {
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    peer.open(&mut script);
    Open { script, peer, server: accept(&listener) }
}

impl Open {
    fn send(&mut self, control: TcpControl, payload: &[u8]) {
        self.peer.send(&mut self.script, control, payload);
    }

    /// What comes until the FIN, which is acknowledged with everything else.
    fn take_to_the_end(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let frame = self
                .script
                .expect_tcp("data or FIN", |segment| !segment.payload().is_empty() || segment.fin());
            all.extend(frame.tcp().payload());
            self.peer.take(&mut self.script, &frame);
            if frame.tcp().fin() {
                self.peer.ack = self.peer.ack.wrapping_add(1);
                self.send(TcpControl::None, b"");
                return all;
            }
        }
    }

    fn server_reads(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        self.server.read_to_end(&mut all).expect("read");
        all
    }

    fn expect_gone(&mut self) {
        self.script.settle();
        while let Some(frame) = self.script.try_recv() {
            assert!(!frame.tcp().rst(), "an orderly end");
        }
        assert_eq!(self.script.stats().tcp_flows, 0);
    }
}

#[test]
fn the_guest_may_close_its_half_first() {
    let mut open = open();
    open.send(TcpControl::Psh, b"question");
    open.send(TcpControl::Fin, b"");
    assert_eq!(open.server_reads(), b"question");
    open.script.advance(Duration::from_secs(3_600));
    assert_eq!(open.script.stats().tcp_flows, 1, "half a connection may rest, too");
    open.server.write_all(&[7; 100_000]).expect("write");
    open.server.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(open.take_to_the_end(), [7; 100_000]);
    open.expect_gone();
}

#[test]
fn the_host_may_close_its_half_first() {
    let mut open = open();
    open.server.write_all(b"banner").expect("write");
    open.server.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(open.take_to_the_end(), b"banner");
    open.script.advance(Duration::from_secs(3_600));
    for _ in 0..10 {
        open.send(TcpControl::Psh, &[8; 10_000]);
    }
    // The last word comes with the FIN.
    open.send(TcpControl::Fin, b"the end");
    let all = open.server_reads();
    assert_eq!((all.len(), all.ends_with(b"the end")), (100_007, true));
    open.expect_gone();
}

#[test]
fn a_guest_that_is_silent_after_the_hosts_end_is_asked() {
    let closed_by_the_host = || {
        let mut open = open();
        open.server.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(open.take_to_the_end(), b"");
        open.script.settle();
        while open.script.try_recv().is_some() {}
        open
    };
    let asked = |open: &mut Open| {
        open.script.advance(FIN_WAIT_PROBE);
        let probe = open.script.expect_tcp("a question", |segment| segment.ack());
        assert_eq!(
            probe.tcp().seq_number(),
            TcpSeqNumber(open.peer.ack.wrapping_sub(1)),
            "which wants an answer"
        );
        assert_eq!(probe.tcp().ack_number(), TcpSeqNumber(open.peer.seq));
        assert!(probe.tcp().payload().is_empty() && !probe.tcp().fin());
    };
    // It has it still, and may keep it.
    let mut open = closed_by_the_host();
    for _ in 0..5 {
        asked(&mut open);
        open.send(TcpControl::None, b"");
        open.script.nothing_comes("more than a question");
    }
    open.send(TcpControl::Fin, b"the end");
    assert_eq!(open.server_reads(), b"the end");
    // It has none: the RST of its kernel to a segment that no connection is for takes its number from it.
    let mut open = closed_by_the_host();
    asked(&mut open);
    open.send(TcpControl::Rst, b"");
    open.script.settle();
    assert_eq!(open.script.stats().tcp_flows, 0);
    // It says nothing any more.
    let mut open = closed_by_the_host();
    asked(&mut open);
    asked(&mut open);
    open.script.advance(FIN_WAIT_PROBE);
    assert_eq!(open.script.stats().tcp_flows, 0);
}

#[test]
fn both_may_close_at_once() {
    let mut open = open();
    open.server.shutdown(Shutdown::Write).expect("shutdown");
    let fin = open.script.expect_tcp("FIN", |segment| segment.fin());
    // The guest's own crosses it: it does not acknowledge ours.
    open.send(TcpControl::Fin, b"");
    let answer = open.script.expect_tcp("ACK", |segment| segment.ack());
    assert_eq!(answer.tcp().ack_number(), TcpSeqNumber(open.peer.seq));
    assert_eq!(open.script.stats().tcp_flows, 1);
    open.peer.ack = fin.tcp().seq_number().0.wrapping_add(1);
    open.send(TcpControl::None, b"");
    assert_eq!(open.server_reads(), b"");
    open.expect_gone();
}

#[test]
fn what_acknowledges_our_fin_counts_whenever_it_comes() {
    let mut open = open();
    open.send(TcpControl::Fin, b"");
    assert_eq!(open.server_reads(), b"");
    open.server.shutdown(Shutdown::Write).expect("shutdown");
    let fin = open.script.expect_tcp("FIN", |segment| segment.fin());
    // Our answer to the guest's was lost: it comes again, and with it the first word about ours. smoltcp looks at nothing in
    // what it has had.
    open.peer.ack = fin.tcp().seq_number().0.wrapping_add(1);
    open.peer.seq = open.peer.seq.wrapping_sub(1);
    open.send(TcpControl::Fin, b"");
    // As a connection in TIME-WAIT says to everything that comes.
    for _ in 0..4 {
        open.script.advance(Duration::from_secs(20));
        open.script.settle();
        if open.script.stats().tcp_flows > 0 {
            open.send(TcpControl::None, b"");
        }
    }
    open.expect_gone();
}

#[test]
fn a_fin_that_comes_again_is_acknowledged_again() {
    let mut open = open();
    open.send(TcpControl::Fin, b"data");
    open.script.expect_tcp("ACK", |segment| segment.ack());
    open.script.advance_millis(1_500);
    open.peer.seq = open.peer.seq.wrapping_sub(5);
    open.send(TcpControl::Fin, b"data");
    let answer = open.script.expect_tcp("ACK", |segment| segment.ack());
    assert_eq!(answer.tcp().ack_number(), TcpSeqNumber(open.peer.seq));
    assert_eq!(open.server_reads(), b"data");
}

#[test]
fn a_fin_that_was_lost_comes_again_whatever_is_acknowledged_meanwhile() {
    let mut open = open();
    open.server.write_all(b"data").expect("write");
    open.server.shutdown(Shutdown::Write).expect("shutdown");
    open.script.expect_tcp("FIN", |segment| segment.fin());
    // It got the data and not the FIN.
    open.peer.ack = open.peer.ack.wrapping_add(4);
    for (late, behind) in [(0, 0), (0, 0), (4, 0), (0, 0), (0, 7), (4, 0), (0, 0), (0, 7), (0, 7)] {
        open.peer.ack -= late;
        open.peer.seq += behind;
        open.send(TcpControl::None, b"");
        open.peer.ack += late;
        open.peer.seq -= behind;
    }
    while open.script.try_recv().is_some() {}
    open.script.advance_millis(3_000);
    let fin = open.script.expect_tcp("FIN again", |segment| segment.fin());
    assert_eq!(fin.tcp().seq_number(), TcpSeqNumber(open.peer.ack));
    open.peer.ack = open.peer.ack.wrapping_add(1);
    open.send(TcpControl::Fin, b"");
    assert_eq!(open.server_reads(), b"");
    open.expect_gone();
}

#[test]
fn a_fin_waits_for_the_data_before_it() {
    let mut open = open();
    let start = open.peer.seq;
    open.peer.seq = start.wrapping_add(5);
    open.send(TcpControl::Fin, b"last");
    open.peer.seq = start;
    open.send(TcpControl::Psh, b"first");
    // Without the FIN, which the guest has to repeat: its kernel leaves out what was acknowledged.
    let answer = open
        .script
        .expect_tcp("ACK of both", |segment| segment.ack_number() == TcpSeqNumber(start.wrapping_add(9)));
    assert!(!answer.tcp().fin());
    open.peer.seq = start.wrapping_add(9);
    open.send(TcpControl::Fin, b"");
    assert_eq!(open.server_reads(), b"firstlast");
}

#[test]
fn what_follows_a_fin_never_arrives() {
    let mut open = open();
    open.send(TcpControl::Fin, b"all");
    let malformed = open.script.stats().dropped_malformed;
    for behind in [-1, 0, 1, 1_000] {
        let seq = open.peer.seq;
        open.peer.seq = seq.wrapping_add(behind);
        open.send(TcpControl::Psh, b"and more");
        open.peer.seq = seq;
    }
    assert_eq!(open.script.stats().dropped_malformed, malformed + 4);
    assert_eq!(open.server_reads(), b"all");
    // The other half is none the worse for it.
    open.server.write_all(b"answer").expect("write");
    open.server.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(open.take_to_the_end(), b"answer");
    open.expect_gone();
}

#[test]
fn a_reset_in_the_middle_of_data_reaches_the_other_side() {
    let mut by_guest = open();
    by_guest.server.write_all(&[7; 50_000]).expect("write");
    by_guest.script.expect_tcp("data", |segment| !segment.payload().is_empty());
    by_guest.send(TcpControl::Psh, b"and then");
    by_guest.send(TcpControl::Rst, b"");
    let mut buffer = [0; 8];
    let error = loop {
        if let Err(error) = by_guest.server.read_exact(&mut buffer) {
            break error;
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(by_guest.script.stats().tcp_flows, 0);

    let mut by_host = open();
    by_host.send(TcpControl::Psh, b"unread");
    by_host.server.write_all(b"some").expect("write");
    let data = by_host.script.expect_tcp("data", |segment| segment.payload() == b"some");
    by_host.peer.take(&mut by_host.script, &data);
    // Closing with unread data is a reset.
    drop(by_host.server);
    let reset = by_host.script.expect_tcp("RST", |segment| segment.rst());
    assert_eq!(reset.tcp().seq_number(), TcpSeqNumber(by_host.peer.ack), "where the guest expects it");
    assert_eq!(by_host.script.stats().tcp_flows, 0);
}

#[test]
fn a_closed_window_is_probed_for_as_long_as_the_guest_answers() {
    let mut open = open();
    open.peer.window = 0;
    open.send(TcpControl::None, b"");
    open.server.write_all(b"patience").expect("write");
    open.script.settle();
    let mut probes = 0;
    // Ten minutes, more than any silence is suffered for.
    for _ in 0..600 {
        open.script.advance_millis(1_000);
        while let Some(frame) = open.script.try_recv() {
            assert!(frame.tcp().payload().len() <= 1 && !frame.tcp().rst());
            probes += 1;
            // The guest's kernel takes no byte, and says so.
            open.send(TcpControl::None, b"");
        }
    }
    assert!((10..60).contains(&probes), "{probes}");
    open.peer.window = 60_000;
    open.send(TcpControl::None, b"");
    let data = open.script.expect_tcp("data", |segment| segment.payload() == b"patience");
    open.peer.take(&mut open.script, &data);
    // Its window closes as the host's side does not read, and opens again.
    let mut sent = 0;
    let full = loop {
        open.send(TcpControl::Psh, &[9; 30_000]);
        let frame = open.script.expect_tcp("ACK", |segment| segment.ack());
        sent += 30_000;
        if frame.tcp().window_len() < 4_000 {
            break frame;
        }
    };
    let taken = full.tcp().ack_number() - TcpSeqNumber(open.peer.seq.wrapping_sub(sent));
    open.server.set_nonblocking(true).expect("non-blocking");
    let mut read = 0;
    let mut buffer = [0; 10_000];
    while read < taken {
        match open.server.read(&mut buffer) {
            Ok(len) => read += len,
            Err(_) => open.script.turn(Duration::from_millis(20)),
        }
    }
    open.script.expect_tcp("an open window", |segment| segment.window_len() > 30_000);
}

#[test]
fn a_window_that_closes_while_data_is_under_way_is_asked_for() {
    let mut open = open();
    open.server.write_all(&[7; 10_000]).expect("write");
    open.script.expect_tcp("data", |segment| !segment.payload().is_empty());
    // The guest had no room for any of it, after all.
    open.peer.window = 0;
    open.send(TcpControl::None, b"");
    // Its word that it has room again is lost.
    open.peer.window = 60_000;
    let mut got = 0;
    for _ in 0..20 {
        open.script.advance_millis(1_000);
        let mut asked = false;
        while let Some(frame) = open.script.try_recv() {
            let segment = frame.tcp();
            asked = true;
            if segment.seq_number() == TcpSeqNumber(open.peer.ack) {
                got += segment.payload().len();
                open.peer.ack =
                    open.peer.ack.wrapping_add(i32::try_from(segment.payload().len()).expect("length"));
            }
        }
        if asked {
            open.send(TcpControl::None, b"");
        }
    }
    assert_eq!(got, 10_000);
    // Nothing is asked any more.
    open.script.advance_millis(5_000);
    while open.script.try_recv().is_some() {}
    open.script.advance(Duration::from_secs(600));
    open.script.nothing_comes("a question without a reason");
}

#[test]
fn a_guest_that_closed_its_half_and_reads_slowly_waits_for_no_probes() {
    let mut open = open();
    open.peer.window_scale = None;
    open.send(TcpControl::Fin, b"question");
    assert_eq!(open.server_reads(), b"question");
    open.server.write_all(&[7; 500_000]).expect("write");
    open.server.shutdown(Shutdown::Write).expect("shutdown");
    let mut all = 0;
    loop {
        // No time passes here, so nothing that comes was waited for.
        let frame =
            open.script.expect_tcp("data or FIN", |segment| !segment.payload().is_empty() || segment.fin());
        open.peer.window = 0;
        all += open.peer.take(&mut open.script, &frame);
        if frame.tcp().fin() {
            break;
        }
        open.peer.window = 100;
        open.send(TcpControl::None, b"");
    }
    assert_eq!(all, 500_000);
    open.peer.ack = open.peer.ack.wrapping_add(1);
    open.send(TcpControl::None, b"");
    open.expect_gone();
}

#[test]
fn a_fin_behind_the_end_of_the_window_waits_for_the_data_before_it() {
    let mut open = open();
    let start = open.peer.seq;
    // The host's side does not read, so the ring fills.
    let (expected, window) = loop {
        open.send(TcpControl::Psh, &[9; 30_000]);
        let seq = open.peer.seq;
        let frame = open.script.expect_tcp("ACK", |segment| segment.ack_number() == TcpSeqNumber(seq));
        let window = usize::from(frame.tcp().window_len()) << 3;
        if window < 60_000 {
            break (seq, window);
        }
    };
    let last: Vec<u8> = (0..window + 1_000).map(|i| u8::try_from(i % 251).expect("small")).collect();
    open.send(TcpControl::Fin, &last);
    let ack = open.script.expect_tcp("ACK", |segment| segment.ack_number() > TcpSeqNumber(expected));
    let taken = ack.tcp().ack_number() - TcpSeqNumber(expected);
    assert!((window..window + 8).contains(&taken), "{taken} of {window}");
    let before = usize::try_from(expected.wrapping_sub(start)).expect("length");
    let mut got = vec![0; before + taken];
    open.server.set_nonblocking(true).expect("non-blocking");
    let mut read = 0;
    while read < got.len() {
        match open.server.read(&mut got[read..]) {
            Ok(0) => panic!("an end after {read} bytes of {}", got.len()),
            Ok(len) => read += len,
            Err(_) => open.script.turn(Duration::from_millis(20)),
        }
    }
    assert_eq!(got[before..], last[..taken]);
    // There is more, and then the end.
    open.peer.seq = expected.wrapping_add(i32::try_from(taken).expect("length"));
    open.send(TcpControl::Fin, &last[taken..]);
    open.server.set_nonblocking(false).expect("blocking");
    assert_eq!(open.server_reads(), last[taken..]);
}

#[test]
fn an_end_that_was_acknowledged_too_early_is_not_probed_for_ever() {
    let mut open = open();
    open.peer.window = 0;
    open.send(TcpControl::None, b"");
    open.server.write_all(&[7; 100]).expect("write");
    open.server.shutdown(Shutdown::Write).expect("shutdown");
    for _ in 0..3 {
        open.script.turn(Duration::from_millis(20));
    }
    // Neither the data nor the FIN has been sent yet: the window is closed.
    open.peer.ack = open.peer.ack.wrapping_add(101);
    open.send(TcpControl::None, b"");
    let mut frames = 0;
    for _ in 0..100 {
        open.script.advance_millis(1_000);
        frames += std::iter::from_fn(|| open.script.try_recv()).count();
        assert!(!open.script.engine.is_blocked(), "{frames}");
    }
    assert!(frames < 100, "{frames}");
    // Its own half lives on.
    open.send(TcpControl::Fin, b"data");
    assert_eq!(open.server_reads(), b"data");
    open.expect_gone();
}
