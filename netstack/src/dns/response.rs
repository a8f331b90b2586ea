//! Messages of resolvers, which are as hostile as those of the guest: what they are taken for, and what they say.
//!
//! The frame of a message (where its records are) is walked here, because it is passed on as it came, but for the OPT
//! record, and its times to live are counted down in place. What the records say is read by hickory-proto. A message that
//! only hickory does not understand is passed on, since the guest may, but neither kept nor believed.
//!
//! The work is bounded by the message's length: each record takes eleven bytes of it at least.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::op::Message;
use hickory_proto::rr::rdata::svcb::SvcParamValue;
use hickory_proto::rr::rdata::{HTTPS, SVCB};
use hickory_proto::rr::{Name, RData, Record};

use super::message::{
    AUTHENTIC, CHECKING_DISABLED, CODE, Code, HEADER, KEY_DNSSEC, OUR_DATAGRAM, Question, RECURSION_DESIRED,
    RESPONSE, Stored, TRUNCATED, TYPE_ANY, TYPE_CNAME, TYPE_OPT, TYPE_SOA, host_of, skip_name, word,
};
use crate::config::{MAX_DNS_ADDRESSES, MAX_DNS_NEGATIVE_TTL, MAX_DNS_TARGETS, MAX_DNS_TTL};
use crate::shared::Random;

/// Aliases of one answer that are followed.
const MAX_ALIASES: usize = 16;

/// How a query is put to a resolver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Manner {
    pub(crate) tcp: bool,
    /// With an OPT record. Some do not know it.
    pub(crate) edns: bool,
    /// With letters of random case, which the answer must repeat. Some do not.
    pub(crate) random_case: bool,
    /// Signatures are to be checked, even if the guest wants the answer unchecked.
    pub(crate) checked: bool,
}

/// Writes a query for `question`.
pub(crate) fn write_query(question: &Question, manner: Manner, random: &mut Random) -> Vec<u8> {
    let [a, b, ..] = random.next().to_ne_bytes();
    let wishes = question.wishes();
    let disabled = if manner.checked { 0 } else { wishes & CHECKING_DISABLED };
    let mut message = vec![a, b, wishes & RECURSION_DESIRED, disabled | AUTHENTIC];
    message.extend([0, 1, 0, 0, 0, 0, 0, u8::from(manner.edns)]);
    message.extend(question.name());
    if manner.random_case {
        for chunk in message[HEADER..].chunks_mut(64) {
            let mut bits = random.next();
            for byte in chunk {
                if byte.is_ascii_lowercase() && bits & 1 != 0 {
                    byte.make_ascii_uppercase();
                }
                bits >>= 1;
            }
        }
    }
    message.extend(question.kind.to_be_bytes());
    message.extend(question.class.to_be_bytes());
    if manner.edns {
        message.push(0);
        message.extend(TYPE_OPT.to_be_bytes());
        message.extend(OUR_DATAGRAM.to_be_bytes());
        message.extend([0, 0, wishes & KEY_DNSSEC, 0, 0, 0]);
    }
    message
}

/// What a message is to the query that it may answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Match {
    Answer,
    /// It would be one, had it the letters' case.
    OtherCase,
    Nothing,
}

/// Whether `response` answers `query`, which is one of ours, for `question`.
pub(crate) fn matches(response: &[u8], query: &[u8], question: &Question) -> Match {
    let Some(header) = response.get(..HEADER) else { return Match::Nothing };
    if header[2] & 0xf8 != RESPONSE || header[..2] != query[..2] {
        return Match::Nothing;
    }
    let range = HEADER..HEADER + question.name().len() + 4;
    match (word(response, 4), response.get(range.clone()).zip(query.get(range))) {
        // Some servers leave the question out of an error (FORMERR, SERVFAIL, NOTIMP, REFUSED). What is said about
        // the name has the name: it is kept, and its random letters are what a forger has to guess.
        (Some(0), _) if matches!(header[3] & CODE, 1 | 2 | 4 | 5) => Match::Answer,
        (Some(1), Some((theirs, ours))) if theirs == ours => Match::Answer,
        (Some(1), Some((theirs, ours))) if theirs.eq_ignore_ascii_case(ours) => Match::OtherCase,
        _ => Match::Nothing,
    }
}

