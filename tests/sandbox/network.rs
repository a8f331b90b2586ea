//! The network: the in-process stack, published ports, `none` and `host`. The servers are in the
//! lab (tests/lab), which is not the host's real network.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::common::{Home, Lab, Running, free_port, need, rootlet_binary, skip};

const NONE: [&str; 0] = [];

/// The lab, or the test is skipped.
macro_rules! lab {
    () => {
        match $crate::common::lab() {
            Some(lab) => lab,
            None => skip!("outside tests/lab there are no servers to talk to"),
        }
    };
}

/// The digest of what [`Lab::SOURCE`] sends.
fn sha256_of_pattern(home: &Home) -> String {
    let script = "import hashlib; p = bytes(range(251)) * 1000; n = 32 << 20; \n\
                  print(hashlib.sha256((p * (n // len(p) + 1))[:n]).hexdigest())";
    home.command("python3").args(["-c", script]).run().ok().text()
}

#[test]
fn addresses_routes_and_resolver_are_set_up() {
    need!("ip");
    let home = Home::new();
    let script = "ip -4 -br addr show tap0; ip -6 route show default; ip -4 route show default; cat /etc/resolv.conf; ip -br link show lo";
    let text = home.sh(NONE, script).run().ok().text();
    let address = text.split_ascii_whitespace().nth(2).unwrap();
    let gateway = address.replace(".2/24", ".1");
    assert!(text.contains(&format!("default via {gateway} dev tap0")), "{text}");
    assert!(text.contains(&format!("nameserver {gateway}")), "{text}");
    assert!(text.lines().any(|line| line.starts_with("default via fd")), "{text}");
    assert!(text.contains("LOOPBACK,UP"), "{text}");
}

#[test]
fn the_loopback_inside_is_the_sandboxs_own() {
    need!("nc");
    let home = Home::new();
    for (options, address) in [(&[][..], "127.0.0.1"), (&["--network=none"], "::1")] {
        let script = format!(
            "nc -lN {address} 5000 </dev/null & until echo hello | nc -N {address} 5000 2>/dev/null; do :; done; wait"
        );
        let out = home.sh(options, &script).run().ok();
        assert_eq!(out.text(), "hello", "{out}");
    }
}

#[test]
fn tcp_reaches_any_host_over_both_families() {
    let lab = lab!();
    let home = Home::new();
    for address in lab.both() {
        let url = format!("http://{}/page", SocketAddr::new(address, Lab::HTTP));
        home.run(NONE, ["curl", "-sS", "--max-time", "50", &url])
            .run()
            .ok()
            .prints("hello from the world, /page");
    }
    for far in ["203.0.113.7", "[2001:db8:7::7]"] {
        let url = format!("http://{far}/far");
        home.run(NONE, ["curl", "-sS", "--max-time", "50", &url])
            .run()
            .ok()
            .prints("hello from the world, /far");
    }
}

#[test]
fn thirty_two_mebibytes_arrive_whole() {
    let lab = lab!();
    let home = Home::new();
    let expected = sha256_of_pattern(&home);
    for address in lab.both() {
        let script = format!("nc -d {address} {} | sha256sum | cut -d' ' -f1", Lab::SOURCE);
        home.sh(NONE, &script).deadline(Duration::from_secs(120)).run().ok().prints(&expected);
    }
}

#[test]
fn thirty_two_mebibytes_are_sent_whole() {
    let lab = lab!();
    let home = Home::new();
    for address in lab.both() {
        let script = format!(
            "head -c 33554432 /dev/urandom > data; nc -N {address} {} < data; echo 33554432 $(sha256sum < data | cut -d' ' -f1)",
            Lab::HASH
        );
        let text = home.sh(NONE, &script).deadline(Duration::from_secs(120)).run().ok().text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert_eq!(lines[0], lines[1]);
    }
}

#[test]
fn half_close_works_both_ways() {
    let lab = lab!();
    let home = Home::new();
    let mark = format!("sent after the end {}", std::process::id());
    // The server closes its side at once; what is sent then still arrives.
    let script = format!(
        "
import socket
s = socket.create_connection(('{world}', {half}))
assert s.recv(100) == b'goodbye' and s.recv(100) == b''
s.sendall({mark:?}.encode())
s.close()
while True:
    c = socket.create_connection(('{world}', 9008))
    heard = b''
    while part := c.recv(65536): heard += part
    if {mark:?}.encode() in heard: break
# And the other way round: we close, the server answers then.
s = socket.create_connection(('{world}', {hash}))
s.sendall(b'abc'); s.shutdown(socket.SHUT_WR)
print(s.makefile().read().split()[0])
",
        world = lab.world,
        half = Lab::HALF_CLOSE,
        hash = Lab::HASH
    );
    home.python(NONE, &script).run().ok().prints("3");
}

#[test]
fn resets_and_refusals_arrive_as_such() {
    let lab = lab!();
    let home = Home::new();
    let script = format!(
        "
import socket, errno
def outcome(address, port, send=b''):
    try:
        s = socket.create_connection((address, port), timeout=50)
        s.sendall(send)
        return repr(s.recv(10))
    except OSError as e:
        return errno.errorcode.get(e.errno, repr(e))
print(outcome('{world}', {closed}), outcome('{world6}', {closed}), outcome('{world}', {reset}, b'x'), outcome('{nobody}', 80))
",
        world = lab.world,
        world6 = lab.world_v6,
        closed = Lab::CLOSED,
        reset = Lab::RESET,
        nobody = lab.nobody
    );
    home.python(NONE, &script).run().ok().prints("ECONNREFUSED ECONNREFUSED ECONNRESET EHOSTUNREACH");
}

