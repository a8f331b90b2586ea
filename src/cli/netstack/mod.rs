//! `rootlet netstack`, and the same program by the name `slirp4netns`.
//!
//! ```text
//!  program, in the host's namespaces     the stack's thread, and this loop: exit descriptor, API socket
//!   +- child, in the target's            `join`: makes the TAP, hands it over; where ports can be published it stays and
//!                                        makes sockets (`maker`), else it ends
//! ```

mod api;
mod confine;
mod join;
mod maker;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use netstack::{Capture, DnsAt, DnsSpec, HostLoopback, Link, PolicySpec, Published, Stack, StackSpec};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use self::api::Api;
use self::join::{Configure, Stay};
use self::maker::Inside;
use super::args::{NetnsType, NetstackArgs, Slirp4netns};
use super::output::Failure;
use crate::control::network::Network;
use crate::control::{Apart, ControlSocket};
use crate::error::errno_text;
use crate::log;
use crate::report::{NetworkLog, NetworkRecords};
use crate::spec::slirp::{
    self as spec, Addresses, DEFAULT_CIDR, DEFAULT_MTU, GATEWAY_MAC, GATEWAY_V6, OptionError, Outbound,
    PREFIX_V6, RESOLVER_V6, Target,
};
use crate::sys::process::{close_all_but, inherited_fd};

/// The other name of this command.
pub(super) const SLIRP4NETNS: &str = "slirp4netns";

/// The program by that name.
pub(super) fn main_by_name(Slirp4netns { netstack: args, .. }: Slirp4netns) -> Result<u8, Failure> {
    let inherited = Inherited::take(&args)?;
    log::init(None, None).map_err(|error| Failure::new(&error))?;
    netstack(&args, inherited)
}

/// The descriptors that the caller gave us.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    exit: Option<OwnedFd>,
    ready: Option<OwnedFd>,
}

impl Inherited {
    /// Takes those that the options name and closes the others, which would stay open as long as the network. Before
    /// anything is opened here.
    pub(super) fn take(args: &NetstackArgs) -> Result<Self, Failure> {
        let take = |option: &str, number: Option<i32>| {
            number.map(|number| {
                if (0..=2).contains(&number) {
                    // Taken and closed, the next file that is opened would be the one that messages go to.
                    let text = format!("{option}: {number} is a standard stream");
                    return Err(Failure::text(text).code(super::WRONG_USAGE));
                }
                inherited_fd(number).map_err(|errno| {
                    let text = format!("{option}: {number} is not open");
                    Failure::text(text).cause(errno_text(errno)).code(super::WRONG_USAGE)
                })
            })
        };
        if args.exit_fd.is_some() && args.exit_fd == args.ready_fd {
            return Err(Failure::text("--exit-fd and --ready-fd must differ").code(super::WRONG_USAGE));
        }
        let exit = take("--exit-fd", args.exit_fd).transpose()?;
        let ready = take("--ready-fd", args.ready_fd).transpose()?;
        let keep: Vec<_> = exit.iter().chain(&ready).map(OwnedFd::as_fd).collect();
        // Without the system call (before Linux 5.9) they stay open.
        close_all_but(&keep).ok();
        Ok(Self { exit, ready })
    }
}

/// What the options say.
struct Wanted {
    target: Target,
    tap: String,
    mtu: u16,
    addresses: Addresses,
    mac: Option<[u8; 6]>,
    outbound: netstack::Outbound,
    rates: netstack::Rates,
}