/// What a response means for the query.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// This is it.
    Answer(Answer),
    /// There is more than a datagram holds; this is what it held.
    Truncated(Stored),
    /// The resolver does not know EDNS.
    NoEdns,
    /// The resolver cannot or will not answer; another one may.
    Failure(Stored),
    /// Nonsense.
    Malformed,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) stored: Stored,
    /// How long it may be kept; 0: not at all.
    pub(crate) ttl: u32,
    /// The addresses that the question's name leads to: [`MAX_DNS_ADDRESSES`] at most. The guest gets all of them.
    pub(crate) ips: Vec<IpAddr>,
    /// The names that its services lead to, whose addresses are asked for by themselves: [`MAX_DNS_TARGETS`] at most.
    pub(crate) targets: BTreeSet<Arc<str>>,
}

/// Judges a message that [`matches`] has found to be the answer to a query in this `manner`.
pub(crate) fn judge(response: &[u8], question: &Question, manner: Manner) -> Verdict {
    let Some(mut frame) = Frame::walk(response, question) else {
        return Verdict::Malformed;
    };
    let code = frame.stored.code;
    // RFC 6891 section 7, RFC 8906: what servers say that do not know EDNS, or not ours.
    let unknown = [Code::FormErr as u16, Code::NotImp as u16, Code::BadVers as u16];
    if manner.edns && unknown.contains(&code) {
        return Verdict::NoEdns;
    }
    if !matches!(code, 0 | 3 | 6) {
        return Verdict::Failure(frame.stored);
    }
    if response[2] & TRUNCATED != 0 {
        return if manner.tcp { Verdict::Malformed } else { Verdict::Truncated(frame.stored) };
    }
    let Ok(message) = Message::from_vec(response) else {
        tracing::debug!(?question, "an answer that is not understood");
        return Verdict::Answer(Answer {
            stored: frame.stored,
            ttl: 0,
            ips: Vec::new(),
            targets: BTreeSet::new(),
        });
    };
    let ttl = frame.lifetime(&message, question);
    let (ips, targets) = leads(&message);
    Verdict::Answer(Answer { stored: frame.stored, ttl, ips, targets })
}

/// A message with its records found.
struct Frame {
    stored: Stored,
    /// The type of each record that has a time to live.
    kinds: Vec<u16>,
}

impl Frame {
    fn walk(response: &[u8], question: &Question) -> Option<Self> {
        if word(response, 4)? == 0 {
            return Some(Self::empty(response, question));
        }
        let mut message = response.to_vec();
        let mut at = HEADER + question.name().len() + 4;
        let mut code = u16::from(response.get(3)? & CODE);
        let mut ttls = Vec::new();
        let mut kinds = Vec::new();
        'sections: for section in [6, 8, 10] {
            for index in 0..word(response, section)? {
                let start = at;
                at = skip_name(response, at)?;
                let kind = word(response, at)?;
                let end = at + 10 + usize::from(word(response, at + 8)?);
                response.get(..end)?;
                if kind == TYPE_OPT {
                    if section != 10 {
                        return None;
                    }
                    code |= u16::from(*response.get(at + 4)?) << 4;
                    // What is behind it is left out: its pointers may lead behind it, too.
                    message.get_mut(section..section + 2)?.copy_from_slice(&index.to_be_bytes());
                    at = start;
                    break 'sections;
                }
                ttls.push(u16::try_from(at + 4).ok()?);
                kinds.push(kind);
                at = end;
            }
        }
        message.truncate(at);
        Some(Self { stored: Stored { message: message.into(), ttls: ttls.into(), code }, kinds })
    }

    /// An error of a server that has left the question out.
    fn empty(response: &[u8], question: &Question) -> Self {
        let mut message = response.get(..4).unwrap_or_default().to_vec();
        message.extend([0, 1, 0, 0, 0, 0, 0, 0]);
        message.extend_from_slice(question.key().get(..question.name().len() + 4).unwrap_or_default());
        let code = u16::from(response.get(3).copied().unwrap_or_default() & CODE);
        Self { stored: Stored { message: message.into(), ttls: Box::default(), code }, kinds: Vec::new() }
    }

    /// How long the answer may be kept, after all its times to live have been brought to what we keep.
    fn lifetime(&mut self, message: &Message, question: &Question) -> u32 {
        // RFC 2308: the answer is "no" if there is nothing of the wanted type. How long so is the SOA record's business.
        let found = message.answers.iter().any(|record| {
            let kind = u16::from(record.record_type());
            kind == question.kind || question.kind == TYPE_ANY && kind != TYPE_CNAME
        });
        let negative = message.authorities.iter().find_map(|record| match &record.data {
            RData::SOA(soa) => Some(lasting(record.ttl).min(lasting(soa.minimum)).min(MAX_DNS_NEGATIVE_TTL)),
            _ => None,
        });
        let is_negative = self.stored.code == Code::NxDomain as u16 || !found;
        let mut least = MAX_DNS_TTL;
        for (&at, &kind) in self.stored.ttls.iter().zip(&self.kinds) {
            let at = usize::from(at);
            let Some(field) = self.stored.message.get_mut(at..at + 4) else { continue };
            let Ok(bytes) = <[u8; 4]>::try_from(&*field) else { continue };
            let mut ttl = lasting(u32::from_be_bytes(bytes)).min(MAX_DNS_TTL);
            if let (true, TYPE_SOA, Some(negative)) = (is_negative, kind, negative) {
                ttl = ttl.min(negative);
            }
            field.copy_from_slice(&ttl.to_be_bytes());
            least = least.min(ttl);
        }
        match (is_negative, negative) {
            (false, _) if self.kinds.is_empty() => 0,
            (false, _) => least,
            (true, Some(negative)) => least.min(negative),
            // A referral, or a server that does not say.
            (true, None) => 0,
        }
    }
}

