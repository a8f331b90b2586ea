//! Ping and what it tells.

use std::net::{IpAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    ping_works_both_families_and_the_gateway_answers,
    ping_where_the_host_forbids_it_is_refused,
    traceroute_sees_the_gateway,
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
            use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
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
