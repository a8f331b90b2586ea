//! What lies below: made once for all contenders.

use std::fmt::Write as _;
use std::fs::{create_dir_all, write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::works::{
    C_SOURCES, CRATES, DEB_FILES, FLAT, GROUPS, NPM_PACKAGES, PER_DIR, SMALL_DIRS, dir_name, scaled,
};

/// Builds a tree over `lowers` (the lowest first).
pub(crate) fn build(tree: &str, lowers: &[PathBuf], scale: usize) {
    let first = &lowers[0];
    match tree {
        "files" => files(lowers, scale),
        "flat" => {
            for (at, lower) in lowers.iter().enumerate() {
                create_dir_all(lower.join("flat")).unwrap();
                for i in (at..scaled(FLAT, scale)).step_by(lowers.len()) {
                    write(lower.join(format!("flat/entry-{i:06}")), "").unwrap();
                }
            }
        }
        "big" => write(first.join("big"), vec![7u8; 256 << 20]).unwrap(),
        "empty" => create_dir_all(first.join("dir")).unwrap(),
        "tar" => {
            let scratch = first.join("src");
            files(std::slice::from_ref(&scratch), scale.div_ceil(5));
            sh(first, "tar cf files.tar src && rm -r src");
        }
        "repo" => repo(first, scale),
        "c" => c_sources(first, scaled(C_SOURCES, scale)),
        "deb" => deb(first, scale),
        "npm" => npm(first, scale),
        "rust" => rust(first, scaled(CRATES, scale)),
        other => panic!("no such tree: {other}"),
    }
}

/// A command in a directory; the tools' output is of no interest unless they fail. What the caller's
/// environment says does not matter: cargo would build outside of the mount where CARGO_TARGET_DIR says so.
pub(crate) fn sh(dir: &Path, script: &str) {
    let kept = ["PATH", "HOME", "TMPDIR", "CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN"];
    let kept = kept.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    let output = Command::new("sh")
        .args(["-ec", script])
        .current_dir(dir)
        .env_clear()
        .envs(kept)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_OPTIONAL_LOCKS", "1")
        .env("CARGO_TARGET_DIR", "target")
        .output()
        .unwrap();
    let said = [&*output.stdout, &*output.stderr].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{script}: {said}");
}

/// 100,000 files of 200 bytes, 100 in each of 1,000 directories in ten others. The ten are in all
/// layers, each of the 1,000 in two.
fn files(lowers: &[PathBuf], scale: usize) {
    for dir in 0..scaled(SMALL_DIRS, scale) {
        for half in 0..2 {
            let lower = &lowers[(dir + half) % lowers.len()];
            let path = lower.join(dir_name(dir));
            create_dir_all(&path).unwrap();
            for file in (half..PER_DIR).step_by(2) {
                write(path.join(format!("file-{file:03}.txt")), [b'x'; 200]).unwrap();
            }
        }
    }
    for lower in lowers {
        for group in 0..GROUPS {
            create_dir_all(lower.join(format!("group-{group}"))).unwrap();
        }
    }
}

pub(crate) fn source_name(file: usize) -> String {
    format!("part-{:02}/source-{file:05}.c", file % 50)
}

/// 5,000 files, two branches that differ in every fourth.
fn repo(dir: &Path, scale: usize) {
    let edit = |text: &str, step: usize| {
        for i in (0..scaled(5000, scale)).step_by(step) {
            let path = dir.join("repo").join(source_name(i));
            create_dir_all(path.parent().unwrap()).unwrap();
            write(path, format!("{text} {i}\n").repeat(40)).unwrap();
        }
    };
    edit("first", 1);
    let commit = "git add -A && git -c user.name=a -c user.email=a@b commit -qm x";
    sh(&dir.join("repo"), &format!("git init -q -b one . && {commit} && git checkout -q -b two"));
    edit("second", 4);
    sh(&dir.join("repo"), &format!("{commit} && git checkout -q one && git gc -q"));
}

fn c_sources(dir: &Path, count: usize) {
    let objects: Vec<String> = (0..count).map(|i| format!("f{i}.o")).collect();
    for i in 0..count {
        let body =
            format!("#include <stdio.h>\n#include \"all.h\"\nint f{i}(void) {{ return puts(\"{i}\"); }}\n");
        write(dir.join(format!("f{i}.c")), body).unwrap();
    }
    let header: String = (0..count).fold(String::new(), |mut text, i| {
        let _ = writeln!(text, "int f{i}(void);");
        text
    });
    write(dir.join("all.h"), header).unwrap();
    let objects = objects.join(" ");
    write(dir.join("Makefile"), format!("all: {objects}\n%.o: %.c all.h\n\tcc -O0 -c -o $@ $<\n")).unwrap();
}

pub(crate) fn deb_name(file: usize) -> String {
    format!("usr/share/bench/d{:02}/f{file:04}", file % 40)
}

/// A package of 2,000 files without scripts, and an empty database.
fn deb(dir: &Path, scale: usize) {
    for i in 0..scaled(DEB_FILES, scale) {
        let path = dir.join("pkg").join(deb_name(i));
        create_dir_all(path.parent().unwrap()).unwrap();
        write(path, vec![b'd'; 1500]).unwrap();
    }
    create_dir_all(dir.join("pkg/DEBIAN")).unwrap();
    let control =
        "Package: bench\nVersion: 1\nArchitecture: all\nMaintainer: n <n@localhost>\nDescription: files\n";
    write(dir.join("pkg/DEBIAN/control"), control).unwrap();
    sh(dir, "dpkg-deb -Znone --root-owner-group -b pkg bench.deb >/dev/null && rm -r pkg");
    sh(dir, "mkdir -p root/var/lib/dpkg/info root/var/lib/dpkg/updates && touch root/var/lib/dpkg/status");
}

pub(crate) fn js_name(file: usize) -> String {
    format!("lib/m{:02}/index{file}.js", file % 10)
}

/// A project with 20 dependencies in tarballs beside it.
fn npm(dir: &Path, scale: usize) {
    let mut dependencies = Vec::new();
    for package in 0..scaled(NPM_PACKAGES, scale) {
        let root = dir.join(format!("tar/p{package}/package"));
        for i in 0..100 {
            let path = root.join(js_name(i));
            create_dir_all(path.parent().unwrap()).unwrap();
            write(path, "module.exports = 1;\n".repeat(20)).unwrap();
        }
        write(root.join("package.json"), format!(r#"{{"name":"p{package}","version":"1.0.0"}}"#)).unwrap();
        sh(&root.join(".."), &format!("tar czf ../../p{package}.tgz package"));
        dependencies.push(format!(r#""p{package}":"file:p{package}.tgz""#));
    }
    let text = format!(r#"{{"name":"x","version":"1.0.0","dependencies":{{{}}}}}"#, dependencies.join(","));
    write(dir.join("package.json"), text).unwrap();
    sh(
        dir,
        "rm -r tar; HOME=$PWD/home npm install --offline --package-lock-only --no-audit --no-fund >/dev/null",
    );
}

/// A workspace of small crates without dependencies from elsewhere.
fn rust(dir: &Path, crates: usize) {
    for i in 0..crates {
        let root = dir.join(format!("c{i}"));
        create_dir_all(root.join("src")).unwrap();
        let depends = if i > 0 { format!("c{0} = {{ path = \"../c{0}\" }}\n", i - 1) } else { String::new() };
        let manifest = format!(
            "[package]\nname = \"c{i}\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[dependencies]\n{depends}"
        );
        write(root.join("Cargo.toml"), manifest).unwrap();
        let body: String = (0..50).fold(String::new(), |mut text, f| {
            let _ = writeln!(text, "pub fn f{f}(x: &[u64]) -> u64 {{ x.iter().map(|y| y * {f}).sum() }}");
            text
        });
        write(root.join("src/lib.rs"), body).unwrap();
    }
    let members: Vec<String> = (0..crates).map(|i| format!("\"c{i}\"")).collect();
    let text = format!("[workspace]\nresolver = \"2\"\nmembers = [{}]\n", members.join(", "));
    write(dir.join("Cargo.toml"), text).unwrap();
    sh(dir, "cargo generate-lockfile --offline 2>/dev/null");
}
