//! The guest's end of the link, made in its namespaces.
//!
//! Who has joined another user namespace cannot come back, so a child does it and hands the TAP's descriptor over:
//!
//! child -> program : `Made { mac, stays }` with the descriptor, or `Failed { what, errno }`. Then the child ends, unless it
//! is to make sockets there ([`super::maker`]); by then it has given up all that it does not need for that. It logs nothing
//! itself: the log's file is closed there, and its number may be another file's.
//!
//! Of what the program had open when it made the child, the child closes everything before anything else: whoever waits
//! for the end of one of these descriptors (`--ready-fd`, `--exit-fd`) waits for the program alone.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use netstack::SocketMaker;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use rustix::fs::{CWD, Mode, OFlags, openat};
use serde::{Deserialize, Serialize};

use super::maker::{self, Inside, Maker};
use crate::cli::output::Failure;
use crate::error::{errno_of, errno_text};
use crate::spec::slirp::{GATEWAY_V6, Network, PREFIX_V6, Target};
use crate::sys;

/// How to bring the interface up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Configure {
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    pub(super) address: Ipv4Addr,
    pub(super) prefix: u8,
    pub(super) gateway: Ipv4Addr,
    pub(super) ipv6: bool,
}

#[derive(Debug, Serialize, Deserialize)]
enum Message {
    Made { mac: [u8; 6], stays: Stays },
    Failed { what: String, errno: i32 },
}

/// Whether the child stays.
#[derive(Debug, Serialize, Deserialize)]
enum Stays {
    Yes,
    No,
    /// It could not give up what it was to.
    Failed {
        what: String,
        cause: String,
    },
}

/// A step that failed, and the errno, `UnknownErrno` if the kernel did not say no.
struct Step(String, Errno);

fn step(what: impl Into<String>) -> impl FnOnce(Errno) -> Step {
    let what = what.into();
    move |errno| Step(what, errno)
}

fn rustix_step(what: String) -> impl FnOnce(rustix::io::Errno) -> Step {
    move |errno| Step(what, Errno::from_raw(errno.raw_os_error()))
}

fn io_step(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Step {
    let what = what.into();
    move |error| Step(what, errno_of(&error).unwrap_or(Errno::EINVAL))
}

/// The link, as the program sees it.
pub(super) struct Joined {
    pub(super) tap: OwnedFd,
    /// The Ethernet address of its other end.
    pub(super) mac: [u8; 6],
    /// Sockets there.
    pub(super) inside: Option<Inside>,
}

/// What a child that stays in the target is to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stay {
    /// It leaves the host's files.
    pub(super) sandbox: bool,
}

/// Makes the TAP `tap` in the target, and has sockets made there, if `stay` says so.
pub(super) fn join(
    target: &Target,
    tap: &str,
    configure: Option<Configure>,
    stay: Option<Stay>,
) -> Result<Joined, Failure> {
    let internal = |errno: Errno| Failure::text("cannot make the network interface").cause(errno_text(errno));
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(internal)?;
    let pair = stay.map(|_| netstack::inside_sockets()).transpose();
    let (sockets, socket_maker) =
        pair.map_err(|error| internal(errno_of(&error).unwrap_or(Errno::EINVAL)))?.unzip();
    // A caller may have it ignored, and then nobody could be waited for.
    sys::process::default_signal(nix::sys::signal::Signal::SIGCHLD).map_err(internal)?;
    let Some(child) = sys::process::fork().map_err(internal)? else {
        let own = socket_maker.iter().map(SocketMaker::as_fd).chain([theirs.as_fd()]);
        let closed = sys::process::close_all_but(&own.collect::<Vec<_>>());
        let (message, tap) = match keep_debuggers_away().and_then(|()| in_target(target, tap, configure)) {
            Ok((tap, mac)) => {
                let stays = match (stay, closed) {
                    (Some(Stay { sandbox }), Ok(())) => give_up(sandbox),
                    // Who cannot close what is not his own does not stay (before Linux 5.9).
                    _ => Stays::No,
                };
                (Message::Made { mac, stays }, Some(tap))
            }
            Err(Step(what, errno)) => (Message::Failed { what, errno: errno as i32 }, None),
        };
        let bytes = serde_json::to_vec(&message).unwrap_or_default();
        // Without it the program sees that we are gone.
        let sent = sys::fdpass::send(theirs.as_fd(), &bytes, tap.as_ref().map(OwnedFd::as_fd));
        drop((theirs, tap));
        if let (Some(socket_maker), true, Message::Made { stays: Stays::Yes, .. }) =
            (&socket_maker, sent.is_ok(), &message)
        {
            maker::make_sockets(socket_maker);
        }
        sys::process::exit_now(i32::from(sent.is_err()));
    };
    // From here on it is waited for, whatever happens.
    let child = Maker(child);
    drop((theirs, socket_maker));
    let mut buffer = [0; 1024];
    let (length, tap) = sys::fdpass::receive(ours.as_fd(), &mut buffer)
        .map_err(|errno| internal(Errno::from_raw(errno.raw_os_error())))?;
    let message = serde_json::from_slice(buffer.get(..length).unwrap_or_default());
    match (message, tap) {
        (Ok(Message::Made { mac, stays }), Some(tap)) => {
            let inside = match stays {
                Stays::Yes => sockets.map(|sockets| Inside { sockets, maker: child }),
                Stays::No => None,
                Stays::Failed { what, cause } => {
                    tracing::warn!(
                        reason = what,
                        cause,
                        "connections from the loopback will cross the interface"
                    );
                    None
                }
            };
            Ok(Joined { tap, mac, inside })
        }
        (Ok(Message::Failed { what, errno }), _) => Err(match Errno::from_raw(errno) {
            Errno::UnknownErrno => Failure::text(what),
            errno => Failure::text(what).cause(errno_text(errno)).hint(hint(errno)),
        }),
        _ => Err(Failure::text("the process that was to make the network interface has ended")),
    }
}

