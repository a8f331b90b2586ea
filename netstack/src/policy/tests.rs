//! What is decided, as data.

use super::*;
use crate::config::DnsAt;

fn rules(host_loopback: HostLoopback, allow: &[&str], deny: &[&str]) -> Rules {
    let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().expect(text)).collect();
    let policy =
        PolicySpec { allow: parse(allow), deny: parse(deny), host_loopback, ..PolicySpec::default() };
    Rules::new(&StackSpec { policy, ..crate::config::tests::spec() })
}

fn decide_by(loopback: bool, transport: Transport, to: &str, route: RouteKind) -> Verdict {
    let host_loopback = if loopback { HostLoopback::All } else { HostLoopback::Refused };
    decide(&rules(host_loopback, &[], &[]), transport, to.parse().expect(to), route, &[])
}

fn tcp(to: &str) -> Verdict {
    decide_by(false, Transport::Tcp, to, RouteKind::Remote)
}

#[test]
fn other_machines_are_allowed() {
    for to in [
        "192.0.2.1:80",
        "10.0.3.1:22",
        "100.64.0.1:1",
        "172.16.0.1:443",
        "[2001:db8::1]:443",
        "[fd12::1]:1",
        "[64:ff9b::c000:201]:80",
        "[2002:c000:201::1]:80",
        // The client is 192.0.2.1.
        "[2001:0:c000:202:8000:f0f0:3fff:fdfe]:80",
        "[2001:db8::5efe:c000:201]:80",
        "[2001:db8::100:5efe:7f00:1]:80",
        "[2001:1:7f00:1::1]:80",
    ] {
        assert_eq!(tcp(to), Verdict::Allow(to.parse().expect(to)), "{to}");
    }
}

#[test]
fn the_hosts_loopback_is_refused_by_every_name() {
    for to in [
        "127.0.0.1:80",
        "127.255.255.254:80",
        "0.0.0.0:80",
        "0.1.2.3:80",
        "[::]:80",
        "[::1]:80",
        "[::ffff:127.0.0.1]:80",
        "[::ffff:0.0.0.0]:80",
        "[::127.0.0.1]:80",
        "[64:ff9b::7f00:1]:80",
        "[2002:7f00:1::1]:80",
        "[2001:0:7f00:1:8000:f0f0:3fff:fdfe]:80",
        "[2001:0:c000:202:8000:f0f0:80ff:fffe]:80",
        "[2001:db8::5efe:7f00:1]:80",
        "[2001:db8::200:5efe:7f00:1]:80",
        "[2002:c000:201::5efe:7f00:1]:80",
        "[64:ff9b:1::5efe:7f00:1]:80",
        "10.0.2.2:80",
        "[fd00::2]:80",
    ] {
        assert_eq!(tcp(to), Verdict::Refuse(Reason::HostLoopback), "{to}");
    }
}