#[test]
fn a_reader_that_stalls_closes_the_window_and_nothing_is_lost() {
    let lab = lab!();
    let home = Home::new();
    // The server reads nothing until it is told to: the sender must be stopped by the window, and
    // everything must arrive when it opens. A second connection works meanwhile.
    let script = format!(
        "
import hashlib, os, select, socket
s = socket.create_connection(('{world}', {stall}))
s.setblocking(False)
sent = hashlib.sha256(); total = 0
block = os.urandom(1 << 16)
while select.select([], [s], [], 3)[1]:
    n = s.send(block)
    sent.update(block[:n]); total += n
    assert total < 1 << 30, 'nothing stops the sender'
assert socket.create_connection(('{world}', {release})).recv(100) == b'released'
s.setblocking(True)
s.sendall(b'the end'); sent.update(b'the end'); total += 7
s.shutdown(socket.SHUT_WR)
count, digest = s.makefile().read().split()
print(int(count) == total, digest == sent.hexdigest())
",
        world = lab.world,
        stall = Lab::STALL,
        release = Lab::RELEASE
    );
    home.python(NONE, &script).deadline(Duration::from_secs(180)).run().ok().prints("True True");
}

#[test]
fn a_thousand_connections_at_once() {
    let lab = lab!();
    let home = Home::new();
    let script = format!(
        "
import asyncio, resource
async def one(i):
    r, w = await asyncio.open_connection('{}', {})
    w.write(b'%06d' % i); await w.drain()
    got = await r.readexactly(6)
    return (r, w, got == b'%06d' % i)
async def main():
    all = await asyncio.gather(*(one(i) for i in range(1000)))
    print(sum(ok for _, _, ok in all))
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
asyncio.run(main())
",
        lab.world,
        Lab::ECHO
    );
    home.python(NONE, &script).deadline(Duration::from_secs(180)).run().ok().prints("1000");
}

#[test]
fn many_short_connections_one_after_another() {
    let lab = lab!();
    let home = Home::new();
    let script = format!(
        "
import socket
for i in range(2000):
    with socket.create_connection(('{}', {})) as s:
        s.sendall(b'x'); assert s.recv(1) == b'x'
print('done')
",
        lab.world,
        Lab::ECHO
    );
    home.python(NONE, &script).deadline(Duration::from_secs(180)).run().ok().prints("done");
}

#[test]
fn udp_goes_there_and_back_over_both_families() {
    let lab = lab!();
    let home = Home::new();
    for address in lab.both() {
        let family = if address.is_ipv6() { "AF_INET6" } else { "AF_INET" };
        let script = format!(
            "
import socket
s = socket.socket(socket.{family}, socket.SOCK_DGRAM); s.settimeout(50)
for size in (0, 1, 1000, 1400, 1472 if '{family}' == 'AF_INET' else 1452, 5000, 20000):
    data = bytes(i % 251 for i in range(size))
    s.sendto(data, ('{address}', {port}))
    got, peer = s.recvfrom(65536)
    assert got == data, (size, len(got))
    assert peer[:2] == ('{address}', {port}), peer
print('fine')
",
            port = Lab::ECHO
        );
        home.python(NONE, &script).run().ok().prints("fine");
    }
}

#[test]
fn udp_to_a_closed_port_is_refused() {
    let lab = lab!();
    let home = Home::new();
    let script = format!(
        "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(50)
s.connect(('{}', {}))
s.send(b'x')
try:
    s.recv(10)
except ConnectionRefusedError:
    print('refused')
",
        lab.world,
        Lab::CLOSED
    );
    home.python(NONE, &script).run().ok().prints("refused");
}

#[test]
fn ping_reaches_the_world_and_the_gateway() {
    let lab = lab!();
    need!("ping");
    let home = Home::new();
    for address in lab.both() {
        let out = home.run(NONE, ["ping", "-c1", "-W20", &address.to_string()]).run().ok();
        assert!(out.text().contains("1 received"), "{out}");
    }
    let script = "ping -c1 -W20 $(sed -n 's/nameserver //p' /etc/resolv.conf)";
    let out = home.sh(NONE, script).run().ok();
    assert!(out.text().contains("1 received"), "{out}");
    let out = home.run(NONE, ["ping", "-c1", "-W3", &lab.nobody.to_string()]).run();
    assert_ne!(out.code(), 0, "{out}");
}

#[test]
fn names_resolve_through_the_gateway() {
    let _lab = lab!();
    need!("dig");
    let home = Home::new();
    let dig =
        |words: &[&str]| home.run(NONE, ["dig", "+short", "+time=20"].iter().chain(words)).run().ok().text();
    assert_eq!(dig(&["world.test"]), "10.77.0.2");
    assert_eq!(dig(&["AAAA", "world.test"]), "fd77::2");
    assert_eq!(dig(&["+tcp", "world.test"]), "10.77.0.2");
    assert_eq!(dig(&["-x", "10.77.0.2"]), "world.test.");
    // Too long for a datagram: truncated, then asked again by TCP.
    let long = dig(&["TXT", "long.test"]);
    assert!(long.starts_with("\"part1") && long.contains("part8"), "{long}");
    let missing = home.run(NONE, ["dig", "+time=20", "no-such-name.test"]).run().ok().text();
    assert!(missing.contains("NXDOMAIN"), "{missing}");
}

