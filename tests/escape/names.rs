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