fn hint(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::EPERM | Errno::EACCES => Some(
            "the namespaces must be the caller's own (`unshare -Urn`), and /dev/net/tun must be open to him: \
             `rootlet doctor`",
        ),
        Errno::EBUSY => Some("an interface of this name is in use there"),
        _ => None,
    }
}

/// In the child that is to stay.
fn give_up(sandbox: bool) -> Stays {
    match maker::give_up(sandbox) {
        Ok(()) => Stays::Yes,
        Err(Failure { text, causes, .. }) => Stays::Failed { what: text, cause: causes.join(": ") },
    }
}

/// In the child, before it joins: whoever is privileged in the target could trace it there, and so get at the
/// host's files and at what the program has open.
fn keep_debuggers_away() -> Result<(), Step> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|errno| Step("cannot keep debuggers away".to_owned(), Errno::from_raw(errno.raw_os_error())))
}

/// In the child.
fn in_target(target: &Target, tap: &str, configure: Option<Configure>) -> Result<(OwnedFd, [u8; 6]), Step> {
    // Both before either is joined: afterwards the paths are another user's to open.
    let (network, user) = open_namespaces(target)?;
    if is_own(&network, "net") {
        // Root's own would get the interface, its address and a default route.
        return Err(Step("the network namespace is this program's own".to_owned(), Errno::UnknownErrno));
    }
    let join = |namespace: BorrowedFd<'_>, kind, what: &str| {
        setns(namespace, kind).map_err(step(format!("cannot join the {what} namespace")))
    };
    match &user {
        Some(user) if is_own(user, "user") => {}
        Some(user) => join(user.as_fd(), CloneFlags::CLONE_NEWUSER, "user")?,
        // Who may join it already need not, and must not, change: Podman calls from inside.
        None => {
            if setns(&network, CloneFlags::CLONE_NEWNET).is_err() {
                let owner = sys::process::owner_of_namespace(network.as_fd())
                    .map_err(step("cannot find the user namespace of the network namespace"))?;
                join(owner.as_fd(), CloneFlags::CLONE_NEWUSER, "user")?;
            }
        }
    }
    join(network.as_fd(), CloneFlags::CLONE_NEWNET, "network")?;
    let fd = netstack::open_tap(tap).map_err(io_step(format!("cannot make the interface {tap}")))?;
    if let Some(configure) = configure {
        bring_up(tap, configure)?;
    }
    let mac = mac_of(tap).ok_or_else(|| Step(format!("{tap} has no Ethernet address"), Errno::ENODEV))?;
    Ok((fd, mac))
}

/// The target's network namespace, and its user namespace if that is known.
fn open_namespaces(target: &Target) -> Result<(File, Option<File>), Step> {
    let open = |path: &Path| {
        File::open(path).map_err(io_step(format!("cannot open the namespace {}", path.display())))
    };
    let user = target.user.as_deref().map(open).transpose()?;
    let pid = match &target.network {
        Network::Path(path) => return Ok((open(path)?, user)),
        Network::Process(pid) => pid,
    };
    // One directory for both: if the process ends, its number may be another one's at any time.
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    let process = openat(CWD, format!("/proc/{pid}"), flags, Mode::empty())
        .map_err(rustix_step(format!("there is no process {pid}")))?;
    let of = |name: &str| {
        let what = format!("cannot open the namespace {name} of process {pid}");
        openat(&process, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map(File::from)
            .map_err(rustix_step(what))
    };
    let network = of("ns/net")?;
    Ok((network, Some(user.map_or_else(|| of("ns/user"), Ok)?)))
}

/// Whether this process is in the namespace, of this kind.
fn is_own(namespace: &File, kind: &str) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let id = |file: std::io::Result<std::fs::Metadata>| file.ok().map(|m| (m.dev(), m.ino()));
    let own = id(std::fs::metadata(format!("/proc/self/ns/{kind}")));
    own.is_some() && id(namespace.metadata()) == own
}

fn mac_of(tap: &str) -> Option<[u8; 6]> {
    nix::ifaddrs::getifaddrs()
        .ok()?
        .filter(|interface| interface.interface_name == tap)
        .find_map(|interface| interface.address.as_ref()?.as_link_addr()?.addr())
}

fn bring_up(tap: &str, configure: Configure) -> Result<(), Step> {
    let during = |object: &str| step(format!("cannot configure {tap} ({object})"));
    let route = sys::netlink::Route::open().map_err(during("routing socket"))?;
    route.set_up(1, None, None).map_err(step("cannot bring up lo"))?;
    let index = nix::net::if_::if_nametoindex(tap).map_err(during("index"))?;
    if configure.ipv6 {
        // Everything is said here, and nobody else is on the link. Where /proc/sys is read-only it takes a
        // moment longer until IPv6 can be used.
        for setting in ["accept_ra", "accept_dad"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{tap}/{setting}"), "0").ok();
        }
    }
    route.set_up(index, Some(configure.mac), Some(configure.mtu)).map_err(during("link"))?;
    let v4 = (IpAddr::V4(configure.address), configure.prefix, IpAddr::V4(configure.gateway));
    let own = netstack::slaac_address(PREFIX_V6.0, configure.mac);
    let v6 = (IpAddr::V6(own), PREFIX_V6.1, IpAddr::V6(GATEWAY_V6));
    for (address, prefix, gateway) in std::iter::once(v4).chain(configure.ipv6.then_some(v6)) {
        route.add_address(index, address, prefix).map_err(during("address"))?;
        route.add_default_route(index, gateway).map_err(during("default route"))?;
    }
    Ok(())
}