#[test]
fn programs_resolve_names() {
    let _lab = lab!();
    let home = Home::new();
    home.run(NONE, ["curl", "-sS", "--max-time", "50", "http://world.test/by-name"])
        .run()
        .ok()
        .prints("hello from the world, /by-name");
    home.run(NONE, ["getent", "hosts", "no-such-name.test"]).run().exits(2);
}

#[test]
fn names_are_given_with_an_option() {
    need!("dig");
    let home = Home::new();
    let options = ["--hostname=inner", "--add-host=db:192.0.2.7", "--add-host", "six.lan=[2001:db8::7]"];
    let script = "
        gateway=$(sed -n 's/nameserver //p' /etc/resolv.conf)
        getent hosts db; getent hosts six.lan
        dig +short db A; dig +short six.lan AAAA; dig +short -x 192.0.2.7
        dig +short inner A | sed 's/.*\\.//'; dig +short -x ${gateway%.*}.2; dig +short -x $gateway | grep _gateway
        dig +noall +comments -x ${gateway%.*}.77 | grep -o NXDOMAIN";
    let text = home.sh(options, script).run().ok().text();
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    assert_eq!(
        words,
        [
            "192.0.2.7",
            "db",
            "2001:db8::7",
            "six.lan",
            "192.0.2.7",
            "2001:db8::7",
            "db.",
            "2",
            "inner.",
            "_gateway.",
            "NXDOMAIN"
        ]
    );
    // Without a network of its own there is still the file.
    home.run(["--network=none", "--add-host=db:192.0.2.7"], ["getent", "hosts", "db"])
        .run()
        .ok()
        .prints("192.0.2.7       db");
}

#[test]
fn the_gateway_is_the_host_only_where_the_host_can_be_reached() {
    let home = Home::new();
    let option = "--add-host=myhost:host-gateway";
    home.run([option], ["true"]).run().exits(125).says("myhost:host-gateway").says("--allow-host-loopback");
    let script = "getent hosts myhost; sed -n 's/nameserver //p' /etc/resolv.conf";
    let text = home.sh([option, "--allow-host-loopback"], script).run().ok().text();
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    assert_eq!((words.len(), words[0], words[1]), (3, words[2], "myhost"));
}

#[test]
fn short_names_are_looked_for_in_the_domains_that_are_given() {
    let _lab = lab!();
    let home = Home::new();
    let found = home.run(["--dns-search=test"], ["getent", "ahostsv4", "world"]).run().ok();
    assert!(found.text().contains("10.77.0.2"), "{found}");
    home.run(["--dns-search=."], ["getent", "hosts", "world"]).run().exits(2);
    home.run(["--dns-search=."], ["grep", "search", "/etc/resolv.conf"]).run().exits(1);
}

#[test]
fn another_resolver_is_asked_if_one_is_given() {
    need!("dig");
    let home = Home::new();
    // On the host's loopback, which the inside cannot reach by itself.
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let addr = server.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let mut query = [0; 512];
        let (_, from) = server.recv_from(&mut query).unwrap();
        let end = 12 + query[12..].iter().position(|&byte| byte == 0).unwrap() + 5;
        let mut answer = query[..end].to_vec();
        answer[2] |= 0x80;
        answer[7] = 1;
        answer[11] = 0;
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 8]);
        server.send_to(&answer, from).unwrap();
    });
    // The second time from the cache: the server answers once.
    let script = "dig +short a.example; dig +short a.EXAMPLE";
    let out = home.sh(["--dns".to_owned(), addr.to_string()], script).run().ok();
    assert_eq!(out.text(), "192.0.2.8\n192.0.2.8", "{out}");
    thread.join().unwrap();
    // Nobody is there any more.
    let out = home.sh(["--dns".to_owned(), addr.to_string()], "dig a.example").run().ok();
    assert!(
        out.text().contains("SERVFAIL") && out.text().contains("no resolver of the host answers"),
        "{out}"
    );
    for bad in ["resolver.example", "0.0.0.0", "192.0.2.1:0"] {
        home.run(["--dns", bad], ["true"]).run().exits(125).says(bad);
    }
    home.run(["--dns=192.0.2.1", "--network=host"], ["true"]).run().exits(125).says("network host");
}

/// A TCP server on the host's loopback which says who it is.
fn loopback_server(address: &str) -> (u16, std::thread::JoinHandle<usize>, TcpListener) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let theirs = listener.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        let mut served = 0;
        loop {
            let Ok((mut peer, _)) = theirs.accept() else { return served };
            // All of it: closing with something unread would reset the connection.
            let mut word = [0; 5];
            match peer.read_exact(&mut word) {
                Ok(()) if &word == b"stop!" => return served,
                _ => {
                    served += 1;
                    peer.write_all(b"I am the host").ok();
                }
            }
        }
    });
    (port, thread, listener)
}

fn stop(port: u16, address: &str, thread: std::thread::JoinHandle<usize>) -> usize {
    TcpStream::connect((address, port)).unwrap().write_all(b"stop!").unwrap();
    thread.join().unwrap()
}

