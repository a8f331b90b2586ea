//! `rootlet netstack`, and the same program by the name `slirp4netns`: on namespaces of `unshare -Urn`, as Podman
//! calls it.

use crate::common::{Cmd, Home, Out, free_port, lab, need, rootlet_binary, skip};

/// A namespace `target` without a network; `Net(OPTION…)` gives it one and waits until it can be used.
const PRELUDE: &str = r#"
import json, os, signal, socket, stat, subprocess, sys
S, R = os.environ["S"], os.environ["R"]
target = subprocess.Popen(["unshare", "-Urn", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE)
target.stdout.read(1)
class Net:
    def __init__(self, *options, of=str(target.pid), program=(S,)):
        ready, w = os.pipe()
        e, self.exit = os.pipe()
        command = [*program, "-r", str(w), "-e", str(e), *options, of, "tap0"]
        self.p = subprocess.Popen(command, pass_fds=(w, e), stderr=subprocess.PIPE, text=True)
        os.close(w); os.close(e)
        self.ready = os.read(ready, 10) + os.read(ready, 10)
        if self.ready != b"1":
            sys.exit(self.p.stderr.read())
    def end(self):
        os.close(self.exit)
        status = self.p.wait()
        print(self.p.stderr.read(), end="")
        return status
def inside(script):
    enter = ["nsenter", "-t", str(target.pid), "-U", "--preserve-credentials", "-n", "sh", "-c", script]
    return subprocess.run(enter, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout.strip()
def ask(request, close=True):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("api")
        s.sendall(request if isinstance(request, bytes) else json.dumps(request).encode())
        if close:
            s.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: s.recv(4096), b"")).decode()
def call(execute, **arguments):
    return ask({"execute": execute, "arguments": arguments})
def serve(kind, port):
    # A server inside: says who called, then ends.
    code = f"""
import socket, sys
s = socket.socket(socket.AF_INET, {kind}); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("0.0.0.0", {port}))
if {kind} == socket.SOCK_STREAM: s.listen()
print(flush=True)
if {kind} == socket.SOCK_STREAM:
    c, peer = s.accept(); c.sendall(peer[0].encode())
else:
    data, peer = s.recvfrom(99); s.sendto(peer[0].encode() + data, peer)
"""
    enter = ["nsenter", "-t", str(target.pid), "-U", "--preserve-credentials", "-n", "python3", "-c", code]
    server = subprocess.Popen(enter, stdout=subprocess.PIPE)
    server.stdout.read(1)
    return server
"#;

/// Runs Python after the prelude. The target ends with it, whatever happens.
fn python(home: &Home, script: &str) -> Out {
    let name = home.dir("bin").join("slirp4netns");
    if !name.exists() {
        std::os::unix::fs::symlink(rootlet_binary(), name).unwrap();
    }
    let body: String = script.lines().map(|line| format!("    {line}\n")).collect();
    let whole = format!("{PRELUDE}\ntry:\n    pass\n{body}\nfinally:\n    target.kill(); target.wait()\n");
    let command: Cmd = home.command("python3").args(["-c", &whole]);
    let ports = format!("{} {}", free_port(), free_port());
    command.env("S", home.path("bin/slirp4netns")).env("R", rootlet_binary()).env("PORTS", ports).run()
}

#[test]
fn a_namespace_gets_a_network_that_ends_when_it_is_told_to() {
    need!("ip", "nsenter");
    let home = Home::new();
    let script = r#"
for program in (S,), (R, "netstack"):
    net = Net("-c", "-6", "--mtu=1400", "--macaddress=02:00:00:00:00:07", program=program)
    print(inside("ip -o -4 addr show dev tap0 | grep -o 'inet [^ ]*'; ip -o -6 addr show dev tap0 scope global | grep -o 'inet6 [^ ]*'"))
    print(inside("ip route show default | cut -d' ' -f1-5; ip -6 route show default | cut -d' ' -f1-5; cat /sys/class/net/tap0/mtu 2>/dev/null || ip link show tap0 | grep -o 'mtu 1400'"))
    print(inside("ip -o link show tap0 | grep -o '02:00:00:00:00:07'; ip -o link show lo | grep -o LOWER_UP"))
    print(net.end(), inside("ip link show tap0 2>&1 | grep -c 'does not exist'"))
# The exit descriptor may also say something; a signal ends it as any program.
net = Net("-c")
os.write(net.exit, b"x")
print(net.p.wait())
net = Net("-c")
net.p.send_signal(signal.SIGTERM)
print(net.p.wait(), inside("ip link show tap0 2>&1 | grep -c 'does not exist'"))
# So does the end of the interface.
net = Net("-c")
inside("ip link del tap0")
print(net.p.wait())"#;
    let out = python(&home, script).ok().text();
    let lines: Vec<&str> = out.lines().collect();
    let one = [
        "inet 10.0.2.100/24",
        "inet6 fd00::ff:fe00:7/64",
        "default via 10.0.2.2 dev tap0",
        "default via fd00::2 dev tap0",
    ];
    assert_eq!((&lines[..4], &lines[8..12]), (&one[..], &one[..]), "{out}");
    assert!(lines[4].ends_with("1400"), "{out}");
    assert_eq!(lines[5..8], ["02:00:00:00:00:07", "LOWER_UP", "0 1"], "{out}");
    assert_eq!(lines[16..], ["0", "-15 1", "0"], "{out}");
}

