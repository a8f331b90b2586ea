//! The control socket of the network (`--network-control`) from where it must not be used: inside, as another user, and by
//! clients that send or read as they please. The canary is an answer.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::common::{Home, Running, is_root, rootlet_binary, skip};

/// Asks at each path of its arguments, and prints the kind of what comes back, or the error.
const ASK: &str = r#"
import errno, json, socket, sys
for path in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(path)
        except OSError as e:
            print(errno.errorcode[e.errno], flush=True)
            continue
        try:
            s.sendall(b'{"request":"rules"}\n')
        except BrokenPipeError:
            pass
        try:
            line = s.makefile().readline()
        except ConnectionResetError:
            line = ""
        print(next(iter(json.loads(line)), line) if line else "nothing", line.strip(), flush=True)
"#;

/// The same in a loop, a thousand times, and with half a request each time; then it waits for the end of its input.
const FLOOD: &str = r#"
import socket, sys
answers = set()
for _ in range(1000):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(sys.argv[1])
        try:
            s.sendall(b'{"request":"set-rules","host_loopback":')
            s.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answers.add(s.recv(4096).decode().strip())
print(len(answers), *answers, flush=True)
sys.stdin.read()
"#;

/// Runs its arguments in a mount namespace of a user namespace that root has given all ids, as it may to a container.
const CONTAINER: &str = r#"
import ctypes, os, sys
def unshare(flags):
    assert ctypes.CDLL(None, use_errno=True).unshare(flags) == 0, os.strerror(ctypes.get_errno())
made, make = os.pipe()
mapped, map = os.pipe()
child = os.fork()
if child == 0:
    unshare(0x10000000)
    os.write(make, b"x")
    os.read(mapped, 1)
    unshare(0x20000)
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(made, 1)
for ids in ("uid", "gid", "projid"):
    with open(f"/proc/{child}/{ids}_map", "w") as file:
        file.write("0 0 4294967295")