/// Connects from inside to each address and prints what came back, or the error.
fn try_from_inside(home: &Home, options: &[&str], addresses: &[String], port: u16) -> Vec<String> {
    let script = format!(
        "
import errno, socket, sys
for address in {addresses:?}:
    if address == 'gateway':
        address = open('/etc/resolv.conf').read().split()[1]
    try:
        s = socket.create_connection((address, {port}), timeout=20)
        s.sendall(b'hello'); print(s.recv(100).decode() or 'closed')
    except OSError as e:
        print(errno.errorcode.get(e.errno, repr(e)))
"
    );
    home.python(options, &script).run().ok().text().lines().map(str::to_owned).collect()
}

#[test]
fn the_hosts_loopback_and_addresses_are_refused() {
    let lab = lab!();
    let home = Home::new();
    let (port, thread, _listener) = loopback_server("0.0.0.0");
    // The canary answers outside.
    let mut direct = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    direct.write_all(b"hello").unwrap();
    let mut answer = String::new();
    direct.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "I am the host");
    let addresses: Vec<String> = [
        "gateway",
        "127.0.0.1",
        "127.1.2.3",
        "0.0.0.0",
        "::ffff:127.0.0.1",
        "169.254.169.254",
        "64:ff9b::7f00:1",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain([lab.host.to_string()])
    .collect();
    let got = try_from_inside(&home, &[], &addresses, port);
    assert_eq!(got.len(), addresses.len());
    for (address, got) in addresses.iter().zip(&got) {
        assert!(got.starts_with('E') || got.contains("timeout"), "{address}: {got}");
    }
    assert_eq!(stop(port, "127.0.0.1", thread), 1, "something reached the host");
}

#[test]
fn the_hosts_ipv6_loopback_is_refused() {
    let lab = lab!();
    let home = Home::new();
    let (port, thread, _listener) = loopback_server("::1");
    let addresses = ["::1", "fe80::1", "fd87:726f:6f74::1"]
        .map(str::to_owned)
        .into_iter()
        .chain([lab.host_v6.to_string()]);
    let got = try_from_inside(&home, &[], &addresses.collect::<Vec<_>>(), port);
    assert!(got.iter().all(|got| got.starts_with('E') || got.contains("timeout")), "{got:?}");
    assert_eq!(stop(port, "::1", thread), 0, "something reached the host");
}

#[test]
fn names_that_lead_to_the_loopback_are_refused() {
    let _lab = lab!();
    let home = Home::new();
    let (port, thread, _listener) = loopback_server("127.0.0.1");
    // DNS rebinding: a name of the world that answers with the loopback or a link-local address.
    // Inside these would be the sandbox's own loopback at most.
    let addresses = ["rebind.test", "linklocal.test"].map(str::to_owned);
    let got = try_from_inside(&home, &[], &addresses, port);
    assert!(got.iter().all(|got| !got.contains("host")), "{got:?}");
    assert_eq!(stop(port, "127.0.0.1", thread), 0);
}

#[test]
fn the_hosts_loopback_is_the_gateway_on_request() {
    let lab = lab!();
    let home = Home::new();
    let (port, thread, _listener) = loopback_server("127.0.0.1");
    let addresses = ["gateway", "127.0.0.1"].map(str::to_owned);
    let got = try_from_inside(&home, &["--allow-host-loopback"], &addresses, port);
    assert_eq!(got, ["I am the host", "ECONNREFUSED"]);
    assert_eq!(stop(port, "127.0.0.1", thread), 1);
    let (port, thread, _listener) = loopback_server(&lab.host.to_string());
    let got = try_from_inside(&home, &["--allow-host-loopback"], &[lab.host.to_string()], port);
    assert_eq!(got, ["I am the host"]);
    assert_eq!(stop(port, &lab.host.to_string(), thread), 1);
}

#[test]
fn the_hosts_loopback_is_opened_by_port_and_by_name() {
    let lab = lab!();
    let home = Home::new();
    let (port, thread, _listener) = loopback_server("0.0.0.0");
    let (other, other_thread, _other_listener) = loopback_server("0.0.0.0");
    let names = ["host.containers.internal", "host.docker.internal", "gateway"].map(str::to_owned);
    let addresses: Vec<String> = names.iter().cloned().chain([lab.host.to_string()]).collect();
    let option = format!("--allow-host-loopback={port}");
    let got = try_from_inside(&home, &[&option], &addresses, port);
    assert_eq!(got, ["I am the host"; 4]);
    let got = try_from_inside(&home, &[&option], &addresses, other);
    assert_eq!(got, ["EHOSTUNREACH"; 4]);
    // The names are there without the option, too, and lead nowhere else.
    let got = try_from_inside(&home, &[], &names, port);
    assert_eq!(got, ["EHOSTUNREACH"; 3]);
    assert_eq!(stop(port, "127.0.0.1", thread), 4);
    assert_eq!(stop(other, "127.0.0.1", other_thread), 0, "something reached the host");
}

#[test]
fn names_of_the_host_are_answered_by_the_name_server_too() {
    need!("dig");
    let home = Home::new();
    let script = "dig +short A host.containers.internal; dig +short A host.docker.internal; \
                  dig +short AAAA host.docker.internal; awk '/nameserver/ {print $2}' /etc/resolv.conf";
    let text = home.sh(NONE, script).run().ok().text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines.iter().all(|line| *line == lines[2]), "{text}");
}

