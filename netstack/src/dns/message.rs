//! Queries of the guest, and the answers to them, byte by byte.
//!
//! This is the way of every answer from the cache, so nothing here allocates but the answer's own buffer, which is used
//! again. Names in questions are never compressed (RFC 9267 section 2), so there is nothing that could loop. Messages of
//! resolvers are read in [`response`](super::response).
//!
//! EDNS (RFC 6891) ends here: an OPT record is about one hop. What a guest's says is obeyed (the size of its buffer, the
//! wish for DNSSEC records), its options are not passed on, and an answer has one of ours exactly if the query had one.

use std::net::IpAddr;

use crate::config::MAX_DNS_DATAGRAM;

pub(crate) const HEADER: usize = 12;
/// Bits of the flags' first byte: this is a response; what kind of query; authoritative; truncated; recursion desired.
pub(crate) const RESPONSE: u8 = 0x80;
const OPCODE: u8 = 0x78;
const AUTHORITATIVE: u8 = 0x04;
pub(crate) const TRUNCATED: u8 = 0x02;
pub(crate) const RECURSION_DESIRED: u8 = 0x01;
/// Bits of the second: recursion available; authentic data; checking disabled; response code.
const RECURSION_AVAILABLE: u8 = 0x80;
pub(crate) const AUTHENTIC: u8 = 0x20;
pub(crate) const CHECKING_DISABLED: u8 = 0x10;
pub(crate) const CODE: u8 = 0x0f;

pub(crate) const TYPE_A: u16 = 1;
pub(crate) const TYPE_CNAME: u16 = 5;
pub(crate) const TYPE_SOA: u16 = 6;
const TYPE_PTR: u16 = 12;
pub(crate) const TYPE_AAAA: u16 = 28;
pub(crate) const TYPE_OPT: u16 = 41;
pub(crate) const TYPE_SVCB: u16 = 64;
pub(crate) const TYPE_HTTPS: u16 = 65;
pub(crate) const TYPE_ANY: u16 = 255;
pub(crate) const CLASS_IN: u16 = 1;

/// Longest name, as it is on the wire.
const MAX_NAME: usize = 255;
/// Records behind the question of a query. One OPT is the rule, a signature may follow.
const MAX_EXTRA: u16 = 4;
/// Least that anybody takes (RFC 1035 section 4.2.1).
const LEAST_DATAGRAM: usize = 512;
/// The greatest message that we say we take: what needs no fragments on any link (the DNS flag day of 2020).
pub(crate) const OUR_DATAGRAM: u16 = 1_232;
/// Lifetime of the answers from the list of hosts.
const HOSTS_TTL: u32 = 60;

/// Response codes (RFC 1035 section 4.1.1, RFC 6891 section 9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    /// The upper eight of its twelve bits are in the OPT record.
    BadVers = 16,
}

/// What a guest's OPT record asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edns {
    /// Longest datagram that it takes.
    size: u16,
    version: u8,
    /// DNSSEC records are wanted.
    pub(crate) dnssec: bool,
}

/// What a query asks.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Question {
    /// See [`Question::key`].
    key: [u8; MAX_NAME + 5],
    name_len: usize,
    pub(crate) kind: u16,
    pub(crate) class: u16,
    /// Where the question ends in the message.
    end: usize,
    pub(crate) edns: Option<Edns>,
}

impl std::fmt::Debug for Question {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", text(self.name()), self.kind)
    }
}

/// The bit of a key for DNSSEC records.
pub(crate) const KEY_DNSSEC: u8 = 0x80;

impl Question {
    /// All that an answer depends on: the name in lower case, type, class; then whether recursion, DNSSEC records and
    /// unchecked data are wanted.
    pub(crate) fn key(&self) -> &[u8] {
        &self.key[..self.name_len + 5]
    }

    /// The name as it is on the wire, in lower case.
    pub(crate) fn name(&self) -> &[u8] {
        &self.key[..self.name_len]
    }

    /// The bits at the end of the key.
    pub(crate) fn wishes(&self) -> u8 {
        self.key[self.name_len + 4]
    }

    pub(crate) fn recursion_desired(&self) -> bool {
        self.wishes() & RECURSION_DESIRED != 0
    }

