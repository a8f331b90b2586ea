//! `--network-control`: commands to the network of a sandbox that runs.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::{Home, Lab, Running, lab, need, uid};

/// A client, which waits for its answers.
pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    pub(crate) fn at(path: &Path) -> Self {
        Self(BufReader::new(UnixStream::connect(path).unwrap()))
    }

    /// The next answer; null if the connection is over.
    pub(crate) fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        if line.is_empty() { Value::Null } else { serde_json::from_str(&line).unwrap() }
    }

    pub(crate) fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.0.get_mut(), "{request}").unwrap();
        self.answer()
    }

    /// What a request that is obeyed gives.
    pub(crate) fn result(&mut self, request: Value) -> Value {
        let mut answer = self.ask(&request);
        assert!(answer.get("error").is_none(), "{request}: {answer}");
        answer["result"].take()
    }

    /// Kind and text of a refusal, causes included.
    fn refusal(&mut self, request: Value) -> (String, String) {
        let answer = self.ask(&request);
        let error = answer.get("error").unwrap_or_else(|| panic!("{request}: {answer}"));
        (error["kind"].as_str().unwrap().to_owned(), error.to_string())
    }
}

/// A server that sends back what it gets, at port 8080 of every address inside. It says `ready`.
const ECHO: &str = "
import socket, threading
s = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)
def serve(c):
    while data := c.recv(65536): c.sendall(data)
    c.close()
print('ready', flush=True)
while True:
    threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";

/// Connects to `NAME PORT` of each line of its input, and says with the line's number how that went. It waits in connect(2):
/// with a time-out Python asks for the error once poll(2) tells of one, which over IPv4 may be before it is there.
const CONNECT: &str = "
import errno, socket, sys
print('ready', flush=True)
for number, line in enumerate(sys.stdin):
    try:
        to, port = line.split()
        socket.create_connection((to, int(port))).close()
        print(number, 'reached', flush=True)
    except OSError as e:
        print(number, errno.errorcode.get(e.errno, e), flush=True)
";

fn controlled(home: &Home, options: &[&str], script: &str) -> (PathBuf, Running) {
    let path = home.path("c");
    let option = format!("--network-control={}", path.display());
    let options = options.iter().copied().chain([option.as_str()]);
    let running = home.run(options, ["python3", "-c", script]).stdin_open().start();
    running.until_out("ready");
    (path, running)
}

fn end(running: Running) {
    running.signal(Signal::SIGTERM);
    running.finish().exits(143);
}

#[test]
fn ports_come_and_go() {
    let home = Home::new();
    let (path, running) = controlled(&home, &["-p", "127.0.0.1:0:8080"], ECHO);
    let mut client = Client::at(&path);
    let ports = client.result(json!({"request": "ports"}));
    assert_eq!(ports["ports"].as_array().unwrap().len(), 1, "{ports}");
    assert_eq!((&ports["ports"][0]["port"], &ports["ports"][0]["inside_port"]), (&json!(1), &json!(8080)));

    let added = client.result(json!({"request": "publish", "ports": "127.0.0.1:0:8080", "id": "a"}));
    let address: SocketAddr = added["ports"][0]["host"][0].as_str().unwrap().parse().unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"hello").unwrap();
    let mut got = [0; 5];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");

    let flows = client.result(json!({"request": "flows"}));
    let flow = &flows["flows"][0];
    assert_eq!((&flow["protocol"], &flow["direction"]), (&json!("tcp"), &json!("in")), "{flows}");
    assert_eq!((&flow["received_bytes"], &flow["sent_bytes"]), (&json!(5), &json!(5)), "{flows}");
    let stats = client.result(json!({"request": "stats"}));
    assert_eq!((&stats["tcp_in"], &stats["tcp_flows"]), (&json!(1), &json!(1)), "{stats}");
    // In parts.
    assert_eq!(client.result(json!({"request": "flows", "after": 1})), json!({"flows": []}));
    let first = client.result(json!({"request": "ports", "limit": 1}));
    assert_eq!((&first["next"], first["ports"].as_array().unwrap().len()), (&json!(1), 1), "{first}");
    let second = client.result(json!({"request": "ports", "limit": 1, "after": 1}));
    assert_eq!(second, added);

    // The connection stays, the port is free.
    let port = added["ports"][0]["port"].as_u64().unwrap();
    client.result(json!({"request": "unpublish", "port": port}));
    TcpListener::bind(address).unwrap();
    stream.write_all(b"again").unwrap();
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"again");
    assert_eq!(client.refusal(json!({"request": "unpublish", "port": port})).0, "not-found");
    assert_eq!(client.result(json!({"request": "ports"})), ports);
    end(running);
    assert_eq!(client.answer(), Value::Null);
    assert!(!path.exists());
}

