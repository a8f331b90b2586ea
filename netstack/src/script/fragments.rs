//! Datagrams in pieces.

use super::*;

#[test]
fn fragments_arrive_as_one_datagram_or_not_at_all() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    server.set_nonblocking(true).expect("non-blocking");
    let port = server.local_addr().expect("address").port();
    let mut script = Script::new(&spec(), true);
    let whole = udp((GUEST_V4, 5_000), (GATEWAY_V4, port), &[9; 3_000]);
    let piece = |at: usize, end: usize| v4_fragment(&whole, 7, at, end);
    for (at, end) in [(1_480, 2_960), (2_960, 3_008), (0, 1_480)] {
        script.send_ip(&piece(at, end));
    }
    script.settle();
    assert_eq!(server.recv(&mut [0; 4_000]).expect("datagram"), 3_000);
    // Half a minute between the pieces is too much.
    script.send_ip(&piece(0, 1_480));
    script.settle();
    script.advance_millis(31_000);
    script.send_ip(&piece(1_480, 2_960));
    script.send_ip(&piece(2_960, 3_008));
    script.settle();
    server.recv(&mut [0; 4_000]).expect_err("not at all");
}

#[test]
fn fragments_that_overlap_are_no_datagram() {
    let servers = ["127.0.0.1:0", "[::1]:0"].map(|addr| UdpSocket::bind(addr).expect("socket"));
    for (server, (guest, gateway)) in servers.iter().zip([(GUEST_V4, GATEWAY_V4), (GUEST_V6, GATEWAY_V6)]) {
        server.set_nonblocking(true).expect("non-blocking");
        let port = server.local_addr().expect("address").port();
        let mut script = Script::new(&spec(), true);
        let whole = udp((guest, 5_000), (gateway, port), &[9; 2_000]);
        let header_len = if guest == GUEST_V4 { 20 } else { 40 };
        let len = whole.len() - header_len;
        let send = |id: u16, at: usize, end: usize| {
            if guest == GUEST_V4 {
                return script.send_ip(&v4_fragment(&whole, id, at, end));
            }
            let mut payload = vec![17, 0];
            payload.extend((u16::try_from(at).expect("offset") | u16::from(end < len)).to_be_bytes());
            payload.extend(u32::from(id).to_be_bytes());
            payload.extend(&whole[40 + at..40 + end]);
            script.send_ip(&ingress::rebuild(ip(guest), ip(gateway), 44, 64, &payload));
        };
        for (id, pieces) in [
            (1, vec![(0, 800), (792, len)]),
            (2, vec![(800, len), (0, 808)]),
            (3, vec![(0, 800), (1_600, len), (792, 1_608)]),
            (4, vec![(0, 8), (16, 800), (8, 24), (800, len)]),
        ] {
            for (at, end) in pieces {
                send(id, at, end);
            }
        }
        // As it should be.
        send(5, 0, 800);
        send(5, 0, 800);
        send(5, 800, len);
        script.settle();
        assert_eq!(server.recv(&mut [0; 3_000]).expect("the whole one"), 2_000);
        server.recv(&mut [0; 3_000]).expect_err("nothing else");
    }
}
