//! What the forwarder keeps of answers, and for how long.

use super::*;

#[test]
fn an_answer_is_kept_and_its_time_is_counted_down() {
    let mut dns = Dns::new();
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 100, A.into()), (0, "a.example", TYPE_A, 200, A.into())]);
    assert_eq!(ttls(&dns.heard(1_000)), [100, 200]);
    for (millis, left) in [(0, [100, 200]), (30_900, [70, 170]), (100, [69, 169]), (68_900, [1, 101])] {
        dns.script.advance_millis(millis);
        // In other letters, with another identifier and without EDNS: the same question.
        let ask = query(7, "A.Example", TYPE_A, false);
        dns.ask(1_001, &ask);
        let told = dns.told(1_001);
        assert_eq!((&told[..2], &told[12..ask.len()]), (&ask[..2], &ask[12..]), "as it was asked");
        let message = Message::from_vec(&told).expect("a message");
        assert_eq!((ttls(&message), message.edns.is_some()), (left.to_vec(), false));
        assert_eq!(dns.script.engine.open_queries(), 0);
    }
    dns.not_asked();
    assert_eq!((dns.script.stats().dns_queries, dns.script.stats().dns_cached), (5, 4));
    dns.script.advance_millis(200);
    dns.ask(1_002, &query(8, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 100, A.into())]);
    assert_eq!(ttls(&dns.heard(1_002)), [100]);
    // Another type is another question.
    dns.ask(1_003, &query(8, "a.example", TYPE_AAAA, true));
    dns.answers(0, &[(0, "a.example", TYPE_AAAA, 100, vec![0x20; 16])]);
    assert_eq!(ttls(&dns.heard(1_003)), [100]);
}

#[test]
fn no_is_kept_as_long_as_its_soa_record_says_and_failures_are_not() {
    let mut dns = Dns::new();
    for (code, expected, name) in
        [(3, ResponseCode::NXDomain, "nobody.example"), (0, ResponseCode::NoError, "nothing.example")]
    {
        dns.ask(1_000, &query(1, name, TYPE_A, true));
        dns.answers(code, &[(1, "example", TYPE_SOA, 900, soa(20))]);
        let message = dns.heard(1_000);
        assert_eq!((message.metadata.response_code, ttls(&message)), (expected, vec![20]));
        dns.script.advance_millis(19_000);
        dns.ask(1_000, &query(2, name, TYPE_A, true));
        let message = dns.heard(1_000);
        assert_eq!((message.metadata.response_code, ttls(&message)), (expected, vec![1]));
        dns.not_asked();
        dns.script.advance_millis(1_000);
        dns.ask(1_000, &query(3, name, TYPE_A, true));
        dns.answers(code, &[]);
        dns.heard(1_000);
        // Nobody has said how long.
        dns.ask(1_000, &query(4, name, TYPE_A, true));
        dns.answers(2, &[]);
        assert_eq!(dns.heard(1_000).metadata.response_code, ResponseCode::ServFail);
        dns.ask(1_000, &query(5, name, TYPE_A, true));
        dns.answers(0, &[(0, name, TYPE_A, 0, A.into())]);
        assert_eq!(ttls(&dns.heard(1_000)), [0]);
        dns.ask(1_000, &query(6, name, TYPE_A, true));
        dns.answers(3, &[]);
        dns.heard(1_000);
    }
}

#[test]
fn what_the_hosts_own_resolver_says_is_kept_for_moments() {
    let mut dns = Dns::near(|_| {});
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 100, A.into())]);
    assert_eq!(ttls(&dns.heard(1_000)), [100], "how long it holds is not ours to say");
    dns.script.advance_millis(u64::from(MAX_DNS_LOCAL_TTL) * 1_000 - 1);
    dns.ask(1_000, &query(2, "a.example", TYPE_A, true));
    assert_eq!(ttls(&dns.heard(1_000)), [96]);
    dns.not_asked();
    // It has joined another network meanwhile.
    dns.script.advance_millis(1);
    dns.ask(1_000, &query(3, "a.example", TYPE_A, true));
    dns.answers(3, &[]);
    assert_eq!(dns.heard(1_000).metadata.response_code, ResponseCode::NXDomain);
}

