//! Addresses of the sandbox: a network that nothing else on this host leads to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netstack::Rule;

use super::{NetPlan, Note, PlanError, StackPlan};
use crate::host::HostFacts;
use crate::spec::{LoopbackSpec, NetMode, ValidSpec};

/// Each is a /24. Uncommon ones first: a network that the host joins later must not collide
/// either.
const CANDIDATES: [[u8; 3]; 14] = [
    [10, 87, 0],
    [10, 87, 1],
    [10, 87, 2],
    [10, 187, 0],
    [10, 23, 187],
    [172, 29, 87],
    [172, 30, 87],
    [172, 22, 87],
    [172, 17, 87],
    [192, 168, 187],
    [192, 168, 87],
    [192, 168, 23],
    // Shared address space (RFC 6598) and benchmarking (RFC 2544): private in practice.
    [100, 97, 87],
    [198, 18, 87],
];
const PREFIX_V4: u8 = 24;
/// A ULA (RFC 4193) of our own; the same in every sandbox, since none sees another's.
const PREFIX_V6: u8 = 64;
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd87, 0x726f, 0x6f74, 0, 0, 0, 0, 1);
const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd87, 0x726f, 0x6f74, 0, 0, 0, 0, 2);

/// Decides the network.
pub(super) fn plan_net(
    spec: &ValidSpec,
    facts: &HostFacts,
    notes: &mut Vec<Note>,
) -> Result<NetPlan, PlanError> {
    match spec.net.mode {
        NetMode::None => Ok(NetPlan::None),
        NetMode::Host => Ok(NetPlan::Host),
        NetMode::Stack => {
            let [a, b, c] = free_network(&facts.networks_v4).ok_or(PlanError::NoFreeNetwork)?;
            if spec.net.dns.is_empty() && !facts.resolv.has_resolver {
                notes.push(Note::new(
                    "names are asked for at the host's 127.0.0.53 and 127.0.0.1",
                    "the host's /etc/resolv.conf names no resolver, or is not there; --dns names one",
                ));
            }
            let (guest, gateway) = (Ipv4Addr::new(a, b, c, 2), Ipv4Addr::new(a, b, c, 1));
            let is_own = |rule: &&Rule| {
                rule.is_within(guest.into(), PREFIX_V4) || rule.is_within(GUEST_V6.into(), PREFIX_V6)
            };
            if let Some(rule) = spec.net.allow.iter().find(is_own) {
                return Err(PlanError::RuleForOwnNetwork { rule: rule.to_string() });
            }
            if matches!(&spec.net.host_loopback, LoopbackSpec::Ports(ports) if ports.contains(&53)) {
                notes.push(Note {
                    weaker: true,
                    ..Note::new(
                        "port 53 of the gateway does not lead to the host's loopback",
                        "the sandbox's name server is there; on the host's other addresses the port is open",
                    )
                });
            }
            Ok(NetPlan::Stack(Box::new(StackPlan {
                dns: spec.net.dns.clone(),
                search: spec.net.dns_search.clone().unwrap_or_else(|| facts.resolv.search.clone()),
                ndots: facts.resolv.ndots,
                hosts: added_hosts(spec, Some(gateway)),
                tap: "tap0".into(),
                mtu: 1500,
                guest_v4: (guest, PREFIX_V4),
                gateway_v4: gateway,
                guest_v6: (GUEST_V6, PREFIX_V6),
                gateway_v6: GATEWAY_V6,
                publish: spec.net.publish.clone(),
                host_loopback: spec.net.host_loopback.clone(),
                allow: spec.net.allow.clone(),
                deny: spec.net.deny.clone(),
                rate_in: spec.net.rate_in,
                rate_out: spec.net.rate_out,
                control: spec.net.control.clone(),
            })))
        }
    }
}

/// `--add-host`, with the gateway for what stands for the host's loopback.
pub(super) fn added_hosts(spec: &ValidSpec, gateway: Option<Ipv4Addr>) -> Vec<(String, IpAddr)> {
    let gateway = gateway.map(IpAddr::from);
    spec.net.add_host.iter().filter_map(|host| Some((host.name.clone(), host.ip.or(gateway)?))).collect()
}

fn free_network(taken: &[(Ipv4Addr, u8)]) -> Option<[u8; 3]> {
    CANDIDATES.into_iter().find(|[a, b, c]| {
        let candidate = Ipv4Addr::new(*a, *b, *c, 0);
        !taken.iter().any(|(network, prefix)| overlap(candidate, PREFIX_V4, *network, *prefix))
    })
}

fn overlap(a: Ipv4Addr, a_prefix: u8, b: Ipv4Addr, b_prefix: u8) -> bool {
    let shift = 32 - u32::from(a_prefix.min(b_prefix).min(32));
    let network = |ip: Ipv4Addr| ip.to_bits().checked_shr(shift).unwrap_or(0);
    network(a) == network(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> (Ipv4Addr, u8) {
        let (ip, prefix) = text.split_once('/').unwrap();
        (ip.parse().unwrap(), prefix.parse().unwrap())
    }

    #[test]
    fn the_first_network_that_nothing_overlaps() {
        assert_eq!(free_network(&[]), Some([10, 87, 0]));
        assert_eq!(free_network(&[net("10.87.0.0/24")]), Some([10, 87, 1]));
        assert_eq!(free_network(&[net("10.87.0.77/32")]), Some([10, 87, 1]));
        assert_eq!(free_network(&[net("10.0.0.0/8")]), Some([172, 29, 87]));
        assert_eq!(free_network(&[net("10.0.0.0/8"), net("172.16.0.0/12")]), Some([192, 168, 187]));
        let private = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"].map(net);
        assert_eq!(free_network(&private), Some([198, 18, 87]));
        assert_eq!(free_network(&[net("0.0.0.0/1"), net("128.0.0.0/1")]), None);
    }

    #[test]
    fn overlap_is_symmetric() {
        let (a, b, c) = (net("10.1.0.0/16"), net("10.1.2.0/24"), net("10.2.0.0/16"));
        assert!(overlap(a.0, a.1, b.0, b.1) && overlap(b.0, b.1, a.0, a.1));
        assert!(!overlap(a.0, a.1, c.0, c.1));
        assert!(overlap(a.0, 0, c.0, 0));
    }
}