#[test]
fn what_cannot_be_done_is_not_done_in_part() {
    let home = Home::new();
    let (path, running) = controlled(&home, &["--deny=192.0.2.1"], ECHO);
    let mut client = Client::at(&path);
    // The second port of the range is taken, by this process.
    let first = crate::common::free_ports(2);
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, first + 1)).unwrap();
    let range = format!("127.0.0.1:{first}-{}:1-2", first + 1);
    let (kind, text) = client.refusal(json!({"request": "publish", "ports": range}));
    assert!(kind == "failed" && text.contains("EADDRINUSE"), "{text}");
    assert!(text.contains(&format!("(pid {}) has it", std::process::id())), "{text}");
    assert_eq!(client.result(json!({"request": "ports"})), json!({"ports": []}));
    TcpListener::bind((Ipv4Addr::LOCALHOST, first)).unwrap();
    drop(taken);
    client.result(json!({"request": "publish", "ports": range}));
    assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, first)).is_err());

    let before = client.result(json!({"request": "rules"}));
    assert_eq!(before, json!({"allow": [], "deny": ["192.0.2.1"], "host_loopback": "none"}));
    for (wrong, part) in [
        (json!({"allow": ["any"], "deny": ["example.com"]}), "deny: "),
        (json!({"allow": ["any", "224.0.0.1"]}), "allow: "),
        (json!({"deny": [], "host_loopback": "http"}), "allow-host-loopback: "),
        (json!({"deny": [], "alow": ["any"]}), "unknown field"),
        (json!({"deny": "any"}), "expected a sequence"),
    ] {
        let mut request = wrong.clone();
        request["request"] = json!("set-rules");
        let (kind, text) = client.refusal(request);
        assert!(kind == "invalid" && text.contains(part), "{wrong}: {text}");
        assert_eq!(client.result(json!({"request": "rules"})), before, "{wrong}");
    }
    let set = json!({"request": "set-rules", "allow": ["tcp:any:80,443"], "host_loopback": "5432,8000-8009"});
    let after =
        json!({"allow": ["tcp:any:80,443"], "deny": ["192.0.2.1"], "host_loopback": "5432,8000-8009"});
    assert_eq!(client.result(set), after);

    let rates = client.result(json!({"request": "set-rates", "in": "10mbit", "out": "1m,burst=64k"}));
    let out = json!({"bytes_per_second": 1 << 20, "burst": 1 << 16});
    assert_eq!(rates, json!({"in": {"bytes_per_second": 1_250_000, "burst": null}, "out": out}));
    for wrong in [json!({"in": null, "out": "1"}), json!({"in": "in:1m"}), json!({"in": 7})] {
        let mut request = wrong.clone();
        request["request"] = json!("set-rates");
        assert_eq!(client.refusal(request).0, "invalid", "{wrong}");
        assert_eq!(client.result(json!({"request": "rates"})), rates, "{wrong}");
    }
    assert_eq!(client.result(json!({"request": "set-rates", "in": null})), json!({"in": null, "out": out}));
    for wrong in
        [json!({"ports": "80-70000:80"}), json!({"ports": "1-2000"}), json!({"ports": ""}), json!({})]
    {
        let mut request = wrong.clone();
        request["request"] = json!("publish");
        assert_eq!(client.refusal(request).0, "invalid", "{wrong}");
    }
    assert_eq!(client.refusal(json!({"request": "flows", "limit": 100_000})).0, "invalid");
    end(running);
}

#[test]
fn rules_hold_from_then_on() {
    let home = Home::new();
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let (path, mut running) = controlled(&home, &[], CONNECT);
    let mut client = Client::at(&path);
    let mut tries = 0;
    let mut try_once = |running: &mut Running, to: &str, port: u16, what: &str| {
        running.write(format!("{to} {port}\n"));
        running.until_out(&format!("{tries} {what}\n"));
        tries += 1;
    };
    let gateway = "host.containers.internal";
    try_once(&mut running, gateway, port, "EHOSTUNREACH");
    client.result(json!({"request": "set-rules", "host_loopback": port.to_string()}));
    try_once(&mut running, gateway, port, "reached");
    client.result(json!({"request": "set-rules", "host_loopback": "none"}));
    try_once(&mut running, gateway, port, "EHOSTUNREACH");
    if let Some(lab) = lab() {
        let world = lab.world.to_string();
        try_once(&mut running, &world, Lab::HTTP, "reached");
        client.result(json!({"request": "set-rules", "deny": [format!("tcp:{world}:1-100")]}));
        try_once(&mut running, &world, Lab::HTTP, "EHOSTUNREACH");
        client.result(json!({"request": "set-rules", "deny": []}));
        try_once(&mut running, &world, Lab::HTTP, "reached");
    }
    running.close_stdin();
    running.finish().ok();
}

