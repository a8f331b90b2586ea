//! The works: what is measured, and what is wanted of it.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Options;
use crate::common::{INTERNET_V4, World};
use crate::contenders::Running;
use crate::load::{self, Ends, Measured, Server};

#[derive(Clone, Copy)]
pub(crate) enum Better {
    More,
    Less,
}

/// One value of a work.
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    /// What is wanted as a ratio to the bare link, as a ratio to pasta, and in itself.
    pub(crate) native: Option<f64>,
    pub(crate) pasta: Option<f64>,
    pub(crate) own: Option<f64>,
}

const fn part(name: &'static str, unit: &'static str, better: Better) -> Part {
    Part { name, unit, better, native: None, pasta: None, own: None }
}

pub(crate) struct Work {
    pub(crate) name: &'static str,
    pub(crate) parts: &'static [Part],
    /// Each measurement has a new guest.
    pub(crate) fresh: bool,
    pub(crate) run: fn(&World, &Running, &Options) -> Measured,
}

const fn work(
    name: &'static str,
    parts: &'static [Part],
    run: fn(&World, &Running, &Options) -> Measured,
) -> Work {
    Work { name, parts, fresh: false, run }
}

const RATE: Part = part("rate", "Gbit/s", Better::More);
const COST: Part = Part { own: Some(0.45), ..part("cpu", "s/GiB", Better::Less) };
/// One stream; eight.
const ONE: &[Part] = &[Part { native: Some(0.40), pasta: Some(8.0), ..RATE }, COST];
const EIGHT: &[Part] = &[Part { native: Some(0.20), pasta: Some(8.0), ..RATE }, COST];
/// The same under BBR: 0.7 of what is wanted without.
const ONE_BBR: &[Part] =
    &[Part { native: Some(0.28), pasta: Some(5.6), ..RATE }, part("cpu", "s/GiB", Better::Less)];
const EIGHT_BBR: &[Part] =
    &[Part { native: Some(0.14), pasta: Some(5.6), ..RATE }, part("cpu", "s/GiB", Better::Less)];
const FROM_LOOPBACK: &[Part] = &[Part { native: Some(0.9), ..RATE }, part("cpu", "s/GiB", Better::Less)];
const FROM_OUTSIDE: &[Part] = &[Part { native: Some(0.35), ..RATE }, COST];
const LATENCY: &[Part] = &[
    Part { native: Some(1.8), ..part("p50", "us", Better::Less) },
    Part { pasta: Some(1.0), ..part("p99", "us", Better::Less) },
];
const CONNECTIONS: &[Part] =
    &[Part { native: Some(0.5), pasta: Some(1.3), ..part("rate", "1/s", Better::More) }];
const REQUESTS: &[Part] = &[Part { native: Some(0.6), ..part("rate", "1/s", Better::More) }];
const DATAGRAMS: &[Part] = &[
    Part { pasta: Some(1.5), ..part("rate", "1000/s", Better::More) },
    part("cpu", "us each", Better::Less),
];
const NAMES: &[Part] = &[Part { native: Some(0.8), pasta: Some(2.0), ..part("rate", "1/s", Better::More) }];
const MANY: &[Part] = &[
    Part { native: Some(1.0), ..part("served", "", Better::More) },
    part("time", "s", Better::Less),
    part("p50", "us", Better::Less),
    Part { own: Some(40.0), ..part("private", "MiB", Better::Less) },
];
const IDLE: &[Part] = &[
    Part { own: Some(0.0), ..part("wake-ups", "1/s", Better::Less) },
    Part { own: Some(5.0), ..part("private", "MiB", Better::Less) },
];
const START: &[Part] = &[part("connected", "ms", Better::Less)];

macro_rules! bulk {
    ($streams:literal, $to_client:literal) => {
        |world, guest, options| load::bulk(guest, &guest.out(world), $streams, $to_client, options.time)
    };
}

macro_rules! published {
    ($loopback:literal, $to_client:literal) => {
        |world, guest, options| {
            load::bulk(guest, &guest.published(world, $loopback), 1, $to_client, options.time)
        }
    };
}

