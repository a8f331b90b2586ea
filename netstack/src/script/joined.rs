//! Connections that do not cross the TAP (`join.rs`): calls that fail, and sockets inside that do not come.

use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use super::faults::{ERRORS, calm_down, connecting_port, is_connecting, plan};
use super::good::Good;
use super::*;
use crate::calls::{Call, Fault};
use crate::config::{INSIDE_PAUSE, INSIDE_SOCKET};

/// A client on the host's loopback and a server in what stands for the guest's namespace, with a connection of the stack's
/// between them that does not cross the TAP.
pub(super) struct Joining {
    pub(super) script: Script,
    pub(super) maker: crate::SocketMaker,
    pub(super) inside: TcpListener,
}

/// How an exchange over such a connection ended for the client: the bytes that came back, or why not.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Echoed(usize),
    Failed(std::io::ErrorKind),
    /// It went over the TAP, behind which nobody is here.
    Crossed,
}

impl Joining {
    pub(super) fn new() -> Self {
        Self::with(&spec())
    }

    pub(super) fn with(spec: &StackSpec) -> Self {
        let (sockets, maker) = crate::inside_sockets().expect("socket pair");
        Self::through(spec, sockets, maker)
    }

    fn through(spec: &StackSpec, sockets: crate::InsideSockets, maker: crate::SocketMaker) -> Self {
        let published = Published::bind(&[forwarded(Protocol::Tcp, 80)]).expect("port").through(sockets);
        let script = Script::of(spec, true, published);
        // Every address is the host's own here, the guest's too.
        let inside = TcpListener::bind("[::]:80").expect("listener");
        inside.set_nonblocking(true).expect("non-blocking");
        Self { script, maker, inside }
    }

    /// One client's exchange: sends so many bytes, has them echoed, and both close.
    fn exchange(&mut self, len: usize, what: &str) -> Ended {
        let data: Vec<u8> = (0..len).map(Good::byte).collect();
        let mut client = TcpStream::connect(self.script.published[0]).expect("connect");
        client.set_nonblocking(true).expect("non-blocking");
        let mut servers: Vec<(TcpStream, Vec<u8>, bool)> = Vec::new();
        let (mut sent, mut back, mut buffer) = (0, Vec::<u8>::new(), vec![0u8; 100_000]);
        let would_block = |error: &std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            assert!(std::time::Instant::now() < deadline, "{what}: it stands still");
            assert!(self.maker.answer(), "{what}: the stack has given the maker up");
            self.script.turn(Duration::ZERO);
            while let Some(frame) = self.script.try_recv() {
                if is_connecting(&frame) {
                    return Ended::Crossed;
                }
            }
            while let Ok((stream, _)) = self.inside.accept() {
                stream.set_nonblocking(true).expect("non-blocking");
                servers.push((stream, Vec::new(), false));
            }
            servers.retain_mut(|(stream, held, ended)| {
                if held.is_empty() && !*ended {
                    match stream.read(&mut buffer) {
                        Ok(0) => *ended = true,
                        Ok(len) => held.extend(&buffer[..len]),
                        Err(error) if would_block(&error) => {}
                        Err(_) => return false,
                    }
                }
                match stream.write(held) {
                    Ok(len) => drop(held.drain(..len)),
                    Err(error) if would_block(&error) => {}
                    Err(_) => return false,
                }
                !(*ended && held.is_empty())
            });
            if sent < data.len() {
                match client.write(&data[sent..]) {
                    Ok(len) => sent += len,
                    Err(error) if would_block(&error) => {}
                    Err(error) => return Ended::Failed(error.kind()),
                }
                if sent == data.len() {
                    client.shutdown(std::net::Shutdown::Write).expect("shutdown");
                }
            }
            match client.read(&mut buffer) {
                Ok(0) => {
                    assert!(back == data[..back.len()], "{what}: other bytes");
                    return Ended::Echoed(back.len());
                }
                Ok(len) => back.extend(&buffer[..len]),
                Err(error) if would_block(&error) => {}
                Err(error) => return Ended::Failed(error.kind()),
            }
        }
    }
}

