//! Commands for something that runs, over a unix socket: one JSON object a line, one answer a line.
//!
//! ```text
//!  client  ── {"id":1,"request":"stats"} ──>  this thread  ── method call ──>  what is commanded
//!          <── {"id":1,"result":{…}} ───────
//! ```
//!
//! Here is what is the same whatever is commanded: where the socket may be (`place`), who may connect (`peer`), lines,
//! limits, the thread. What requests there are says a `Commanded`, for the network `network`. It is outside the sandbox: the
//! process, its thread, its namespaces.
//!
//! A client says one thing after the other and is answered in this order. While it leaves an answer unread nothing more is read
//! from it, so each client has at most one line and one answer here. `MAX_CLIENTS` are kept; then the one that has been
//! silent for the longest gives way, so nobody can keep others out. Half a line, or an answer that is not read, is waited for
//! `PATIENCE` long; a client that says nothing may do so for ever. Nothing of this waits on the thread of what is
//! commanded, and nothing wakes up without a reason.
//!
//! The thread is not waited for when it is told to end: what it commands may hang.

pub(crate) mod network;
mod peer;
mod place;

use std::fmt;
use std::io::{ErrorKind, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub(crate) use self::peer::Apart;
use self::peer::{Peers, Stranger};
use self::place::Unsafe;
use crate::error::{errno_of, errno_text};
use crate::local_socket::{LocalListener, SocketFile};

/// Longest request in bytes, without the end of the line.
const MAX_LINE: usize = 64 << 10;
/// Clients at once.
const MAX_CLIENTS: usize = 16;
/// How long half a line may take to be whole, and an answer to be read.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes read from a client before others get their turn.
const TURN: usize = 16 << 10;
/// Longest name that a client may give to a request.
const MAX_ID: usize = 64;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen at the control socket {path}: {what}")]
pub struct ControlError {
    path: PathBuf,
    what: &'static str,
    #[source]
    source: Option<std::io::Error>,
}

/// What obeys.
pub(crate) trait Commanded: Send + 'static {
    /// The result of a request. It may wait for an answer, but not for a client.
    fn obey(&mut self, request: &Request) -> Result<Value, Refusal>;
}

/// What a client wants.
#[derive(Debug)]
pub(crate) struct Request {
    /// The word.
    pub(crate) name: String,
    arguments: Map<String, Value>,
}

impl Request {
    /// What it says besides. A type that denies unknown fields keeps a slip of the pen from being ignored.
    pub(crate) fn arguments<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        T::deserialize(Value::Object(self.arguments.clone()))
            .map_err(|error| Refusal::new(Kind::Invalid, error.to_string()))
    }
}

/// Why a request is not obeyed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Refusal {
    kind: Kind,
    text: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    causes: Vec<String>,
}

/// For programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// Not a request: no JSON object, too long, no word.
    Malformed,
    /// This client may not ask for anything.
    NotAllowed,
    /// The word is not known.
    UnknownRequest,
    /// An argument is missing, unknown, or not what it should be.
    Invalid,
    /// What it is about is not there.
    NotFound,
    /// It was tried, and failed.
    Failed,
}

impl Refusal {
    pub(crate) fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), causes: Vec::new() }
    }

    /// From an error and those below it.
    pub(crate) fn of(kind: Kind, error: &dyn std::error::Error) -> Self {
        let mut refusal = Self::new(kind, error.to_string());
        let mut below = error.source();
        while let Some(cause) = below {
            let text = crate::error::own_errno(cause).map_or_else(|| cause.to_string(), errno_text);
            refusal.causes.push(text);
            below = cause.source();
        }
        refusal
    }

    /// With a cause below the others.
    pub(crate) fn cause(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    /// A word that nobody knows.
    pub(crate) fn unknown(request: &Request, known: &[&str]) -> Self {
        Self::new(Kind::UnknownRequest, format!("there is no request {:?}", request.name))
            .cause(format!("those known are {}", known.join(", ")))
    }
}

/// A socket at which clients wait until it is served. Its file goes with it.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: LocalListener,
    peers: Peers,
}

/// A socket that is served. Dropped, it is no more.
#[derive(Debug)]
pub(crate) struct Served {
    /// It goes at once, whatever the thread is doing.
    _file: Option<SocketFile>,
    /// Closed, it ends the thread, and with it the connections.
    _end: PipeWriter,
}

