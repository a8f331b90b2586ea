//! Names that would act on the caller's terminal are escaped in what we print.

use crate::common::Home;

/// What a terminal would obey, reorder or hide.
const EVIL: [&str; 6] =
    ["\u{1b}[2J", "\u{1b}]0;pwned\u{7}", "\u{202e}fdp.exe", "\u{9b}31m", "new\nline", "\u{200b}hidden"];

#[track_caller]
fn is_clean(bytes: &[u8], what: &str) {
    let text = String::from_utf8_lossy(bytes);
    for c in text.chars() {
        let bad = (c.is_control() && c != '\n')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200b}'..='\u{200f}');
        assert!(!bad, "{what} prints {c:?}: {text:?}");
    }
}

#[test]
fn diff_escapes_file_names() {
    let home = Home::new();
    let mut command = home.rootlet(["run", "--name=evil", "--", "touch", "--"]);
    for name in EVIL {
        command = command.arg(name);
    }
    command.run().ok();
    home.keeps("evil");
    let out = home.rootlet(["diff", "evil"]).run().ok();
    is_clean(&out.out, "diff");
    assert!(out.text().contains("\\u{1b}[2J"), "{out}");
    // A name with a line end must not make a second entry.
    assert!(!out.text().lines().any(|line| line == "line"), "{out}");
    let json = home.rootlet(["diff", "--json", "evil"]).run().ok();
    is_clean(&json.out, "diff --json");
    let paths: Vec<String> =
        json.json().as_array().unwrap().iter().map(|c| c["path"].as_str().unwrap().to_owned()).collect();
    assert!(paths.iter().any(|path| path.ends_with("new\nline")), "{paths:?}");
}

#[test]
fn ls_escapes_commands() {
    let home = Home::new();
    home.rootlet(["run", "--name=evil", "--", "sh", "-c", "touch x", EVIL[0], EVIL[2], EVIL[4]]).run().ok();
    home.keeps("evil");
    is_clean(&home.rootlet(["ls"]).run().ok().out, "ls");
    is_clean(&home.rootlet(["ls", "--json"]).run().ok().out, "ls --json");
}

#[test]
fn errors_and_logs_escape_names() {
    let home = Home::new();
    for name in EVIL {
        for options in [
            vec![format!("--workdir=/{name}")],
            vec![format!("--rootfs=/{name}")],
            vec!["--log-level=trace".into()],
        ] {
            let out = home.rootlet(["run", "--rm"]).args(&options).args(["--", name]).run();
            assert!([125, 127].contains(&out.code()), "{out}");
            is_clean(&out.err, "an error");
        }
        let out = home.rootlet(["rm", name]).run();
        is_clean(&out.err, "rm");
        let out = home.run(["--dry-run", &format!("--env=A={name}")], [name]).run();
        is_clean(&out.out, "the plan");
        let out = home.rootlet([name]).run();
        is_clean(&out.err, "usage");
        let out = home.rootlet(["run", &format!("--{name}"), "--", "true"]).run();
        is_clean(&out.err, "usage of run");
    }
}

#[test]
fn an_interpreters_name_is_escaped() {
    let home = Home::new();
    let script = home.script("work/script", "#!/no/\u{1b}[2J/such\n");
    let out = home.run([""; 0], [script]).run();
    assert!([126, 127].contains(&out.code()), "{out}");
    is_clean(&out.err, "an error");
}

/// Does things with such names while everything is logged, and prints nothing itself.
const NOISE: &str = r#"
import ctypes, os, socket, struct, sys
names = [name.encode() for name in sys.argv[1:]]
libc = ctypes.CDLL(None)
with open('/etc/resolv.conf') as conf:
    resolver = next(line.split()[1] for line in conf if line.startswith('nameserver') and ':' not in line)
questions = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
questions.settimeout(50)
for name in names:
    libc.prctl(15, name)
    open(name, 'wb').close()
    os.setxattr(name, b'user.' + name, name)
    os.link(name, b'link' + name)
    os.rename(name, b'new' + name)
    os.symlink(name, name)
    os.unlink(name)
    os.mkdir(name)
    os.mknod(name + b'/node', 0o20600, 0x103)
    os.chown(name, 77777, 77777)
    for label in (name, name[:1], b'a.' + name):
        question = struct.pack('!6H', 7, 0x100, 1, 0, 0, 0) + bytes([len(label)]) + label + b'\4test\0' + struct.pack('!2H', 1, 1)
        questions.sendto(question, (resolver, 53))
        questions.recv(4096)
    try: os.execv(name, [name])
    except OSError: pass
"#;

#[test]
fn a_trace_of_what_a_payload_does_is_clean() {
    let home = Home::new();
    let (log, report) = (home.text("work/log"), home.text("work/report"));
    let out = home
        .rootlet([
            "--log-level=trace",
            &format!("--log-file={log}"),
            "run",
            "--rm",
            "--report",
            &report,
            "--",
        ])
        .args(["python3", "-c", NOISE])
        .args(EVIL)
        .run()
        .ok();
    is_clean(&out.err, "standard error");
    for path in [log, report] {
        let text = std::fs::read(&path).unwrap();
        assert!(!text.is_empty());
        is_clean(&text, &path);
        // A line end in a name begins no line of ours.
        assert!(!String::from_utf8_lossy(&text).lines().any(|line| line.starts_with("line")), "{path}");
    }
}

#[test]
fn host_names_and_accounts_are_escaped() {
    let home = Home::new();
    let root = home.dir("work/rootfs");
    std::fs::create_dir(root.join("etc")).unwrap();
    let accounts: String =
        EVIL.iter().map(|name| format!("{}:x:0:0::/{name}:/{name}\n", name.replace(':', ""))).collect();
    std::fs::write(root.join("etc/passwd"), &accounts).unwrap();
    std::fs::write(root.join("etc/group"), &accounts).unwrap();
    for name in EVIL {
        for option in [
            "hostname",
            "domainname",
            "name",
            "user",
            "uidmap",
            "volume",
            "tmpfs",
            "publish",
            "upper",
            "report",
        ] {
            let flag = format!("--{option}={name}");
            let rootfs = format!("--rootfs={}", root.display());
            for more in [&[][..], &["--dry-run"], &["--dry-run", "--json"]] {
                if option == "report" && !more.is_empty() {
                    continue;
                }
                let out = home.run([&flag, &rootfs].map(String::as_str).iter().chain(more), [name]).run();
                is_clean(&out.err, &flag);
                is_clean(&out.out, &flag);
            }
        }
    }
}