#[test]
fn the_world_is_reached_and_the_hosts_loopback_if_allowed() {
    need!("curl", "dig", "nsenter");
    let home = Home::new();
    let Some(lab) = lab() else { skip!("outside of the lab there is no world") };
    let script = format!(
        r#"
server = socket.create_server(("127.0.0.1", 0)); port = server.getsockname()[1]
other = socket.create_server(("::1", 0), family=socket.AF_INET6)
def tried(ip, port):
    return inside(f"nc -w 5 -z {{ip}} {{port}} && echo open || echo closed")
net = Net("-c", "-6")
print(inside("curl -s -o /dev/null -w '%{{http_code}} ' http://{v4}/; curl -s -o /dev/null -w '%{{http_code}}' http://[{v6}]/"))
print(inside("dig +short +time=5 @10.0.2.3 world.test; dig +short +tcp @fd00::3 world.test AAAA"))
print(tried("10.0.2.2", port), tried("fd00::2", other.getsockname()[1]), tried("10.0.2.3", 80))
net.end()
net = Net("-c", "--disable-host-loopback", "--disable-dns", "--cidr=172.29.64.0/20", "--mtu=65520", "--enable-sandbox", "--enable-seccomp")
print(inside("curl -s -o /dev/null -w '%{{http_code}} ' http://{v4}/; ip -o -4 addr show dev tap0 | grep -o 'inet [^ ]*'"))
print(tried("172.29.64.2", port), inside("dig +tries=1 +time=1 @172.29.64.3 world.test | grep -c status"), inside("nc -w 3 -z {v6} 80 || echo no IPv6"))
net.end()
for option in "--outbound-addr={host}", "--outbound-addr=lab0":
    net = Net("-c", option)
    print(inside("nc -w 5 {v4} {who} </dev/null"), tried("10.0.2.2", port))
    net.end()
"#,
        v4 = lab.world,
        v6 = lab.world_v6,
        host = lab.host,
        who = crate::common::Lab::WHO
    );
    let out = python(&home, &script).ok().text();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..4], ["200 200", "10.77.0.2", "fd77::2", "open open closed"], "{out}");
    assert_eq!(lines[4..6], ["200 inet 172.29.64.100/20", "closed 0 no IPv6"], "{out}");
    assert!(lines[6..].iter().all(|line| line.contains("10.77.0.1") && line.ends_with("open")), "{out}");
    assert_eq!(lines[6..].len(), 2, "{out}");
}

