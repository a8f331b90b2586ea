//! Data of open connections: in frames of which size it goes, what becomes of what is lost, and how connections rest.

use super::*;

#[test]
fn super_segments_carry_the_guests_segment_size() {
    for (is_v6, mss, size) in [(false, 1460, 1448), (true, 1440, 1428), (false, 500, 488), (true, 9000, 1428)]
    {
        let (listener, port) = listener(is_v6);
        let mut script = Script::new(&spec(), true);
        let mut peer = Peer::new(is_v6, port);
        peer.mss = mss;
        peer.open(&mut script);
        let mut server = accept(&listener);
        server.write_all(&[7; 30_000]).expect("write");
        let mut got = 0;
        let mut largest = 0;
        while got < 30_000 {
            let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
            let kind = if is_v6 { 4 } else { 1 };
            let len = frame.tcp().payload().len();
            largest = largest.max(len);
            let expected = if len > usize::from(size) { (kind, size) } else { (0, 0) };
            assert_eq!(frame.offload(), expected);
            assert_eq!(frame.0[0], 1, "the kernel finishes the checksum");
            got += peer.take(&mut script, &frame);
        }
        assert!(largest > 5_000, "{largest}");
    }
}

#[test]
fn without_segmentation_every_frame_fits_the_link() {
    for is_v6 in [false, true] {
        let (listener, port) = listener(is_v6);
        let mut script = Script::new(&spec(), false);
        let mut peer = Peer::new(is_v6, port);
        peer.open(&mut script);
        accept(&listener).write_all(&[7; 30_000]).expect("write");
        let mut ended = false;
        let mut got = 0;
        while got < 30_000 {
            let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
            assert!(frame.0.len() <= HEAD + 1500 && frame.offload() == (0, 0));
            got += peer.take(&mut script, &frame);
            // The server has closed: the end comes with the last byte, or right behind it.
            ended |= frame.tcp().fin();
        }
        if !ended {
            script.expect_tcp("FIN", |segment| segment.fin());
        }
    }
}

#[test]
fn lost_data_is_sent_again_and_a_silent_guest_is_given_up() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    peer.open(&mut script);
    let mut server = accept(&listener);
    server.write_all(b"lost").expect("write");
    let first = script.expect_tcp("data", |segment| segment.payload() == b"lost");
    script.nothing_comes("a repetition at once");
    script.advance_millis(1_100);
    let again = script.expect_tcp("data again", |segment| segment.payload() == b"lost");
    assert_eq!(first.tcp().seq_number(), again.tcp().seq_number());
    // It goes on, ever more slowly, for three minutes.
    for _ in 0..179 {
        script.advance_millis(1_000);
    }
    script.expect_tcp("RST", |segment| segment.rst());
    assert_eq!(script.stats().tcp_flows, 0);
    server.read(&mut [0; 10]).expect_err("the peer notices");
}

#[test]
fn a_connection_may_rest_for_a_day() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    peer.open(&mut script);
    let mut server = accept(&listener);
    for _ in 0..24 {
        script.advance(Duration::from_secs(3_600));
    }
    script.nothing_comes("anything while nothing happens");
    server.write_all(b"still there?").expect("write");
    let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
    peer.take(&mut script, &frame);
    script.advance_millis(5_000);
    assert_eq!(script.stats().tcp_flows, 1);
}

#[test]
fn a_segment_behind_the_end_of_the_window_is_not_taken() {
    for window_scale in [Some(7), None] {
        let (listener, port) = listener(false);
        let mut script = Script::new(&spec(), true);
        let mut peer = Peer::new(false, port);
        peer.window_scale = window_scale;
        peer.open(&mut script);
        let start = peer.seq;
        // Before the stack has acknowledged anything, so all that it has announced is the window of its SYN.
        peer.seq = start.wrapping_add(500_000);
        peer.send(&mut script, TcpControl::None, &[7; 60_000]);
        let answer = script.expect_tcp("an acknowledgement", |segment| !segment.syn()).0;
        let segment = Out(answer);
        assert_eq!(segment.tcp().ack_number(), TcpSeqNumber(start));
        for (_, right) in segment.tcp().selective_ack_ranges().expect("options").into_iter().flatten() {
            assert!(right.wrapping_sub(u32::from_ne_bytes(start.to_ne_bytes())) <= 512 * 1024);
        }
        peer.seq = start;
        peer.send(&mut script, TcpControl::None, b"in order");
        accept(&listener).read_exact(&mut [0; 8]).expect("read");
    }
}

#[test]
fn idle_flows_among_many_lose_their_pages_and_no_data() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut open: Vec<(Peer, TcpStream)> = Vec::new();
    for i in 0..4 {
        let mut peer = Peer::new(false, port);
        peer.guest.1 += i;
        peer.open(&mut script);
        open.push((peer, accept(&listener)));
    }
    for (peer, server) in &mut open {
        peer.send(&mut script, TcpControl::Psh, b"first");
        server.read_exact(&mut [0; 5]).expect("read");
        // The segment before this one is late.
        peer.seq += 6;
        peer.send(&mut script, TcpControl::Psh, b"third");
        peer.seq -= 11;
    }
    script.advance_millis(3_000);
    assert!(script.engine.is_quiet(script.now + Duration::from_secs(60)), "a flow rests once, not every 2 s");
    for (peer, server) in &mut open {
        peer.send(&mut script, TcpControl::Psh, b"second");
        let mut all = [0; 11];
        server.read_exact(&mut all).expect("read");
        assert_eq!(&all, b"secondthird");
        server.write_all(b"answer").expect("write");
        let frame = script.expect_tcp("the answer", |segment| !segment.payload().is_empty());
        assert_eq!(frame.tcp().payload(), b"answer");
        peer.seq += 5;
        peer.take(&mut script, &frame);
    }
}