#[test]
fn after_a_suspension_everything_is_asked_for_anew_and_names_are_older() {
    let mut dns = Dns::new();
    let names = |dns: &Dns| dns.script.engine.names_of(dns.script.now, ip("192.0.2.1"));
    let record = [(0, "a.example", TYPE_A, 3_600, A.into())];
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    dns.answers(0, &record);
    dns.heard(1_000);
    dns.script.advance_millis(2_000);
    // Asked before, and not answered yet.
    dns.ask(1_000, &query(2, "b.example", TYPE_A, true));
    let (old, old_from) = dns.asked();
    dns.script.engine.pretend_suspension(Duration::from_secs(600));
    dns.script.advance_millis(1_000);
    dns.ask(1_001, &query(3, "a.example", TYPE_A, true));
    dns.answers(0, &record);
    dns.heard(1_001);
    // Whoever waits still gets what comes, but it is not kept.
    dns.server
        .send_to(&response(&old, 0, &[(0, "b.example", TYPE_A, 3_600, A.into())]), old_from)
        .expect("send");
    assert_eq!(dns.heard(1_000).answers.len(), 1);
    for name in ["b.example", "a.example"] {
        dns.ask(1_002, &query(4, name, TYPE_A, true));
        if name == "b.example" {
            dns.answers(0, &[(0, name, TYPE_A, 3_600, A.into())]);
        }
        dns.heard(1_002);
        dns.not_asked();
    }
    assert_eq!(names(&dns), ["a.example", "b.example"]);
    // The pins grow older by what the clock does not show, when names are asked for the next time.
    dns.script.advance_millis(1_000);
    dns.script.engine.pretend_suspension(Duration::from_secs(3_500) + PIN_GRACE);
    dns.ask(1_003, &query(5, "c.example", TYPE_A, true));
    assert_eq!(names(&dns), ["a.example", "b.example"]);
    dns.script.advance_millis(99_000);
    assert!(names(&dns).is_empty());
}

/// Leads more names to addresses than can be remembered.
fn overflow_pins(dns: &mut Dns, round: u8) {
    for part in 0..=u8::try_from(MAX_PINS / 200).expect("small") {
        let name = format!("many-{round}-{part}.example");
        let address = |i| vec![10, round, part, i];
        let records: Vec<Record<'_>> = (0..200).map(|i| (0, &*name, TYPE_A, 60, address(i))).collect();
        dns.ask(1_000, &query(1, &name, TYPE_A, false));
        dns.answers(0, &records);
        dns.heard(1_000);
    }
    dns.script.engine.check_bounds();
}

#[test]
fn what_is_kept_is_forgotten_for_lost_names_only_where_rules_want_them() {
    let mut dns = Dns::new();
    let ask = query(1, "a.example", TYPE_A, true);
    let kept = |dns: &mut Dns| {
        let before = dns.script.stats().dns_cached;
        dns.ask(1_000, &ask);
        let kept = dns.script.stats().dns_cached > before;
        if !kept {
            dns.answers(0, &[(0, "a.example", TYPE_A, 3_600, A.into())]);
        }
        dns.heard(1_000);
        kept
    };
    assert!(!kept(&mut dns));
    overflow_pins(&mut dns, 1);
    assert!(kept(&mut dns));
    // From now on it has to be pinned.
    let mut policy = dns.script.engine.policy();
    policy.deny_names = vec!["bad.example".parse().expect("name")];
    dns.script.engine.set_policy(policy.clone());
    assert!(!kept(&mut dns) && kept(&mut dns));
    dns.script.engine.set_policy(policy);
    assert!(kept(&mut dns), "it was pinned before");
    overflow_pins(&mut dns, 2);
    assert!(!kept(&mut dns));
}
