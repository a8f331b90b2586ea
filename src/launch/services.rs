//! What the supervisor serves: the overlay and the network.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};

use fsoverlay::Overlay;
use netstack::{
    Capture, DnsSpec, Link, Outbound, PolicySpec, Protocol, Publish, Published, Rate, Rates, SocketMaker,
    Stack, StackSpec,
};

use super::LaunchError;
use crate::control::network::Network;
use crate::control::{Apart, ControlSocket, Served};
use crate::plan::{NetPlan, Plan, StackPlan};
use crate::report::{MadeFile, NetworkLog, NetworkRecords, PublishedPort, finish_capture};

/// Threads that serve the overlay. At least two, because a request that waits for the disk must not
/// hold up the others; each costs start-up time, and more than four serve no faster.
fn overlay_workers() -> usize {
    std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4))
}

/// The overlay and the network stack, from prepared to ended.
pub(crate) struct Services {
    overlay: Option<Overlay>,
    server: Option<fsoverlay::Server>,
    network: Option<(StackSpec, Published)>,
    /// For init, which makes sockets in the sandbox's namespace.
    maker: Option<SocketMaker>,
    stack: Option<Stack>,
    capture_file: Option<File>,
    /// Removed again if the network does not start.
    made_capture: Option<MadeFile>,
    capture: Option<Capture>,
    published: Vec<PublishedPort>,
    control: Option<ControlSocket>,
    /// Ends when it is dropped.
    controlled: Option<Served>,
}

impl Services {
    /// Opens the layers and binds the ports; starts nothing.
    pub(super) fn prepare(plan: &Plan, records: NetworkRecords) -> Result<Self, LaunchError> {
        for layer in &plan.root.layers {
            tracing::debug!(layer = %layer.host_path.display(), "opening");
        }
        let overlay = Overlay::open(&plan.root.overlay_spec(&plan.ids, overlay_workers()))
            .map_err(LaunchError::Overlay)?;
        let mut network = None;
        let mut maker = None;
        let mut capture_file = None;
        let mut made_capture = None;
        let mut published = Vec::new();
        let mut control = None;
        if let NetPlan::Stack(stack) = &plan.net {
            let ports: Vec<Publish> = stack.publish.iter().map(Publish::from).collect();
            let ports = Published::bind(&ports).map_err(LaunchError::Network)?;
            let bind = |path| ControlSocket::bind(path, Apart::User);
            control = stack.control.as_deref().map(bind).transpose()?;
            published = ports
                .addresses()
                .map(|(host, protocol, inside_port)| PublishedPort {
                    host,
                    inside_port,
                    udp: protocol == Protocol::Udp,
                })
                .collect();
            for port in &published {
                tracing::debug!(host = %port.host, inside = port.inside_port, udp = port.udp, "published");
            }
            capture_file = records.capture;
            made_capture = records.made;
            let flow_log = records.log.map(NetworkLog::flow_log);
            let what = "the socket pair to init";
            let (inside, theirs) = netstack::inside_sockets()
                .map_err(|source| LaunchError::Network(netstack::Error::Start { what, source }))?;
            maker = Some(theirs);
            let spec = StackSpec { flow_log, ..stack_spec(stack, &plan.hostname) };
            network = Some((spec, ports.through(inside)));
        }
        Ok(Self {
            overlay: Some(overlay),
            server: None,
            network,
            maker,
            stack: None,
            capture_file,
            made_capture,
            capture: None,
            published,
            control,
            controlled: None,
        })
    }

    /// Init's end of the pair over which the stack gets sockets of the sandbox's namespace. Ours is closed: when init is
    /// gone the stack is to know.
    pub(super) fn take_maker(&mut self) -> Option<SocketMaker> {
        self.maker.take()
    }

    /// Lets the overlay see where the threads run that ask it.
    pub(crate) fn know_askers(&mut self, proc: OwnedFd) {
        self.overlay = self.overlay.take().map(|overlay| overlay.with_proc(proc));
    }

    /// Serves the overlay on its mounted descriptor.
    pub(crate) fn serve_overlay(&mut self, fuse: OwnedFd) -> Result<(), LaunchError> {
        if let Some(overlay) = self.overlay.take() {
            self.server = Some(overlay.serve(fuse).map_err(LaunchError::Overlay)?);
        }
        Ok(())
    }

