//! ARP and neighbour discovery: who we are on the link, and, for guests that ask, how to use it.
//!
//! Most guests are configured by whoever made them, and need only Ethernet addresses of us. One that insists sends a
//! router solicitation (RFC 4861) and is told: the gateway as the default router, the subnet, the link's MTU, the resolver
//! (RFC 8106). If the guest's address is the one that its Ethernet address makes (RFC 4862), it may take it from there;
//! else it is told to ask DHCPv6 ([`dhcp`](crate::dhcp)), so that there never is a second one.
//!
//! Every message is answered by one at most, of a bounded size; nothing is remembered but that somebody has solicited:
//! since what a router says of itself holds for some hours, it is then repeated before ([`ROUTER_REFRESH`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::time::Instant;
use smoltcp::wire::{Icmpv6Message, Icmpv6Packet, NdiscRepr};

use crate::config::{ROUTER_LIFETIME, ROUTER_REFRESH, StackSpec};
use crate::device::{Offload, Tap};
use crate::emit;
use crate::flow::TimerKey;
use crate::ingress::{self, ICMPV6, Packet};
use crate::shared::Shared;

/// Every node of the link.
pub(crate) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Neighbour discovery is believed only with the greatest hop limit, which proves that the sender is on the link.
const HOPS: u8 = 255;

