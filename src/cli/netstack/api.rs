//! The API socket: slirp4netns's commands, one JSON object to a connection.
//!
//! A connection says one thing: the reply is sent when the object is complete, and the connection closed. One that does not
//! get there waits for others to come; the longest waiting gives way to the one that would be too many. Texts of errors are
//! slirp4netns's, which callers may compare; what is known besides is beside them (`cause`).

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use netstack::{Control, PortId, Protocol, Publish, PublishedPort};
use serde::Serialize;
use serde_json::Value;

use crate::cli::output::Failure;
use crate::error::errno_of;
use crate::local_socket::LocalListener;

/// A request must be shorter than this.
const MAX_REQUEST: usize = 4096;
/// Pieces of [`MAX_REQUEST`] that are read behind one.
const MAX_DRAINED: usize = 64;
/// Connections that have not said what they want.
const MAX_CLIENTS: usize = 16;

/// The socket and who has connected.
pub(super) struct Api {
    listener: LocalListener,
    clients: VecDeque<Client>,
    /// Where ports lead if nothing else is said.
    guest: Ipv4Addr,
}

struct Client {
    stream: UnixStream,
    request: Vec<u8>,
}

impl Api {
    /// Listens at `path`. What a server that is gone has left there is replaced.
    pub(super) fn bind(path: &Path, guest: Ipv4Addr) -> Result<Self, Failure> {
        let listener = LocalListener::bind(path).map_err(|error| {
            let cause = errno_of(&error).map_or_else(|| error.to_string(), crate::error::errno_text);
            Failure::text(format!("cannot listen at the API socket {}", path.display())).cause(cause)
        })?;
        Ok(Self { listener, clients: VecDeque::new(), guest })
    }

    /// What to wait for.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.listener.event().into_iter().chain(self.clients.iter().map(|client| client.stream.as_fd()))
    }

    /// For how long to wait at most; `None`: for ever.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.listener.patience()
    }

    /// Does what can be done now.
    pub(super) fn serve(&mut self, control: &Control) {
        let guest = self.guest;
        self.clients.retain_mut(|client| client.serve(control, guest));
        for stream in self.listener.accept() {
            let mut client = Client { stream, request: Vec::new() };
            if !client.serve(control, guest) {
                continue;
            }
            if self.clients.len() >= MAX_CLIENTS {
                self.clients.pop_front();
            }
            self.clients.push_back(client);
        }
    }
}

impl Client {
    /// Whether it has more to say.
    fn serve(&mut self, control: &Control, guest: Ipv4Addr) -> bool {
        let mut buffer = [0; MAX_REQUEST];
        loop {
            let ended = match self.stream.read(&mut buffer) {
                Ok(got) => {
                    self.request.extend(buffer.iter().take(got));
                    got == 0
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return false,
            };
            let reply = match parse(&self.request) {
                _ if self.request.len() >= MAX_REQUEST => refusal("bad request: too large message", None),
                Parsed::Value(request) => answer(control, guest, &request),
                Parsed::Incomplete if !ended => continue,
                Parsed::Incomplete | Parsed::Nonsense => refusal("bad request: cannot parse JSON", None),
            };
            // A few hundred bytes for each port fit into a socket's buffer; for a list that does not, the
            // reader is waited for, but not for ever.
            let patience = std::time::Duration::from_secs(1);
            let sent = self
                .stream
                .set_nonblocking(false)
                .and_then(|()| self.stream.set_write_timeout(Some(patience)))
                .and_then(|()| self.stream.write_all(reply.as_bytes()));
            if let Err(error) = sent {
                tracing::debug!(%error, "an answer of the API socket was not taken");
            }
            self.drain();
            return false;
        }
    }
}

impl Client {
    /// Reads what came behind the request: closed over it, the connection would be reset and the answer lost.
    fn drain(&mut self) {
        let mut buffer = [0; MAX_REQUEST];
        if self.stream.set_nonblocking(true).is_ok() {
            // Whoever goes on without end has no claim to the answer.
            for _ in 0..MAX_DRAINED {
                if !matches!(self.stream.read(&mut buffer), Ok(got) if got > 0) {
                    break;
                }
            }
        }
    }
}

enum Parsed {
    Value(Value),
    Incomplete,
    Nonsense,
}

/// The first JSON value; what follows it does not count.
fn parse(text: &[u8]) -> Parsed {
    match serde_json::Deserializer::from_slice(text).into_iter().next() {
        Some(Ok(value)) => Parsed::Value(value),
        Some(Err(error)) if !error.is_eof() => Parsed::Nonsense,
        Some(Err(_)) | None => Parsed::Incomplete,
    }
}

#[derive(Serialize)]
struct Refusal<'a> {
    error: Description<'a>,
}