#[test]
fn ranges_without_a_host_are_refused_by_name() {
    for (to, reason) in [
        ("169.254.169.254:80", Reason::LinkLocal),
        ("[::ffff:169.254.169.254]:80", Reason::LinkLocal),
        ("[64:ff9b::a9fe:a9fe]:80", Reason::LinkLocal),
        // By a prefix for local use of 96, 48, 56 or 64 bits; and translated without state.
        ("[64:ff9b:1::a9fe:a9fe]:80", Reason::LinkLocal),
        ("[64:ff9b:1:abcd::a9fe:a9fe]:80", Reason::LinkLocal),
        ("[64:ff9b:1:a9fe:a9:fe00::]:80", Reason::LinkLocal),
        ("[64:ff9b:1:a9:fe:a9fe::]:80", Reason::LinkLocal),
        ("[64:ff9b:1:0:a9:fea9:fe00:0]:80", Reason::LinkLocal),
        ("[64:ff9b:1::7f00:1]:80", Reason::HostLoopback),
        ("[::ffff:0:a9fe:a9fe]:80", Reason::LinkLocal),
        ("[2001:0:a9fe:a9fe::3fff:fdfe]:80", Reason::LinkLocal),
        ("[2001:0:c000:202::5601:5601]:80", Reason::LinkLocal),
        ("[2001:db8::5efe:a9fe:a9fe]:80", Reason::LinkLocal),
        ("[2001:db8::200:5efe:6464:64c8]:80", Reason::Metadata),
        ("[::ffff:0:7f00:1]:80", Reason::HostLoopback),
        ("[fe80::1]:80", Reason::LinkLocal),
        ("[fec0::1]:80", Reason::LinkLocal),
        ("100.100.100.200:80", Reason::Metadata),
        ("168.63.129.16:80", Reason::Metadata),
        ("[fd00:ec2::254]:80", Reason::Metadata),
        ("[fd00:ec2::23]:80", Reason::Metadata),
        ("[fd00:42::42]:80", Reason::Metadata),
        ("[fd00:c1::a9fe:a9fe]:80", Reason::Metadata),
        ("[fd00:a9fe:a9fe::1]:80", Reason::Metadata),
        ("[fd00:100::100:200]:80", Reason::Metadata),
        ("192.0.0.192:80", Reason::Metadata),
        ("224.0.0.1:80", Reason::Multicast),
        ("239.255.255.250:1900", Reason::Multicast),
        ("255.255.255.255:67", Reason::Broadcast),
        ("[ff02::fb]:5353", Reason::Multicast),
        ("240.0.0.1:80", Reason::Reserved),
        ("[::ffff:192.0.2.1]:80", Reason::Reserved),
        ("10.0.2.255:80", Reason::Broadcast),
        ("10.0.2.3:80", Reason::Subnet),
        ("10.0.2.100:80", Reason::Subnet),
        ("[fd00::3]:80", Reason::Subnet),
    ] {
        for allow in [false, true] {
            let verdict = decide_by(allow, Transport::Udp, to, RouteKind::Remote);
            assert_eq!(verdict, Verdict::Refuse(reason), "{to}");
        }
    }
}

#[test]
fn of_several_reasons_the_one_that_nothing_opens_is_told() {
    let to = [
        // Of Teredo, the server is a link-local address, and the client the loopback; then the other way round.
        ("[2001:0:a9fe:a9fe:8000:f0f0:80ff:fffe]:80", Reason::HostLoopback),
        ("[2001:0:7f00:1:8000:f0f0:5601:5601]:80", Reason::HostLoopback),
        ("[2001:0:a9fe:a9fe:8000:f0f0:1fff:fffe]:80", Reason::Multicast),
        // Its own range, and what is in it.
        ("[fe80::5efe:7f00:1]:80", Reason::HostLoopback),
        ("[fd00:42::5efe:7f00:1]:80", Reason::HostLoopback),
        ("[fe80::5efe:6464:64c8]:80", Reason::LinkLocal),
        ("[ff02::5efe:7f00:1]:80", Reason::Multicast),
    ];
    for (to, reason) in to {
        let address: SocketAddr = to.parse().expect(to);
        let rule = format!("[{}]", address.ip());
        // A rule about that address alone opens what can be opened.
        for (rules, opened) in
            [(rules(HostLoopback::All, &[], &[]), false), (rules(HostLoopback::All, &[&rule], &[]), true)]
        {
            let wanted = match reason {
                Reason::LinkLocal if opened => Verdict::Allow(address),
                reason => Verdict::Refuse(reason),
            };
            assert_eq!(decide(&rules, Transport::Tcp, address, RouteKind::Remote, &[]), wanted, "{to}");
        }
    }
    let kinds = [RouteKind::Local, RouteKind::Unknown, RouteKind::Remote, RouteKind::Broadcast];
    assert_eq!(kinds.into_iter().fold(RouteKind::Remote, RouteKind::max), RouteKind::Unknown);
    assert!(RouteKind::Broadcast > RouteKind::Local, "which an option opens");
}

#[test]
fn the_hosts_own_addresses_follow_the_routing_table() {
    let to = "198.51.100.7:22";
    for (route, reason) in [
        (RouteKind::Local, Reason::HostAddress),
        (RouteKind::Broadcast, Reason::Broadcast),
        (RouteKind::Unknown, Reason::Unknown),
    ] {
        assert_eq!(decide_by(false, Transport::Tcp, to, route), Verdict::Refuse(reason));
    }
    assert_eq!(decide_by(true, Transport::Tcp, to, RouteKind::Local), Verdict::Allow(to.parse().expect(to)));
    assert_eq!(decide_by(true, Transport::Tcp, to, RouteKind::Unknown), Verdict::Refuse(Reason::Unknown));
}