/// The address that `mac` makes in the /64 of `prefix` (RFC 4291, appendix A).
#[must_use]
pub fn slaac_address(prefix: Ipv6Addr, mac: [u8; 6]) -> Ipv6Addr {
    let [p0, p1, p2, p3, p4, p5, p6, p7, ..] = prefix.octets();
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([p0, p1, p2, p3, p4, p5, p6, p7, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// The gateway's link-local address.
pub(crate) fn link_local(tap: &Tap) -> Ipv6Addr {
    slaac_address(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), tap.gateway_mac())
}

/// An ARP request.
pub(crate) fn arp(sh: &mut Shared, source_mac: [u8; 6], source: Ipv4Addr, target: Ipv4Addr) {
    // A probe (RFC 5227) has no source: whether an address is free.
    let is_probe = source.is_unspecified();
    if sh.spec.is_ours(target.into()) && (is_probe || sh.is_guest(source.into())) {
        if !is_probe {
            sh.tap.learn_guest_mac(source_mac);
        }
        if !sh.tap.is_congested() {
            emit::arp_reply(&mut sh.tap, target, source_mac, source);
        }
    }
}

/// Neighbour discovery, from `mac` if that is known. MLD and what else there is mean nothing here.
pub(crate) fn neighbour(sh: &mut Shared, now: Instant, packet: &Packet<'_>, mac: Option<[u8; 6]>) {
    let (IpAddr::V6(src), Ok(icmp)) = (packet.src, Icmpv6Packet::new_checked(packet.payload())) else {
        return;
    };
    let is_wanted = matches!(icmp.msg_type(), Icmpv6Message::NeighborSolicit | Icmpv6Message::RouterSolicit);
    if !is_wanted
        || !sh.spec.ipv6
        || packet.hop_limit != HOPS
        || src.is_multicast()
        || !ingress::verify_checksum(packet)
        || sh.tap.is_congested()
    {
        return;
    }
    match NdiscRepr::parse(&icmp) {
        Ok(NdiscRepr::NeighborSolicit { target_addr, .. }) => {
            let is_ours = sh.spec.is_ours(target_addr.into()) || target_addr == link_local(&sh.tap);
            if !is_ours {
                return;
            }
            // Without a source it is a question whether the address is free (RFC 4862 section 5.4.3).
            if src.is_unspecified() {
                return emit::neighbour_advert(&mut sh.tap, target_addr, ALL_NODES);
            }
            if let Some(mac) = mac {
                sh.tap.learn_guest_mac(mac);
            }
            emit::neighbour_advert(&mut sh.tap, target_addr, src);
        }
        Ok(NdiscRepr::RouterSolicit { .. }) => {
            if let Some(mac) = mac {
                sh.tap.learn_guest_mac(mac);
            }
            let is_neighbour = src.is_unicast_link_local() || sh.is_guest(src.into());
            advertise_router(sh, now, if is_neighbour { src } else { ALL_NODES });
        }
        _ => {}
    }
}

/// Tells what the link is, and does so again before that is out of date.
pub(crate) fn advertise_router(sh: &mut Shared, now: Instant, to: Ipv6Addr) {
    sh.timers.set(now + ROUTER_REFRESH, TimerKey::Router);
    if sh.tap.is_congested() {
        return;
    }
    let message = router_advert(&sh.spec, sh.tap.gateway_mac());
    let from = link_local(&sh.tap);
    let packet = sh.tap.packet_mut(40 + message.len());
    ingress::write_ip_header(packet, from.into(), to.into(), ICMPV6, HOPS);
    packet[40..].copy_from_slice(&message);
    Icmpv6Packet::new_unchecked(&mut packet[40..]).fill_checksum(&from, &to);
    sh.tap.send_ip(40 + message.len(), Offload::NONE);
}

/// A router advertisement (RFC 4861 section 4.2), without its checksum.
fn router_advert(spec: &StackSpec, mac: [u8; 6]) -> Vec<u8> {
    const INFINITE: u32 = u32::MAX;
    const MANAGED: u8 = 0x80;
    const OTHER: u8 = 0x40;
    const ON_LINK: u8 = 0x80;
    const AUTONOMOUS: u8 = 0x40;
    let (guest, prefix_len) = spec.guest.v6;
    let own = prefix_len == 64 && slaac_address(guest, spec.guest.mac) == guest;
    let lifetime = u16::try_from(ROUTER_LIFETIME.secs()).unwrap_or(u16::MAX);
    // Type, code, checksum; hop limit, flags, lifetime; how long neighbours are reachable: unspecified.
    let flags = if own { OTHER } else { MANAGED | OTHER };
    let mut message = vec![134, 0, 0, 0, 64, flags];
    message.extend(lifetime.to_be_bytes());
    message.extend([0; 8]);
    // Source link-layer address.
    message.extend([1, 1]);
    message.extend(mac);
    // MTU.
    message.extend([5, 1, 0, 0]);
    message.extend(u32::from(spec.mtu).to_be_bytes());
    // Prefix information.
    let prefix = guest.to_bits() & u128::MAX.checked_shl(128 - u32::from(prefix_len.min(128))).unwrap_or(0);
    message.extend([3, 4, prefix_len, if own { ON_LINK | AUTONOMOUS } else { ON_LINK }]);
    message.extend(INFINITE.to_be_bytes());
    message.extend(INFINITE.to_be_bytes());
    message.extend([0; 4]);
    message.extend(prefix.to_be_bytes());
    // Recursive DNS server.
    if let Some(resolver) = spec.resolver_v6() {
        message.extend([25, 3, 0, 0]);
        message.extend(INFINITE.to_be_bytes());
        message.extend(resolver.octets());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DnsAt;

    #[test]
    fn an_ethernet_address_makes_an_address() {
        let made = slaac_address("fd00::77".parse().expect("address"), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert_eq!(made, "fd00::5054:ff:fe12:3456".parse::<Ipv6Addr>().expect("address"));
    }

    #[test]
    fn a_guest_is_offered_one_way_to_its_address() {
        let mut spec = crate::config::tests::spec();
        let flags = |spec: &StackSpec| {
            let message = router_advert(spec, spec.gateway.mac);
            assert_eq!(message.len() % 8, 0);
            (message[5], message[16 + 16 + 3], message.len())
        };
        // fd00::100: DHCPv6.
        assert_eq!(flags(&spec), (0xc0, 0x80, 88));
        spec.guest.v6.0 = slaac_address(spec.guest.v6.0, spec.guest.mac);
        spec.dns.at = DnsAt::Nowhere;
        assert_eq!(flags(&spec), (0x40, 0xc0, 64));
    }
}
