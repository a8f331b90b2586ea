//! Names of addresses, as the rules know them from answers.

use super::*;

#[test]
fn resolved_names_are_pinned_to_their_addresses() {
    let mut dns = Dns::with(|spec| spec.dns.hosts = vec![("Box.".into(), ip("192.0.2.1"))]);
    let names = |dns: &Dns| dns.script.engine.names_of(dns.script.now, ip("192.0.2.1"));
    assert_eq!(names(&dns), ["box"]);
    dns.ask(1_000, &query(1, "WWW.example", TYPE_A, true));
    dns.answers(0, &[(0, "www.example", TYPE_A, 60, A.into())]);
    dns.heard(1_000);
    assert_eq!(names(&dns), ["box", "www.example"]);
    // As long as the guest may still have it from the cache, and the grace.
    dns.script.advance_millis(59_000);
    dns.ask(1_000, &query(2, "www.example", TYPE_A, true));
    dns.heard(1_000);
    dns.script.advance(PIN_GRACE);
    assert_eq!(names(&dns), ["box", "www.example"]);
    dns.script.advance_millis(1_000);
    assert_eq!(names(&dns), ["box"]);
}

#[test]
fn hints_of_services_are_pinned_to_their_hosts() {
    let mut dns = Dns::new();
    let service = vec![0, 1, 0, 0, 4, 0, 4, 192, 0, 2, 1];
    for (name, kind) in [("a.example", 65), ("_8443._https.b.example", 65), ("_dns.c.example", 64)] {
        dns.ask(1_000, &query(1, name, kind, true));
        dns.answers(0, &[(0, name, kind, 60, service.clone())]);
        dns.heard(1_000);
    }
    // Only services have names of that kind.
    dns.ask(1_000, &query(1, "_d.example", TYPE_A, true));
    dns.answers(0, &[(0, "_d.example", TYPE_A, 60, A.into())]);
    dns.heard(1_000);
    let names = dns.script.engine.names_of(dns.script.now, ip("192.0.2.1"));
    assert_eq!(names, ["a.example", "b.example", "c.example", "_d.example"]);
}

#[test]
fn what_nobody_checked_is_no_name_for_rules() {
    let mut unchecked = query(1, "a.example", TYPE_A, true);
    unchecked[3] |= 0x10;
    for (allow_names, passed_on, pinned) in [(vec![], 0x10, false), (vec!["*.example"], 0, true)] {
        let mut dns = Dns::with(|spec| {
            spec.policy.allow_names = allow_names.iter().map(|name| name.parse().expect(name)).collect();
        });
        dns.ask(1_000, &unchecked);
        let (ask, from) = dns.asked();
        assert_eq!(ask[3] & 0x10, passed_on);
        dns.server
            .send_to(&response(&ask, 0, &[(0, "a.example", TYPE_A, 60, A.into())]), from)
            .expect("send");
        let told = dns.heard(1_000);
        assert!(told.metadata.checking_disabled && told.answers.len() == 1, "as it was asked");
        let names = dns.script.engine.names_of(dns.script.now, ip("192.0.2.1"));
        assert_eq!(!names.is_empty(), pinned, "{names:?}");
    }
}