fn wanted(args: &NetstackArgs) -> Result<Wanted, Failure> {
    match args.target_type.as_str() {
        "netns" => {}
        "bess" => {
            return Err(Failure::text("--target-type=bess is not supported")
                .cause("its frames come over a unix socket; this stack wants a TAP device")
                .code(super::WRONG_USAGE));
        }
        other => {
            let text = format!("--target-type: {other:?}: the type is netns");
            return Err(Failure::text(text).code(super::WRONG_USAGE));
        }
    }
    let usage = |error: OptionError| Failure::new(&error).code(super::WRONG_USAGE);
    let is_path = args.netns_type == NetnsType::Path;
    let mtu = args.mtu.as_deref().map_or(Ok(DEFAULT_MTU), |text| spec::mtu(text, args.enable_ipv6));
    let outbound = |option, text: &Option<String>, ipv6| {
        text.as_deref().map(|text| spec::outbound(option, text, ipv6)).transpose().map_err(usage)
    };
    let v4 = outbound("--outbound-addr", &args.outbound_addr, false)?;
    let v6 = outbound("--outbound-addr6", &args.outbound_addr6, true)?;
    Ok(Wanted {
        target: spec::target(&args.target, is_path, args.userns_path.clone()).map_err(usage)?,
        tap: spec::tap_name("TAPNAME", &args.tap).map_err(usage)?,
        mtu: mtu.map_err(usage)?,
        addresses: spec::cidr(args.cidr.as_deref().unwrap_or(DEFAULT_CIDR)).map_err(usage)?,
        mac: args.macaddress.as_deref().map(spec::mac).transpose().map_err(usage)?,
        outbound: netstack::Outbound {
            v4: v4.map(|from| resolve_outbound(&from, false)).transpose()?.and_then(|ip| match ip {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(_) => None,
            }),
            v6: v6.map(|from| resolve_outbound(&from, true)).transpose()?.and_then(|ip| match ip {
                IpAddr::V6(ip) => Some(ip),
                IpAddr::V4(_) => None,
            }),
        },
        rates: rates(&args.network_rate)?,
    })
}

fn rates(texts: &[String]) -> Result<netstack::Rates, Failure> {
    let rates = crate::spec::parse::network_rates(texts)
        .map_err(|error| Failure::new(&error).code(super::WRONG_USAGE))?;
    let [received, sent] = rates.map(|rate| rate.map(netstack::Rate::from));
    Ok(netstack::Rates { sent, received })
}

/// The address that is meant, which must be one of the host's.
fn resolve_outbound(from: &Outbound, ipv6: bool) -> Result<IpAddr, Failure> {
    let ip = match from {
        Outbound::Address(ip) => *ip,
        Outbound::Interface(name) => address_of(name, ipv6).ok_or_else(|| {
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            Failure::text(format!("the interface {name} has no {family} address"))
        })?,
    };
    std::net::UdpSocket::bind((ip, 0)).map_err(|error| {
        let cause = crate::error::errno_of(&error).map_or_else(|| error.to_string(), errno_text);
        Failure::text(format!("cannot use the outbound address {ip}")).cause(cause)
    })?;
    Ok(ip)
}

fn address_of(interface: &str, ipv6: bool) -> Option<IpAddr> {
    let all = nix::ifaddrs::getifaddrs().ok()?;
    all.filter(|found| found.interface_name == interface).find_map(|found| {
        let address = found.address?;
        match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) if !ipv6 => Some(v4.ip().into()),
            (_, Some(v6)) if ipv6 && !v6.ip().is_unicast_link_local() => Some(v6.ip().into()),
            _ => None,
        }
    })
}

/// An Ethernet address that nobody has (locally administered).
fn random_mac() -> [u8; 6] {
    use std::hash::{BuildHasher as _, Hasher as _};
    // Its keys are random.
    let [a, b, c, d, e, ..] = std::hash::RandomState::new().build_hasher().finish().to_ne_bytes();
    [0x02, a, b, c, d, e]
}

