//! What `rootlet netstack` (and `slirp4netns`) is asked for: the options as text, checked. Nothing here looks at the host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

/// An option whose value cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {value:?}: {reason}")]
pub struct OptionError {
    /// The option.
    pub option: &'static str,
    /// What was given.
    pub value: String,
    /// Why it cannot be used.
    pub reason: String,
}

fn refused(option: &'static str, value: &str, reason: impl Into<String>) -> OptionError {
    OptionError { option, value: value.to_owned(), reason: reason.into() }
}

/// The MTU where none is given.
pub const DEFAULT_MTU: u16 = 1500;
/// What slirp4netns takes at most; an IPv4 packet and an Ethernet header of this length have 65,535 bytes.
pub const MAX_MTU: u16 = 65_521;
/// IPv6 asks for this from every link (RFC 8200 section 5).
pub const MIN_MTU_V6: u16 = 1280;
/// IPv4 does for this (RFC 791), but no program expects less than 576 to work.
pub const MIN_MTU: u16 = 576;

/// Checks an MTU.
///
/// # Errors
/// A number that is none, or too small or too great.
pub fn mtu(text: &str, ipv6: bool) -> Result<u16, OptionError> {
    let least = if ipv6 { MIN_MTU_V6 } else { MIN_MTU };
    match text.parse() {
        // As slirp4netns has it.
        Ok(0) => Ok(DEFAULT_MTU),
        Ok(mtu) if (least..=MAX_MTU).contains(&mtu) => Ok(mtu),
        _ => Err(refused("--mtu", text, format!("an MTU is a number from {least} to {MAX_MTU}"))),
    }
}

/// The IPv4 addresses of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The guest: the network's address + 100.
    pub guest: Ipv4Addr,
    /// The gateway, which stands for the host: + 2.
    pub gateway: Ipv4Addr,
    /// The resolver: + 3.
    pub resolver: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix: u8,
}

/// The network where none is given.
pub const DEFAULT_CIDR: &str = "10.0.2.0/24";
/// The IPv6 network.
pub const PREFIX_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0), 64);
/// The gateway's IPv6 address.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
/// The resolver's IPv6 address.
pub const RESOLVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3);
/// The host's Ethernet address on the link. It is the stack's alone, so the same in every guest.
pub const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02];

/// Checks a network such as 10.0.2.0/24.
///
/// # Errors
/// No IPv4 network; one that has no room for an address + 100.
pub fn cidr(text: &str) -> Result<Addresses, OptionError> {
    let bad = |reason: &str| refused("--cidr", text, reason);
    let (address, prefix) = text.split_once('/').ok_or_else(|| bad("a network is ADDRESS/LENGTH"))?;
    let address: Ipv4Addr = address.parse().map_err(|_| bad("that is no IPv4 address"))?;
    let prefix: u8 = prefix.parse().map_err(|_| bad("that is no length of a prefix"))?;
    if !(8..=25).contains(&prefix) {
        return Err(bad("the length must be 8 to 25"));
    }
    let network = address.to_bits();
    if network & (u32::MAX >> prefix) != 0 {
        return Err(bad("the address has bits set behind the prefix"));
    }
    if address.is_loopback() || address.is_multicast() || address.is_link_local() || address.octets()[0] == 0
    {
        return Err(bad("this network has a meaning of its own"));
    }
    let at = |offset: u32| Ipv4Addr::from_bits(network + offset);
    Ok(Addresses { guest: at(100), gateway: at(2), resolver: at(3), prefix })
}

/// Checks an Ethernet address.
///
/// # Errors
/// None, or that of a group.
pub fn mac(text: &str) -> Result<[u8; 6], OptionError> {
    let bad = |reason: &str| refused("--macaddress", text, reason);
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
        *byte = part
            .and_then(|part| u8::from_str_radix(part, 16).ok())
            .ok_or_else(|| bad("an Ethernet address is six bytes, as in 52:54:00:12:34:56"))?;
    }
    if parts.next().is_some() {
        return Err(bad("an Ethernet address is six bytes, as in 52:54:00:12:34:56"));
    }
    if mac[0] & 1 != 0 {
        return Err(bad("the last bit of the first byte is set: that is the address of a group"));
    }
    if mac == [0; 6] || mac == GATEWAY_MAC {
        return Err(bad("nobody else may have this address"));
    }
    Ok(mac)
}

/// Where flows leave the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outbound {
    /// From this address.
    Address(IpAddr),
    /// From the address of this interface.
    Interface(String),
}

