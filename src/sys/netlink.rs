//! The few rtnetlink(7) messages that bring up a network namespace. All safe: messages
//! are built as bytes.

use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

const NLM_F_REQUEST: u16 = 0x01;
const NLM_F_ACK: u16 = 0x04;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 0x02;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// A routing socket of the calling thread's network namespace.
#[derive(Debug)]
pub(crate) struct Route(OwnedFd);

impl Route {
    /// Opens it.
    ///
    /// # Errors
    /// As socket(2).
    pub(crate) fn open() -> Result<Self, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC;
        socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute).map(Self)
    }

    /// Sets the interface up, with this hardware address and MTU if given.
    ///
    /// # Errors
    /// As the kernel answers.
    pub(crate) fn set_up(&self, index: u32, mac: Option<[u8; 6]>, mtu: Option<u16>) -> Result<(), Errno> {
        // struct ifinfomsg: family, pad, type, index, flags, change
        let mut body = vec![0, 0, 0, 0];
        body.extend(index.to_ne_bytes());
        body.extend(libc::IFF_UP.cast_unsigned().to_ne_bytes());
        body.extend(libc::IFF_UP.cast_unsigned().to_ne_bytes());
        if let Some(mac) = mac {
            push_attribute(&mut body, IFLA_ADDRESS, &mac);
        }
        if let Some(mtu) = mtu {
            push_attribute(&mut body, IFLA_MTU, &u32::from(mtu).to_ne_bytes());
        }
        self.request(RTM_NEWLINK, 0, &body)
    }

    /// Adds an address, without duplicate address detection.
    ///
    /// # Errors
    /// As the kernel answers.
    pub(crate) fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> Result<(), Errno> {
        // struct ifaddrmsg: family, prefixlen, flags, scope, index
        let mut body = vec![family(address), prefix, IFA_F_NODAD, 0];
        body.extend(index.to_ne_bytes());
        push_attribute(&mut body, IFA_LOCAL, &octets(address));
        push_attribute(&mut body, IFA_ADDRESS, &octets(address));
        self.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &body)
    }

    /// Adds the default route through `gateway`.
    ///
    /// # Errors
    /// As the kernel answers.
    pub(crate) fn add_default_route(&self, index: u32, gateway: IpAddr) -> Result<(), Errno> {
        // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
        let mut body = vec![family(gateway), 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0, 0, 0, 0];
        push_attribute(&mut body, RTA_GATEWAY, &octets(gateway));
        push_attribute(&mut body, RTA_OIF, &index.to_ne_bytes());
        self.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &body)
    }

    fn request(&self, kind: u16, flags: u16, body: &[u8]) -> Result<(), Errno> {
        let length = u32::try_from(16 + body.len()).map_err(|_| Errno::EMSGSIZE)?;
        // struct nlmsghdr: length, type, flags, sequence, port
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut reply = [0; 512];
        let length = recv(self.0.as_raw_fd(), &mut reply, MsgFlags::empty())?;
        // An acknowledgement is an NLMSG_ERROR with errno 0 after the header.
        let reply = reply.get(..length).unwrap_or_default();
        let kind = reply.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
        let error = reply.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
        match (kind, error) {
            (Some(NLMSG_ERROR), Some(0)) => Ok(()),
            (Some(NLMSG_ERROR), Some(error)) => Err(Errno::from_raw(-error)),
            _ => Err(Errno::EPROTO),
        }
    }
}

fn push_attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // The values are addresses and integers of at most 16 bytes.
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(family).unwrap_or_default()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_to_four_bytes() {
        let mut message = Vec::new();
        push_attribute(&mut message, IFLA_ADDRESS, &[1, 2, 3, 4, 5, 6]);
        assert_eq!(message.len(), 12);
        assert_eq!(message[..2], 10u16.to_ne_bytes());
    }

    #[test]
    fn an_unknown_interface_is_refused_by_the_kernel() {
        let route = Route::open().expect("a routing socket needs no privilege");
        let refused = route.set_up(0x7fff_fffe, None, None);
        assert!(matches!(refused, Err(Errno::ENODEV | Errno::EPERM)), "{refused:?}");
    }
}