/// Gives the target a network, until the exit descriptor says so or the interface is gone.
pub(super) fn netstack(args: &NetstackArgs, inherited: Inherited) -> Result<u8, Failure> {
    let wanted = wanted(args)?;
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // The limit that was is enough, too.
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).ok();
    }
    let addresses = wanted.addresses;
    let api = args.api_socket.as_deref().map(|path| Api::bind(path, addresses.guest)).transpose()?;
    let records = NetworkRecords::open(args.network_log.as_deref(), args.network_capture.as_deref())
        .map_err(|error| Failure::new(&error))?;
    let control = args.network_control.as_deref().map(bind_control).transpose()?;
    let configure = args.configure.then(|| Configure {
        mac: wanted.mac.unwrap_or_else(random_mac),
        mtu: wanted.mtu,
        address: addresses.guest,
        prefix: addresses.prefix,
        gateway: addresses.gateway,
        ipv6: args.enable_ipv6,
    });
    // Without commands no port is ever published, and a capture is to have every packet.
    let joins = (api.is_some() || control.is_some()) && records.capture.is_none();
    let stay = joins.then_some(Stay { sandbox: args.enable_sandbox });
    let join::Joined { tap, mac, inside } = join::join(&wanted.target, &wanted.tap, configure, stay)?;
    // What can still fail is no matter of the target, and happens where the capture cannot be removed, perhaps.
    if let Some(made) = records.made {
        made.keep();
    }
    if args.enable_sandbox {
        confine::enter_sandbox()?;
    }
    if args.enable_seccomp {
        confine::limit_system_calls()?;
    }
    let failed = |error: netstack::Error| Failure::new(&error);
    let none = Published::bind(&[]).map_err(failed)?;
    let (published, _maker) = match inside {
        Some(Inside { sockets, maker }) => (none.through(sockets), Some(maker)),
        None => (none, None),
    };
    let capture =
        records.capture.map(Capture::replace).transpose().map_err(|source| {
            failed(netstack::Error::Start { what: "the capture of the network", source })
        })?;
    let mut spec = stack_spec(args, &wanted, mac);
    spec.flow_log = records.log.map(NetworkLog::flow_log);
    spec.capture.clone_from(&capture);
    let stack = Stack::start(tap, &spec, published).map_err(failed)?;
    // The log's last line is written when nobody has it any more.
    drop(spec);
    // Until the end of this function, and its file with it.
    let _control = control
        .map(|socket| socket.serve(Network(stack.control().clone())))
        .transpose()
        .map_err(|error| Failure::text("cannot serve the control socket").cause(error.to_string()))?;
    if let Some(ready) = inherited.ready {
        std::fs::File::from(ready).write_all(b"1").map_err(|error| {
            Failure::text("cannot write to the ready descriptor").cause(error.to_string())
        })?;
    }
    let served = serve(&stack, api, inherited.exit.as_ref());
    stack.stop();
    if let Some(capture) = capture {
        crate::report::finish_capture(&capture);
    }
    served
}

fn bind_control(path: &Path) -> Result<ControlSocket, Failure> {
    let path = std::path::absolute(path)
        .map_err(|error| Failure::text("the path of the control socket").cause(error.to_string()))?;
    ControlSocket::bind(&path, Apart::UserOrNetwork).map_err(|error| Failure::new(&error))
}

fn stack_spec(args: &NetstackArgs, wanted: &Wanted, mac: [u8; 6]) -> StackSpec {
    let Addresses { guest, gateway, resolver, prefix } = wanted.addresses;
    let v4 = |ip: Ipv4Addr| (ip, prefix);
    let v6 = |ip: Ipv6Addr| (ip, PREFIX_V6.1);
    StackSpec {
        mtu: wanted.mtu,
        guest: Link { mac, v4: v4(guest), v6: v6(netstack::slaac_address(PREFIX_V6.0, mac)) },
        gateway: Link { mac: GATEWAY_MAC, v4: v4(gateway), v6: v6(GATEWAY_V6) },
        ipv6: args.enable_ipv6,
        dns: DnsSpec {
            at: if args.disable_dns { DnsAt::Nowhere } else { DnsAt::Addresses(resolver, RESOLVER_V6) },
            ..DnsSpec::default()
        },
        policy: PolicySpec {
            host_loopback: if args.disable_host_loopback { HostLoopback::Refused } else { HostLoopback::All },
            ..PolicySpec::default()
        },
        outbound: wanted.outbound,
        flow_log: None,
        capture: None,
        rates: wanted.rates,
    }
}

/// Waits for the end, and obeys the API socket.
fn serve(stack: &Stack, mut api: Option<Api>, exit: Option<&OwnedFd>) -> Result<u8, Failure> {
    loop {
        let any = PollFlags::POLLIN | PollFlags::POLLPRI;
        let mut fds = vec![PollFd::new(stack.end_event(), PollFlags::empty())];
        fds.extend(exit.map(|exit| PollFd::new(exit.as_fd(), any)));
        let ends = fds.len();
        fds.extend(api.iter().flat_map(Api::fds).map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let patience = api.as_ref().and_then(Api::patience).and_then(|left| PollTimeout::try_from(left).ok());
        match poll(&mut fds, patience.unwrap_or(PollTimeout::NONE)) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(Failure::text("cannot wait for events").cause(errno_text(errno))),
        }
        // What a closed exit descriptor has to say counts as well.
        if fds.iter().take(ends).any(|fd| fd.revents().is_some_and(|events| !events.is_empty())) {
            return match stack.has_failed() {
                true => {
                    Err(Failure::text("the network stack has failed: the namespace has no network any more"))
                }
                false => Ok(0),
            };
        }
        drop(fds);
        if let Some(api) = &mut api {
            api.serve(stack.control());
        }
    }
}