#[test]
fn rules_hold_for_real_programs() {
    let lab = lab!();
    need!("curl");
    need!("ping");
    let home = Home::new();
    // Exit statuses of curl: 7, no connection. Its message has the errno.
    let curl = |to: &IpAddr| match to {
        IpAddr::V4(ip) => {
            format!("curl -sS -m 20 -o /dev/null http://{ip}:{}/ 2>&1 && echo reached", Lab::HTTP)
        }
        IpAddr::V6(ip) => {
            format!("curl -sS -m 20 -o /dev/null 'http://[{ip}]:{}/' 2>&1 && echo reached", Lab::HTTP)
        }
    };
    let [v4, v6] = lab.both();
    let script = format!(
        "{}; {}; ping -c 1 -W 10 {v4} | grep -i -o 'filtered\\|1 received'; true",
        curl(&v4),
        curl(&v6)
    );
    let run = |options: &[&str]| home.sh(options, &script).run().text();
    let all = run(&[]);
    assert_eq!(all.matches("reached").count(), 2, "{all}");
    let only = run(&["--allow", &format!("tcp:{v4}:{}", Lab::HTTP)]);
    let lines: Vec<&str> = only.lines().collect();
    assert!(
        lines[0] == "reached" && lines[1].contains("curl: (7)") && lines[2].eq_ignore_ascii_case("filtered"),
        "{only}"
    );
    let denied = run(&["--allow", "any", "--deny", &format!("{v4}"), "--deny", &format!("[{v6}]:1-65535")]);
    assert_eq!(denied.matches("curl: (7)").count(), 2, "{denied}");
    assert!(denied.to_lowercase().contains("filtered"), "{denied}");
    // The errors by their names.
    let errors =
        |options: &[&str], port| try_from_inside(&home, options, &[v4.to_string(), v6.to_string()], port);
    assert_eq!(errors(&["--deny=any"], Lab::HTTP), ["EHOSTUNREACH", "EACCES"]);
    // Names are still resolved, and the address counts, not the name.
    let name = home
        .sh(
            ["--deny=any"],
            "getent ahostsv4 world.test | head -1; curl -sS -m 20 http://world.test/ 2>&1; echo $?",
        )
        .run()
        .text();
    assert!(name.contains(&v4.to_string()) && name.ends_with("7"), "{name}");
}

#[test]
fn the_network_log_has_a_line_for_each_flow() {
    let lab = lab!();
    need!("curl");
    let home = Home::new();
    let file = home.path("network.log");
    std::fs::write(&file, "{}\n").unwrap();
    let option = format!("--network-log={}", file.display());
    let script = "curl -sS -m 20 -4 -o /dev/null http://world.test/; curl -s -m 20 -o /dev/null http://169.254.169.254/; \
                  curl -s -m 20 -o /dev/null http://10.77.0.2:25/; true";
    home.sh([&option, "--deny=tcp:any:25"], script).run().ok();
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let events: Vec<String> = lines[1..]
        .iter()
        .map(|line| {
            let word = |field: &str| line[field].as_str().unwrap_or("-").to_owned();
            ["event", "protocol", "direction", "outside", "name", "reason", "rule"].map(word).join(" ")
        })
        .collect();
    let world = lab.world;
    assert_eq!(
        events,
        [
            format!("opened tcp out {world}:80 world.test - -"),
            format!("closed tcp out {world}:80 world.test finished -"),
            "refused tcp out 169.254.169.254:80 - link-local -".to_owned(),
            format!("refused tcp out {world}:25 world.test deny tcp:any:25"),
        ],
        "{text}"
    );
    assert_eq!(lines[0], serde_json::json!({}), "what was there stays");
    let closed = &lines[2];
    for field in ["time", "seconds", "sent_bytes", "sent_packets", "received_bytes", "received_packets"] {
        assert!(closed[field].as_f64().unwrap() > 0.0, "{field}: {text}");
    }
    assert!(closed["inside"].as_str().unwrap().starts_with("10."), "{text}");
}

#[test]
fn rates_hold_and_nonsense_is_refused_before_anything_happens() {
    let lab = lab!();
    need!("nc", "bash");
    let home = Home::new();
    let bytes = 1 << 20;
    let script = format!(
        "nc -d {} {} 2>/dev/null | head -c {bytes} | wc -c; cat /proc/uptime",
        lab.world,
        Lab::SOURCE
    );
    let script = format!("cut -d' ' -f1 /proc/uptime; {script}");
    let text = home.sh(["--network-rate=in:8mbit,burst=64k"], &script).run().text();
    let lines: Vec<&str> = text.lines().collect();
    let seconds = |line: &str| line.split(' ').next().unwrap().parse::<f64>().unwrap();
    assert_eq!(lines[1], bytes.to_string(), "{text}");
    // The burst goes at once, everything else at the rate.
    let least = f64::from(bytes - (64 << 10)) / 1e6;
    assert!(seconds(lines[2]) - seconds(lines[0]) >= least - 0.02, "{text}");
    for (options, part) in [
        (&["--network-rate=fast"][..], "10mbit"),
        (&["--network-rate=1m", "--network-rate=in:2m"], "each way has one rate"),
        (&["--network-rate=1m", "--network=none"], "network-rate and network none"),
        (&["--network-rate=1m", "--network=host"], "network-rate and network host"),
    ] {
        home.run(options, ["true"]).run().exits(125).says(part);
    }
}