    /// Runs the network stack on the TAP.
    pub(crate) fn start_network(&mut self, tap: OwnedFd) -> Result<(), LaunchError> {
        if let Some((mut spec, published)) = self.network.take() {
            if let Some(file) = self.capture_file.take() {
                let what = "the capture of the network";
                let capture = Capture::replace(file)
                    .map_err(|source| LaunchError::Network(netstack::Error::Start { what, source }))?;
                spec.capture = Some(capture.clone());
                self.capture = Some(capture);
            }
            let stack = Stack::start(tap, &spec, published).map_err(LaunchError::Network)?;
            if let Some(socket) = self.control.take() {
                let what = "the thread of the control socket";
                let served = socket
                    .serve(Network(stack.control().clone()))
                    .map_err(|source| LaunchError::Network(netstack::Error::Start { what, source }))?;
                self.controlled = Some(served);
            }
            self.stack = Some(stack);
            if let Some(made) = self.made_capture.take() {
                made.keep();
            }
        }
        Ok(())
    }

    /// Leaves the threads to the end of the process, which ends the mount they serve.
    pub(super) fn abandon(&mut self) {
        drop((self.control.take(), self.controlled.take()));
        std::mem::forget((self.server.take(), self.stack.take()));
    }

    /// Where published ports are bound on the host, with the port inside.
    pub(super) fn published(&self) -> &[PublishedPort] {
        &self.published
    }

    /// Has the network pass on what the inside's kernel still has of its programs, which are gone, until `interrupt` can be
    /// read.
    pub(crate) fn drain_network(&mut self, interrupt: Option<BorrowedFd<'_>>) {
        drop((self.control.take(), self.controlled.take()));
        if let Some(stack) = &self.stack {
            stack.drain(interrupt);
        }
    }

    /// Has the network reset what the inside's programs, which were ended, had not ended themselves.
    pub(crate) fn cut_network(&self) {
        if let Some(stack) = &self.stack {
            stack.cut();
        }
    }

    /// Ends both once the sandbox is gone; whether the overlay's upper holds a change.
    pub(super) fn finish(&mut self) -> bool {
        drop((self.control.take(), self.controlled.take()));
        if let Some(stack) = self.stack.take() {
            stack.stop();
        }
        if let Some(capture) = self.capture.take() {
            finish_capture(&capture);
        }
        let Some(server) = self.server.take() else { return false };
        let changed = server.changed();
        server.join();
        changed
    }
}

fn stack_spec(plan: &StackPlan, hostname: &str) -> StackSpec {
    let mut hosts: Vec<(&str, IpAddr)> = vec![
        (hostname, plan.guest_v4.0.into()),
        (hostname, plan.guest_v6.0.into()),
        (StackPlan::GATEWAY_NAME, plan.gateway_v4.into()),
        (StackPlan::GATEWAY_NAME, plan.gateway_v6.into()),
    ];
    // Whether the loopback is opened or not: else the host's resolvers would be asked, and could send the sandbox
    // somewhere else.
    hosts.extend(plan.gateway_names().map(|name| (name, plan.gateway_v4.into())));
    hosts.extend(plan.hosts.iter().map(|(name, ip)| (name.as_str(), *ip)));
    StackSpec {
        mtu: plan.mtu,
        guest: Link { mac: StackPlan::GUEST_MAC, v4: plan.guest_v4, v6: plan.guest_v6 },
        gateway: Link {
            mac: StackPlan::GATEWAY_MAC,
            v4: (plan.gateway_v4, plan.guest_v4.1),
            v6: (plan.gateway_v6, plan.guest_v6.1),
        },
        ipv6: true,
        dns: DnsSpec {
            upstreams: plan.dns.clone(),
            hosts: hosts.into_iter().map(|(name, ip)| (name.to_owned(), ip)).collect(),
            ..DnsSpec::default()
        },
        policy: PolicySpec {
            allow: plan.allow.clone(),
            deny: plan.deny.clone(),
            host_loopback: plan.host_loopback.clone().into(),
            // Rules by name are the crate's, and no option's yet.
            ..PolicySpec::default()
        },
        flow_log: None,
        capture: None,
        rates: Rates { sent: plan.rate_out.map(Rate::from), received: plan.rate_in.map(Rate::from) },
        outbound: Outbound::default(),
    }
}