#[derive(Serialize)]
struct Description<'a> {
    desc: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
}

fn refusal(desc: &str, cause: Option<String>) -> String {
    text(&Refusal { error: Description { desc, cause } })
}

#[derive(Serialize)]
struct Done<T> {
    r#return: T,
}

#[derive(Serialize)]
struct Nothing {}

#[derive(Serialize)]
struct Added {
    id: u64,
}

#[derive(Serialize)]
struct List {
    entries: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    id: u64,
    proto: &'static str,
    host_addr: String,
    host_port: u16,
    guest_addr: String,
    guest_port: u16,
}

fn text(value: &impl Serialize) -> String {
    // Structs of numbers and text: there is nothing that JSON could not hold.
    serde_json::to_string(value).unwrap_or_default()
}

/// The answer to a request.
fn answer(control: &Control, guest: Ipv4Addr, request: &Value) -> String {
    let Some(request) = request.as_object() else {
        return refusal("bad request: json_object() failed", None);
    };
    let Some(execute) = request.get("execute").and_then(Value::as_str) else {
        return refusal("bad request: no execute found", None);
    };
    let none = Value::Null;
    let arguments = request.get("arguments").unwrap_or(&none);
    match execute {
        "add_hostfwd" => match publish(arguments, guest) {
            Ok(port) => match control.publish(&port) {
                Ok(port) => text(&Done { r#return: Added { id: port.id.0 } }),
                Err(error) => {
                    let failure = crate::cli::output::Failure::new(&error).cause_of_port(&error);
                    let cause = std::iter::once(failure.text).chain(failure.causes).collect::<Vec<_>>();
                    refusal("bad request: add_hostfwd: slirp_add_hostfwd failed", Some(cause.join(": ")))
                }
            },
            Err(argument) => refusal(&format!("bad request: add_hostfwd: bad arguments.{argument}"), None),
        },
        // Unlike the others without "return", as slirp4netns has it.
        "list_hostfwd" => match control.published() {
            Ok(ports) => text(&List { entries: ports.iter().map(|port| entry(port, guest)).collect() }),
            Err(error) => refusal("bad request: list_hostfwd: failed", Some(error.to_string())),
        },
        "remove_hostfwd" => {
            let id = arguments.get("id").and_then(Value::as_u64);
            match id.map(|id| control.unpublish(PortId(id))) {
                Some(Ok(Some(_))) => text(&Done { r#return: Nothing {} }),
                Some(Ok(None)) | None => refusal("bad request: remove_hostfwd: bad arguments.id", None),
                Some(Err(error)) => {
                    let desc = "bad request: remove_hostfwd: slirp_remove_hostfwd failed";
                    refusal(desc, Some(error.to_string()))
                }
            }
        }
        _ => refusal("bad request: unknown execute", None),
    }
}

fn entry(port: &PublishedPort, guest: Ipv4Addr) -> Entry {
    let asked = &port.asked;
    Entry {
        id: port.id.0,
        proto: match asked.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        },
        host_addr: asked.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()).to_string(),
        host_port: asked.host_port,
        guest_addr: asked.inside_ip.unwrap_or(guest.into()).to_string(),
        guest_port: asked.inside_port,
    }
}

/// The port that `add_hostfwd` asks for, or the argument that is wrong.
fn publish(arguments: &Value, guest: Ipv4Addr) -> Result<Publish, &'static str> {
    let protocol = match arguments.get("proto").and_then(Value::as_str) {
        Some("tcp") => Protocol::Tcp,
        Some("udp") => Protocol::Udp,
        _ => return Err("proto"),
    };
    let address = |name: &'static str, default: Ipv4Addr| match arguments.get(name) {
        None => Ok(default),
        // As Podman says it.
        Some(value) if value.as_str() == Some("") => Ok(default),
        Some(value) => value.as_str().and_then(|text| text.parse::<Ipv4Addr>().ok()).ok_or(name),
    };
    let port = |name: &'static str| {
        let number = arguments.get(name).and_then(Value::as_u64);
        number.and_then(|number| u16::try_from(number).ok()).filter(|port| *port != 0).ok_or(name)
    };
    let host_ip = address("host_addr", Ipv4Addr::UNSPECIFIED)?;
    let host_port = port("host_port")?;
    let inside = address("guest_addr", guest)?;
    let inside_port = port("guest_port")?;
    Ok(Publish {
        host_ip: Some(host_ip.into()),
        host_port,
        // The guest's own address: it may listen on IPv6, too.
        inside_ip: (inside != guest && !inside.is_unspecified()).then_some(inside.into()),
        inside_port,
        protocol,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_checked_one_by_one() {
        let guest = Ipv4Addr::new(10, 0, 2, 100);
        let ask = |text: &str| publish(&serde_json::from_str(text).unwrap(), guest);
        let port = ask(r#"{"proto":"udp","host_addr":"127.0.0.1","host_port":53,"guest_addr":"10.0.2.101","guest_port":54}"#).unwrap();
        assert_eq!((port.host_port, port.inside_port, port.protocol), (53, 54, Protocol::Udp));
        assert_eq!(port.inside_ip, Some("10.0.2.101".parse().unwrap()));
        let port =
            ask(r#"{"proto":"tcp","host_port":80,"guest_addr":"10.0.2.100","guest_port":81}"#).unwrap();
        assert_eq!((port.host_ip, port.inside_ip), (Some(Ipv4Addr::UNSPECIFIED.into()), None));
        let text = r#"{"proto":"tcp","host_addr":"","host_port":80,"guest_addr":"","guest_port":81}"#;
        assert_eq!(ask(text), Ok(port));
        for (text, wrong) in [
            ("null", "proto"),
            (r#"{"proto":"sctp"}"#, "proto"),
            (r#"{"proto":"tcp","host_addr":"::1"}"#, "host_addr"),
            (r#"{"proto":"tcp","host_port":65536}"#, "host_port"),
            (r#"{"proto":"tcp","host_port":"80"}"#, "host_port"),
            (r#"{"proto":"tcp","host_port":0}"#, "host_port"),
            (r#"{"proto":"tcp","host_port":80,"guest_addr":7}"#, "guest_addr"),
            (r#"{"proto":"tcp","host_port":80}"#, "guest_port"),
        ] {
            assert_eq!(ask(text), Err(wrong), "{text}");
        }
    }

    #[test]
    fn a_request_is_complete_when_its_object_is() {
        assert!(matches!(parse(b"{\"execute\": \"list"), Parsed::Incomplete));
        assert!(matches!(parse(b" "), Parsed::Incomplete));
        assert!(matches!(parse(b"x"), Parsed::Nonsense));
        assert!(matches!(parse(b"{\"execute\": 1} and more"), Parsed::Value(_)));
        // Nothing nests without end.
        assert!(matches!(parse("[".repeat(4000).as_bytes()), Parsed::Nonsense));
    }
}