#[test]
fn a_network_capture_can_be_read_by_other_programs() {
    let _lab = lab!();
    need!("curl", "tcpdump");
    let home = Home::new();
    let file = home.path("network.pcapng");
    std::fs::write(&file, "what was there goes\n").unwrap();
    let option = format!("--network-capture={}", file.display());
    home.sh([&option], "curl -sS -m 20 -4 -o /dev/null http://world.test/").run().ok();
    let read = |filter: &str| {
        let mut tcpdump = std::process::Command::new("tcpdump");
        let output =
            tcpdump.args(["-n", "--time-stamp-precision=nano", "-r"]).arg(&file).arg(filter).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let syns = read("tcp[tcpflags] == tcp-syn and dst port 80");
    assert!(syns.lines().count() == 1 && syns.contains("Flags [S]"), "{syns}");
    assert!(read("udp port 53").contains("A? world.test."));
    // Names are in a block of their own, which tcpdump passes over.
    let bytes = std::fs::read(&file).unwrap();
    let record = |text: &[u8]| bytes.windows(text.len()).any(|part| part == text);
    assert!(record(b"\x0a\x4d\0\x02world.test\0"));
}

#[test]
fn a_network_capture_on_a_full_disk_ends_and_the_network_goes_on() {
    let _lab = lab!();
    need!("curl");
    let home = Home::new();
    let script = "curl -sS -m 20 -4 -o /dev/null http://world.test/ && echo reached";
    home.sh(["--network-capture=/dev/full"], script)
        .run()
        .says("the capture of the network ends here")
        .prints("reached");
}

#[test]
fn a_network_log_that_cannot_be_is_refused_before_anything_happens() {
    let home = Home::new();
    for (options, part) in [
        (&["--network-log=/no/such/dir/log"][..], "ENOENT"),
        (&["--network-log=/dev/null", "--network=none"], "network-log and network none"),
        (&["--network-log=/dev/null", "--network=host"], "network-log and network host"),
        (&["--network-capture=/no/such/dir/log"], "ENOENT"),
        (&["--network-capture=/dev/null", "--network=none"], "network-capture and network none"),
    ] {
        home.run(options, ["true"]).run().exits(125).says(part);
    }
}

#[test]
fn a_network_capture_that_cannot_be_emptied_is_refused() {
    let home = Home::new();
    // The caller's own file, which may not become shorter.
    let script = r#"
import fcntl, os, subprocess, sys
file = os.memfd_create("capture", os.MFD_ALLOW_SEALING)
os.write(file, b"what was there stays")
fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
path = f"/proc/{os.getpid()}/fd/{file}"
run = subprocess.run([sys.argv[1], "run", "--network-capture=" + path, "--", "echo", "it ran"], capture_output=True, text=True)
print(run.returncode, run.stdout, run.stderr, os.pread(file, 99, 0).decode())"#;
    let out = home.command("python3").args(["-c", script]).args([rootlet_binary()]).run().ok().text();
    assert!(out.starts_with("125 ") && !out.contains("it ran"), "{out}");
    for part in ["emptying the file of the capture", "EPERM", "what was there stays"] {
        assert!(out.contains(part), "{part}: {out}");
    }
}

#[test]
fn a_capture_of_a_run_that_does_not_begin_is_not_left_behind() {
    let home = Home::new();
    let (log, capture) = (home.path("log"), home.path("capture"));
    let options = [
        format!("--network-log={}", log.display()),
        format!("--network-capture={}", capture.display()),
        "--rootfs=/no/such/root".into(),
    ];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let are_there = || (log.exists(), capture.exists());
    // Another run may have opened the log meanwhile.
    home.run(&options, ["true"]).run().exits(125).says("/no/such/root");
    assert_eq!(are_there(), (true, false));
    // The port is found taken when all else is ready.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("-p=127.0.0.1:{}:1", taken.local_addr().unwrap().port());
    home.run([options[0], options[1], &port], ["true"]).run().exits(125).says("EADDRINUSE");
    assert_eq!(are_there(), (true, false));
    // One that begins leaves them, whatever there was to write, and whatever came of the command.
    home.run(&options[..2], ["/no/such/command"]).run().exits(127);
    assert_eq!(are_there(), (true, true));
}

#[test]
fn rules_that_make_no_sense_are_refused_before_anything_happens() {
    let home = Home::new();
    for (option, part) in [
        ("--allow=127.0.0.1", "allow-host-loopback"),
        ("--allow=224.0.0.0/4", "multicast"),
        ("--allow=example.com:443", "no IP address"),
        ("--deny=2001:db8::/32", "in brackets"),
        ("--deny=10.0.0.1/8", "bits behind"),
        ("--deny=any:0", "no port"),
        ("--allow-host-loopback=", "write ports"),
        ("--allow-host-loopback=http", "write ports"),
    ] {
        home.rootlet(["run", option, "--", "true"]).run().exits(125).says(part);
    }
}

/// A port of the host that nobody listens on now.
const ECHO_SERVER: &str = "
import socket, sys, threading
family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET
s = socket.socket(family); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((sys.argv[1], int(sys.argv[2]))); s.listen(128)
def serve(c):
    while data := c.recv(65536): c.sendall(data)
    c.shutdown(socket.SHUT_WR); c.close()
print('listening', flush=True)
while True:
    threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";

fn echo_through(address: SocketAddr, size: usize) {
    let stream = TcpStream::connect(address).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let data: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let expected = data.clone();
    let sender = std::thread::spawn(move || {
        writer.write_all(&data).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    let mut stream = stream;
    stream.read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    assert!(got == expected, "{} of {} bytes came back", got.len(), expected.len());
}

fn end(running: Running) {
    running.signal(nix::sys::signal::Signal::SIGTERM);
    running.finish().exits(143);
}

#[test]
fn a_published_tcp_port_leads_inside() {
    let home = Home::new();
    let port = free_port();
    for inside in ["0.0.0.0", "::"] {
        let publish = format!("127.0.0.1:{port}:8080");
        let running = home.run(["-p", &publish], ["python3", "-c", ECHO_SERVER, inside, "8080"]).start();
        running.until_out("listening");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        echo_through(address, 10);
        echo_through(address, 8 << 20);
        std::thread::scope(|scope| {
            for _ in 0..50 {
                scope.spawn(|| echo_through(address, 10_000));
            }
        });
        end(running);
        assert!(TcpStream::connect(address).is_err(), "the port is still open");
    }
}

/// Says who connects to it, at each of its addresses.
const WHO_SERVER: &str = r"
import os, socket, sys
own = os.popen('ip -4 -o addr show tap0').read().split()[3].split('/')[0]
s = socket.socket()
s.bind((own if sys.argv[1] == 'own' else sys.argv[1], 8080)); s.listen()
print('listening at', own, flush=True)
while True:
    c, peer = s.accept()
    c.sendall(peer[0].encode()); c.close()
";

#[test]
fn peers_on_the_hosts_loopback_appear_as_the_sandbox_itself() {
    let home = Home::new();
    let port = free_port();
    let publish = format!("127.0.0.1:{port}:8080");
    let capture = home.path("capture");
    let capture = format!("--network-capture={}", capture.display());
    // What has to be captured crosses the link, and comes from its other end.
    for (bound, option, own) in [("0.0.0.0", None, true), ("own", None, true), ("own", Some(&capture), false)]
    {
        let options = ["-p".to_owned(), publish.clone()].into_iter().chain(option.cloned());
        let running = home.run(options, ["python3", "-c", WHO_SERVER, bound]).start();
        let line = running.until_out("\n");
        let address = line.split_whitespace().last().unwrap().to_owned();
        let mut seen = String::new();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap().read_to_string(&mut seen).unwrap();
        assert_eq!(seen == address, own, "{bound} {option:?}: {seen} at {address}");
        assert!(seen.starts_with(address.rsplit_once('.').unwrap().0), "{seen}");
        end(running);
    }
    // The sandbox's own loopback is its own.
    let running = home.run(["-p", &publish], ["python3", "-c", WHO_SERVER, "127.0.0.1"]).start();
    running.until_out("listening");
    let mut seen = String::new();
    let read = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .and_then(|mut stream| stream.read_to_string(&mut seen));
    assert!(read.is_err() && seen.is_empty(), "{read:?} {seen}");
    end(running);
}

#[test]
fn a_port_is_published_on_every_address_unless_one_is_named() {
    let lab = lab!();
    let home = Home::new();
    let port = free_port();
    let publish = format!("{port}:8080");
    // A server of one family is reached by both: what `localhost` means is the client's choice.
    let running = home.run(["-p", &publish], ["python3", "-c", ECHO_SERVER, "0.0.0.0", "8080"]).start();
    running.until_out("listening");
    for address in [IpAddr::from(Ipv4Addr::LOCALHOST), lab.host.into(), std::net::Ipv6Addr::LOCALHOST.into()]
    {
        echo_through(SocketAddr::new(address, port), 1000);
    }
    end(running);
}

#[test]
fn a_published_port_without_a_server_is_closed_at_once() {
    let home = Home::new();
    let port = free_port();
    let publish = format!("127.0.0.1:{port}:8080");
    let mut running = home.run(["-p", &publish], ["sh", "-c", "echo ready; cat"]).stdin_open().start();
    running.until_out("ready");
    if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
        let mut got = Vec::new();
        // Closed or reset, but neither data nor a wait for ever.
        stream.set_read_timeout(Some(Duration::from_secs(50))).unwrap();
        match stream.read_to_end(&mut got) {
            Ok(_) => assert!(got.is_empty()),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    running.close_stdin();
    running.finish().ok();
}

#[test]
fn a_published_udp_port_leads_inside() {
    let home = Home::new();
    let port = free_port();
    let server = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 5353))
print('listening', flush=True)
while True:
    data, peer = s.recvfrom(65536)
    s.sendto(data.upper(), peer)
";
    let publish = format!("127.0.0.1:{port}:5353/udp");
    let running = home.run(["-p", &publish], ["python3", "-c", server]).start();
    running.until_out("listening");
    let clients: Vec<UdpSocket> = (0..20).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (number, client) in clients.iter().enumerate() {
        client.set_read_timeout(Some(Duration::from_secs(50))).unwrap();
        client.send_to(format!("client {number}").as_bytes(), ("127.0.0.1", port)).unwrap();
    }
    for (number, client) in clients.iter().enumerate() {
        let mut buffer = [0; 100];
        let (length, _) = client.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], format!("CLIENT {number}").as_bytes());
    }
    end(running);
}

