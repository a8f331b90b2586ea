//! As much of DNS messages as a forwarder needs: the question of a query, whether a response answers it, and the few
//! answers that the forwarder gives itself. Names in questions are never compressed (RFC 9267 section 2), so there is
//! nothing here that could loop.

use std::net::IpAddr;

const HEADER: usize = 12;
/// Response bit of the flags.
const RESPONSE: u8 = 0x80;

pub(crate) const TYPE_A: u16 = 1;
pub(crate) const TYPE_AAAA: u16 = 28;
const TYPE_OPT: u16 = 41;
const TYPE_ANY: u16 = 255;
const CLASS_IN: u16 = 1;

/// Response codes (RFC 1035 section 4.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NotImp = 4,
    Refused = 5,
}

/// Lifetime of the answers from the list of hosts.
const HOSTS_TTL: u32 = 60;

/// What a query asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    /// In lower case, with dots, without the one at the end.
    pub(crate) name: String,
    pub(crate) kind: u16,
    pub(crate) class: u16,
    /// Where the question ends in the message.
    end: usize,
    /// The query has an OPT record (RFC 6891).
    edns: bool,
}

fn word(message: &[u8], at: usize) -> Option<u16> {
    message.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes)
}

/// Understands a query. `Err` holds the code to answer with, or nothing if it deserves no answer.
pub(crate) fn parse_query(message: &[u8]) -> Result<Question, Option<Code>> {
    let header = message.get(..HEADER).ok_or(None)?;
    if header[2] & RESPONSE != 0 {
        return Err(None);
    }
    if header[2] & 0x78 != 0 {
        return Err(Some(Code::NotImp));
    }
    if word(message, 4) != Some(1) {
        return Err(Some(Code::FormErr));
    }
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let len = usize::from(*message.get(at).ok_or(Some(Code::FormErr))?);
        let label = message.get(at + 1..at + 1 + len).ok_or(Some(Code::FormErr))?;
        at += 1 + len;
        if len == 0 {
            break;
        }
        // The two high bits mark compression and its relatives.
        if len > 63 || at - HEADER > 254 {
            return Err(Some(Code::FormErr));
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
    }
    let (Some(kind), Some(class)) = (word(message, at), word(message, at + 2)) else {
        return Err(Some(Code::FormErr));
    };
    let end = at + 4;
    let no_records = word(message, 6) == Some(0) && word(message, 8) == Some(0);
    let edns = no_records && message.get(end) == Some(&0) && word(message, end + 1) == Some(TYPE_OPT);
    Ok(Question { name, kind, class, end, edns })
}

/// Whether `response` answers `query` (both whole messages, the same identifier expected).
pub(crate) fn is_response_to(response: &[u8], query: &[u8], question: &Question) -> bool {
    let Some(header) = response.get(..HEADER) else { return false };
    if header[2] & RESPONSE == 0 || header[..2] != query[..2] {
        return false;
    }
    match word(response, 4) {
        // Some servers leave the question out of an error.
        Some(0) => header[3] & 0x0f != 0,
        Some(1) => response
            .get(HEADER..question.end)
            .zip(query.get(HEADER..question.end))
            .is_some_and(|(theirs, ours)| theirs.eq_ignore_ascii_case(ours)),
        _ => false,
    }
}

/// Whether a response says that its sender cannot or will not answer, so that another one may be asked.
pub(crate) fn is_failure(response: &[u8]) -> bool {
    let failed = [Code::ServFail as u8, Code::NotImp as u8, Code::Refused as u8];
    response.get(3).is_some_and(|flags| failed.contains(&(flags & 0x0f)))
}

/// An answer without records.
pub(crate) fn error(query: &[u8], question: Option<&Question>, code: Code) -> Vec<u8> {
    answer(query, question, code, &[])
}

/// An answer with the addresses of the question's kind among `ips`; none of that kind is an answer, too (NODATA).
pub(crate) fn hosts_answer(query: &[u8], question: &Question, ips: &[IpAddr]) -> Vec<u8> {
    let wanted = |ip: &&IpAddr| match ip {
        IpAddr::V4(_) => matches!(question.kind, TYPE_A | TYPE_ANY),
        IpAddr::V6(_) => matches!(question.kind, TYPE_AAAA | TYPE_ANY),
    };
    let ips: Vec<IpAddr> =
        if question.class == CLASS_IN { ips.iter().filter(wanted).copied().collect() } else { Vec::new() };
    answer(query, Some(question), Code::NoError, &ips)
}