    /// The name of the host that it is about: that of a service without what stands for the service (RFC 9460 section 2.3).
    pub(crate) fn host_name(&self) -> &[u8] {
        if matches!(self.kind, TYPE_SVCB | TYPE_HTTPS) { host_of(self.name()) } else { self.name() }
    }

    pub(crate) fn checking_disabled(&self) -> bool {
        self.wishes() & CHECKING_DISABLED != 0
    }

    /// The version of EDNS is one that does not exist yet.
    pub(crate) fn is_bad_version(&self) -> bool {
        self.edns.is_some_and(|edns| edns.version > 0)
    }

    /// What of `query`, from which this came, its answer needs.
    pub(crate) fn asker<'a>(&self, query: &'a [u8], is_tcp: bool) -> Asker<'a> {
        Asker {
            question: query.get(HEADER..self.end).unwrap_or_default(),
            edns: self.edns,
            ..Asker::of(query, is_tcp)
        }
    }
}

/// Who asked, as far as the answer repeats it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asker<'a> {
    pub(crate) id: [u8; 2],
    pub(crate) flags: [u8; 2],
    /// As it was written: a program may check the case that it chose.
    pub(crate) question: &'a [u8],
    pub(crate) edns: Option<Edns>,
    pub(crate) is_tcp: bool,
}

impl<'a> Asker<'a> {
    /// Who asked something that could not be understood.
    pub(crate) fn of(query: &'a [u8], is_tcp: bool) -> Self {
        let pair =
            |at: usize| query.get(at..at + 2).and_then(|pair| pair.try_into().ok()).unwrap_or_default();
        Self { id: pair(0), flags: pair(2), question: &[], edns: None, is_tcp }
    }

    /// Longest answer.
    fn limit(&self) -> usize {
        match self.edns {
            _ if self.is_tcp => usize::from(u16::MAX),
            None => LEAST_DATAGRAM,
            Some(edns) => usize::from(edns.size).clamp(LEAST_DATAGRAM, MAX_DNS_DATAGRAM),
        }
    }

    /// Begins an answer in `out`: `flags` and the rest of the header from ours, the question, no records yet.
    fn begin(&self, out: &mut Vec<u8>, flags: [u8; 2], code: u16) {
        out.clear();
        out.extend(self.id);
        let repeated = self.flags[0] & (OPCODE | RECURSION_DESIRED);
        out.push(RESPONSE | repeated | flags[0] & (AUTHORITATIVE | TRUNCATED));
        // RFC 6840 section 5.8: that the data are authentic is told to those who have asked.
        let asked = self.flags[1] & AUTHENTIC != 0 || self.edns.is_some_and(|edns| edns.dnssec);
        let authentic = if asked { flags[1] & AUTHENTIC } else { 0 };
        let [_, low] = code.to_be_bytes();
        out.push(RECURSION_AVAILABLE | authentic | self.flags[1] & CHECKING_DISABLED | low & CODE);
        out.extend([0, u8::from(!self.question.is_empty()), 0, 0, 0, 0, 0, 0]);
        out.extend(self.question);
    }

    /// Ends an answer: what the guest's buffer cannot hold is left out, and ours is told if the guest told its own.
    fn finish(&self, out: &mut Vec<u8>, code: u16, error: Option<&ExtendedError>) {
        let opt = if self.edns.is_some() { 11 + error.map_or(0, |error| 6 + error.text.len()) } else { 0 };
        if out.len() + opt > self.limit() {
            out.truncate(HEADER + self.question.len());
            if let [_, _, flags, _, _, _, counts @ ..] = &mut out[..HEADER] {
                *flags |= TRUNCATED;
                counts.fill(0);
            }
        }
        let Some(edns) = self.edns else { return };
        // Root name, type, size of our buffer, upper bits of the code, version 0, flags, options.
        out.push(0);
        out.extend(TYPE_OPT.to_be_bytes());
        out.extend(OUR_DATAGRAM.to_be_bytes());
        out.extend([u8::try_from(code >> 4).unwrap_or_default(), 0, if edns.dnssec { 0x80 } else { 0 }, 0]);
        if let Some(error) = error {
            let len = small(error.text.len() + 2);
            out.extend((len + 4).to_be_bytes());
            // RFC 8914.
            out.extend([0, 15]);
            out.extend(len.to_be_bytes());
            out.extend(error.code.to_be_bytes());
            out.extend(error.text.as_bytes());
        } else {
            out.extend([0; 2]);
        }
        bump(out, 10);
    }

