//! Ping and what it tells.

use std::process::Command;

use crate::common::*;

crate::tests! {
    ping_works_both_families_and_the_gateway_answers,
    ping_where_the_host_forbids_it_is_refused,
    traceroute_sees_the_gateway,
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
    }
}
