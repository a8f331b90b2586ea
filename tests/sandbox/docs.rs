//! The README's commands do what it says: every block fenced as `console` is run, and what it shows
//! must come out. A line `$ COMMAND` is typed, what follows is expected, `…` stands for anything.
//! A block after `<!-- not run: REASON -->` is left out.

use crate::common::{Home, rootlet_binary, skip};

struct Step {
    command: String,
    expected: Vec<String>,
}

fn blocks(text: &str) -> Vec<Vec<Step>> {
    let mut blocks = Vec::new();
    let mut lines = text.lines().peekable();
    let mut left_out = false;
    while let Some(line) = lines.next() {
        if line.starts_with("<!-- not run:") {
            left_out = true;
        } else if line.trim() == "```console" {
            let mut steps: Vec<Step> = Vec::new();
            for line in lines.by_ref().take_while(|line| line.trim() != "```") {
                match (line.strip_prefix("$ "), steps.last_mut()) {
                    (Some(command), _) => {
                        steps.push(Step { command: command.to_owned(), expected: Vec::new() })
                    }
                    (None, Some(step)) if step.command.ends_with('\\') => {
                        step.command.truncate(step.command.len() - 1);
                        step.command.push_str(line.trim_start());
                    }
                    (None, Some(step)) => step.expected.push(line.to_owned()),
                    (None, None) => panic!("a console block starts with a prompt, not with {line:?}"),
                }
            }
            if !std::mem::take(&mut left_out) {
                blocks.push(steps);
            }
        } else if !line.trim().is_empty() {
            left_out = false;
        }
    }
    blocks
}

/// `…` in an expected line stands for anything, and alone on a line for any lines.
fn matches(expected: &[String], got: &[&str]) -> bool {
    let Some((first, rest)) = expected.split_first() else { return got.is_empty() };
    if first.trim() == "…" {
        return (0..=got.len()).any(|skipped| matches(rest, &got[skipped..]));
    }
    let Some((line, others)) = got.split_first() else { return false };
    let parts: Vec<&str> = first.split('…').collect();
    let mut at = 0;
    let fits = parts.iter().enumerate().all(|(index, part)| {
        let found = if index == 0 {
            line.starts_with(part).then_some(0)
        } else {
            line[at..].find(part).map(|p| p + at)
        };
        found.is_some_and(|found| {
            at = found + part.len();
            true
        })
    });
    fits && (at == line.len() || first.ends_with('…')) && matches(rest, others)
}

#[test]
fn expectations_match_with_gaps() {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert!(matches(&lines("a…c\n…\nend"), &["abc", "x", "y", "end"]));
    assert!(!matches(&lines("a…c"), &["ab"]));
    assert!(!matches(&lines("a"), &["a", "b"]));
    assert!(!matches(&lines("a"), &["ab"]));
}

#[test]
fn the_readmes_commands_do_what_it_shows() {
    let path = std::env::var_os("ROOTLET_TEST_README")
        .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/README.md").into(), std::path::PathBuf::from);
    let Ok(text) = std::fs::read_to_string(&path) else { skip!("there is no README.md") };
    let blocks = blocks(&text);
    if blocks.is_empty() {
        skip!("README.md has no block fenced as console");
    }
    for steps in blocks {
        let home = Home::new();
        let bin = home.dir("bin");
        std::os::unix::fs::symlink(rootlet_binary(), bin.join("rootlet")).unwrap();
        let path = format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", bin.display());
        for step in &steps {
            let command = format!("{{ {}\n}} 2>&1", step.command);
            let out = home.command("bash").args(["-c", &command]).env("PATH", &path).run();
            let text = out.text();
            let got: Vec<&str> = text.lines().collect();
            assert!(
                matches(&step.expected, &got),
                "$ {}\nexpected:\n{}\ngot:\n{text}",
                step.command,
                step.expected.join("\n")
            );
        }
        for name in home.boxes() {
            home.keeps(&name);
        }
    }
}