#[test]
fn the_file_is_the_callers_alone_and_goes() {
    let home = Home::new();
    let (path, running) = controlled(&home, &[], ECHO);
    let meta = std::fs::symlink_metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o600, uid()));
    // Where another run listens is no place for this one.
    let option = format!("--network-control={}", path.display());
    let mark = home.path("ran");
    let refused = || {
        home.run([&option], ["touch", mark.to_str().unwrap()]).run().exits(125).says(path.to_str().unwrap())
    };
    refused().says("something is there already").says("EADDRINUSE");
    assert!(Client::at(&path).result(json!({"request": "stats"})).is_object());
    // Left by one that was killed.
    running.signal(Signal::SIGKILL);
    running.finish();
    assert!(path.exists());
    home.rootlet(["prune"]).run().ok();
    let (_, running) = controlled(&home, &[], ECHO);
    assert!(Client::at(&path).result(json!({"request": "stats"})).is_object());
    end(running);
    assert!(!path.exists());
    // What is not a socket of nobody's stays.
    std::fs::write(&path, "mine").unwrap();
    refused().says("something is there already");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    refused().says("something is there already");
    drop(listener);
    std::fs::remove_file(&path).unwrap();
    assert!(!mark.exists());
}

#[test]
fn places_that_are_not_the_callers_are_refused() {
    let home = Home::new();
    let dir = home.dir("d");
    home.dir("d/e");
    let option = |path: &str| format!("--network-control={}", home.path(path).display());
    let refused = |options: &[&str], part: &str| {
        home.run(options.iter().copied(), ["true"]).run().exits(125).says(part);
        assert!(home.boxes().is_empty());
    };
    refused(&[&option("no/such")], "ENOENT");
    for mode in ["none", "host"] {
        refused(&[&option("d/c"), "--network", mode], &format!("network {mode}"));
    }
    refused(&["--network-control=/"], "must name a socket");
    refused(&[&option(&"x".repeat(108))], "107 bytes");
    // Where the payload would find it.
    let volume = |path: &str, mode: &str| format!("{}:/mnt{mode}", home.path(path).display());
    for (path, volume) in [("d/c", volume("d", "")), ("d/e/c", volume("d", ":ro")), ("d/c", volume("", ""))] {
        refused(&[&option(path), "-v", &volume], "inside the volume's source");
    }
    std::os::unix::fs::symlink(&dir, home.path("link")).unwrap();
    refused(&[&option("link/c"), "-v", &volume("d", "")], "inside the volume's source");
    refused(&[&option("d/e/c"), "--upper", dir.to_str().unwrap()], "inside the upper directory");
    let mut open = std::fs::metadata(&dir).unwrap().permissions();
    open.set_mode(0o777);
    std::fs::set_permissions(&dir, open).unwrap();
    refused(&[&option("d/c")], "others may put another one in its place");
    // Nor where they may put another directory.
    refused(&[&option("d/e/c")], "others may put another one in its place");
    refused(&[&option("link/e/c")], "is open to other users");
    let mut closed = std::fs::metadata(&dir).unwrap().permissions();
    closed.set_mode(0o755);
    std::fs::set_permissions(&dir, closed).unwrap();
    // Beside them is fine, and the plan has it.
    let out = home
        .rootlet(["run", "--dry-run", &option("d/e/c"), "-v", &volume("work", ""), "--", "true"])
        .run()
        .ok();
    assert!(out.text().contains(&format!("control     {}", home.path("d/e/c").display())), "{out}");
    assert_eq!(std::fs::read_dir(home.path("d/e")).unwrap().count(), 0);
}

#[test]
fn a_shell_is_enough() {
    need!("nc");
    let home = Home::new();
    let (path, running) = controlled(&home, &[], ECHO);
    let line = r#"{"request":"rules"}"#;
    let out = home.command("nc").args(["-NU", path.to_str().unwrap()]).stdin(line).run().ok();
    out.prints(r#"{"result":{"allow":[],"deny":[],"host_loopback":"none"}}"#);
    end(running);
}