#[test]
fn the_gateway_answers_dns_and_echo_and_stands_for_loopback_when_allowed() {
    for route in [RouteKind::Remote, RouteKind::Unknown] {
        assert_eq!(decide_by(false, Transport::Udp, "10.0.2.2:53", route), Verdict::Gateway);
        assert_eq!(decide_by(true, Transport::Tcp, "[fd00::2]:53", route), Verdict::Gateway);
        assert_eq!(decide_by(false, Transport::Ping, "10.0.2.2:0", route), Verdict::Gateway);
    }
    for (to, real) in [("10.0.2.2:80", "127.0.0.1:80"), ("[fd00::2]:80", "[::1]:80")] {
        assert_eq!(
            decide_by(true, Transport::Tcp, to, RouteKind::Remote),
            Verdict::Allow(real.parse().expect(real))
        );
    }
    // Loopback itself stays refused: only the gateway stands for it.
    let verdict = decide_by(true, Transport::Tcp, "127.0.0.1:80", RouteKind::Local);
    assert_eq!(verdict, Verdict::Refuse(Reason::HostLoopback));
}

/// `tcp:`, `udp:` or `icmp:` and a destination, and what becomes of it: `ok`, or the name of the refusal.
fn verdict(rules: &Rules, wanted: &str, route: RouteKind) -> String {
    verdict_by_name(rules, wanted, route, &[])
}

