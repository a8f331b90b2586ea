use super::*;
use std::collections::VecDeque;

/// Obeys `say`, with the text that is to be said, and `long`.
struct Parrot;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Words {
    text: String,
}

impl Commanded for Parrot {
    fn obey(&mut self, request: &Request) -> Result<Value, Refusal> {
        match request.name.as_str() {
            "say" => Ok(Value::String(request.arguments::<Words>()?.text)),
            "long" => Ok(Value::String("x".repeat(4 << 20))),
            _ => Err(Refusal::unknown(request, &["say", "long"])),
        }
    }
}

fn answered(line: &str) -> Value {
    let answer = answer(line.as_bytes(), &mut Parrot);
    assert!(answer.ends_with('\n') && answer.trim_end().lines().count() == 1, "{answer}");
    serde_json::from_str(&answer).unwrap()
}

fn kind(line: &str) -> Value {
    answered(line)["error"]["kind"].clone()
}

#[test]
fn a_request_is_answered_by_the_name_it_has() {
    let answer = answered(r#"{"id": 7, "request": "say", "text": "a\u001b\u202e"}"#);
    assert_eq!(answer, serde_json::json!({ "id": 7, "result": "a\u{1b}\u{202e}" }));
    let raw = super::answer(r#"{"request":"say","text":"a\u202e"}"#.as_bytes(), &mut Parrot);
    assert_eq!(raw, "{\"result\":\"a\\u202e\"}\n");
    assert_eq!(answered(r#"{"request":"sing","id":"x"}"#)["id"], "x");
}

#[test]
fn what_is_not_a_request_is_refused_with_its_reason() {
    for line in ["x", "[]", "7", "{", "{}", r#"{"request":7}"#, "\"say\"", "{} {}"] {
        assert_eq!(kind(line), "malformed", "{line}");
    }
    for id in ["null", "[1]", "{}", "true"] {
        assert_eq!(kind(&format!(r#"{{"request":"say","text":"","id":{id}}}"#)), "malformed", "{id}");
    }
    let id = "x".repeat(MAX_ID + 1);
    assert_eq!(kind(&format!(r#"{{"request":"say","text":"","id":"{id}"}}"#)), "malformed");
    // Nothing nests without end.
    assert_eq!(kind(&format!(r#"{{"request":{}"#, "[".repeat(MAX_LINE - 20))), "malformed");
    assert_eq!(kind(r#"{"request":"say","request":"long"}"#), "malformed");
    assert_eq!(kind(r#"{"request":"say","text":"a","text":"b"}"#), "malformed");
    assert_eq!(kind(r#"{"request":"sing"}"#), "unknown-request");
    for arguments in [r#""text":7"#, r#""txt":"a""#, r#""text":"a","loud":true"#] {
        assert_eq!(kind(&format!(r#"{{"request":"say",{arguments}}}"#)), "invalid", "{arguments}");
    }
}

/// Our end of a connection, and the client's, which does not wait either.
fn client(now: Instant) -> (Client, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Client::new(ours, now), theirs)
}

fn lines_at(mut theirs: &UnixStream) -> VecDeque<Value> {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(got @ 1..) = theirs.read(&mut buffer) {
        text.extend_from_slice(&buffer[..got]);
    }
    String::from_utf8(text).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn lines_come_in_any_pieces_and_are_answered_one_a_turn() {
    let now = Instant::now();
    let (mut ours, mut theirs) = client(now);
    theirs.write_all(b"\n  \n{\"request\":\"say\",").unwrap();
    assert!(ours.turn(now, &mut Parrot) && lines_at(&theirs).is_empty());
    assert_eq!(ours.deadline(), Some(now + PATIENCE));
    theirs
        .write_all(
            b"\"text\":\"1\"}\n{\"request\":\"say\",\"text\":\"2\"}\n{\"request\":\"say\",\"text\":\"3\"}",
        )
        .unwrap();
    assert!(ours.turn(now, &mut Parrot) && ours.has_more());
    assert_eq!(lines_at(&theirs), [serde_json::json!({"result":"1"})]);
    assert!(ours.turn(now, &mut Parrot));
    assert_eq!(lines_at(&theirs), [serde_json::json!({"result":"2"})]);
    // The last line needs no end, and nothing is owed after it.
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(!ours.has_more());
    assert!(!ours.turn(now, &mut Parrot));
    assert_eq!(lines_at(&theirs), [serde_json::json!({"result":"3"})]);
}

#[test]
fn a_line_without_end_is_refused_and_no_more_of_it_is_kept() {
    let now = Instant::now();
    let (mut ours, mut theirs) = client(now);
    let mut turns = 0;
    let mut sent = 0;
    loop {
        sent += theirs.write(&[b'x'; 8192]).unwrap_or(0);
        if !ours.turn(now, &mut Parrot) {
            break;
        }
        turns += 1;
        assert!(ours.input.len() <= MAX_LINE + 1 && turns < 1_000);
    }
    assert!(sent > MAX_LINE);
    assert_eq!(lines_at(&theirs)[0]["error"]["kind"], "malformed");
    // One of the greatest length is not too long.
    let (mut ours, mut theirs) = client(now);
    let line = format!(r#"{{"request":"say","text":"{}"}}"#, "y".repeat(MAX_LINE - 27));
    assert_eq!(line.len(), MAX_LINE);
    for part in format!("{line}\n").as_bytes().chunks(8192) {
        theirs.write_all(part).unwrap();
        assert!(ours.turn(now, &mut Parrot));
    }
    assert_eq!(lines_at(&theirs)[0]["result"].as_str().map(str::len), Some(MAX_LINE - 27));
}

#[test]
fn while_an_answer_is_not_read_nothing_more_is_taken() {
    let now = Instant::now();
    let later = now + PATIENCE / 2;
    let (mut ours, mut theirs) = client(now);
    theirs.write_all(b"{\"request\":\"long\"}\n{\"request\":\"long\"}\n").unwrap();
    assert!(ours.turn(now, &mut Parrot));
    let waits = ours.output.len();
    assert!(waits > 1 << 20 && !ours.has_more());
    assert!(ours.turn(later, &mut Parrot) && ours.output.len() == waits);
    assert_eq!(ours.deadline(), Some(now + PATIENCE));
    // It reads: the rest comes, then the next answer.
    let mut answers = 0;
    let mut buffer = vec![0; 1 << 20];
    while answers < 2 {
        while let Ok(got @ 1..) = theirs.read(&mut buffer) {
            answers += buffer[..got].iter().filter(|&&b| b == b'\n').count();
        }
        assert!(ours.turn(later, &mut Parrot));
    }
    assert!(ours.output.is_empty() && ours.deadline().is_none());
    drop(theirs);
    assert!(!ours.turn(later, &mut Parrot));
}

#[test]
fn who_owes_something_for_too_long_is_closed_and_who_is_silent_is_not() {
    let now = Instant::now();
    let mut theirs = Vec::new();
    let mut clients: Vec<Client> =
        ["{", "", "{\"request\":\"long\"}\n", "{\"request\":\"say\",\"text\":\"a\"}\n"]
            .into_iter()
            .map(|said| {
                let (mut ours, mut their) = client(now);
                their.write_all(said.as_bytes()).unwrap();
                assert!(ours.turn(now, &mut Parrot));
                theirs.push(their);
                ours
            })
            .collect();
    // Half a line more is no whole line.
    theirs[0].write_all(b" ").unwrap();
    assert!(clients[0].turn(now + PATIENCE / 2, &mut Parrot));
    expire(&mut clients, now + PATIENCE - Duration::from_millis(1));
    assert_eq!(clients.len(), 4);
    expire(&mut clients, now + PATIENCE);
    assert_eq!(clients.len(), 2);
    expire(&mut clients, now + 1_000 * PATIENCE);
    assert_eq!(clients.len(), 2);
}

/// A directory that goes.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("rootlet-control-{}-{name}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn ask(mut stream: &UnixStream, line: &str) -> String {
    stream.write_all(line.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        answer.extend(byte);
    }
    String::from_utf8(answer).unwrap()
}

const SAY: &str = "{\"request\":\"say\",\"text\":\"hi\"}\n";

#[test]
fn whoever_is_silent_for_the_longest_gives_way() {
    let dir = Dir::new("many");
    let path = dir.0.join("control");
    let served = ControlSocket::bind(&path, Apart::User).unwrap().serve(Parrot).unwrap();
    let connect = || {
        let client = UnixStream::connect(&path).unwrap();
        // What hangs is to fail.
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    };
    let mut clients: Vec<UnixStream> = (0..MAX_CLIENTS).map(|_| connect()).collect();
    // The first one says something last.
    for client in clients.iter().rev() {
        assert!(ask(client, SAY).contains("hi"));
    }
    let late = connect();
    assert!(ask(&late, SAY).contains("hi"));
    let silent = clients.pop().unwrap();
    assert_eq!((&silent).read(&mut [0]).unwrap(), 0);
    for client in &clients {
        assert!(ask(client, SAY).contains("hi"));
    }
    drop(served);
    assert!(!path.exists());
    // The thread ends, and with it the connections.
    assert_eq!((&late).read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_directory_in_which_others_may_write_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = Dir::new("shared");
    let set = |mode| std::fs::set_permissions(&dir.0, std::fs::Permissions::from_mode(mode)).unwrap();
    let path = dir.0.join("control");
    for mode in [0o777, 0o770, 0o702] {
        set(mode);
        let error = ControlSocket::bind(&path, Apart::User).unwrap_err().to_string();
        assert!(error.contains("others may put another one in its place"), "{error}");
    }
    for mode in [0o1777, 0o755, 0o700] {
        set(mode);
        drop(ControlSocket::bind(&path, Apart::User).unwrap());
    }
    let socket = ControlSocket::bind(&path, Apart::User).unwrap();
    let error = ControlSocket::bind(&path, Apart::User).unwrap_err().to_string();
    assert!(error.contains("something is there already"), "{error}");
    drop(socket);
    assert!(!path.exists());
}