#[test]
fn the_api_socket_answers_as_slirp4netns_does() {
    need!("nsenter");
    let home = Home::new();
    let script = r#"
busy = socket.create_server(("127.0.0.1", 0)); taken = busy.getsockname()[1]
tcp, udp = map(int, os.environ["PORTS"].split())
# Left by a server that was killed.
old = socket.socket(socket.AF_UNIX); old.bind("api"); old.close()
net = Net("-c", "-a", "api")
assert stat.S_IMODE(os.stat("api").st_mode) == 0o600, oct(os.stat("api").st_mode)
print(call("add_hostfwd", proto="tcp", host_port=tcp, guest_port=80))
print(call("add_hostfwd", proto="udp", host_addr="127.0.0.1", host_port=udp, guest_addr="10.0.2.100", guest_port=81))
print(call("list_hostfwd").replace(str(tcp), "TCP").replace(str(udp), "UDP"))
server = serve(socket.SOCK_STREAM, 80)
with socket.create_connection(("127.0.0.1", tcp)) as s: print(s.recv(99).decode())
server.wait()
server = serve(socket.SOCK_DGRAM, 81)
with socket.socket(type=socket.SOCK_DGRAM) as s:
    s.sendto(b"!", ("127.0.0.1", udp)); print(s.recv(99).decode())
server.wait()
print(call("remove_hostfwd", id=1), call("remove_hostfwd", id=1))
try: socket.create_connection(("127.0.0.1", tcp))
except ConnectionRefusedError: print("refused")
print(ask({"execute": "list_hostfwd"}, close=False).replace(str(udp), "UDP"))
# Ids are not used again.
print(call("add_hostfwd", proto="tcp", host_port=tcp, guest_port=80))
for request in (b"", b"x", b"{}", b"[1]", b'{"execute": 3}', b'{"execute": "foo"}', b" " * 5000, b'{"execute": "add_hostfwd"}',
                b'{"execute": "remove_hostfwd"}', b'{"execute": "remove_hostfwd", "arguments": {"id": "1"}}'):
    print(ask(request))
for wrong in {"proto": "sctp"}, {"host_addr": "::1"}, {"host_addr": "x"}, {"host_port": 0}, {"host_port": 70000}, {"guest_addr": "x"}, {"guest_port": 0}:
    print(call("add_hostfwd", **({"proto": "tcp", "host_port": 1, "guest_port": 1} | wrong)))
# Many who say nothing keep nobody out.
silent = [socket.socket(socket.AF_UNIX) for _ in range(40)]
for s in silent: s.connect("api"); s.send(b'{"exe')
print(call("add_hostfwd", proto="tcp", host_addr="127.0.0.1", host_port=taken, guest_port=80).replace(str(taken), "PORT").replace(str(os.getpid()), "PID"))
for s in silent: s.close()
# Without a descriptor for it a connection waits until there is one.
import resource
limit = resource.prlimit(net.p.pid, resource.RLIMIT_NOFILE)
resource.prlimit(net.p.pid, resource.RLIMIT_NOFILE, (3, limit[1]))
with socket.socket(socket.AF_UNIX) as s:
    s.connect("api"); s.sendall(b'{"execute": "list_hostfwd"}')
    resource.prlimit(net.p.pid, resource.RLIMIT_NOFILE, limit)
    print(s.recv(99)[:12].decode())
print(net.end(), os.path.lexists("api"))
# A start that fails leaves nothing, either.
failed = subprocess.run([S, "-a", "api", str(target.pid), "lo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
print(failed.returncode, "cannot make the interface lo" in failed.stdout, os.path.lexists("api"))"#;
    let out = python(&home, script).ok().text();
    let error = |desc: &str| format!(r#"{{"error":{{"desc":"bad request: {desc}"}}}}"#);
    let udp = r#"{"id":2,"proto":"udp","host_addr":"127.0.0.1","host_port":UDP,"guest_addr":"10.0.2.100","guest_port":81}"#;
    let mut expected = vec![
        r#"{"return":{"id":1}}"#.to_owned(),
        r#"{"return":{"id":2}}"#.to_owned(),
        format!(
            r#"{{"entries":[{{"id":1,"proto":"tcp","host_addr":"0.0.0.0","host_port":TCP,"guest_addr":"10.0.2.100","guest_port":80}},{udp}]}}"#
        ),
        "10.0.2.100".to_owned(),
        "10.0.2.2!".to_owned(),
        format!(r#"{{"return":{{}}}} {}"#, error("remove_hostfwd: bad arguments.id")),
        "refused".to_owned(),
        format!(r#"{{"entries":[{udp}]}}"#),
        r#"{"return":{"id":3}}"#.to_owned(),
    ];
    expected.extend(
        [
            "cannot parse JSON",
            "cannot parse JSON",
            "no execute found",
            "json_object() failed",
            "no execute found",
            "unknown execute",
            "too large message",
            "add_hostfwd: bad arguments.proto",
            "remove_hostfwd: bad arguments.id",
            "remove_hostfwd: bad arguments.id",
        ]
        .map(error),
    );
    for argument in ["proto", "host_addr", "host_addr", "host_port", "host_port", "guest_addr", "guest_port"]
    {
        expected.push(error(&format!("add_hostfwd: bad arguments.{argument}")));
    }
    expected.push(
        r#"{"error":{"desc":"bad request: add_hostfwd: slirp_add_hostfwd failed","cause":"cannot listen on 127.0.0.1:PORT: EADDRINUSE (address already in use): python3 (pid PID) has it"}}"#
            .to_owned(),
    );
    expected.extend([r#"{"entries":["#, "0 False", "1 True False"].map(str::to_owned));
    assert_eq!(out.lines().collect::<Vec<_>>(), expected, "{out}");
}

#[test]
fn targets_are_processes_or_paths() {
    need!("nsenter", "ip");
    let home = Home::new();
    let script = r#"
path = f"/proc/{target.pid}/ns/net"
user = f"/proc/{target.pid}/ns/user"
show = "ip -o -4 addr show dev tap0 | grep -o 'inet [^ ]*'"
for options in ("--netns-type=path",), ("--netns-type", "path", "--userns-path", user):
    net = Net("-c", *options, of=path)
    print(inside(show), net.end())
# From inside the user namespace, as Podman does.
enter = ("nsenter", "-t", str(target.pid), "-U", "--preserve-credentials", S)
net = Net("-c", "--enable-sandbox", "--enable-seccomp", "--netns-type=path", of=path, program=enter)
print(inside(show), net.end())"#;
    python(&home, script).ok().prints(&["inet 10.0.2.100/24 0"; 3].join("\n"));
}

#[test]
fn what_is_given_up_is_gone() {
    need!("nsenter");
    let home = Home::new();
    let script = r#"
net = Net("-c", "--enable-sandbox", "--enable-seccomp")
status = dict(line.split(":\t", 1) for line in open(f"/proc/{net.p.pid}/status").read().splitlines() if ":\t" in line)
print(int(status["CapEff"], 16) & ~(1 << 10), int(status["CapPrm"], 16) & ~(1 << 10), status["NoNewPrivs"], status["Seccomp"])
# Whose files these are is in a namespace of his own, which he who made it may look into.
enter = ["nsenter", "-t", str(net.p.pid), "-U", "--preserve-credentials"] if os.getuid() else []
mounts = open(f"/proc/{net.p.pid}/mountinfo").read().splitlines()
print(sorted({"/" + line.split()[4].split("/")[1] for line in mounts}), all(line.split()[5].startswith("ro,") for line in mounts))
same = os.readlink(f"/proc/{net.p.pid}/ns/net") == os.readlink("/proc/self/ns/net")
print(same, net.end())
net = Net("-c")
print(os.readlink(f"/proc/{net.p.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"), net.end())"#;
    python(&home, script).ok().prints("0 0 1 2\n['/', '/etc', '/run'] True\nTrue 0\nTrue 0");
}

#[test]
fn guests_that_ask_are_told_their_addresses() {
    need!("nsenter", "ip", "busybox");
    let home = Home::new();
    home.script(
        "work/lease",
        "#!/bin/sh\n[ \"$1\" != bound ] || echo \"$ip $subnet $router $dns $broadcast $lease $mtu\" >leased\n",
    );
    let script = r#"
net = Net("-6", "--mtu=1300")
print(inside("ip link show tap0 | grep -c 'state DOWN'; sysctl -qw net.ipv6.conf.tap0.accept_ra=1 net.ipv6.conf.tap0.accept_dad=0; ip link set tap0 up"))
inside("busybox udhcpc -i tap0 -n -q -f -t 20 -s ./lease -O mtu >client.log 2>&1")
print(open("leased").read().strip())
# The kernel asks for routers by itself, and makes its address. The end of `ip monitor` is what we wait for.
print(inside("ip -o -6 monitor address route >seen & m=$!; until ip -6 route show default proto ra | grep -q 'via fe80::5055:aff:fe00:202' && ip -6 addr show dev tap0 scope global | grep -q fd00; do kill -0 $m || exit 1; done; kill $m; ip -6 route show default proto ra | grep -o 'mtu 1300'; mac=$(cat /sys/class/net/tap0/address 2>/dev/null); ip -6 addr show dev tap0 scope global | grep -o 'inet6 fd00::[^ ]*/64' | grep -c ff:fe"))
print(inside("ip addr add 10.0.2.100/24 dev tap0; ping -c 1 -W 10 10.0.2.2 | grep -c ' 0% packet loss'; ping -c 1 -W 10 fd00::2 | grep -c ' 0% packet loss'"))
print(net.end())"#;
    let expected =
        "1\n10.0.2.100 255.255.255.0 10.0.2.2 10.0.2.3 10.0.2.255 86400 1300\nmtu 1300\n1\n1\n1\n0";
    python(&home, script).ok().prints(expected);
}

#[test]
fn what_fails_leaves_nothing_behind() {
    need!("nsenter", "ip");
    let home = Home::new();
    let script = r#"
import itertools
def tried(*options, of=str(target.pid), tap="tap0", capture="kept"):
    ready, w = os.pipe()
    command = [S, "-c", "-r", str(w), "-a", "made", "--network-capture=" + capture, *options, of, tap]
    status = subprocess.run(command, pass_fds=(w,), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    os.close(w)
    told = os.read(ready, 10)
    os.close(ready)
    made = (told, inside("ip -o link | grep -vc ': lo:'; ip -o addr; ip route; ip -6 route | grep -v '^fe80::'"), os.listdir("."), open("kept").read())
    if status != 1 or made != before:
        print(options, of, tap, status, made, before)
open("kept", "w").write("an old capture"), open("log", "w").close()
before = (b"", "0", os.listdir("."), "an old capture")
for options in ("--mtu=99999", "--cidr=10.0.2.0", "--macaddress=1:2:3", "--outbound-addr=192.0.2.77", "--outbound-addr6=no-such-link", "--target-type=bess",
                "--netns-type=path", "--exit-fd=77", "--exit-fd=1", "--userns-path=/etc/passwd", "--userns-path=/no/such", "--network-rate=fast", "--network-log=/no/such/log", "--no-such-option"):
    tried(options)
tried(of="x"), tried(of="0"), tried(of=str(os.getpid())), tried(tap="lo"), tried(tap="a/b")
for options in ({"of": str(os.getpid())}, {"tap": "lo"}):
    tried("--network-log=log", capture="new", **options)
tried("--network-log=log", capture="/no/such/capture")
net = Net("-c", "-a", "made", "--network-capture=kept")
print(net.end(), inside("ip -o link | wc -l"), os.path.lexists("made"), b"old" in open("kept", "rb").read())"#;
    python(&home, script).ok().prints("0 1 False False");
}

#[test]
fn a_stack_that_fails_is_a_failure() {
    need!("strace", "nsenter");
    let home = Home::new();
    let script = r#"
calls = "epoll_wait,epoll_pwait"
strace = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + calls, "-e", f"inject={calls}:error=EBADF:when=3+", S)
net = Net("-c", program=strace)
inside("for i in 1 2 3 4 5; do ping -c 1 -W 1 10.0.2.2; done")
print(net.p.wait(), "the network stack has failed" in net.p.stderr.read())"#;
    python(&home, script).ok().prints("1 True");
}

#[test]
fn what_goes_through_it_is_recorded_and_bounded() {
    need!("nsenter", "nc");
    let home = Home::new();
    let script = r#"
import resource, threading
server = socket.create_server(("127.0.0.1", 0)); port = server.getsockname()[1]
threading.Thread(target=lambda: [server.accept()[0].close() for _ in range(3)], daemon=True).start()
def connect():
    inside(f"nc -d -w 50 10.0.2.2 {port}")
    # Who is asked for the flows has told of all that has ended.
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("control")
        answers = s.makefile("rw")
        while True:
            print('{"request": "flows"}', file=answers, flush=True)
            if not json.loads(answers.readline())["result"]["flows"]: break
def lines():
    return [json.loads(line) for line in open("log").read().splitlines()]
net = Net("-c", "--network-log=log", "--network-capture=capture", "--network-rate=10mbit", "--network-control=control")
connect()
size = os.stat("log").st_size
# Room for half a line. The signal that comes with it ends nobody.
resource.prlimit(net.p.pid, resource.RLIMIT_FSIZE, (size + 50, -1))
connect()
print(os.stat("log").st_size == size)
# A thread of its own writes the capture.
while "the capture of the network ends here" not in (line := net.p.stderr.readline()):
    assert line, "it has ended"
    print(line, end="")
print(line, end="")
resource.prlimit(net.p.pid, resource.RLIMIT_FSIZE, (-1, -1))
connect()
print(net.end())
print([(line["event"], line.get("lost", 0)) for line in lines()])
with open("capture", "rb") as file: print(file.read(4).hex())"#;
    let out = python(&home, script).ok().text();
    assert!(out.contains("a line of the network log is lost"), "{out}");
    assert!(out.contains("the capture of the network ends here"), "{out}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "True", "{out}");
    assert!(lines.contains(&"0") && lines.contains(&"0a0d0d0a"), "{out}");
    assert!(out.contains("('opened', 0), ('closed', 0), ('opened', 2), ('closed', 0)]"), "{out}");
}

#[test]
fn wrong_uses_are_told_before_anything_is_made() {
    let home = Home::new();
    let pid = std::process::id().to_string();
    home.file("file", "kept");
    std::os::unix::fs::symlink("file", home.path("link")).unwrap();
    for (arguments, said) in [
        (&["x"][..], "no process id"),
        (&["0"], "no process id"),
        (&["--mtu=99999"], "576 to 65521"),
        (&["-6", "--mtu=1000"], "1280 to 65521"),
        (&["--cidr=10.0.2.0"], "ADDRESS/LENGTH"),
        (&["--cidr=10.0.2.0/30"], "8 to 25"),
        (&["-c", "--macaddress=1:2:3"], "six bytes"),
        (&["--macaddress=02:00:00:00:00:01"], "--configure"),
        (&["--outbound-addr=fd00::1"], "no IPv4 address"),
        (&["--outbound-addr=192.0.2.77"], "cannot use the outbound address"),
        (&["--outbound-addr6=no-such-link"], "has no IPv6 address"),
        (&["--target-type=bess"], "unix socket"),
        (&["--target-type=x"], "the type is netns"),
        (&["--netns-type=x"], "x"),
        (&["--exit-fd=77"], "not open"),
        (&["--exit-fd=0"], "standard stream"),
        (&["--ready-fd=2"], "standard stream"),
        (&["--network-rate=fast"], "10mbit"),
        (&["--network-log=/no/such/directory/log"], "ENOENT"),
        (&["--network-capture=/no/such/directory/file"], "ENOENT"),
        (&[], "is this program's own"),
        (&["--ready-fd=77"], "not open"),
        (&["--no-such-option"], "--no-such-option"),
        (&["--api-socket=/no/such/directory/api"], "ENOENT"),
        (&[&format!("--api-socket={}", home.path("file").display())], "EADDRINUSE"),
        (&[&format!("--api-socket={}", home.path("link").display())], "EADDRINUSE"),
    ] {
        let with_target = !matches!(arguments, ["x" | "0"]);
        let target = with_target.then_some(pid.as_str());
        let out = home.rootlet(["netstack"]).args(arguments).args(target).run();
        assert!(matches!(out.code(), 1 | 2) && out.errors().contains(said), "{arguments:?}: {out}");
    }
    assert_eq!(std::fs::read_to_string(home.path("link")).unwrap(), "kept");
    // A tap of this name would not be a name; a namespace that is none; one that is not ours.
    home.rootlet(["netstack", &pid, "a/b"]).run().exits(2);
    let none = home.rootlet(["netstack", "--netns-type=path", "/etc/passwd"]).run().exits(1);
    assert!(none.errors().contains("namespace"), "{none}");
    let name = home.dir("bin").join("slirp4netns");
    std::os::unix::fs::symlink(rootlet_binary(), &name).unwrap();
    home.command(&name).args(["--mtu=1", &pid]).run().exits(1);
    let help = home.command(&name).args(["--help"]).run().ok().text();
    // Podman asks for these.
    for option in [
        "--disable-host-loopback",
        "--mtu",
        "--enable-sandbox",
        "--enable-seccomp",
        "--enable-ipv6",
        "--cidr",
        "--outbound-addr",
    ] {
        assert!(help.contains(option), "{help}");
    }
    assert!(home.command(&name).args(["-v"]).run().ok().text().starts_with("slirp4netns version "));
}

#[test]
fn the_target_does_not_command_its_network() {
    need!("nsenter");
    let home = Home::new();
    // Who is sent away may find the connection closed before it has said anything, and still has the reason to read.
    let client = r#"
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect("control")
try:
    s.sendall(sys.argv[1].encode() + b"\n")
except OSError:
    pass
print(s.makefile().readline(), end="")
"#;
    home.file("work/client.py", client);
    // As Podman has it: the program is in the user namespace that its caller has made, and so is the target.
    let script = r#"
join = ["nsenter", "-t", str(target.pid), "-U", "--preserve-credentials"]
second = subprocess.Popen([*join, "unshare", "-n", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE)
second.stdout.read(1)
try:
    net = Net("-c", "--network-control=control", of=str(second.pid), program=(*join, R, "netstack"))
    def command(enter, request):
        client = [*enter, "python3", "client.py", json.dumps(request)]
        return subprocess.run(client, stdout=subprocess.PIPE, text=True).stdout.strip()
    print(command(join, {"request": "set-rules", "deny": ["any"], "host_loopback": "none"}))
    print(command(join, {"request": "publish", "ports": "127.0.0.1:0:80"})[:36])
    rules = {"request": "set-rules", "deny": []}
    inside = ["nsenter", "-t", str(second.pid), "-U", "--preserve-credentials", "-n"]
    for enter in inside, []:
        answer = json.loads(command(enter, rules))
        print(answer["error"]["kind"], answer["error"]["text"])
    print(command(join, {"request": "rules"}), stat.filemode(os.stat("control").st_mode), net.end(), os.path.exists("control"))
    for option in "--enable-sandbox", "--enable-seccomp":
        refused = subprocess.run([R, "netstack", "--network-control=control", option, "1"], stderr=subprocess.PIPE, text=True)
        print(refused.returncode, "cannot be used with" in refused.stderr)
finally:
    second.kill(); second.wait()
"#;
    let rules = r#"{"result":{"allow":[],"deny":["any"],"host_loopback":"none"}}"#;
    let other = "a process of another net namespace has connected, such as that of the sandbox";
    let expected = [
        rules,
        r#"{"result":{"ports":[{"host":["127.0."#,
        &format!("not-allowed {other}"),
        // Who is outside of the program's own user namespace cannot be looked at from there.
        "not-allowed a process has connected that has ended, or cannot be looked at",
        // Told once.
        &format!(" WARN rootlet::control: a connection to the control socket is refused reason={other}"),
        &format!("{rules} srw------- 0 False"),
        "2 True",
        "2 True",
    ];
    python(&home, script).ok().prints(&expected.join("\n"));
}

/// About the child that makes sockets inside, and a port that leads there.
const MAKER: &str = r#"
import contextlib, select
tcp, other = map(int, os.environ["PORTS"].split())
def status_of(pid):
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)
def makers(net):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if int(status_of(pid)["PPid"]) == net.p.pid:
                found.append(int(pid))
    return found
def publish(port=tcp, **arguments):
    id = json.loads(call("add_hostfwd", **({"proto": "tcp", "host_addr": "127.0.0.1", "host_port": port, "guest_port": 80} | arguments)))
    return id["return"]["id"]
def seen_by(inside_port=80, port=tcp):
    server = serve(socket.SOCK_STREAM, inside_port)
    with socket.create_connection(("127.0.0.1", port)) as s:
        said = s.recv(99).decode()
    server.wait()
    return said
def end_of(pidfd):
    # Or the test's deadline.
    select.select([pidfd], [], [])
    os.close(pidfd)
    return "gone"
"#;

#[test]
fn loopback_connections_are_joined() {
    need!("nsenter", "ip");
    let home = Home::new();
    let script = r#"
def command(request):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("control"); s.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(s.makefile().readline())["result"]
def counted():
    stats = command({"request": "stats"})
    return stats["tcp_in"], stats["tcp_joined"]
net = Net("-c", "-a", "api", "--network-control=control", "--network-log=log", program=(R, "netstack"))
id = publish()
print(seen_by(), call("remove_hostfwd", id=id), publish() != id, seen_by(), counted())
# By the other socket, too.
ports = command({"request": "publish", "ports": "127.0.0.1:0:81"})["ports"]
print(seen_by(81, int(ports[0]["host"][0].split(":")[1])), counted())
# What is not for the guest's own address crosses the interface, and what nobody takes does, in vain.
inside("ip addr add 10.0.2.101/24 dev tap0")
publish(other, guest_addr="10.0.2.101", guest_port=82)
print(seen_by(82, other), counted())
with socket.create_connection(("127.0.0.1", tcp)) as s:
    try: print(s.recv(99))
    except ConnectionResetError: print("refused", counted())
# Without its maker of sockets the rest goes on.
[maker] = makers(net)
pidfd = os.pidfd_open(maker)
os.kill(maker, signal.SIGKILL)
print(end_of(pidfd), seen_by(), counted())
print(net.end(), [line["outside"].split(":")[0] for line in map(json.loads, open("log")) if line["event"] == "opened"][:2])
# It is there for ports only; and a capture is to have every packet.
for options in ("-c",), ("-c", "-a", "api", "--network-capture=capture"):
    net = Net(*options)
    print(makers(net), "-a" in options and publish() and seen_by(), net.end())
"#;
    let expected = [
        r#"10.0.2.100 {"return":{}} True 10.0.2.100 (2, 2)"#,
        "10.0.2.100 (3, 3)",
        "10.0.2.2 (4, 3)",
        "refused (5, 3)",
        "gone 10.0.2.2 (6, 3)",
        "0 ['10.0.2.100', '10.0.2.100']",
        "[] False 0",
        "[] 10.0.2.2 0",
    ];
    python(&home, &format!("{MAKER}{script}")).ok().prints(&expected.join("\n"));
}

#[test]
fn why_there_is_no_maker_is_in_the_log() {
    need!("nsenter");
    let home = Home::new();
    // In the target nobody may leave the host's files.
    let script = r#"
print(inside("echo 0 >/proc/sys/user/max_mnt_namespaces"), end="")
net = Net("-c", "-a", "api", "--enable-sandbox", program=(R, "--log-file=log", "netstack"))
print(makers(net), publish() and seen_by(), net.end())
print([line.split(" ", 1)[1:] for line in open("log").read().strip().splitlines()])"#;
    let out = python(&home, &format!("{MAKER}{script}")).ok().text();
    let (run, log) = out.split_once('\n').unwrap_or_default();
    assert_eq!(run, "[] 10.0.2.2 0", "{out}");
    for part in ["connections from the loopback will cross the interface", "(namespaces)", "ENOSPC"] {
        assert!(log.contains(part), "{part} is not in {log}");
    }
}

#[test]
fn the_maker_goes_with_the_program() {
    need!("nsenter", "ip");
    let home = Home::new();
    let script = r#"
def begin():
    net = Net("-c", "-a", "api")
    publish()
    assert seen_by() == "10.0.2.100"
    [maker] = makers(net)
    return net, maker, os.pidfd_open(maker)
# It is ended and waited for: nobody finds a process that is left.
net, maker, pidfd = begin()
print(net.end(), os.path.exists(f"/proc/{maker}"), end_of(pidfd))
# The same if it could not have seen it.
net, maker, pidfd = begin()
os.kill(maker, signal.SIGSTOP)
print(net.end(), os.path.exists(f"/proc/{maker}"), end_of(pidfd))
# The end of the interface ends both.
net, maker, pidfd = begin()
inside("ip link del tap0")
print(net.p.wait(), os.path.exists(f"/proc/{maker}"), end_of(pidfd))
for stopped in False, True:
    net, maker, pidfd = begin()
    if stopped: os.kill(maker, signal.SIGSTOP)
    net.p.kill()
    # Standard error, too, was the program's alone.
    print(net.p.wait(), net.p.stderr.read() == "", end_of(pidfd))
# It keeps no namespace longer than the program does, which keeps the one of its interface.
join = ["nsenter", "-t", str(target.pid), "-U", "--preserve-credentials"]
second = subprocess.Popen([*join, "unshare", "-n", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE)
second.stdout.read(1)
print(inside(f"ip link add here type veth peer name there netns {second.pid}"), end="")
net = Net("-c", "-a", "api", of=str(second.pid))
publish()
second.kill(); second.wait()
print(len(makers(net)), inside("ip -o link show here | wc -l"), net.end(), inside("while ip link show here >link 2>&1; do :; done; cat link"))
"#;
    let expected = [
        "0 False gone",
        "0 False gone",
        "0 False gone",
        "-9 True gone",
        "-9 True gone",
        "1 1 0 Device \"here\" does not exist.",
    ];
    python(&home, &format!("{MAKER}{script}")).ok().prints(&expected.join("\n"));
}

#[test]
fn who_makes_sockets_inside_can_do_nothing_else() {
    need!("nsenter");
    let home = Home::new();
    // In the second round the program is in the target's user namespace, as Podman has it. Whose that is may look at what the
    // child has open.
    let script = r#"
join = ("nsenter", "-t", str(target.pid), "-U", "--preserve-credentials")
second = subprocess.Popen([*join, "unshare", "-n", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE)
second.stdout.read(1)
try:
    for options in (), ("--enable-sandbox", "--enable-seccomp"):
        os.path.lexists("api") and os.unlink("api")
        net = Net("-c", "-a", "api", *options)
        publish()
        assert seen_by() == "10.0.2.100"
        [maker] = makers(net)
        status = status_of(maker)
        print([status["Cap" + set] for set in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == ["0" * 16] * 5, status["NoNewPrivs"], status["Seccomp"])
        # Nor may the target's root look into it.
        print(inside(f"cat /proc/{maker}/environ 2>&1 | grep -o 'Permission denied'"), net.end())
        os.path.lexists("api") and os.unlink("api")
        net = Net("-c", "-a", "api", *options, "--netns-type=path", of=f"/proc/{second.pid}/ns/net", program=(*join, S))
        publish()
        # A question is answered when everything has been given up: nobody listens, and the link says so.
        with socket.create_connection(("127.0.0.1", tcp)) as s:
            try: s.recv(99)
            except ConnectionResetError: pass
        [maker] = makers(net)
        of = f"/proc/{maker}/"
        print([os.readlink(of + "fd/" + fd)[:7] for fd in os.listdir(of + "fd")], os.listdir(of + "root") == [], net.end())
finally:
    second.kill(); second.wait()
"#;
    let expected = [
        "True 1 2",
        "Permission denied 0",
        "['socket:'] False 0",
        "True 1 2",
        "Permission denied 0",
        "['socket:'] True 0",
    ];
    python(&home, &format!("{MAKER}{script}")).ok().prints(&expected.join("\n"));
}
