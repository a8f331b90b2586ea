//! The name in a TLS ClientHello (RFC 8446 section 4.1.2, RFC 6066 section 3), as rules by name want it.
//!
//! A pure function of the first bytes that the guest sends on a connection; asked again when there are more. It fails
//! closed: what begins as TLS and is not a ClientHello that is understood to its end is [`Hello::Broken`], so that no
//! server can be talked into reading another name in it than this does. So are records that some servers skip before the
//! ClientHello, alerts that only warn for example: the name would come behind them. Bounds: [`MAX_HELLO`] bytes of
//! message, copied once and only if they are split over several records.
//!
//! Only the first ClientHello is looked at. One that a server asks for by a HelloRetryRequest has to repeat the name (RFC
//! 8446 section 4.1.2), and one of a renegotiation is encrypted; that they do is the server's to see to.

use std::borrow::Cow;

/// Longest ClientHello that is understood. Those of today's programs have some hundred bytes, with keys of post-quantum
/// cryptography two thousand.
pub(crate) const MAX_HELLO: usize = 12 * 1024;

/// What a connection's first bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hello {
    /// The beginning of a ClientHello: more is needed.
    More,
    /// No TLS, or a ClientHello without a name.
    Nameless,
    /// A ClientHello that asks for this name, in lower case.
    Name(String),
    /// TLS that does not begin with a ClientHello, or with one that contradicts itself or is too long.
    Broken,
}

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
/// All types of records.
const RECORDS: std::ops::RangeInclusive<u8> = 20..=24;
/// Versions of records that servers take for TLS at the beginning: all but 3 are wrong, but some look no closer.
const VERSIONS: std::ops::Range<u8> = 0..16;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;
/// RFC 8446 section 5.1.
const MAX_RECORD: usize = 1 << 14;

/// Reads the first bytes of a connection.
pub(crate) fn read(bytes: &[u8]) -> Hello {
    match message(bytes) {
        Ok(message) => name_of(&message).unwrap_or(Hello::Broken),
        Err(other) => other,
    }
}

/// What bytes are that are no ClientHello, as far as their first record's header tells: `None` if it may be one.
fn first_record(bytes: &[u8]) -> Option<Hello> {
    match *bytes {
        [kind, ..] if !RECORDS.contains(&kind) => Some(Hello::Nameless),
        [_, version, ..] if !VERSIONS.contains(&version) => Some(Hello::Nameless),
        [HANDSHAKE, 3, ..] => None,
        [_, 3, ..] => Some(Hello::Broken),
        // By the version it is none. Other protocols begin with a length, which may look like the type: only what goes
        // on like one that a server takes is one.
        [HANDSHAKE, _, _, _, _, CLIENT_HELLO, ..] => None,
        [HANDSHAKE, _, _, _, _, _, ..] => Some(Hello::Nameless),
        [ALERT, _, _, 0, 2, ..] => Some(Hello::Broken),
        [ALERT, _, _, _, _, ..] => Some(Hello::Nameless),
        [HANDSHAKE | ALERT, ..] => Some(Hello::More),
        [_, _, ..] => Some(Hello::Nameless),
        _ => Some(Hello::More),
    }
}

/// The ClientHello without its header, out of as many records as it is in.
fn message(bytes: &[u8]) -> Result<Cow<'_, [u8]>, Hello> {
    if let Some(other) = first_record(bytes) {
        return Err(other);
    }
    let mut message = Cow::Borrowed(&[][..]);
    let mut rest = bytes;
    loop {
        match *rest {
            [] => return Err(Hello::More),
            [kind, ..] if kind != HANDSHAKE => return Err(Hello::Broken),
            [_, version, ..] if !VERSIONS.contains(&version) => return Err(Hello::Broken),
            _ => {}
        }
        let Some((header, body)) = rest.split_first_chunk::<5>() else { return Err(Hello::More) };
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        // RFC 8446 section 5.1: no handshake record is empty.
        if len == 0 || len > MAX_RECORD {
            return Err(Hello::Broken);
        }
        let part = body.get(..len).unwrap_or(body);
        if message.is_empty() {
            message = Cow::Borrowed(part);
        } else {
            message.to_mut().extend_from_slice(part);
        }
        match *message {
            [kind, ..] if kind != CLIENT_HELLO => return Err(Hello::Broken),
            [_, a, b, c, ..] => {
                let wanted = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                if wanted > MAX_HELLO {
                    return Err(Hello::Broken);
                }
                // What follows the message in its record is not for us to judge.
                let range = 4..4 + wanted;
                if message.len() >= range.end {
                    return Ok(match message {
                        Cow::Borrowed(message) => Cow::Borrowed(message.get(range).unwrap_or_default()),
                        Cow::Owned(mut message) => {
                            message.truncate(range.end);
                            message.drain(..4);
                            Cow::Owned(message)
                        }
                    });
                }
            }
            _ => {}
        }
        let Some(next) = body.get(len..) else { return Err(Hello::More) };
        rest = next;
    }
}