/// Checks an outbound address of one family, or the name of an interface.
///
/// # Errors
/// An address of the other family, or one that is nobody's.
pub fn outbound(option: &'static str, text: &str, ipv6: bool) -> Result<Outbound, OptionError> {
    match text.parse::<IpAddr>() {
        Ok(ip) if ip.is_ipv6() != ipv6 => {
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            Err(refused(option, text, format!("that is no {family} address")))
        }
        Ok(ip) if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() => {
            Err(refused(option, text, "nothing beyond the host can be reached from this address"))
        }
        Ok(ip) => Ok(Outbound::Address(ip)),
        Err(_) => tap_name(option, text).map(Outbound::Interface),
    }
}

/// Checks the name of an interface.
///
/// # Errors
/// What the kernel would not take.
pub fn tap_name(option: &'static str, text: &str) -> Result<String, OptionError> {
    let odd = |b: u8| b == b'/' || b == b':' || b == b'%' || b.is_ascii_whitespace() || b.is_ascii_control();
    if text.is_empty() || text.len() > 15 || text == "." || text == ".." || text.bytes().any(odd) {
        return Err(refused(option, text, "that is no name of an interface"));
    }
    Ok(text.to_owned())
}

/// Which namespaces the guest's end is made in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The network namespace.
    pub network: Network,
    /// The user namespace that it belongs to; `None`: that of the process, or it is asked of the kernel.
    pub user: Option<PathBuf>,
}

/// Where the network namespace is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// It is that of this process.
    Process(i32),
    /// It is here.
    Path(PathBuf),
}

/// Checks the target: a process id, or a path.
///
/// # Errors
/// No process id where one is wanted.
pub fn target(text: &str, is_path: bool, user: Option<PathBuf>) -> Result<Target, OptionError> {
    if is_path {
        return Ok(Target { network: Network::Path(text.into()), user });
    }
    match text.parse::<i32>() {
        Ok(pid) if pid > 0 => Ok(Target { network: Network::Process(pid), user }),
        _ => Err(refused("PID", text, "that is no process id (a path wants --netns-type=path)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_follow_from_the_network() {
        let default = cidr(DEFAULT_CIDR).unwrap();
        assert_eq!(default.guest, Ipv4Addr::new(10, 0, 2, 100));
        assert_eq!(default.gateway, Ipv4Addr::new(10, 0, 2, 2));
        assert_eq!(default.resolver, Ipv4Addr::new(10, 0, 2, 3));
        assert_eq!(cidr("172.20.128.0/17").unwrap().guest, Ipv4Addr::new(172, 20, 128, 100));
        for bad in [
            "10.0.2.0",
            "10.0.2.1/24",
            "10.0.2.0/26",
            "10.0.2.0/7",
            "fd00::/64",
            "127.0.0.0/8",
            "x/24",
            "10.0.2.0/x",
        ] {
            assert!(cidr(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_mtu_has_bounds() {
        assert_eq!(mtu("65520", false), Ok(65_520));
        assert_eq!(mtu("0", true), Ok(1500));
        assert_eq!(mtu("576", false), Ok(576));
        for (bad, ipv6) in [("65522", false), ("575", false), ("1279", true), ("-1", false), ("x", false)] {
            assert!(mtu(bad, ipv6).is_err(), "{bad}");
        }
    }

    #[test]
    fn ethernet_addresses_are_one_guests() {
        assert_eq!(mac("52:54:00:Ab:cd:01"), Ok([0x52, 0x54, 0, 0xab, 0xcd, 1]));
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:01:02",
            "5:54:00:ab:cd:01",
            "+1:54:00:ab:cd:01",
            "53:54:00:ab:cd:01",
            "52:55:0a:00:02:02",
            "00:00:00:00:00:00",
        ] {
            assert!(mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn outbound_addresses_are_of_their_family() {
        assert_eq!(
            outbound("--outbound-addr", "192.0.2.1", false),
            Ok(Outbound::Address([192, 0, 2, 1].into()))
        );
        assert_eq!(outbound("--outbound-addr", "eth0", false), Ok(Outbound::Interface("eth0".to_owned())));
        assert!(outbound("--outbound-addr", "fd00::1", false).is_err());
        assert!(outbound("--outbound-addr6", "192.0.2.1", true).is_err());
        assert!(outbound("--outbound-addr", "127.0.0.1", false).is_err());
        assert!(outbound("--outbound-addr", "", false).is_err());
        assert!(outbound("--outbound-addr", "a b", false).is_err());
    }

    #[test]
    fn a_target_is_a_process_or_a_path() {
        let process = target("12", false, None).unwrap();
        assert_eq!(process, Target { network: Network::Process(12), user: None });
        assert_eq!(target("/run/ns", true, None).unwrap().network, Network::Path("/run/ns".into()));
        assert!(target("/run/ns", false, None).is_err() && target("0", false, None).is_err());
    }
}