#[test]
fn joined_connections_whose_calls_fail_cross_the_tap_or_are_reset_or_do_without() {
    let name = "script::joined::joined_connections_whose_calls_fail_cross_the_tap_or_are_reset_or_do_without";
    if !in_empty_namespace(name) {
        return;
    }
    const LEN: usize = 400_000;
    let mut joining = Joining::new();
    assert_eq!(joining.exchange(LEN, "no fault"), Ended::Echoed(LEN));
    assert_eq!(joining.script.stats().tcp_joined, 1);
    calm_down(&mut joining.script, "no fault");
    let before = joining.script.inventory();
    drop(joining);
    for call in [
        Call::Bind,
        Call::Connect,
        Call::EpollAdd,
        Call::Send,
        Call::Recv,
        Call::Splice,
        Call::Pipe,
        Call::SetSockOpt,
        Call::GetSockOpt,
    ] {
        for errno in ERRORS {
            let what = format!("{call:?} {errno}");
            // A pipe that is kept would be used again.
            let mut joining = Joining::new();
            let empty = joining.script.inventory();
            let ended = {
                // The client's socket is watched first; if that fails, the connection goes the way of all others.
                let mut watched = usize::from(errno == ERRORS[0]);
                let _plan = plan(move |asked, _| {
                    watched += usize::from(asked == Call::EpollAdd);
                    let fails = asked == call && (call != Call::EpollAdd || watched > 1);
                    if fails { Fault::Fails(errno) } else { Fault::None }
                });
                joining.exchange(LEN, &what)
            };
            let refused = [Errno::ECONNREFUSED, Errno::EHOSTUNREACH, Errno::ENETUNREACH, Errno::ETIMEDOUT];
            if matches!(call, Call::Pipe | Call::SetSockOpt) {
                assert_eq!(ended, Ended::Echoed(LEN), "{what}");
            } else if matches!(call, Call::Bind | Call::Connect)
                || call == Call::GetSockOpt && refused.contains(&errno)
            {
                // Nobody has answered, so the link is asked.
                assert_eq!(ended, Ended::Crossed, "{what}");
                assert_eq!(
                    (joining.script.stats().tcp_in, joining.script.stats().tcp_joined),
                    (1, 0),
                    "{what}"
                );
            } else {
                use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
                assert!(matches!(ended, Ended::Failed(ConnectionReset | BrokenPipe)), "{what}: {ended:?}");
            }
            // The inside does not answer.
            joining.script.advance(Duration::from_secs(11));
            calm_down(&mut joining.script, &what);
            joining.script.advance(Duration::from_secs(11));
            calm_down(&mut joining.script, &what);
            let left = joining.script.inventory();
            assert_eq!((left.0, left.1, left.2, left.3), (0, 0, 0, 0), "{what}");
            assert!(left.4 - empty.4 <= before.4 - empty.4, "{what}: descriptors");
            joining.script.engine.check_bounds();
            // It was not for ever.
            assert_eq!(joining.exchange(1_000, &what), Ended::Echoed(1_000), "{what}");
        }
    }
}

const REST: Duration = Duration::from_millis(1);

/// Of so many connections that come at once, how many cross the TAP at once. The others do after a second, or this fails.
fn cross(script: &mut Script, many: usize) -> usize {
    let clients: Vec<TcpStream> =
        (0..many).map(|_| TcpStream::connect(script.published[0]).expect("connect")).collect();
    let wanted = many as u64;
    script.wait_for("flows", |script| script.stats().tcp_flows == wanted);
    // Whoever gets no answer says it again.
    let mut known = std::collections::HashSet::new();
    let mut crossing = |script: &Script| {
        let ports = std::iter::from_fn(|| script.try_recv()).filter_map(|frame| connecting_port(&frame));
        ports.filter(|port| known.insert(*port)).count()
    };
    let at_once = crossing(script);
    if at_once < many {
        script.advance(INSIDE_SOCKET - REST);
        assert_eq!(crossing(script), 0);
        script.advance(REST);
        assert_eq!(crossing(script), many - at_once);
    }
    // The inside gives no answer at any of the server's places.
    drop(clients);
    for _ in 0..2 {
        script.advance(Duration::from_secs(11));
        crossing(script);
    }
    assert_eq!(script.stats().tcp_flows, 0);
    at_once
}