#[test]
fn a_port_that_is_busy_is_told_before_anything_runs() {
    let home = Home::new();
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port();
    let mark = home.path("work/ran");
    let publish = format!("127.0.0.1:{port}:80");
    home.run(["-p", &publish], ["touch", mark.to_str().unwrap()])
        .run()
        .exits(125)
        .says(&port.to_string())
        .says("EADDRINUSE")
        .says("hint:");
    assert!(home.boxes().is_empty());
}

#[test]
fn publishing_on_an_address_that_is_not_the_hosts_is_refused() {
    let home = Home::new();
    home.run(["-p", "192.0.2.77:8080:80"], ["true"]).run().exits(125).says("192.0.2.77").says("hint:");
}

#[test]
fn none_has_no_network() {
    let home = Home::new();
    let script = "
import errno, socket
for address in ('10.77.0.2', 'fd77::2', '127.0.0.2'):
    try:
        socket.create_connection((address, 7), timeout=20)
        print('connected')
    except OSError as e:
        print(errno.errorcode[e.errno])
";
    home.python(["--network=none"], script).run().ok().prints("ENETUNREACH\nENETUNREACH\nECONNREFUSED");
}

#[test]
fn host_is_the_hosts_network() {
    let home = Home::new();
    let (port, thread, _listener) = loopback_server("127.0.0.1");
    let got = try_from_inside(&home, &["--network=host"], &["127.0.0.1".to_owned()], port);
    assert_eq!(got, ["I am the host"]);
    assert_eq!(stop(port, "127.0.0.1", thread), 1);
}

