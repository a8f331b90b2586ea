//! What the supervisor serves: the overlay and the network.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use fsoverlay::Overlay;
use netstack::{
    Capture, DnsSpec, HostLoopback, Link, Outbound, PolicySpec, Protocol, Publish, Published, Rate, Rates,
    Stack, StackSpec,
};

use super::LaunchError;
use crate::plan::{NetPlan, Plan, StackPlan};
use crate::report::{NetworkLog, NetworkRecords, PublishedPort};
use crate::spec::{LoopbackSpec, RateSpec};

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
    stack: Option<Stack>,
    capture_file: Option<File>,
    capture: Option<Capture>,
    published: Vec<PublishedPort>,
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
        let mut capture_file = None;
        let mut published = Vec::new();
        if let NetPlan::Stack(stack) = &plan.net {
            let ports = Published::bind(&publish(stack)).map_err(LaunchError::Network)?;
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
            let flow_log = records.log.map(NetworkLog::flow_log);
            network = Some((StackSpec { flow_log, ..stack_spec(stack, &plan.hostname) }, ports));
        }
        Ok(Self {
            overlay: Some(overlay),
            server: None,
            network,
            stack: None,
            capture_file,
            capture: None,
            published,
        })
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
                let what = "the thread of the capture";
                let capture = Capture::start(file)
                    .map_err(|source| LaunchError::Network(netstack::Error::Start { what, source }))?;
                spec.capture = Some(capture.clone());
                self.capture = Some(capture);
            }
            self.stack = Some(Stack::start(tap, &spec, published).map_err(LaunchError::Network)?);
        }
        Ok(())
    }

    /// Leaves the threads to the end of the process, which ends the mount they serve.
    pub(super) fn abandon(&mut self) {
        std::mem::forget((self.server.take(), self.stack.take()));
    }

    /// Where published ports are bound on the host, with the port inside.
    pub(super) fn published(&self) -> &[PublishedPort] {
        &self.published
    }

    /// Ends both once the sandbox is gone; whether the overlay's upper holds a change.
    pub(super) fn finish(&mut self) -> bool {
        if let Some(stack) = self.stack.take() {
            stack.stop();
        }
        if let Some(capture) = self.capture.take() {
            let captured = capture.finish();
            tracing::info!(
                seen = captured.seen,
                dropped = captured.dropped,
                "the capture of the network is over"
            );
            if captured.dropped > 0 {
                tracing::warn!(
                    dropped = captured.dropped,
                    "packets are missing in the capture of the network"
                );
            }
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
            host_loopback: match &plan.host_loopback {
                LoopbackSpec::Refused => HostLoopback::Refused,
                LoopbackSpec::Ports(ports) => HostLoopback::Ports(ports.clone()),
                LoopbackSpec::All => HostLoopback::All,
            },
            // Rules by name are the crate's, and no option's yet.
            ..PolicySpec::default()
        },
        flow_log: None,
        capture: None,
        rates: Rates { sent: plan.rate_out.map(rate), received: plan.rate_in.map(rate) },
        outbound: Outbound::default(),
    }
}

fn rate(RateSpec { bytes_per_second, burst }: RateSpec) -> Rate {
    Rate { bytes_per_second, burst }
}

fn publish(plan: &StackPlan) -> Vec<Publish> {
    plan.publish
        .iter()
        .map(|p| Publish {
            host_ip: p.host_ip,
            host_port: p.host_port,
            inside_ip: None,
            inside_port: p.inside_port,
            protocol: if p.udp { Protocol::Udp } else { Protocol::Tcp },
        })
        .collect()
}