fn verdict_by_name(rules: &Rules, wanted: &str, route: RouteKind, names: &[&'static str]) -> String {
    let (transport, to) = wanted.split_once(' ').expect(wanted);
    let transport = match transport {
        "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        _ => Transport::Ping,
    };
    // Those that the spec knows are marked.
    let known =
        |name: &&'static str| KnownAs { name: name.trim_start_matches('='), by_spec: name.starts_with('=') };
    let names: Vec<KnownAs<'_>> = names.iter().map(known).collect();
    match decide(rules, transport, to.parse().expect(to), route, &names) {
        Verdict::Gateway => "gateway".into(),
        Verdict::Allow(real) if real == to.parse().expect(to) => "ok".into(),
        Verdict::Allow(real) => real.to_string(),
        Verdict::Peek(_) => "peek".into(),
        Verdict::Refuse(reason) => match rules.rule_of(reason) {
            Some(rule) => format!("{} {rule}", reason.name()),
            None => reason.name().into(),
        },
    }
}

/// Flows, and what becomes of each.
type Becomes = &'static [(&'static str, &'static str)];

#[test]
fn rules_decide() {
    let cases: &[(&[&str], &[&str], Becomes)] = &[
        // Without rules everything goes.
        (&[], &[], &[("tcp 192.0.2.1:80", "ok"), ("icmp [2001:db8::1]:0", "ok")]),
        // One rule that allows, and nothing else does.
        (
            &["tcp:192.0.2.0/24:443"],
            &[],
            &[
                ("tcp 192.0.2.1:443", "ok"),
                ("tcp 192.0.2.1:80", "not-allowed"),
                ("udp 192.0.2.1:443", "not-allowed"),
                ("icmp 192.0.2.1:0", "not-allowed"),
                ("tcp 192.0.3.1:443", "not-allowed"),
                ("tcp [2001:db8::1]:443", "not-allowed"),
                // The stack's own services are not part of the world.
                ("udp 10.0.2.2:53", "gateway"),
                ("icmp 10.0.2.2:0", "gateway"),
            ],
        ),
        // Denying wins, whatever the order and the prefixes.
        (
            &["192.0.2.7", "10.0.0.0/8"],
            &["192.0.2.0/24", "any:25"],
            &[
                ("tcp 192.0.2.7:80", "deny 192.0.2.0/24"),
                ("tcp 10.9.0.1:25", "deny any:25"),
                ("tcp 10.9.0.1:80", "ok"),
                ("icmp 10.9.0.1:0", "ok"),
            ],
        ),
        // Denying alone leaves the rest as it is.
        (
            &[],
            &["udp:any", "[2001:db8::/32]"],
            &[
                ("udp 192.0.2.1:443", "deny udp:any"),
                ("tcp 192.0.2.1:443", "ok"),
                ("icmp [2001:db8::1]:0", "deny [2001:db8::/32]"),
                ("tcp [2001:db9::1]:443", "ok"),
            ],
        ),
        // A denied IPv4 address is not reached through a translator, an allowed one is not by itself.
        (
            &["192.0.2.0/24", "[2002::/16]", "[64:ff9b:1::/48]", "[2001::/32]", "[2001:db8::/32]"],
            &["192.0.2.9"],
            &[
                ("tcp [2002:c000:209::1]:80", "deny 192.0.2.9"),
                ("tcp [64:ff9b:1::c000:209]:80", "deny 192.0.2.9"),
                ("tcp [64:ff9b:1:c000:2:900::]:80", "deny 192.0.2.9"),
                ("tcp [::ffff:0:c000:209]:80", "deny 192.0.2.9"),
                ("tcp [2001:0:c000:209::3fff:fdfe]:80", "deny 192.0.2.9"),
                ("tcp [2001:0:c000:202::3fff:fdf6]:80", "deny 192.0.2.9"),
                ("tcp [2001:db8::200:5efe:c000:209]:80", "deny 192.0.2.9"),
                ("tcp [2001:0:c000:202::3fff:fdfe]:80", "ok"),
                ("tcp [2001:db8::200:5efe:c000:201]:80", "ok"),
                ("tcp [2002:c000:201::1]:80", "ok"),
                ("tcp [64:ff9b:1::c000:201]:80", "ok"),
                ("tcp [64:ff9b:1:fffe::c000:201]:80", "ok"),
                ("tcp [64:ff9b:1:c000:2:100::]:80", "ok"),
                ("tcp [64:ff9b::c000:201]:80", "not-allowed"),
            ],
        ),
        // A wide rule opens nothing that is refused always, one about nothing else does.
        (
            &["any", "169.254.169.254:80", "icmp:100.100.100.200"],
            &[],
            &[
                ("tcp 169.254.169.254:80", "ok"),
                ("tcp 169.254.169.254:81", "link-local"),
                ("tcp 169.254.169.253:80", "link-local"),
                ("tcp [64:ff9b::a9fe:a9fe]:80", "link-local"),
                ("icmp 100.100.100.200:0", "ok"),
                ("tcp 100.100.100.200:80", "metadata"),
                ("tcp 168.63.129.16:80", "metadata"),
                ("tcp 127.0.0.1:80", "host-loopback"),
                ("udp 224.0.0.251:5353", "multicast"),
                ("udp 255.255.255.255:67", "broadcast"),
                ("tcp 10.0.2.3:80", "subnet"),
                ("tcp 10.0.2.2:80", "host-loopback"),
            ],
        ),
        // And denying takes that back, too.
        (&["169.254.169.254"], &["169.254.0.0/16"], &[("tcp 169.254.169.254:80", "deny 169.254.0.0/16")]),
    ];
    for (allow, deny, wanted) in cases {
        let rules = rules(HostLoopback::Refused, allow, deny);
        for (flow, becomes) in *wanted {
            assert_eq!(verdict(&rules, flow, RouteKind::Remote), *becomes, "{flow} by {allow:?} {deny:?}");
        }
    }
}

#[test]
fn the_host_is_opened_by_port_and_by_that_option_alone() {
    let ports = || HostLoopback::Ports([53, 5432].into());
    let cases: &[(HostLoopback, &[&str], &[&str], Becomes)] = &[
        (
            ports(),
            &[],
            &[],
            &[
                ("tcp 10.0.2.2:5432", "127.0.0.1:5432"),
                ("udp [fd00::2]:5432", "[::1]:5432"),
                ("tcp 10.0.2.2:5433", "host-loopback"),
                ("tcp 10.0.2.2:53", "gateway"),
                ("tcp 127.0.0.1:5432", "host-loopback"),
                ("tcp 198.51.100.7:5432", "ok"),
                ("tcp 198.51.100.7:22", "host-address"),
                ("icmp 198.51.100.7:0", "host-address"),
            ],
        ),
        (HostLoopback::All, &[], &[], &[("icmp 198.51.100.7:0", "ok"), ("tcp 198.51.100.7:22", "ok")]),
        // The gateway is nobody's address; the host's own are addresses like others.
        (
            ports(),
            &["192.0.2.1"],
            &["any:5432"],
            &[
                ("tcp 10.0.2.2:5432", "127.0.0.1:5432"),
                ("tcp 198.51.100.7:5432", "deny any:5432"),
                ("tcp 198.51.100.7:53", "not-allowed"),
            ],
        ),
        // Rules about addresses do not open the host.
        (HostLoopback::Refused, &["198.51.100.7"], &[], &[("tcp 198.51.100.7:22", "host-address")]),
    ];
    for (host_loopback, allow, deny, wanted) in cases {
        let rules = rules(host_loopback.clone(), allow, deny);
        for (flow, becomes) in *wanted {
            assert_eq!(verdict(&rules, flow, RouteKind::Local), *becomes, "{flow} by {host_loopback:?}");
        }
    }
}

#[test]
fn rules_that_can_never_allow_anything_are_told_apart() {
    for (text, part) in [
        ("127.0.0.1:5432", "allow-host-loopback"),
        ("[::1]", "allow-host-loopback"),
        ("0.0.0.0/8", "allow-host-loopback"),
        ("[64:ff9b::7f00:1]", "allow-host-loopback"),
        ("[2001:0:7f00::/40]", "allow-host-loopback"),
        ("[fe80::1]", "another link"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("[ff02::1]", "multicast"),
        ("240.0.0.0/5", "nobody"),
    ] {
        let error = text.parse::<Rule>().expect(text).check_allow().expect_err(text).to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    for text in [
        "any",
        "0.0.0.0/0",
        "0.0.0.0/1",
        "[::/0]",
        "[64:ff9b::/97]",
        "[2002::/16]",
        "[2001::/32]",
        "[2001::/33]",
        "[2001:0:4136:e378::/64]",
        "169.254.0.0/16",
        "169.254.169.254:80",
        "[fd00:ec2::254]",
        "192.0.2.1",
        "224.0.0.0/3",
    ] {
        assert_eq!(text.parse::<Rule>().expect(text).check_allow(), Ok(()), "{text}");
    }
}

#[test]
fn a_resolver_of_its_own_leaves_port_53_of_the_gateway_to_the_host() {
    let by = |at, host_loopback, wanted: &str| {
        let mut spec = crate::config::tests::spec();
        spec.policy.host_loopback = host_loopback;
        spec.policy.deny = vec!["any".parse().expect("rule")];
        spec.dns.at = at;
        verdict(&Rules::new(&spec), wanted, RouteKind::Remote)
    };
    let own = || DnsAt::Addresses([10, 0, 2, 3].into(), "fd00::3".parse().expect("address"));
    for (at, host_loopback, wanted, becomes) in [
        (own(), HostLoopback::All, "udp 10.0.2.3:53", "gateway"),
        (own(), HostLoopback::All, "tcp [fd00::3]:53", "gateway"),
        (own(), HostLoopback::All, "icmp 10.0.2.3:0", "gateway"),
        (own(), HostLoopback::All, "tcp 10.0.2.3:80", "subnet"),
        (own(), HostLoopback::All, "udp 10.0.2.2:53", "127.0.0.1:53"),
        (own(), HostLoopback::Ports([53].into()), "udp 10.0.2.2:53", "127.0.0.1:53"),
        (own(), HostLoopback::Refused, "udp 10.0.2.2:53", "host-loopback"),
        (DnsAt::Nowhere, HostLoopback::All, "udp 10.0.2.3:53", "subnet"),
        (DnsAt::Nowhere, HostLoopback::Refused, "udp 10.0.2.2:53", "host-loopback"),
    ] {
        assert_eq!(by(at, host_loopback.clone(), wanted), becomes, "{wanted} {at:?} {host_loopback:?}");
    }
}

#[test]
fn names_decide_and_the_hello_after_them() {
    let name = |name: &str| Hello::Name(name.into());
    let shop = &["shop.example.com", "cdn.example.net"][..];
    // allow, allow_names, deny_names; flow, its names: what is decided; the hello: whether it goes on.
    for (allow, allow_names, deny_names, wanted, names, becomes, hello, goes) in [
        // No rule about names: nobody looks.
        ("", "", "", "tcp 192.0.2.1:443", shop, "ok", Hello::Nameless, true),
        ("192.0.2.1", "", "", "tcp 192.0.2.1:443", shop, "ok", Hello::Nameless, true),
        // Only names that are allowed; the address and the hello both have to be right.
        ("", "*.example.com", "", "tcp 192.0.2.1:443", shop, "peek", name("shop.example.com"), true),
        ("", "*.example.com", "", "tcp 192.0.2.1:443", shop, "peek", name("cdn.example.net"), false),
        ("", "*.example.com", "", "tcp 192.0.2.1:22", shop, "peek", Hello::Nameless, true),
        ("", "*.example.com", "", "tcp 192.0.2.1:443", shop, "peek", Hello::Broken, false),
        ("", "*.example.com", "", "udp 192.0.2.1:443", shop, "ok", Hello::Nameless, true),
        (
            "",
            "*.example.com",
            "",
            "tcp 192.0.2.1:443",
            &["cdn.example.net"],
            "not-allowed",
            Hello::Nameless,
            true,
        ),
        ("", "*.example.com", "", "tcp 192.0.2.1:443", &[], "not-allowed", Hello::Nameless, true),
        // What a rule about addresses allows needs no name.
        ("192.0.2.1", "a.example", "", "tcp 192.0.2.1:443", &[], "ok", name("b.example"), true),
        ("192.0.2.1", "a.example", "", "tcp 192.0.2.9:443", &["a.example"], "peek", name("a.example"), true),
        // Denied names: by what the name server said, or by the hello.
        (
            "",
            "",
            "*.example.net",
            "tcp 192.0.2.1:443",
            shop,
            "deny-name *.example.net",
            Hello::Nameless,
            true,
        ),
        ("", "", "*.example.net", "udp 192.0.2.1:53", shop, "deny-name *.example.net", Hello::Nameless, true),
        ("", "", "bad.example", "tcp 192.0.2.1:443", &[], "peek", name("bad.example"), false),
        ("", "", "bad.example", "tcp 192.0.2.1:443", &[], "peek", name("good.example"), true),
        (
            "",
            "*.example",
            "bad.example",
            "tcp 192.0.2.1:443",
            &["good.example"],
            "peek",
            name("bad.example"),
            false,
        ),
        // Whoever runs a zone does not open private networks, the spec does.
        ("", "*.example.com", "", "tcp 10.1.2.3:443", shop, "private-address", Hello::Nameless, true),
        ("", "*.example.com", "", "udp 100.64.0.1:443", shop, "private-address", Hello::Nameless, true),
        ("", "*.example.com", "", "tcp [fd12::1]:443", shop, "private-address", Hello::Nameless, true),
        (
            "",
            "*.example.com",
            "",
            "tcp [64:ff9b::a01:203]:443",
            shop,
            "private-address",
            Hello::Nameless,
            true,
        ),
        ("", "*.example.com", "", "tcp 10.1.2.3:443", &["=db.example.com"], "peek", Hello::Nameless, true),
        ("", "*.example.com", "", "tcp 10.1.2.3:443", &["=db.example"], "not-allowed", Hello::Nameless, true),
        ("10.0.0.0/8", "*.example.com", "", "tcp 10.1.2.3:443", shop, "ok", Hello::Nameless, true),
        // Names open nothing that is refused always.
        ("", "*.example.com", "", "tcp 127.0.0.1:443", shop, "host-loopback", Hello::Nameless, true),
        ("", "*.example.com", "", "tcp 169.254.169.254:80", shop, "link-local", Hello::Nameless, true),
    ] {
        let mut spec = crate::config::tests::spec();
        spec.policy.allow = allow.split_whitespace().map(|rule| rule.parse().expect(rule)).collect();
        let patterns = |text: &str| text.split_whitespace().map(|name| name.parse().expect(name)).collect();
        (spec.policy.allow_names, spec.policy.deny_names) = (patterns(allow_names), patterns(deny_names));
        let rules = Rules::new(&spec);
        let case = format!("{wanted} {names:?} by {allow:?} {allow_names:?} {deny_names:?}");
        assert_eq!(verdict_by_name(&rules, wanted, RouteKind::Remote, names), becomes, "{case}");
        let to = wanted.split_once(' ').expect(wanted).1.parse().expect(wanted);
        assert_eq!(decide_hello(&rules, to, &hello).is_ok(), goes, "{case} {hello:?}");
    }
}