/// RFC 2181 section 8: a time to live with the highest bit set is none.
fn lasting(ttl: u32) -> u32 {
    if ttl >> 31 == 0 { ttl } else { 0 }
}

/// The addresses that the question's name leads to, its aliases and the targets of its services followed; and those
/// targets. Others that are in the message, whatever for, do not count.
fn leads(message: &Message) -> (Vec<IpAddr>, BTreeSet<Arc<str>>) {
    let Some(query) = message.queries.first() else { return Default::default() };
    let name = follow(&aliases(&message.answers), query.name());
    let further = aliases(&message.additionals);
    let (mut ips, mut targets, mut owners) = (Vec::new(), BTreeSet::new(), HashSet::new());
    for record in message.answers.iter().filter(|record| record.name == *name) {
        match &record.data {
            RData::A(ip) => ips.push(ip.0.into()),
            RData::AAAA(ip) => ips.push(ip.0.into()),
            RData::SVCB(service) | RData::HTTPS(HTTPS(service)) => {
                ips.extend(hints(service));
                // The root stands for the record's own name (RFC 9460 section 2.5).
                let target = if service.target_name.is_root() { name } else { &service.target_name };
                let wire = wire_of(target);
                // What is asked for next is either its addresses, or its services (an alias, section 2.4.2).
                for target in [&wire, host_of(&wire)] {
                    if targets.len() < MAX_DNS_TARGETS {
                        targets.insert(super::message::text(target).into());
                    }
                }
                owners.insert(follow(&further, target));
            }
            _ => {}
        }
    }
    // What the guest would ask for next may be there already (section 4.2).
    for record in message.additionals.iter().filter(|record| owners.contains(&record.name)) {
        match &record.data {
            RData::A(ip) => ips.push(ip.0.into()),
            RData::AAAA(ip) => ips.push(ip.0.into()),
            _ => {}
        }
    }
    ips.truncate(MAX_DNS_ADDRESSES);
    (ips, targets)
}

/// What names are other names for. By hash, since there may be as many services as aliases.
fn aliases(records: &[Record]) -> HashMap<&Name, &Name> {
    let mut aliases = HashMap::new();
    for record in records {
        if let RData::CNAME(target) = &record.data {
            aliases.entry(&record.name).or_insert(&target.0);
        }
    }
    aliases
}