macro_rules! datagrams {
    ($size:literal, $segments:literal, $to_client:literal) => {
        |world, guest, options| {
            load::datagrams(guest, &guest.out(world), $size, $segments, $to_client, options.time)
        }
    };
}

/// `out`: the guest sends. `in`: the guest connects, its peer sends. `pingpong-1`: both ends on one processor.
pub(crate) const WORKS: &[Work] = &[
    work("tcp-out-1", ONE, bulk!(1, false)),
    work("tcp-in-1", ONE, bulk!(1, true)),
    work("tcp-out-8", EIGHT, bulk!(8, false)),
    work("tcp-in-8", EIGHT, bulk!(8, true)),
    work("bbr-out-1", ONE_BBR, bulk!(1, false)),
    work("bbr-in-1", ONE_BBR, bulk!(1, true)),
    work("bbr-out-8", EIGHT_BBR, bulk!(8, false)),
    work("bbr-in-8", EIGHT_BBR, bulk!(8, true)),
    work("pub-lo-in", FROM_LOOPBACK, published!(true, false)),
    work("pub-lo-out", FROM_LOOPBACK, published!(true, true)),
    work("pub-other-in", FROM_OUTSIDE, published!(false, false)),
    work("pub-other-out", FROM_OUTSIDE, published!(false, true)),
    work("tcp-pingpong", LATENCY, |world, guest, options| {
        load::tcp_ping_pong(&guest.out(world), Ends::Apart, options.time)
    }),
    work("tcp-pingpong-1", LATENCY, |world, guest, options| {
        load::tcp_ping_pong(&guest.out(world), Ends::Together, options.time)
    }),
    work("udp-pingpong", LATENCY, |world, guest, options| {
        load::udp_ping_pong(&guest.out(world), Ends::Apart, options.time)
    }),
    work("udp-pingpong-1", LATENCY, |world, guest, options| {
        load::udp_ping_pong(&guest.out(world), Ends::Together, options.time)
    }),
    work("tcp-connect", CONNECTIONS, |world, guest, options| {
        load::connections(&guest.out(world), 16, options.time)
    }),
    work("http-16", REQUESTS, |world, guest, options| load::http(&guest.out(world), 16, options.time)),
    work("udp-out-1400", DATAGRAMS, datagrams!(1400, 1, false)),
    work("udp-in-1400", DATAGRAMS, datagrams!(1400, 1, true)),
    work("udp-out-64", DATAGRAMS, datagrams!(64, 1, false)),
    work("udp-in-64", DATAGRAMS, datagrams!(64, 1, true)),
    // As QUIC sends.
    work("udp-gso-out", DATAGRAMS, datagrams!(1400, 40, false)),
    work("udp-gso-in", DATAGRAMS, datagrams!(1400, 40, true)),
    work("dns", NAMES, names),
    Work {
        fresh: true,
        ..work("many", MANY, |world, guest, options| {
            load::many(guest, &guest.out(world), options.connections, options.time)
        })
    },
    Work { fresh: true, ..work("idle", IDLE, |_, guest, _| load::idle(guest)) },
    Work {
        fresh: true,
        ..work("start", START, |_, guest, _| Ok(vec![guest.first_connection.as_secs_f64() * 1e3]))
    },
];

/// The internet's resolver is dnsmasq, which knows the answer.
fn names(world: &World, guest: &Running, options: &Options) -> Measured {
    let spawned = world.internet.run(|| {
        Command::new("dnsmasq")
            .args([
                "--no-daemon",
                "--conf-file=/dev/null",
                "--no-hosts",
                "--no-resolv",
                "--user=root",
                "--pid-file=",
            ])
            .args(["--bind-interfaces", &format!("--listen-address={INTERNET_V4}"), "--local-ttl=600"])
            .args(["--address=/bench.test/192.0.2.80"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    });
    let _server = Server(spawned.map_err(|error| format!("dnsmasq: {error}"))?);
    let deadline = Instant::now() + Duration::from_secs(5);
    let resolver = crate::common::at(INTERNET_V4, 53);
    while load::names(&world.host, resolver, Duration::from_millis(1)).is_err() {
        if Instant::now() > deadline {
            return Err("dnsmasq does not come up".to_owned());
        }
    }
    load::names(&guest.inside, guest.resolver, options.time)
}