/// Whether the maker has a question before it.
fn is_asked(maker: &crate::SocketMaker) -> bool {
    let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(maker.as_fd().as_raw_fd(), &mut [0; 64], peek).is_ok()
}

#[test]
fn questions_that_nobody_reads_count_when_there_is_no_room_for_more() {
    let name = "script::joined::questions_that_nobody_reads_count_when_there_is_no_room_for_more";
    if !in_empty_namespace(name) {
        return;
    }
    let (sockets, maker) = crate::inside_sockets().expect("socket pair");
    // The kernel makes some thousands of it.
    setsockopt(&sockets.as_fd(), sockopt::SndBuf, &1).expect("SO_SNDBUF");
    let mut joining = Joining::through(&spec(), sockets, maker);
    for _ in 0..3 {
        assert_eq!(cross(&mut joining.script, 40), 0);
    }
    assert_eq!(cross(&mut joining.script, 40), 40);
}

#[test]
fn who_does_not_answer_for_sockets_is_asked_again_after_a_pause() {
    let name = "script::joined::who_does_not_answer_for_sockets_is_asked_again_after_a_pause";
    if !in_empty_namespace(name) {
        return;
    }
    let mut joining = Joining::new();
    let script = &mut joining.script;
    assert_eq!(cross(script, 1), 0);
    assert_eq!(cross(script, 1), 0);
    // An answer in time makes up for them, and those that come too late do not.
    let client = TcpStream::connect(script.published[0]).expect("connect");
    script.wait_for("flow", |script| script.stats().tcp_flows == 1);
    assert!(joining.maker.answer());
    script.wait_for("joined", |script| script.stats().tcp_joined == 1);
    drop(client);
    joining.inside.accept().expect("its other end");
    script.wait_for("the end", |script| script.stats().tcp_flows == 0);
    // Many at once are one.
    assert_eq!(cross(script, 20), 0);
    assert_eq!(cross(script, 1), 0);
    assert!(joining.maker.answer());
    script.settle();
    assert_eq!(cross(script, 1), 0);
    assert!(joining.maker.answer());
    // From now on nobody waits, until the pause is over, of which the last ones have seen the first 22 seconds.
    script.advance(INSIDE_PAUSE - Duration::from_secs(22) - REST);
    assert_eq!(cross(script, 5), 5);
    assert!(!is_asked(&joining.maker));
    // Then one does. It is paused again from when it was asked for on: so much has gone by since then.
    assert_eq!(cross(script, 20), 19);
    assert!(is_asked(&joining.maker));
    script.advance(INSIDE_PAUSE - Duration::from_secs(23) - REST);
    assert_eq!(cross(script, 2), 2);
    assert_eq!(cross(script, 2), 1);
    // What was asked for before is answered too late.
    assert!(joining.maker.answer());
    script.settle();
    assert_eq!(cross(script, 1), 1);
    // As soon as it answers in time it is asked each time.
    let clients: Vec<TcpStream> = (1..=3)
        .map(|joined| {
            let client = TcpStream::connect(script.published[0]).expect("connect");
            script.wait_for("flow", |script| script.stats().tcp_flows == joined);
            assert!(joining.maker.answer());
            script.wait_for("joined", |script| script.stats().tcp_joined == 1 + joined);
            client
        })
        .collect();
    drop(clients);
    assert_eq!(script.stats().tcp_joined, 4);
}