#[test]
fn abstract_sockets_of_the_host_are_out_of_reach() {
    need!("python3");
    let home = Home::new();
    let name = format!("rootlet-test-{}-{}", std::process::id(), crate::common::test_name());
    use std::os::linux::net::SocketAddrExt as _;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    let script = format!(
        "
import errno, socket
s = socket.socket(socket.AF_UNIX)
try:
    s.connect('\\0{name}'); print('connected')
except OSError as e:
    print(errno.errorcode[e.errno])
"
    );
    home.command("python3").args(["-c", &script]).run().ok().prints("connected");
    home.python(NONE, &script).run().ok().prints("ECONNREFUSED");
    let with_host = home.python(["--network=host"], &script).run();
    if std::fs::exists("/sys/kernel/security/landlock").unwrap_or(false) || with_host.text() != "connected" {
        assert_eq!(with_host.ok().text(), "EPERM");
    } else {
        skip!("this kernel has no Landlock scopes");
    }
}

#[test]
fn the_inside_network_avoids_those_of_the_host() {
    let _lab = lab!();
    let home = Home::new();
    let script = "cut -f2 /proc/net/route | sort -u; sed -n 's/nameserver //p' /etc/resolv.conf";
    let text = home.sh(NONE, script).run().ok().text();
    assert!(!text.contains("004D0A"), "the host's 10.77.0.0 is used inside\n{text}");
}

#[test]
fn a_server_inside_sees_its_own_listening_ports_only() {
    need!("python3");
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("{:04X}", listener.local_addr().unwrap().port());
    let text = home.run(NONE, ["cat", "/proc/net/tcp"]).run().ok().text();
    assert!(!text.contains(&format!(":{port} ")), "{text}");
}

/// A peer on the host's loopback, and a program inside that sends it `bytes`, much faster than may go.
fn sends_slowly(home: &Home, options: &[&str], before: &str, bytes: usize) -> (Running, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!(
        "
import signal, socket
{before}
gateway = open('/etc/resolv.conf').read().split()[1]
s = socket.create_connection((gateway, {port}), timeout=20); s.settimeout(None)
s.sendall(bytes({bytes})); s.close()
"
    );
    let options = ["--allow-host-loopback", "--network-rate=out:20k"].iter().chain(options);
    let running = home.run(options, ["python3", "-c", &script]).start();
    let (mut peer, _) = listener.accept().unwrap();
    peer.read_exact(&mut [0]).unwrap();
    (running, peer)
}

/// The sandbox is gone long before its data would be, and the peer learns that this is not all.
fn is_cut_short(began: Instant, mut peer: TcpStream) {
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    let end = peer.read_to_end(&mut Vec::new());
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn what_was_killed_has_nothing_sent_any_more() {
    let home = Home::new();
    for (options, exits) in [(&[][..], 143), (&["--timeout=2s"], 124)] {
        let (running, peer) = sends_slowly(&home, options, "", 9 << 20);
        if exits == 143 {
            running.signal(nix::sys::signal::Signal::SIGTERM);
        }
        let began = Instant::now();
        running.finish().exits(exits);
        is_cut_short(began, peer);
    }
}

#[test]
fn a_signal_ends_the_wait_for_what_was_sent_last() {
    let home = Home::new();
    let ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)";
    let (running, peer) = sends_slowly(&home, &[], ignore, 400_000);
    let began = Instant::now();
    let inside = format!("/proc/{0}/task/{0}/children", running.pid());
    while !std::fs::read_to_string(&inside).unwrap().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20), "the program inside does not end");
        std::thread::yield_now();
    }
    let began = Instant::now();
    running.signal(nix::sys::signal::Signal::SIGTERM);
    running.finish().exits(0).says("were reset");
    is_cut_short(began, peer);
}
