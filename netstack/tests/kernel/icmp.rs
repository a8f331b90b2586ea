//! Ping and what it tells.

use std::io::{IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect,
    recvmsg, setsockopt, socket, sockopt,
};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    ping_works_both_families_and_the_gateway_answers,
    ping_where_the_host_forbids_it_is_refused,
    traceroute_sees_the_gateway,
    a_socket_hears_errors_and_replies,
    an_address_of_the_gateway_is_known_to_be_taken,
}

fn ping_works_both_families_and_the_gateway_answers(_: &World) {
    let guest = Guest::new();
    guest.net.run(|| {
        for ip in [INTERNET_V4, INTERNET_V6, GATEWAY_V4, GATEWAY_V6] {
            sh(&format!("ping -c 2 -i 0.2 -W 5 {ip}"));
        }
        // Larger than the MTU.
        for ip in [INTERNET_V4, INTERNET_V6, GATEWAY_V4] {
            sh(&format!("ping -c 1 -s 4000 -W 5 {ip}"));
        }
        let refused = Command::new("ping").args(["-c", "1", "-W", "5", HOST_V4]).output().unwrap();
        assert!(String::from_utf8_lossy(&refused.stdout).contains("Packet filtered"), "{refused:?}");
    });
    assert_eq!(guest.stack.stats().dropped_malformed, 0);
}

fn ping_where_the_host_forbids_it_is_refused(_: &World) {
    // A host where nobody set the range: the kernel's default is an empty one.
    let guest = Net::new().run(Guest::new);
    let output =
        guest.net.run(|| Command::new("ping").args(["-c", "1", "-W", "5", INTERNET_V4]).output().unwrap());
    assert!(String::from_utf8_lossy(&output.stdout).contains("Packet filtered"), "{output:?}");
}

fn traceroute_sees_the_gateway(_: &World) {
    let guest = Guest::new();
    for (ip, gateway) in [(INTERNET_V4, GATEWAY_V4), (INTERNET_V6, GATEWAY_V6)] {
        let first = guest.net.run(move || {
            let output =
                Command::new("ping").args(["-c", "1", "-W", "5", "-t", "1", "-n", ip]).output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        });
        assert!(
            first.contains(&format!("From {gateway}")) && first.to_lowercase().contains("exceeded"),
            "{first}"
        );
        // A connection that would end at the first hop, too: traceroute -T.
        let refused = guest.net.run(move || {
            let (to, family) = match ip.parse::<IpAddr>().unwrap() {
                IpAddr::V4(_) => (at(ip, 80), AddressFamily::Inet),
                IpAddr::V6(_) => (at(ip, 80), AddressFamily::Inet6),
            };
            let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
            let hops = TcpStream::from(fd.try_clone().unwrap());
            if to.is_ipv4() {
                hops.set_ttl(1).unwrap();
            } else {
                setsockopt(&fd, sockopt::Ipv6Ttl, &1).unwrap();
            }
            connect(fd.as_raw_fd(), &SockaddrStorage::from(to))
        });
        assert_eq!(refused, Err(Errno::EHOSTUNREACH), "{ip}");
    }
    assert_eq!(guest.stack.stats().tcp_flows, 0);
}

/// An echo request of `kind`, with an identifier of its own.
fn request(kind: u8, seq: u8) -> [u8; 12] {
    let mut message = [kind, 0, 0, 0, 0x12, 0x34, 0, seq, b't', b'e', b's', b't'];
    // The kernel does it for ICMPv6.
    let sum = !smoltcp::wire::checksum::data(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// Who says that a request of `socket` went too far, and what came back of that.
fn hops_exceeded(socket: &TcpStream) -> (IpAddr, [u8; 12]) {
    // The queue never blocks.
    let patience = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut [PollFd::new(socket.as_fd(), PollFlags::empty())], patience), Ok(1));
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let mut buffer = [0; 12];
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_ERRQUEUE,
    );
    let from = message.unwrap().cmsgs().unwrap().find_map(|control| match control {
        ControlMessageOwned::Ipv4RecvErr(error, Some(from)) => {
            assert_eq!((error.ee_origin, error.ee_type), (libc::SO_EE_ORIGIN_ICMP, 11));
            Some(IpAddr::from(Ipv4Addr::from_bits(u32::from_be(from.sin_addr.s_addr))))
        }
        ControlMessageOwned::Ipv6RecvErr(error, Some(from)) => {
            assert_eq!((error.ee_origin, error.ee_type), (libc::SO_EE_ORIGIN_ICMP6, 3));
            Some(IpAddr::from(Ipv6Addr::from(from.sin6_addr.s6_addr)))
        }
        _ => None,
    });
    (from.unwrap(), buffer)
}

/// What traceroute -I does with its one socket, which cannot be relied on for that (see tests/network-real/run).
fn a_socket_hears_errors_and_replies(_: &World) {
    let guest = Guest::new();
    for (ip, gateway) in [(INTERNET_V4, GATEWAY_V4), (INTERNET_V6, GATEWAY_V6)] {
        guest.net.run(move || {
            let (ip, gateway): (IpAddr, IpAddr) = (ip.parse().unwrap(), gateway.parse().unwrap());
            let (family, protocol, kind, header_len) = match ip {
                IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 20),
                IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 0),
            };
            let fd = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
            connect(fd.as_raw_fd(), &SockaddrStorage::from(at(&ip.to_string(), 0))).unwrap();
            match ip {
                IpAddr::V4(_) => setsockopt(&fd, sockopt::Ipv4RecvErr, &true).unwrap(),
                IpAddr::V6(_) => setsockopt(&fd, sockopt::Ipv6RecvErr, &true).unwrap(),
            }
            // No more than a connected socket with time-outs.
            let mut socket = patient(fd.into());
            let set_hops = |socket: &TcpStream, hops: u8| match ip {
                IpAddr::V4(_) => socket.set_ttl(hops.into()).unwrap(),
                IpAddr::V6(_) => setsockopt(socket, sockopt::Ipv6Ttl, &hops.into()).unwrap(),
            };
            for seq in [1, 3, 5] {
                set_hops(&socket, 1);
                let sent = request(kind, seq);
                socket.write_all(&sent).unwrap();
                let (from, returned) = hops_exceeded(&socket);
                assert_eq!((from, &returned[4..]), (gateway, &sent[4..]));
                set_hops(&socket, 64);
                let sent = request(kind, seq + 1);
                socket.write_all(&sent).unwrap();
                let mut reply = [0; 64];
                // The error may be reported once more, by itself, before the reply or after.
                let len = std::iter::repeat_with(|| socket.read(&mut reply)).find(
                    |read| !matches!(read, Err(error) if error.raw_os_error() == Some(libc::EHOSTUNREACH)),
                );
                let len = len.unwrap().unwrap();
                assert_eq!(reply[header_len + 4..len], sent[4..]);
                assert_eq!(reply[header_len], if ip.is_ipv4() { 0 } else { 129 });
                // Not to be taken for the next one.
                let _ = socket.take_error().unwrap();
            }
        });
    }
    assert_eq!(guest.stack.stats().dropped_malformed, 0);
}

fn an_address_of_the_gateway_is_known_to_be_taken(_: &World) {
    let guest = Guest::new();
    guest.net.run(|| {
        // Duplicate address detection, which the guest's own address goes without.
        sh(&format!(
            "echo 1 > /proc/sys/net/ipv6/conf/tap0/accept_dad; ip addr add {GATEWAY_V6}/64 dev tap0"
        ));
        wait_until("the kernel told", || sh("ip -6 addr show dev tap0").contains("dadfailed"));
    });
}