impl ControlSocket {
    /// Listens at `path`, an absolute one; `apart` says who is of the sandbox.
    ///
    /// # Errors
    ///
    /// When something else is there, or others could put something else there.
    pub(crate) fn bind(path: &Path, apart: Apart) -> Result<Self, ControlError> {
        let failed = |what: &'static str, source: Option<std::io::Error>| ControlError {
            path: path.to_owned(),
            what,
            source,
        };
        // Who may replace the socket gets the commands, and may answer what he wants.
        place::check(path.parent().unwrap_or(Path::new("/"))).map_err(|error| match error {
            Unsafe::Unknown(_, source) => failed("its directory cannot be looked at", Some(source)),
            other => {
                let what = "others may put another one in its place: choose a directory of yours";
                failed(what, Some(std::io::Error::other(other)))
            }
        })?;
        let peers = Peers::like_us(apart).map_err(|error| failed("/proc is missing", Some(error)))?;
        let listener = LocalListener::bind(path).map_err(|error| match errno_of(&error) {
            Some(Errno::ENAMETOOLONG) => failed("the path of a socket has 107 bytes at most", Some(error)),
            Some(Errno::EADDRINUSE) => failed(
                "something is there already, and it is not a socket of yours that is dead",
                Some(error),
            ),
            Some(Errno::EINVAL) => failed(
                "a dead socket of yours is there, and this file system cannot exchange it: remove it",
                Some(error),
            ),
            _ => failed("the socket cannot be made", Some(error)),
        })?;
        Ok(Self { listener, peers })
    }

    /// Answers from now on, in a thread.
    ///
    /// # Errors
    ///
    /// When the thread or a descriptor cannot be had.
    pub(crate) fn serve(self, commanded: impl Commanded) -> std::io::Result<Served> {
        let (ended, end) = std::io::pipe()?;
        let Self { mut listener, peers } = self;
        let file = listener.take_file();
        let server = Server { listener, peers, ended, clients: Vec::new(), commanded, told: false };
        std::thread::Builder::new().name("control".into()).spawn(move || server.run())?;
        Ok(Served { _file: file, _end: end })
    }
}

struct Server<C> {
    listener: LocalListener,
    peers: Peers,
    ended: PipeReader,
    clients: Vec<Client>,
    commanded: C,
    /// Somebody who may not connect has been logged. Once: the payload may try as often as it likes.
    told: bool,
}

impl<C: Commanded> Server<C> {
    fn run(mut self) {
        loop {
            let now = Instant::now();
            expire(&mut self.clients, now);
            match self.wait(now) {
                Ok(false) => {}
                Ok(true) => return,
                Err(errno) => {
                    tracing::warn!(%errno, "the control socket is not served any more");
                    return;
                }
            }
            let now = Instant::now();
            let commanded = &mut self.commanded;
            self.clients.retain_mut(|client| client.turn(now, commanded));
            self.accept(now);
        }
    }

    /// Waits until there is something to do; whether it is to end.
    fn wait(&self, now: Instant) -> Result<bool, Errno> {
        let mut fds = vec![PollFd::new(self.ended.as_fd(), PollFlags::empty())];
        fds.extend(self.listener.event().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        fds.extend(self.clients.iter().map(|client| {
            let flags = if client.output.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
            PollFd::new(client.stream.as_fd(), flags)
        }));
        let patience = if self.clients.iter().any(Client::has_more) {
            Some(Duration::ZERO)
        } else {
            let deadlines = self.clients.iter().filter_map(Client::deadline);
            // poll(2) counts whole milliseconds.
            let left = deadlines.map(|at| at.saturating_duration_since(now) + Duration::from_millis(1));
            left.chain(self.listener.patience()).min()
        };
        let timeout = patience
            .map_or(PollTimeout::NONE, |left| PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(fds.first().and_then(PollFd::any).unwrap_or(true))
    }

    fn accept(&mut self, now: Instant) {
        for stream in self.listener.accept() {
            if let Err(stranger) = self.peers.check(&stream) {
                if !std::mem::replace(&mut self.told, true) {
                    tracing::warn!(reason = %stranger, "a connection to the control socket is refused");
                }
                send_away(&stream, stranger);
                continue;
            }
            if self.clients.len() >= MAX_CLIENTS
                && let Some((silent, _)) =
                    self.clients.iter().enumerate().min_by_key(|(_, client)| client.heard)
            {
                self.clients.swap_remove(silent);
            }
            self.clients.push(Client::new(stream, now));
        }
    }
}

/// Closes the connections that have owed something for too long.
fn expire(clients: &mut Vec<Client>, now: Instant) {
    clients.retain(|client| client.deadline().is_none_or(|deadline| now < deadline));
}

/// Says why, if there is room for it, which there is in a new connection.
fn send_away(mut stream: &UnixStream, stranger: Stranger) {
    let line = line_of(&Answer { id: None, says: Says::Error(Refusal::of(Kind::NotAllowed, &stranger)) });
    stream.write_all(line.as_bytes()).ok();
}

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// When it last said something whole.
    heard: Instant,
    /// Since when it owes us the rest of a line, or to read an answer.
    owes: Option<Instant>,
    /// It says nothing more.
    ended: bool,
    /// What it says is not listened to any more.
    hopeless: bool,
}

impl Client {
    fn new(stream: UnixStream, now: Instant) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            heard: now,
            owes: None,
            ended: false,
            hopeless: false,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.owes.map(|since| since + PATIENCE)
    }