/// Takes `n` bytes off the front.
fn take<'a>(rest: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(n)?;
    *rest = left;
    Some(taken)
}

fn take_u16(rest: &mut &[u8]) -> Option<u16> {
    take(rest, 2)?.try_into().ok().map(u16::from_be_bytes)
}

/// A vector with its length in front, in one byte or two.
fn take_short<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = *take(rest, 1)?.first()?;
    take(rest, len.into())
}

fn take_long<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = take_u16(rest)?;
    take(rest, len.into())
}

/// `None`: broken.
fn name_of(mut hello: &[u8]) -> Option<Hello> {
    let rest = &mut hello;
    let version = take_u16(rest)?;
    if version >> 8 != 3 {
        return None;
    }
    take(rest, 32)?;
    let session = take_short(rest)?;
    let suites = take_long(rest)?;
    let compression = take_short(rest)?;
    if session.len() > 32 || suites.is_empty() || suites.len() % 2 != 0 || compression.is_empty() {
        return None;
    }
    if rest.is_empty() {
        // Before TLS 1.2 there need not be any extensions.
        return Some(Hello::Nameless);
    }
    let mut extensions = take_long(rest)?;
    if !rest.is_empty() {
        return None;
    }
    let mut found = Hello::Nameless;
    while !extensions.is_empty() {
        let kind = take_u16(&mut extensions)?;
        let data = take_long(&mut extensions)?;
        if kind == SERVER_NAME {
            // RFC 8446 section 4.2: no extension comes twice.
            if found != Hello::Nameless {
                return None;
            }
            found = Hello::Name(host_name(data)?);
        }
    }
    Some(found)
}