/// Where the aliases of `name` end.
fn follow<'a>(aliases: &HashMap<&Name, &'a Name>, mut name: &'a Name) -> &'a Name {
    for _ in 0..MAX_ALIASES {
        let Some(target) = aliases.get(name) else { break };
        name = target;
    }
    name
}

/// A name as it is on the wire, in lower case.
fn wire_of(name: &Name) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in name {
        // A label has 63 bytes at most.
        wire.push(u8::try_from(label.len()).unwrap_or_default());
        wire.extend(label.to_ascii_lowercase());
    }
    wire.push(0);
    wire
}

/// The addresses at which a service is said to be (RFC 9460 section 7.3): programs use them before they have asked.
fn hints(service: &SVCB) -> impl Iterator<Item = IpAddr> {
    service.svc_params.iter().flat_map(|(_, value)| match value {
        SvcParamValue::Ipv4Hint(hint) => hint.0.iter().map(|ip| ip.0.into()).collect(),
        SvcParamValue::Ipv6Hint(hint) => hint.0.iter().map(|ip| ip.0.into()).collect(),
        _ => Vec::new(),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::dns::message::tests::query;
    use crate::dns::message::{TYPE_A, TYPE_AAAA, TYPE_HTTPS, TYPE_SVCB, parse_query, wire};
    use crate::ingress::tests::Seeded;

    const MANNER: Manner = Manner { tcp: false, edns: true, random_case: true, checked: false };

    /// One record: section (0 to 2), owner, type, time to live, data.
    pub(crate) type Record<'a> = (usize, &'a str, u16, u32, Vec<u8>);

    /// A response to `query` with these records.
    pub(crate) fn response(query: &[u8], code: u8, records: &[Record<'_>]) -> Vec<u8> {
        let question = parse_query(query).expect("query");
        let mut message = query[..HEADER + question.name().len() + 4].to_vec();
        message[2] |= RESPONSE;
        message[3] = 0x80 | code;
        message[11] = 0;
        for (section, owner, kind, ttl, data) in records {
            message[7 + 2 * section] += 1;
            message.extend_from_slice(&wire(owner).expect("owner"));
            message.extend(kind.to_be_bytes());
            message.extend([0, 1]);
            message.extend(ttl.to_be_bytes());
            message.extend(u16::try_from(data.len()).expect("length").to_be_bytes());
            message.extend(data);
        }
        message
    }

    pub(crate) fn soa(minimum: u32) -> Vec<u8> {
        let mut data = [&wire("ns.example").expect("name")[..], &wire("who.example").expect("name")].concat();
        data.extend([0; 16]);
        data.extend(minimum.to_be_bytes());
        data
    }

    fn cname(name: &str) -> Vec<u8> {
        wire(name).expect("name").into()
    }

    fn judged(ask: &[u8], response: &[u8]) -> Verdict {
        judge(response, &parse_query(ask).expect("query"), MANNER)
    }

    fn answer(ask: &[u8], response: &[u8]) -> Answer {
        match judged(ask, response) {
            Verdict::Answer(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_query_of_ours_asks_what_the_guest_asked() {
        let mut random = Random::default();
        let mut ask = query(7, "some.long-name.example", TYPE_AAAA, true);
        let at = ask.len() - 4;
        ask[at] = 0x80;
        ask[3] |= CHECKING_DISABLED;
        let question = parse_query(&ask).expect("query");
        let ours: Vec<Vec<u8>> = (0..20).map(|_| write_query(&question, MANNER, &mut random)).collect();
        for message in &ours {
            let again = parse_query(message).expect("query");
            assert_eq!(again.key(), question.key());
            assert_eq!(matches(&response(message, 0, &[]), message, &question), Match::Answer);
        }
        let distinct = |range: std::ops::Range<usize>| {
            ours.iter().map(|message| &message[range.clone()]).collect::<std::collections::HashSet<_>>().len()
        };
        assert!(distinct(0..2) > 15 && distinct(12..34) > 15, "identifier and case are random");
        let manner = Manner { edns: false, random_case: false, ..MANNER };
        let plain = write_query(&question, manner, &mut random);
        assert_eq!(
            (&plain[2..12], &plain[12..]),
            (&[1, 0x30, 0, 1, 0, 0, 0, 0, 0, 0][..], &ask[12..ask.len() - 11])
        );
        let checked = write_query(&question, Manner { checked: true, ..MANNER }, &mut random);
        assert_eq!(checked[2..4], [1, 0x20], "unchecked data are not asked for");
    }

    #[test]
    fn only_the_answer_to_this_question_is_one() {
        let ask = query(7, "a.example", TYPE_A, false);
        let question = parse_query(&ask).expect("query");
        let is = |message: &[u8]| matches(message, &ask, &question);
        let good = response(&ask, 0, &[]);
        assert_eq!(is(&good), Match::Answer);
        for other in [query(8, "a.example", TYPE_A, false), query(7, "b.example", TYPE_A, false)] {
            assert_eq!(is(&response(&other, 0, &[])), Match::Nothing);
        }
        assert_eq!(is(&response(&query(7, "A.example", TYPE_A, false), 0, &[])), Match::OtherCase);
        assert_eq!(is(&ask), Match::Nothing, "a query is no response");
        let mut bare = good[..12].to_vec();
        bare[5] = 0;
        assert_eq!(is(&bare), Match::Nothing);
        bare[3] |= 5;
        assert_eq!(is(&bare), Match::Answer, "an error may be without the question");
        for code in [3, 6, 7] {
            bare[3] = bare[3] & !CODE | code;
            assert_eq!(is(&bare), Match::Nothing, "what is said about a name has the name");
        }
        for len in 0..good.len() {
            assert_eq!(is(&good[..len]), Match::Nothing);
        }
    }

    #[test]
    fn an_answer_is_kept_as_long_as_its_shortest_record() {
        let ask = query(7, "a.example", TYPE_A, true);
        let a = |ttl| (0, "a.example", TYPE_A, ttl, vec![192, 0, 2, 1]);
        for (records, ttl) in [
            (vec![a(300), a(60)], 60),
            (vec![a(300), (2, "ns.example", TYPE_A, 20, vec![192, 0, 2, 9])], 20),
            (vec![a(0)], 0),
            (vec![a(1 << 31)], 0),
            (vec![a(u32::MAX >> 1)], MAX_DNS_TTL),
        ] {
            assert_eq!(answer(&ask, &response(&ask, 0, &records)).ttl, ttl, "{records:?}");
        }
    }

    #[test]
    fn no_is_kept_as_long_as_the_soa_record_says() {
        let ask = query(7, "a.example", TYPE_A, true);
        let soa = |ttl, minimum| (1, "example", TYPE_SOA, ttl, soa(minimum));
        let alias = (0, "a.example", TYPE_CNAME, 10, cname("b.example"));
        for (code, records, ttl) in [
            (3, vec![soa(900, 20)], 20),
            (3, vec![soa(20, 900)], 20),
            (0, vec![soa(900, 20)], 20),
            (0, vec![alias.clone(), soa(900, 20)], 10),
            (3, vec![soa(900, 60)], 30),
            (3, vec![soa(1_000_000, 1_000_000)], MAX_DNS_NEGATIVE_TTL),
            // Nobody says how long.
            (3, vec![], 0),
            (0, vec![], 0),
            (0, vec![alias], 0),
            (0, vec![(1, "example", 2, 900, cname("ns.example"))], 0),
        ] {
            let answer = answer(&ask, &response(&ask, code, &records));
            assert_eq!((answer.ttl, answer.stored.code), (ttl, code.into()), "{records:?}");
        }
        // The record itself is passed on with that time.
        let kept = answer(&ask, &response(&ask, 3, &[soa(900, 20)])).stored;
        let at = usize::from(kept.ttls[0]);
        assert_eq!(kept.message[at..at + 4], 20u32.to_be_bytes());
    }

    #[test]
    fn what_is_no_answer_is_not_taken_for_one() {
        let ask = query(7, "a.example", TYPE_A, true);
        for code in [2, 5, 9] {
            assert!(matches!(judged(&ask, &response(&ask, code, &[])), Verdict::Failure(_)), "{code}");
        }
        for code in [1, 4] {
            let message = response(&ask, code, &[]);
            assert!(matches!(judged(&ask, &message), Verdict::NoEdns), "{code}");
            let plain = Manner { edns: false, ..MANNER };
            let question = parse_query(&ask).expect("query");
            assert!(matches!(judge(&message, &question, plain), Verdict::Failure(_)), "{code}");
        }
        // BADVERS is in the OPT record.
        let mut bad = response(&ask, 0, &[]);
        bad[11] = 1;
        bad.extend([0, 0, 41, 4, 208, 1, 0, 0, 0, 0, 0]);
        assert!(matches!(judged(&ask, &bad), Verdict::NoEdns));
        let mut truncated = response(&ask, 0, &[]);
        truncated[2] |= TRUNCATED;
        assert!(matches!(judged(&ask, &truncated), Verdict::Truncated(_)));
        let mut counts = response(&ask, 0, &[]);
        counts[7] = 1;
        assert!(matches!(judged(&ask, &counts), Verdict::Malformed));
    }

    #[test]
    fn the_opt_record_stays_here_and_the_rest_is_passed_on() {
        let ask = query(7, "a.example", TYPE_A, true);
        let mut message = response(&ask, 0, &[(0, "a.example", TYPE_A, 60, vec![192, 0, 2, 1])]);
        let plain = message.clone();
        message[11] = 1;
        message.extend([0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 4, 0, 3, 0, 0]);
        let got = answer(&ask, &message);
        assert_eq!(got.stored.message[..], plain[..]);
        // One that hickory-proto does not understand: an address of three bytes.
        let odd = response(&ask, 0, &[(0, "a.example", TYPE_A, 60, vec![192, 0, 2])]);
        let got = answer(&ask, &odd);
        assert_eq!((got.stored.message[..].len(), got.ttl, got.ips.len()), (odd.len(), 0, 0));
    }

    #[test]
    fn addresses_are_those_that_the_name_leads_to() {
        let ask = query(7, "A.example", TYPE_A, true);
        let records = [
            (0, "a.example", TYPE_CNAME, 60, cname("b.example")),
            (0, "B.example", TYPE_CNAME, 60, cname("c.example")),
            (0, "c.example", TYPE_A, 60, vec![192, 0, 2, 1]),
            (0, "c.example", TYPE_A, 60, vec![192, 0, 2, 2]),
            (0, "d.example", TYPE_A, 60, vec![192, 0, 2, 3]),
            (2, "c.example", TYPE_A, 60, vec![192, 0, 2, 4]),
        ];
        let ips = answer(&ask, &response(&ask, 0, &records)).ips;
        assert_eq!(ips, ["192.0.2.1", "192.0.2.2"].map(|ip| ip.parse::<IpAddr>().expect("address")));
        // Those of services come with a hint.
        let mut service =
            vec![0, 1, 0, 0, 1, 0, 3, 2, b'h', b'2', 0, 4, 0, 8, 192, 0, 2, 1, 192, 0, 2, 2, 0, 6, 0, 16];
        service.extend("2001:db8::1".parse::<std::net::Ipv6Addr>().expect("address").octets());
        for kind in [TYPE_SVCB, TYPE_HTTPS] {
            let ask = query(7, "a.example", kind, true);
            let records = [
                (0, "a.example", TYPE_CNAME, 60, cname("b.example")),
                (0, "b.example", kind, 60, service.clone()),
                (0, "other.example", kind, 60, service.clone()),
            ];
            let ips = answer(&ask, &response(&ask, 0, &records)).ips;
            assert_eq!(
                ips,
                ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|ip| ip.parse::<IpAddr>().expect("address"))
            );
        }
        let looped = [
            (0, "a.example", TYPE_CNAME, 60, cname("b.example")),
            (0, "b.example", TYPE_CNAME, 60, cname("a.example")),
        ];
        assert!(answer(&ask, &response(&ask, 0, &looped)).ips.is_empty());
    }

    #[test]
    fn services_lead_to_their_targets_and_to_what_is_said_of_them_besides() {
        let to = |priority: u8, target: &[u8]| [&[0, priority], target].concat();
        let ask = query(7, "_1._https.a.example", TYPE_HTTPS, true);
        let records = [
            (0, "_1._https.a.example", TYPE_CNAME, 60, cname("b.example")),
            (0, "b.example", TYPE_HTTPS, 60, to(1, &cname("Far.example"))),
            (0, "b.example", TYPE_HTTPS, 60, to(2, &[0])),
            (0, "b.example", TYPE_HTTPS, 60, to(0, &cname("_2._https.c.example"))),
            (0, "other.example", TYPE_HTTPS, 60, to(1, &cname("bad.example"))),
            (2, "far.example", TYPE_A, 60, vec![192, 0, 2, 1]),
            (2, "b.example", TYPE_CNAME, 60, cname("d.example")),
            (2, "D.example", TYPE_AAAA, 60, vec![0x20; 16]),
            (2, "bad.example", TYPE_A, 60, vec![192, 0, 2, 9]),
        ];
        let got = answer(&ask, &response(&ask, 0, &records));
        let targets: Vec<&str> = got.targets.iter().map(|name| &**name).collect();
        assert_eq!(targets, ["_2._https.c.example", "b.example", "c.example", "far.example"]);
        let ips = [IpAddr::from([192, 0, 2, 1]), IpAddr::from([0x20; 16])];
        assert_eq!(got.ips, ips);
    }

    #[test]
    fn one_answer_has_so_many_targets_only() {
        let ask = query(7, "a.example", TYPE_HTTPS, true);
        let names: Vec<String> = (10..60).map(|i| format!("{i}.example")).collect();
        let service = |name: &String| {
            let hint = [0, 4, 0, 4, 192, 0, 2, name.as_bytes()[0]];
            (0, "a.example", TYPE_HTTPS, 60, [&[0, 1], &cname(name)[..], &hint].concat())
        };
        let records: Vec<_> = names.iter().map(service).collect();
        let got = answer(&ask, &response(&ask, 0, &records));
        assert!(got.targets.iter().map(|name| &**name).eq(&names[..MAX_DNS_TARGETS]), "{:?}", got.targets);
        assert_eq!(got.ips.len(), names.len(), "addresses are those of all");
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut random = Seeded(0x5eed_0004);
        let ask = query(7, "some.name.example", TYPE_A, true);
        let question = parse_query(&ask).expect("query");
        let mut good = response(
            &ask,
            0,
            &[
                (0, "some.name.example", TYPE_CNAME, 60, cname("other.example")),
                (0, "other.example", TYPE_A, 60, vec![192, 0, 2, 1]),
                (0, "other.example", TYPE_HTTPS, 60, vec![0, 1, 1, b'x', 0, 0, 4, 0, 4, 192, 0, 2, 1]),
                (1, "example", TYPE_SOA, 60, soa(60)),
            ],
        );
        good[11] = 1;
        good.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        let mut out = Vec::new();
        for round in 0..40_000 {
            let mut bytes = good.clone();
            for _ in 0..random.below(6) {
                let at = random.below(bytes.len());
                bytes[at] = if random.below(3) == 0 { 0xc0 } else { random.byte() };
            }
            if round % 2 == 0 {
                bytes.truncate(random.below(bytes.len() + 20));
            }
            if matches(&bytes, &ask, &question) == Match::Nothing {
                continue;
            }
            if let Verdict::Answer(Answer { stored, .. }) | Verdict::Truncated(stored) =
                judge(&bytes, &question, MANNER)
            {
                question.asker(&ask, false).write_stored(&mut out, &stored, 10);
                assert!(out.len() <= 1_232 && out[..2] == ask[..2]);
            }
        }
    }

    #[test]
    fn a_message_full_of_pointers_takes_no_time() {
        // As many records as there can be, each with the longest name by a pointer to it.
        let label = "a".repeat(63);
        let name = [&label[..], &label, &label, &label[..59]].join(".");
        let ask = query(7, &name, TYPE_A, true);
        let mut message = response(&ask, 0, &[]);
        let mut count = 0u16;
        while message.len() < 65_500 {
            message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1]);
            count += 1;
        }
        message[6..8].copy_from_slice(&count.to_be_bytes());
        let got = answer(&ask, &message);
        // All of them are passed on, few are believed.
        assert_eq!((got.ips.len(), got.stored.ttls.len()), (MAX_DNS_ADDRESSES, count.into()));
    }
}