    /// Writes an answer without records.
    pub(crate) fn write_error(&self, out: &mut Vec<u8>, code: Code, error: Option<&ExtendedError>) {
        self.begin(out, [0; 2], code as u16);
        self.finish(out, code as u16, error);
    }

    /// Writes an answer of our own: what there is of the wanted kind. None of it is an answer, too (NODATA).
    pub(crate) fn write_own(&self, out: &mut Vec<u8>, kind: u16, ips: &[IpAddr], names: &[Box<[u8]>]) {
        self.begin(out, [AUTHORITATIVE, 0], Code::NoError as u16);
        for ip in ips {
            match ip {
                IpAddr::V4(ip) if matches!(kind, TYPE_A | TYPE_ANY) => record(out, TYPE_A, &ip.octets()),
                IpAddr::V6(ip) if matches!(kind, TYPE_AAAA | TYPE_ANY) => {
                    record(out, TYPE_AAAA, &ip.octets())
                }
                _ => {}
            }
        }
        for name in names.iter().filter(|_| matches!(kind, TYPE_PTR | TYPE_ANY)) {
            record(out, TYPE_PTR, name);
        }
        self.finish(out, 0, None);
    }

    /// Writes a resolver's answer, from which `age` seconds have passed.
    pub(crate) fn write_stored(&self, out: &mut Vec<u8>, stored: &Stored, age: u32) {
        let body = stored.message.get(HEADER + self.question.len()..).unwrap_or_default();
        let Some(&[_, _, high, low, _, _, counts @ ..]) = stored.message.first_chunk::<HEADER>() else {
            return;
        };
        // RFC 6891 section 9: without OPT such a code cannot be told.
        let code = if stored.code > u16::from(CODE) && self.edns.is_none() { 2 } else { stored.code };
        self.begin(out, [high & !AUTHORITATIVE, low], code);
        if let Some(field) = out.get_mut(6..HEADER) {
            field.copy_from_slice(&counts);
        }
        out.extend_from_slice(body);
        for &at in &stored.ttls {
            let at = usize::from(at);
            if let Some(field) = out.get_mut(at..at + 4)
                && let Ok(ttl) = <[u8; 4]>::try_from(&*field)
            {
                field.copy_from_slice(&u32::from_be_bytes(ttl).saturating_sub(age).to_be_bytes());
            }
        }
        self.finish(out, code, None);
    }
}

/// Why there is no answer, for people (RFC 8914).
#[derive(Debug)]
pub(crate) struct ExtendedError {
    pub(crate) code: u16,
    pub(crate) text: &'static str,
}

/// A resolver's answer as it is kept: the question as long as everybody's, no OPT record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) message: Box<[u8]>,
    /// Where the times to live are.
    pub(crate) ttls: Box<[u16]>,
    /// All of its bits.
    pub(crate) code: u16,
}

impl Stored {
    /// A part is missing.
    pub(crate) fn is_truncated(&self) -> bool {
        self.message.get(2).is_some_and(|flags| flags & TRUNCATED != 0)
    }

    /// The memory that it takes.
    pub(crate) fn size(&self) -> usize {
        self.message.len() + 2 * self.ttls.len()
    }
}

/// Appends a record with the question's name, which is at offset 12.
fn record(out: &mut Vec<u8>, kind: u16, data: &[u8]) {
    out.extend([0xc0, 12]);
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    out.extend(HOSTS_TTL.to_be_bytes());
    out.extend(small(data.len()).to_be_bytes());
    out.extend(data);
    bump(out, 6);
}

/// Adds one to the count at `at`.
fn bump(out: &mut [u8], at: usize) {
    if let Some(count) = word(out, at)
        && let Some(field) = out.get_mut(at..at + 2)
    {
        field.copy_from_slice(&count.saturating_add(1).to_be_bytes());
    }
}

fn small(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

pub(crate) fn word(message: &[u8], at: usize) -> Option<u16> {
    message.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes)
}

/// Where the name at `at` ends. Pointers are not followed.
pub(crate) fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    let start = at;
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            len @ 1..=63 => at += 1 + usize::from(len),
            0xc0.. => return message.get(at + 1).map(|_| at + 2),
            _ => return None,
        }
        if at - start >= MAX_NAME {
            return None;
        }
    }
}