    /// There is something to answer that was read already.
    fn has_more(&self) -> bool {
        self.output.is_empty() && (self.input.contains(&b'\n') || (self.ended && !self.input.is_empty()))
    }

    /// Does what can be done now, one request at most; whether the client stays.
    fn turn(&mut self, now: Instant, commanded: &mut impl Commanded) -> bool {
        if !self.write() {
            return false;
        }
        if !self.output.is_empty() {
            return true;
        }
        if self.hopeless || !self.read() {
            return false;
        }
        let whole = self.take_line();
        if whole.is_some() || self.input.is_empty() {
            self.owes = None;
        }
        if let Some(line) = whole {
            self.heard = now;
            self.output = answer(&line, commanded).into_bytes();
        } else if self.input.len() > MAX_LINE {
            let refusal = Refusal::new(Kind::Malformed, format!("a request has {MAX_LINE} bytes at most"));
            self.output = line_of(&Answer { id: None, says: Says::Error(refusal) }).into_bytes();
            self.hopeless = true;
        }
        if !self.write() {
            return false;
        }
        if !self.input.is_empty() || !self.output.is_empty() {
            self.owes.get_or_insert(now);
        }
        !self.output.is_empty() || !(self.hopeless || (self.ended && self.input.is_empty()))
    }

    /// Whether the client can still be talked to.
    fn read(&mut self) -> bool {
        if self.ended || self.input.contains(&b'\n') {
            return true;
        }
        let mut buffer = [0; TURN];
        let room = (MAX_LINE + 1).saturating_sub(self.input.len()).min(TURN);
        let Some(buffer) = buffer.get_mut(..room) else { return true };
        match (&self.stream).read(buffer) {
            Ok(got) => {
                self.input.extend(buffer.iter().take(got));
                self.ended = got == 0;
                true
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// Sends what waits, as far as there is room; whether the client can still be talked to.
    fn write(&mut self) -> bool {
        while !self.output.is_empty() {
            match (&self.stream).write(&self.output) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        // Most answers are short; the room of a long one is not kept.
        self.output.shrink_to(TURN);
        true
    }

    /// The next line that says something. The last one needs no end.
    fn take_line(&mut self) -> Option<Vec<u8>> {
        loop {
            let end = match self.input.iter().position(|&b| b == b'\n') {
                Some(at) => at + 1,
                None if self.ended && !self.input.is_empty() => self.input.len(),
                None => return None,
            };
            let line: Vec<u8> = self.input.drain(..end).collect();
            if !line.trim_ascii().is_empty() {
                return Some(line);
            }
        }
    }
}

#[derive(Serialize)]
struct Answer {
    /// As the request had it.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
    #[serde(flatten)]
    says: Says,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Says {
    Result(Value),
    Error(Refusal),
}

fn line_of(answer: &Answer) -> String {
    // What is in it has text for keys. Names from outside are in it, and people read it on terminals.
    let mut line = crate::log::escape_json(&serde_json::to_string(answer).unwrap_or_default()).into_owned();
    line.push('\n');
    line
}

fn answer(line: &[u8], commanded: &mut impl Commanded) -> String {
    let (id, outcome) = match parse(line) {
        Ok((id, request)) => {
            let outcome = commanded.obey(&request);
            tracing::debug!(request = %request.name, obeyed = outcome.is_ok(), "a command");
            (id, outcome)
        }
        Err((id, refusal)) => (id, Err(refusal)),
    };
    line_of(&Answer { id, says: outcome.map_or_else(Says::Error, Says::Result) })
}

/// A JSON object in which no field is there twice: the reader would not know which one counts.
struct Fields(Map<String, Value>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Once;
        impl<'de> Visitor<'de> for Once {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Fields, A::Error> {
                let mut fields = Map::new();
                while let Some((name, value)) = from.next_entry::<String, Value>()? {
                    if fields.contains_key(&name) {
                        return Err(serde::de::Error::custom(format_args!(
                            "the field {name:?} is there twice"
                        )));
                    }
                    fields.insert(name, value);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Once)
    }
}

/// The request of a line, with what the client calls it.
fn parse(line: &[u8]) -> Result<(Option<Value>, Request), (Option<Value>, Refusal)> {
    let malformed = |text: String| Refusal::new(Kind::Malformed, text);
    let Fields(mut arguments) = serde_json::from_slice(line)
        .map_err(|error| (None, malformed(format!("this is no request in JSON: {error}"))))?;
    let id = match arguments.remove("id") {
        None => None,
        Some(Value::String(id)) if id.len() > MAX_ID => {
            return Err((None, malformed(format!("an id has {MAX_ID} bytes at most"))));
        }
        Some(id @ (Value::String(_) | Value::Number(_))) => Some(id),
        Some(_) => return Err((None, malformed("an id is a number or a string".into()))),
    };
    match arguments.remove("request") {
        Some(Value::String(name)) => Ok((id, Request { name, arguments })),
        _ => Err((id, malformed("the field \"request\" must say what is wanted".into()))),
    }
}

#[cfg(test)]
mod tests;