fn answer(query: &[u8], question: Option<&Question>, code: Code, ips: &[IpAddr]) -> Vec<u8> {
    let mut message = Vec::with_capacity(512);
    message.extend(query.get(..2).unwrap_or(&[0; 2]));
    // The opcode and "recursion desired" are repeated; "authoritative" marks our own hosts.
    let flags = query.get(2).copied().unwrap_or_default() & 0x79;
    let authoritative = if ips.is_empty() { 0 } else { 0x04 };
    message.push(RESPONSE | flags | authoritative);
    message.push(0x80 | code as u8);
    let edns = question.is_some_and(|question| question.edns);
    let answers = u16::try_from(ips.len()).unwrap_or_default();
    for count in [u16::from(question.is_some()), answers, 0, u16::from(edns)] {
        message.extend(count.to_be_bytes());
    }
    if let Some(question) = question {
        message.extend(query.get(HEADER..question.end).unwrap_or_default());
    }
    for ip in ips {
        let (kind, data): (u16, &[u8]) = match ip {
            IpAddr::V4(ip) => (TYPE_A, &ip.octets()),
            IpAddr::V6(ip) => (TYPE_AAAA, &ip.octets()),
        };
        // The name is the question's, at offset 12.
        message.extend([0xc0, 12]);
        message.extend(kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        message.extend(HOSTS_TTL.to_be_bytes());
        message.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
        message.extend(data);
    }
    if edns {
        // Root name, OPT, 1,232 bytes (what DNS flag day 2020 recommends), nothing else.
        message.push(0);
        message.extend(TYPE_OPT.to_be_bytes());
        message.extend(1232u16.to_be_bytes());
        message.extend([0; 6]);
    }
    message
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ingress::tests::Seeded;

    /// A query as a libc sends it.
    pub(crate) fn query(id: u16, name: &str, kind: u16, edns: bool) -> Vec<u8> {
        let mut message = id.to_be_bytes().to_vec();
        message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)]);
        for label in name.split('.') {
            message.push(u8::try_from(label.len()).expect("label"));
            message.extend(label.as_bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        if edns {
            message.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        }
        message
    }

    fn answers(message: &[u8]) -> u16 {
        word(message, 6).expect("header")
    }

    #[test]
    fn a_question_is_understood_whatever_its_case() {
        let question = parse_query(&query(7, "WWW.Example.com", TYPE_AAAA, true)).expect("query");
        assert_eq!(question.name, "www.example.com");
        assert_eq!((question.kind, question.class, question.edns), (TYPE_AAAA, CLASS_IN, true));
    }

    #[test]
    fn what_is_no_query_is_refused_or_ignored() {
        let mut response = query(7, "a.b", TYPE_A, false);
        response[2] |= RESPONSE;
        assert_eq!(parse_query(&response), Err(None));
        assert_eq!(parse_query(b"short"), Err(None));
        let mut update = query(7, "a.b", TYPE_A, false);
        update[2] = 5 << 3;
        assert_eq!(parse_query(&update), Err(Some(Code::NotImp)));
        let mut two = query(7, "a.b", TYPE_A, false);
        two[5] = 2;
        assert_eq!(parse_query(&two), Err(Some(Code::FormErr)));
    }

    #[test]
    fn compression_in_a_question_is_an_error_and_no_loop() {
        let mut looped = query(7, "a", TYPE_A, false);
        looped[12] = 0xc0;
        looped[13] = 12;
        assert_eq!(parse_query(&looped), Err(Some(Code::FormErr)));
    }

    #[test]
    fn hosts_answer_with_their_addresses_and_with_nodata_for_other_types() {
        let ips = ["192.0.2.1".parse().expect("address"), "192.0.2.2".parse().expect("address")];
        let ask = query(7, "Box.Internal", TYPE_A, true);
        let question = parse_query(&ask).expect("query");
        let message = hosts_answer(&ask, &question, &ips);
        assert_eq!((answers(&message), message[3] & 15, word(&message, 10)), (2, 0, Some(1)));
        assert!(is_response_to(&message, &ask, &question));
        assert!(message.windows(4).any(|window| window == [192, 0, 2, 2]));
        let ask = query(7, "box.internal", TYPE_AAAA, false);
        let question = parse_query(&ask).expect("query");
        let message = hosts_answer(&ask, &question, &ips);
        assert_eq!((answers(&message), message[3] & 15), (0, 0));
    }

    #[test]
    fn only_the_answer_to_this_question_is_one() {
        let ask = query(7, "a.example", TYPE_A, false);
        let question = parse_query(&ask).expect("query");
        let good = error(&ask, Some(&question), Code::ServFail);
        assert!(is_response_to(&good, &ask, &question) && is_failure(&good));
        for other in [query(8, "a.example", TYPE_A, false), query(7, "b.example", TYPE_A, false)] {
            let wrong = error(&other, parse_query(&other).ok().as_ref(), Code::NoError);
            assert!(!is_response_to(&wrong, &ask, &question));
        }
        assert!(!is_response_to(&ask, &ask, &question), "a query is no response");
        assert!(is_response_to(&error(&ask, None, Code::Refused), &ask, &question));
        assert!(!is_response_to(&error(&ask, None, Code::NoError), &ask, &question));
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let mut random = Seeded(0x5eed_0003);
        let good = query(7, "some.name.example", TYPE_A, true);
        for _ in 0..60_000 {
            let mut bytes = good.clone();
            for _ in 0..random.below(5) {
                let at = random.below(bytes.len());
                bytes[at] = random.byte();
            }
            bytes.truncate(random.below(bytes.len() + 20));
            if let Ok(question) = parse_query(&bytes) {
                assert!(question.name.len() <= 253);
                let reply = hosts_answer(&bytes, &question, &["::1".parse().expect("address")]);
                assert!(is_response_to(&reply, &bytes, &question));
            }
            is_failure(&bytes);
        }
    }
}