/// Understands a query. `Err` holds the code to answer with, or nothing if it deserves no answer.
pub(crate) fn parse_query(message: &[u8]) -> Result<Question, Option<Code>> {
    const BAD: Option<Code> = Some(Code::FormErr);
    let header: &[u8; HEADER] = message.first_chunk().ok_or(None)?;
    if header[2] & RESPONSE != 0 {
        return Err(None);
    }
    if header[2] & OPCODE != 0 {
        return Err(Some(Code::NotImp));
    }
    let count = |at: usize| word(header, at).unwrap_or_default();
    if count(4) != 1 || count(6) != 0 || count(8) != 0 || count(10) > MAX_EXTRA {
        return Err(BAD);
    }
    let mut key = [0; MAX_NAME + 5];
    let mut at = HEADER;
    let mut name_len = 0;
    loop {
        let len = *message.get(at).ok_or(BAD)?;
        let end = at + 1 + usize::from(len);
        // The two high bits mark compression and its relatives.
        if len > 63 || end - HEADER > MAX_NAME {
            return Err(BAD);
        }
        let label = message.get(at..end).ok_or(BAD)?;
        key[name_len..name_len + label.len()].copy_from_slice(label);
        name_len += label.len();
        at = end;
        if len == 0 {
            break;
        }
    }
    // A length is at most 63, and no letter.
    key[..name_len].make_ascii_lowercase();
    let tail = message.get(at..at + 4).ok_or(BAD)?;
    key[name_len..name_len + 4].copy_from_slice(tail);
    let (kind, class) = (word(tail, 0).unwrap_or_default(), word(tail, 2).unwrap_or_default());
    let end = at + 4;
    let edns = parse_extra(message, end, count(10)).ok_or(BAD)?;
    let dnssec = if edns.is_some_and(|edns| edns.dnssec) { KEY_DNSSEC } else { 0 };
    key[name_len + 4] = header[2] & RECURSION_DESIRED | header[3] & CHECKING_DISABLED | dnssec;
    Ok(Question { key, name_len, kind, class, end, edns })
}

/// Looks for the OPT record among `count` records at `at`. `None` if the records are malformed, or if there are two.
fn parse_extra(message: &[u8], mut at: usize, count: u16) -> Option<Option<Edns>> {
    let mut edns = None;
    for _ in 0..count {
        let is_root = message.get(at) == Some(&0);
        at = skip_name(message, at)?;
        let head: &[u8; 10] = message.get(at..)?.first_chunk()?;
        at = at + 10 + usize::from(word(head, 8)?);
        message.get(..at)?;
        if word(head, 0)? == TYPE_OPT {
            if !is_root || edns.is_some() {
                return None;
            }
            edns = Some(Edns { size: word(head, 2)?, version: head[5], dnssec: head[6] & 0x80 != 0 });
        }
    }
    Some(edns)
}

/// A name of the wire as people write it, without the dot at the end (RFC 1035 section 5.1).
pub(crate) fn text(mut name: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    while let Some((&len, rest)) = name.split_first()
        && let Some((label, rest)) = rest.split_at_checked(usize::from(len))
        && len != 0
    {
        if !text.is_empty() {
            text.push('.');
        }
        for &byte in label {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => text.push(char::from(byte)),
                // Writing to a String does not fail.
                _ => drop(write!(text, "\\{byte:03}")),
            }
        }
        name = rest;
    }
    text
}

/// The name of the host that has a service, of the service's name.
pub(crate) fn host_of(mut name: &[u8]) -> &[u8] {
    while let [len, b'_', ..] = name
        && let Some(rest) = name.get(1 + usize::from(*len)..)
    {
        name = rest;
    }
    name
}