os.write(map, b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"#;

/// Runs the program that follows in a chroot, which is no namespace.
const CHROOT: &str = r#"
import json, os, socket, sys
program = open(sys.argv[2]).read()
directory, sys.argv[2:] = os.path.dirname(sys.argv[3]), [os.path.basename(sys.argv[3])]
sys.argv = sys.argv[1:]
os.chdir(directory)
os.chroot(".")
exec(program)
"#;

fn rules_at(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(b"{\"request\":\"rules\"}\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

const RULES: &str = "{\"result\":{\"allow\":[],\"deny\":[],\"host_loopback\":\"none\"}}\n";

/// A sandbox with a volume, in which the socket then gets a second name: rootlet has refused to put it there, but cannot keep
/// the caller from it.
fn with_the_socket_in_a_volume(home: &Home, script: &str, arguments: &[&str]) -> Running {
    let volume = home.dir("v");
    let socket = home.path("c");
    let options =
        [format!("--network-control={}", socket.display()), format!("-v={}:/mnt", volume.display())];
    // The payload begins when the second name is there.
    let whole = format!("import sys\nprint('ready', flush=True)\nsys.stdin.readline()\n{script}");
    let command = ["python3", "-c", &whole].into_iter().chain(arguments.iter().copied());
    let mut running = home.run(options, command).stdin_open().start();
    running.until_out("ready");
    std::fs::hard_link(&socket, volume.join("c")).unwrap();
    assert_eq!(rules_at(&volume.join("c")), RULES, "the second name leads nowhere");
    running.write("\n");
    running
}

#[test]
fn the_payload_does_not_command_its_own_network() {
    let home = Home::new();
    let path = home.text("c");
    // Over the host's tree it sees the socket's own name, too: the overlay's object, at which nobody listens.
    let mut running = with_the_socket_in_a_volume(&home, ASK, &["/mnt/c", &path]);
    running.close_stdin();
    let out = running.finish().ok();
    let text = out.text();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[1].starts_with("error {") && lines[1].contains("not-allowed"), "{out}");
    assert!(lines[1].contains("another user namespace"), "{out}");
    assert_eq!(lines[2], "ECONNREFUSED", "{out}");
    out.says("a connection to the control socket is refused");
    std::fs::remove_file(home.path("v/c")).unwrap();
}

#[test]
fn a_flood_from_inside_keeps_nobody_out() {
    let home = Home::new();
    let mut running = with_the_socket_in_a_volume(&home, FLOOD, &["/mnt/c"]);
    // Meanwhile, and afterwards.
    for _ in 0..200 {
        assert_eq!(rules_at(&home.path("c")), RULES);
    }
    let text = running.until_out("not-allowed");
    assert!(text.contains("1 {\"error\":{\"kind\":\"not-allowed\""), "{text}");
    assert_eq!(rules_at(&home.path("c")), RULES);
    running.close_stdin();
    let out = running.finish().ok();
    // It is told once.
    assert_eq!(out.errors().matches("is refused").count(), 1, "{out}");
    std::fs::remove_file(home.path("v/c")).unwrap();
}

#[test]
fn another_user_is_sent_away() {
    if !is_root() {
        skip!("only root can be another user");
    }
    let home = Home::new();
    let path = home.path("c");
    let option = format!("--network-control={}", path.display());
    let running = home.run([&option], ["sh", "-c", "echo ready; exec sleep 1000"]).start();
    running.until_out("ready");
    let program = home.file("work/ask.py", ASK);
    let ask = |user: &str| {
        let user = [format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".into()];
        let command = home.command("setpriv").args(user).args(["python3"]).arg(&program).arg(&path);
        command.run().ok().text()
    };
    assert_eq!(ask("65534").trim(), "EACCES");
    // Even if the caller opens it to all.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(ask("65534").trim(), "nothing");
    assert!(ask("0").starts_with("result"), "root is the caller");
    running.signal(Signal::SIGTERM);
    running.finish().exits(143);
}

#[test]
fn roots_elsewhere_are_sent_away() {
    if !is_root() {
        skip!("only root can be another user, and root");
    }
    let home = Home::new();
    let dir = home.dir("work/u");
    home.command("chown").args(["54321:54321"]).arg(&dir).run().ok();
    let path = dir.join("c");
    // Of an ordinary user's, who may not look at processes of root.
    let running = home
        .command("setpriv")
        .args(["--reuid=54321", "--regid=54321", "--clear-groups", "--"])
        .arg(rootlet_binary())
        .args(["run", "--rm", &format!("--network-control={}", path.display())])
        .args(["--", "sh", "-c", "echo ready; exec sleep 1000"])
        .env("XDG_STATE_HOME", &dir)
        .start();
    running.until_out("ready");
    // So that who has no capability here gets as far as a connection.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    let program = home.file("work/ask.py", ASK);
    let ask = |command: &[&str]| {
        let command = home.command(command[0]).args(&command[1..]).args(["python3"]).arg(&program).arg(&path);
        command.run().ok().text()
    };
    for unshare in [&["unshare", "--user"][..], &["unshare", "--user", "--map-root-user"]] {
        let told = ask(unshare);
        assert!(told.contains("not-allowed") && told.contains("another user namespace"), "{told}");
    }
    let told = ask(&["python3", "-c", CONTAINER]);
    assert!(told.contains("not-allowed") && told.contains("another root directory"), "{told}");
    let told = ask(&["python3", "-c", CHROOT]);
    assert!(told.contains("not-allowed") && told.contains("another root directory"), "{told}");
    assert!(ask(&["env"]).starts_with("result"), "root is obeyed");
    running.signal(Signal::SIGTERM);
    running.finish().exits(143);
}

#[test]
fn clients_that_misbehave_hinder_nobody() {
    let home = Home::new();
    let path = home.path("c");
    let option = format!("--network-control={}", path.display());
    let running = home.run([&option], ["sh", "-c", "echo ready; exec sleep 1000"]).start();
    running.until_out("ready");
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = memory();
    // Ten megabytes without an end of line.
    let mut endless = UnixStream::connect(&path).unwrap();
    let chunk = [b'{'; 64 << 10];
    let taken = (0..160).take_while(|_| endless.write_all(&chunk).is_ok()).count();
    assert!(taken < 160, "all of it was read");
    let mut said = String::new();
    endless.read_to_string(&mut said).ok();
    assert!(said.contains("a request has 65536 bytes at most"), "{said:?}");
    // Sixty that do not read their answers, sixty that say half of what they want. The sixteen that are kept change all the
    // time, and whoever behaves is served.
    let mut clients = Vec::new();
    for number in 0..120 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_nonblocking(true).unwrap();
        if number % 2 == 0 {
            let many = "{\"request\":\"stats\"}\n".repeat(4000);
            // Until no more is taken: the server has stopped reading, or has closed.
            while client.write_all(many.as_bytes()).is_ok() {}
        } else {
            client.write_all(b"{\"request\":").ok();
        }
        assert_eq!(rules_at(&path), RULES);
        clients.push(client);
    }
    let more = memory() - before;
    assert!(more < 8 * 1024, "the supervisor needed {more} KiB more");
    running.signal(Signal::SIGTERM);
    running.finish().exits(143);
}