/// The one name of a server_name extension: RFC 6066 allows one of each kind, and there is one kind.
fn host_name(mut data: &[u8]) -> Option<String> {
    let mut list = take_long(&mut data)?;
    if !data.is_empty() || *take(&mut list, 1)?.first()? != HOST_NAME {
        return None;
    }
    let name = take_long(&mut list)?;
    if !list.is_empty() {
        return None;
    }
    super::names::normal(std::str::from_utf8(name).ok()?)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ingress::tests::Seeded;

    /// What programs send: their name, and the bytes.
    pub(crate) fn real() -> Vec<(&'static str, Vec<u8>)> {
        let byte =
            |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("hex");
        let line = |line: &'static str| {
            let (program, hex) = line.split_once(' ').expect("two words");
            (program, hex.as_bytes().chunks(2).map(byte).collect())
        };
        include_str!("hellos.txt").lines().map(line).collect()
    }

    fn expected(program: &str) -> Hello {
        match program {
            "curl-openssl" => Hello::Name("www.example.com".into()),
            "git-gnutls" => Hello::Name("git.example.org".into()),
            "openssl-tls12" => Hello::Name("old.example.net".into()),
            "node" => Hello::Name("node.example.com".into()),
            _ => Hello::Nameless,
        }
    }

    #[test]
    fn the_names_that_real_programs_ask_for_are_read() {
        assert_eq!(real().len(), 5);
        for (program, bytes) in real() {
            assert_eq!(read(&bytes), expected(program), "{program}");
            // Whatever follows it, early data for example.
            assert_eq!(read(&[&bytes[..], &[23, 3, 3, 0, 1, 0]].concat()), expected(program), "{program}");
        }
    }

    #[test]
    fn every_beginning_of_one_wants_more() {
        for (program, bytes) in real() {
            for len in 0..bytes.len() {
                assert_eq!(read(&bytes[..len]), Hello::More, "{program}, {len} bytes");
            }
        }
    }

    /// The same message in records of `size` bytes.
    fn split(bytes: &[u8], size: usize) -> Vec<u8> {
        let records = bytes[5..].chunks(size).flat_map(|part| {
            let len = u16::try_from(part.len()).expect("length").to_be_bytes();
            [&[HANDSHAKE, 3, 1], &len[..], part].concat()
        });
        records.collect()
    }

    #[test]
    fn one_in_several_records_says_the_same() {
        for (program, bytes) in real() {
            for size in [1, 3, 4, 5, 100] {
                let split = split(&bytes, size);
                assert_eq!(read(&split), expected(program), "{program} by {size}");
                assert_eq!(read(&split[..split.len() - 1]), Hello::More, "{program} by {size}");
            }
        }
    }

    #[test]
    fn other_protocols_have_no_name() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"SSH-2.0-OpenSSH_10.0\r\n",
            // A ClientHello of SSL 2, which has no names.
            &[0x80, 0x2e, 1, 3, 1],
            // Those that begin with a length of one byte, or of four the other way round.
            &[22, 0, 0xff, 5, 9, b'l'],
            &[21, 0, 0xff, 5, 9],
            &[23, 1, 0, 0, 1],
            &[20, 0],
            &[24, 9, 3, 1],
            &[22, 0x16, 3, 1, 0, 1],
        ] {
            assert_eq!(read(bytes), Hello::Nameless, "{bytes:?}");
        }
        for bytes in [&[][..], &[20], &[22], &[23], &[22, 3], &[22, 3, 1], &[22, 2, 0, 0, 1], &[21, 1, 0, 0]]
        {
            assert_eq!(read(bytes), Hello::More, "{bytes:?}");
        }
    }

    /// Servers skip such records, or look at less of them than they should, and go on to the ClientHello behind.
    #[test]
    fn what_begins_as_tls_in_another_way_is_broken() {
        let real = &real()[0].1[..];
        for first in [
            // A warning, in several versions; the end of a cipher; data; a heartbeat; an empty record.
            &[21, 3, 1, 0, 2, 1, 90][..],
            &[21, 2, 0, 0, 2, 1, 90],
            &[20, 3, 3, 0, 1, 1],
            &[23, 3, 3, 0, 1, 0],
            &[24, 3, 3, 0, 3, 1, 0, 0],
            &[22, 3, 1, 0, 0],
            // A HelloRequest, and another message that is no ClientHello.
            &[22, 3, 1, 0, 4, 0, 0, 0, 0],
            &[22, 3, 1, 0, 4, 2, 0, 0, 0],
            // A record of impossible length.
            &[22, 3, 1, 0xff, 0xff],
            // Their first bytes are enough.
            &[20, 3],
            &[21, 3],
        ] {
            assert_eq!(read(first), Hello::Broken, "{first:?}");
            assert_eq!(read(&[first, real].concat()), Hello::Broken, "{first:?}");
        }
    }

    #[test]
    fn a_wrong_version_of_the_record_hides_no_name() {
        for (program, mut bytes) in real() {
            for version in [0, 2, 4, 15] {
                bytes[1] = version;
                assert_eq!(read(&bytes), expected(program), "{program} {version}");
            }
            bytes[1] = 16;
            assert_eq!(read(&bytes), Hello::Nameless);
        }
    }

    /// A ClientHello with these extensions.
    fn hello(extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
        body.extend(u16::try_from(extensions.len()).expect("length").to_be_bytes());
        body.extend(extensions);
        let len = |n: usize| u16::try_from(n).expect("length").to_be_bytes();
        [&[22, 3, 1], &len(body.len() + 4)[..], &[1, 0], &len(body.len())[..], &body].concat()
    }

    fn named(list: &[u8]) -> Vec<u8> {
        let len = |n: usize| u16::try_from(n).expect("length").to_be_bytes();
        [&[0, 0], &len(list.len() + 2)[..], &len(list.len())[..], list].concat()
    }

    #[test]
    fn what_contradicts_itself_is_broken() {
        let good = named(b"\x00\x00\x03a.b");
        assert_eq!(read(&hello(&good)), Hello::Name("a.b".into()));
        assert_eq!(read(&hello(&named(b"\x00\x00\x04A.b."))), Hello::Name("a.b".into()));
        for (what, extensions) in [
            ("two extensions", [&good[..], &good].concat()),
            ("two names", named(b"\x00\x00\x03a.b\x00\x00\x03c.d")),
            ("another kind of name", named(b"\x01\x00\x03a.b")),
            ("no name", named(b"")),
            ("an empty name", named(b"\x00\x00\x00")),
            ("a name longer than its list", named(b"\x00\x00\x04a.b")),
            ("a NUL in the name", named(b"\x00\x00\x03a\x00b")),
            ("a name that is no ASCII", named("\u{0}\u{0}\u{2}é".as_bytes())),
            ("half an extension", vec![0]),
            ("an extension longer than all", vec![0, 5, 0, 1]),
        ] {
            assert_eq!(read(&hello(&extensions)), Hello::Broken, "{what}");
        }
        // Longer than anybody's.
        assert_eq!(read(&[22, 3, 1, 1, 0, 1, 0, 0x30, 1, 3, 3]), Hello::Broken);
        // Something else in the middle of one.
        let real = split(&hello(&good), 20);
        let mut bytes = real;
        bytes[25] = 23;
        assert_eq!(read(&bytes), Hello::Broken);
    }

    #[test]
    fn no_bytes_do_harm() {
        let mut seed = Seeded(0x5eed_0009);
        let real = real();
        for round in 0..40_000 {
            let mut bytes = real[round % real.len()].1.clone();
            for _ in 0..1 + seed.below(4) {
                let at = seed.below(bytes.len());
                bytes[at] = seed.byte();
            }
            bytes.truncate(seed.below(bytes.len() * 2));
            if let Hello::Name(name) = read(&bytes) {
                assert!(name.len() <= 253 && name.is_ascii(), "{name}");
            }
        }
    }
}
