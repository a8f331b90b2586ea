//! `rootlet overlay`, and the same program by the name `fuse-overlayfs`, mounting in namespaces of
//! their own as Podman has it.

use crate::common::{Cmd, Home, is_root, rootlet_binary, skip};

/// Directories `a` over `b`, an upper, a work directory and a mount point.
fn prepared(home: &Home) {
    home.file("work/a/both", "a");
    home.file("work/b/both", "b");
    home.file("work/b/below", "below");
    for dir in ["u", "w", "m"] {
        home.dir(format!("work/{dir}"));
    }
    let name = home.dir("bin").join("fuse-overlayfs");
    if !name.exists() {
        std::os::unix::fs::symlink(rootlet_binary(), name).unwrap();
    }
}

/// A script as root of a user and mount namespace: `$R` is rootlet, `$F` the same by its other name,
/// `$O` the usual options.
fn inside(home: &Home, script: &str) -> Cmd {
    let flags = if is_root() { "-m" } else { "-Urm" };
    home.command("unshare")
        .args([flags, "sh", "-c", script])
        .env("R", rootlet_binary())
        .env("F", home.path("bin/fuse-overlayfs"))
        .env("O", "lowerdir=a:b,upperdir=u,workdir=w")
}

#[test]
fn a_mount_can_be_used_when_the_command_returns() {
    let home = Home::new();
    prepared(&home);
    let script = "
set -e
$R overlay -o $O m
cat m/both m/below; echo new >m/new; rm m/below; chmod 600 m/both
grep -c \" $PWD/m fuse.rootlet rw,\" /proc/mounts
umount m; ls m";
    inside(&home, script).run().ok().prints("abelow1");
    // Without the mount: the upper holds what was done, the layers what they held.
    assert_eq!(std::fs::read_to_string(home.path("work/u/new")).unwrap(), "new\n");
    assert_eq!(std::fs::read_to_string(home.path("work/b/below")).unwrap(), "below");
    let again = "$R overlay -o $O m && ls m && stat -c %a m/both && umount m";
    inside(&home, again).run().ok().prints("both\nnew\n600");
}

#[test]
fn it_answers_to_the_name_fuse_overlayfs() {
    let home = Home::new();
    prepared(&home);
    // The second form is mount.fuse3's.
    let script = "
set -e
$F -olowerdir=a -o lowerdir=b:a,upperdir=u,workdir=w m; cat m/both; umount m
$F name m -o rw,suid,dev,lowerdir=a; cat m/both; touch m/x 2>&1 || :; umount m
$F m -o upperdir=u,workdir=w,lowerdir=a,ro; touch m/x 2>&1 || :
grep -o \" $PWD/m fuse.fuse-overlayfs ro,\" /proc/mounts | wc -l; umount m
$F --version";
    let out = inside(&home, script).run().ok();
    let denied = "touch: cannot touch 'm/x': Read-only file system";
    let version = env!("CARGO_PKG_VERSION");
    out.prints(&format!("ba{denied}\n{denied}\n1\nfuse-overlayfs {version} (rootlet)"));
}

#[test]
fn a_signal_unmounts_and_loses_nothing_that_was_written() {
    let home = Home::new();
    prepared(&home);
    let script = "
$R overlay -f -o $O m & server=$!
until grep -q \" $PWD/m \" /proc/mounts; do kill -0 $server || exit 3; done
exec 5>m/open; echo kept >&5
kill -TERM $server; wait $server; echo $?
grep -c \" $PWD/m \" /proc/mounts
cat u/open; echo lost >&5";
    let out = inside(&home, script).run();
    assert!(out.text().starts_with("0\n0\nkept"), "{out}");
}

#[test]
fn what_cannot_be_mounted_is_refused_before_anything_is_mounted() {
    let home = Home::new();
    prepared(&home);
    home.file("work/file", "");
    home.dir("work/u/inner");
    let cases = [
        ("lowerdir=a:none", "cannot use the layer none"),
        ("lowerdir=file", "it is not a directory"),
        ("lowerdir=a,upperdir=none,workdir=w", "cannot use the upper directory none"),
        ("lowerdir=a,upperdir=u", "upperdir needs workdir"),
        ("lowerdir=a,upperdir=u,workdir=u/inner", "the work directory is inside the upper directory"),
        ("lowerdir=u/inner,upperdir=u,workdir=w", "the layer is inside the upper directory"),
        ("lowerdir=a,frobnicate=1", "unknown option frobnicate"),
        ("lowerdir=a,plugins=x", "the option plugins=x is not supported"),
        ("upperdir=u,ro=7,workdir=w", "it takes no value"),
    ];
    for (options, text) in cases {
        let script = format!("$F -o {options} m; echo $?; grep -c \" $PWD/m \" /proc/mounts");
        let out = inside(&home, &script).run();
        assert!(out.text() == "1\n0" && out.errors().contains(text), "{options}: {out}");
    }
    let out =
        inside(&home, "$R overlay -o lowerdir=a none; echo $?; $R overlay -o lowerdir=a,q m; echo $?").run();
    assert!(out.text() == "1\n2" && out.errors().contains("cannot use the mount point none"), "{out}");
}

#[test]
fn names_with_colons_and_commas_are_escaped() {
    let home = Home::new();
    prepared(&home);
    home.file("work/c:d,e/odd", "odd");
    inside(&home, r"$R overlay -o 'lowerdir=c\:d\,e:a' m && cat m/odd m/both && umount m")
        .run()
        .ok()
        .prints("odda");
}

#[test]
fn a_layer_above_the_mount_point_does_not_show_the_mount() {
    let home = Home::new();
    prepared(&home);
    let script = "$R overlay -o lowerdir=$PWD,upperdir=u,workdir=w m && ls m m/m m/u && umount m";
    inside(&home, script).run().ok().prints("m:\na\nb\nm\nu\nw\n\nm/m:\n\nm/u:");
}

#[test]
fn who_may_not_mount_gets_a_hint_or_the_helper() {
    if is_root() {
        skip!("root may mount");
    }
    let home = Home::new();
    prepared(&home);
    let refused =
        home.command(rootlet_binary()).args(["overlay", "-o", "lowerdir=a", "m"]).env("PATH", "/nonexistent");
    let out = refused.run().exits(1);
    assert!(out.errors().contains("fusermount3") && out.errors().contains("unshare -rm"), "{out}");
}