/// The wire form of a name that people wrote, in lower case. `None` if there is none.
pub(crate) fn wire(name: &str) -> Option<Box<[u8]>> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let mut wire = Vec::with_capacity(name.len() + 2);
    for label in name.split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| (1..=63).contains(len))?;
        wire.push(len);
        wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
    }
    wire.push(0);
    (wire.len() <= MAX_NAME).then(|| wire.into())
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

    fn error(query: &[u8], code: Code) -> Vec<u8> {
        let mut out = Vec::new();
        parse_query(query).expect("query").asker(query, false).write_error(&mut out, code, None);
        out
    }

    #[test]
    fn a_question_is_understood_whatever_its_case() {
        let message = query(7, "WWW.Example.com", TYPE_AAAA, true);
        let question = parse_query(&message).expect("query");
        assert_eq!(question.name(), b"\x03www\x07example\x03com\x00");
        assert_eq!((question.kind, question.class), (TYPE_AAAA, CLASS_IN));
        assert_eq!(question.edns, Some(Edns { size: 1_232, version: 0, dnssec: false }));
        assert_eq!(question.asker(&message, false).question, &message[12..33]);
        let root = parse_query(&[0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1]).expect("the root");
        assert_eq!(root.name(), b"\0");
    }

    #[test]
    fn a_key_tells_apart_what_answers_depend_on_and_nothing_else() {
        let key = |message: &[u8]| parse_query(message).expect("query").key().to_vec();
        let plain = query(7, "a.example", TYPE_A, false);
        assert_eq!(key(&plain), key(&query(9, "A.eXample", TYPE_A, true)), "name, identifier, EDNS as such");
        assert_ne!(key(&plain), key(&query(7, "b.example", TYPE_A, false)));
        assert_ne!(key(&plain), key(&query(7, "a.example", TYPE_AAAA, false)));
        let mut others = vec![plain.clone()];
        for (at, bit) in [(2, RECURSION_DESIRED), (3, CHECKING_DISABLED), (plain.len() - 1, 2)] {
            let mut other = plain.clone();
            other[at] ^= bit;
            others.push(other);
        }
        let mut dnssec = query(7, "a.example", TYPE_A, true);
        let at = dnssec.len() - 4;
        dnssec[at] = 0x80;
        others.push(dnssec);
        for (i, a) in others.iter().enumerate() {
            assert!(others[i + 1..].iter().all(|b| key(a) != key(b)), "{i}");
        }
        let mut authentic = plain.clone();
        authentic[3] |= AUTHENTIC;
        assert_eq!(key(&plain), key(&authentic));
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
        for (at, count) in [(5, 2), (5, 0), (7, 1), (9, 1), (11, 1), (11, 200)] {
            let mut counts = query(7, "a.b", TYPE_A, false);
            counts[at] = count;
            assert_eq!(parse_query(&counts), Err(Some(Code::FormErr)), "{at}");
        }
        let long = vec!["a".repeat(63); 4].join(".");
        assert_eq!(parse_query(&query(7, &long, TYPE_A, false)), Err(Some(Code::FormErr)));
        let longest = format!("{}.{}", vec!["a".repeat(63); 3].join("."), "a".repeat(61));
        assert_eq!(parse_query(&query(7, &longest, TYPE_A, false)).expect("query").name().len(), MAX_NAME);
    }

    #[test]
    fn compression_in_a_question_is_an_error_and_no_loop() {
        let mut looped = query(7, "a", TYPE_A, false);
        looped[12] = 0xc0;
        looped[13] = 12;
        assert_eq!(parse_query(&looped), Err(Some(Code::FormErr)));
    }

    #[test]
    fn one_opt_record_is_right_and_two_are_not() {
        let mut two = query(7, "a.b", TYPE_A, true);
        two[11] = 2;
        two.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        assert_eq!(parse_query(&two), Err(Some(Code::FormErr)));
        let mut named = query(7, "a.b", TYPE_A, true);
        let at = named.len() - 11;
        named.splice(at..=at, [1, b'x', 0]);
        assert_eq!(parse_query(&named), Err(Some(Code::FormErr)));
        // Options, and a signature behind it.
        let mut signed = query(7, "a.b", TYPE_A, true);
        signed[11] = 2;
        *signed.last_mut().expect("length") = 8;
        signed.extend([0, 10, 0, 4, 1, 2, 3, 4]);
        signed.extend([0, 0, 250, 0, 255, 0, 0, 0, 0, 0, 1, 9]);
        assert!(parse_query(&signed).expect("query").edns.is_some());
        signed.pop();
        assert_eq!(parse_query(&signed), Err(Some(Code::FormErr)));
        let mut version = query(7, "a.b", TYPE_A, true);
        let at = version.len() - 5;
        version[at] = 1;
        let question = parse_query(&version).expect("query");
        assert!(question.is_bad_version());
        let answer = error(&version, Code::BadVers);
        assert_eq!((answer[3] & CODE, word(&answer, 10)), (0, Some(1)));
        assert_eq!(answer[answer.len() - 6..], [1, 0, 0, 0, 0, 0], "the upper bits of 16, and version 0");
    }

    #[test]
    fn own_names_answer_with_what_they_have_of_the_wanted_kind() {
        let ips = ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|ip| ip.parse().expect("address"));
        let names = [wire("box").expect("name")];
        for (kind, answers) in [(TYPE_A, 2), (TYPE_AAAA, 1), (TYPE_PTR, 1), (TYPE_ANY, 4), (16, 0)] {
            let ask = query(7, "Box.Internal", kind, true);
            let mut out = Vec::new();
            parse_query(&ask).expect("query").asker(&ask, false).write_own(&mut out, kind, &ips, &names);
            assert_eq!((word(&out, 6), out[3] & CODE, word(&out, 10)), (Some(answers), 0, Some(1)));
            let message = hickory_proto::op::Message::from_vec(&out).expect("a message");
            assert_eq!(message.answers.len(), usize::from(answers));
            assert!(message.metadata.authoritative && message.edns.is_some());
        }
    }

    #[test]
    fn an_answer_that_does_not_fit_is_marked_and_has_no_records() {
        let ips: Vec<IpAddr> = (0..100u8).map(|i| IpAddr::from([192, 0, 2, i])).collect();
        for (edns, size, is_tcp, fits) in [
            (false, 0, false, false),
            (false, 0, true, true),
            (true, 0, false, false),
            (true, 1_232, false, false),
            (true, 4_096, false, true),
            (true, 65_535, false, true),
        ] {
            let mut ask = query(7, "many.example", TYPE_A, edns);
            if edns {
                let at = ask.len() - 8;
                ask[at..at + 2].copy_from_slice(&u16::to_be_bytes(size));
            }
            let mut out = Vec::new();
            parse_query(&ask).expect("query").asker(&ask, is_tcp).write_own(&mut out, TYPE_A, &ips, &[]);
            let message = hickory_proto::op::Message::from_vec(&out).expect("a message");
            assert_eq!(message.answers.len(), if fits { 100 } else { 0 }, "{edns} {size} {is_tcp}");
            assert_eq!(message.metadata.truncation, !fits);
            assert_eq!(message.edns.is_some(), edns);
            assert!(fits || out.len() <= 512);
        }
    }

    #[test]
    fn an_error_tells_people_why_if_they_can_hear_it() {
        let why = ExtendedError { code: 23, text: "nobody there" };
        for edns in [false, true] {
            let ask = query(7, "a.example", TYPE_A, edns);
            let mut out = Vec::new();
            let asker = parse_query(&ask).expect("query").asker(&ask, false);
            asker.write_error(&mut out, Code::ServFail, Some(&why));
            let message = hickory_proto::op::Message::from_vec(&out).expect("a message");
            assert_eq!(message.metadata.response_code, hickory_proto::op::ResponseCode::ServFail);
            assert_eq!(out.ends_with(b"\0\x0f\0\x0e\0\x17nobody there"), edns);
        }
    }

    #[test]
    fn names_survive_being_written() {
        for name in ["a", "www.example.com", "_sip._tcp.x-1.net"] {
            assert_eq!(text(&wire(name).expect(name)), name);
        }
        assert_eq!(wire("WWW.Example."), wire("www.example"));
        assert_eq!(text(b"\x03a.b\x01\xff\0"), "a\\046b.\\255");
        for bad in ["", ".", "a..b", &"a".repeat(64), &vec!["a".repeat(63); 4].join(".")] {
            assert_eq!(wire(bad), None, "{bad}");
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let mut random = Seeded(0x5eed_0003);
        let good = query(7, "some.name.example", TYPE_A, true);
        let mut out = Vec::new();
        for _ in 0..60_000 {
            let mut bytes = good.clone();
            for _ in 0..random.below(5) {
                let at = random.below(bytes.len());
                bytes[at] = random.byte();
            }
            bytes.truncate(random.below(bytes.len() + 20));
            if let Ok(question) = parse_query(&bytes) {
                assert!(question.name().len() <= MAX_NAME);
                let ips = ["::1".parse().expect("address")];
                question.asker(&bytes, false).write_own(&mut out, question.kind, &ips, &[]);
                assert!(out.len() <= 512 && out[..2] == bytes[..2]);
                text(question.name());
            }
        }
    }
}
