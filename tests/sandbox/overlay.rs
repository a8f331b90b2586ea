//! `rootlet overlay`, and the same program by the name `fuse-overlayfs`, mounting in namespaces of
//! their own as Podman has it.

use crate::common::{Cmd, Home, has_subids, is_root, need, rootlet_binary, skip};

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
    let flags: &[&str] = match (is_root(), has_subids()) {
        (true, _) => &["-m"],
        (false, true) => &["--map-root-user", "--map-auto", "-m"],
        (false, false) => &["-Urm"],
    };
    home.command("unshare")
        .args(flags)
        .args(["sh", "-c", script])
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
fn an_exported_upper_is_the_same_in_the_kernels_overlay() {
    let home = Home::new();
    prepared(&home);
    home.file("work/b/old/deep/file", "content");
    let script = "
set -e
$R overlay -o $O m; mv m/old m/new; echo more >m/new/more; umount m; mkdir k
kernel() { mount -t overlay o -o userxattr,$O k 2>/dev/null || { echo skip; exit; }; ls -R k/new 2>&1 | wc -l; umount k; }
before=$(kernel); test \"$before\" != skip || { echo skip; exit; }
$R overlay --export -o $O
after=$(kernel); test \"$before\" != \"$after\"; echo $after
mount -t overlay o -o userxattr,$O k; cat k/new/deep/file k/new/more; test ! -e k/old; umount k
$R overlay -o $O m; cat m/new/deep/file m/new/more; umount m
$R overlay --export -o $O";
    let out = inside(&home, script).run().ok();
    if out.text() == "skip" {
        skip!("the kernel's overlayfs cannot be mounted here");
    }
    let copied = "directories that had been renamed and are copies now:";
    out.prints(&format!("{copied} 1\n6\ncontentmore\ncontentmore\n{copied} 0"));
    for wrong in
        ["--export -o lowerdir=a", "--export -o $O m", "--export -o lowerdir=a,upperdir=nowhere,workdir=w"]
    {
        let out = inside(&home, &format!("$R overlay {wrong}; echo $?")).run().ok();
        assert_ne!(out.text(), "0", "{wrong}");
    }
}

#[test]
fn an_upper_in_use_is_named_and_not_cleaned() {
    let home = Home::new();
    prepared(&home);
    let script = "
set -e
mkdir m2; $R overlay -o $O m; : >w/#f1
$R overlay -o $O m2; ls w | grep -c f1
umount m2; umount -l m
until $R overlay -o $O m 2>err && ! grep -q 'another server' err; do umount m; done
ls w | grep -c f1 || :; umount m";
    let out = inside(&home, script).run().ok();
    out.says("another server has this upper").prints("1\n0");
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
touch u/upper; $F m -o upperdir=u,workdir=w,lowerdir=a,ro; touch m/x 2>&1 || :; ls m
grep -o \" $PWD/m fuse.fuse-overlayfs ro,\" /proc/mounts | wc -l; umount m
$F --version";
    let out = inside(&home, script).run().ok();
    let denied = "touch: cannot touch 'm/x': Read-only file system";
    let version = env!("CARGO_PKG_VERSION");
    out.prints(&format!("ba{denied}\n{denied}\nboth\nupper\n1\nfuse-overlayfs {version} (rootlet)"));
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
    home.file("work/w/work/f", "of a layer");
    home.dir("work/u/inner");
    let cases = [
        ("lowerdir=a:none", "cannot use the layer none"),
        ("lowerdir=file", "it is not a directory"),
        ("lowerdir=a,upperdir=none,workdir=w", "cannot use the upper directory none"),
        ("lowerdir=a,upperdir=u", "upperdir needs workdir"),
        ("lowerdir=a,upperdir=u,workdir=u/inner", "the work directory is inside the upper directory"),
        ("lowerdir=u/inner,upperdir=u,workdir=w", "the layer is inside the upper directory"),
        ("lowerdir=w/work,upperdir=u,workdir=w", "the layer is inside the work directory"),
        ("lowerdir=a,upperdir=u,workdir=a", "the layer is inside the work directory"),
        ("lowerdir=a,frobnicate=1", "unknown option frobnicate"),
        ("lowerdir=a,plugins=x", "the option plugins=x is not supported"),
        ("upperdir=u,ro=7,workdir=w", "it takes no value"),
        ("lowerdir=a,upperdir=u,workdir=w,passthrough,timeout=1", "layers that change"),
    ];
    // Root of a user namespace may not, root of the host may.
    let passthrough = ("lowerdir=a,upperdir=u,workdir=w,passthrough", "FUSE passthrough cannot be had");
    for (options, text) in cases.into_iter().chain((!is_root()).then_some(passthrough)) {
        let script = format!("$F -o {options} m; echo $?; grep -c \" $PWD/m \" /proc/mounts");
        let out = inside(&home, &script).run();
        assert!(out.text() == "1\n0" && out.errors().contains(text), "{options}: {out}");
    }
    let out =
        inside(&home, "$R overlay -o lowerdir=a none; echo $?; $R overlay -o lowerdir=a,q m; echo $?").run();
    assert!(out.text() == "1\n2" && out.errors().contains("cannot use the mount point none"), "{out}");
    assert!(home.path("work/w/work/f").exists());
}

#[test]
fn a_signal_that_the_caller_ignores_is_ignored() {
    let home = Home::new();
    prepared(&home);
    // What is waited for is blocked: SIGTERM, but neither this one nor SIGINT, which sh ignores for `&`.
    // While a thread is made, all are.
    let script = "
trap '' HUP
$R overlay -f -o $O m & server=$!
until grep -q \" $PWD/m \" /proc/mounts; do kill -0 $server || exit 3; done
cat m/both; echo
until grep SigBlk /proc/$server/status | grep -v ffff; do kill -0 $server || exit 4; done
kill -HUP $server; kill -TERM $server; wait $server; echo $?";
    inside(&home, script).run().ok().prints("a\nSigBlk:\t0000000000004000\n0");
}

#[test]
fn nothing_is_mounted_for_a_caller_who_is_gone() {
    need!("strace");
    let home = Home::new();
    prepared(&home);
    // The process in the background stops at its first step, and goes on when the caller is dead.
    let script = "
strace -f -qq -e trace=setsid -e inject=setsid:signal=STOP -o log $R overlay -o $O m & strace=$!
until grep -q 'stopped by SIGSTOP' log 2>/dev/null; do kill -0 $strace || exit 3; done
server=$(awk '/stopped by SIGSTOP/ { print $1 }' log)
caller=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$server/status)
kill -KILL $caller
until [ ! -e /proc/$caller ]; do kill -0 $strace || exit 4; done
kill -CONT $server
wait $strace; grep -c \" $PWD/m \" /proc/mounts";
    let out = inside(&home, script).run();
    assert_eq!(out.text(), "0", "{out}");
}

#[test]
fn a_link_in_the_place_of_the_mount_point_is_not_followed() {
    need!("strace");
    let home = Home::new();
    prepared(&home);
    // The server stops before it opens the mount point again, and goes on when somebody has put a link there.
    let script = "
strace -f -qq -o log -e trace=setsid -e inject=setsid:signal=STOP $R overlay -o $O m & strace=$!
until grep -q 'stopped by SIGSTOP' log 2>/dev/null; do kill -0 $strace || exit 3; done
mv m moved; ln -s b m
kill -CONT $(awk '/stopped by SIGSTOP/ { print $1 }' log)
wait $strace; echo $?; grep -c \" $PWD/b \" /proc/mounts; grep -c \" $PWD/moved \" /proc/mounts";
    let out = inside(&home, script).run();
    assert!(out.text() == "1\n0\n0" && out.errors().contains("ELOOP"), "{out}");
}

#[test]
fn links_are_not_followed_if_that_is_asked_for() {
    let home = Home::new();
    prepared(&home);
    let script = "
set -e
ln -s both a/link
$R overlay -o $O,nosymfollow m; readlink m/link; cat m/link 2>/dev/null || echo refused; umount m
$R overlay -o $O,nosymfollow,symfollow m; cat m/link; umount m";
    inside(&home, script).run().ok().prints("both\nrefused\na");
}

#[test]
fn the_server_in_the_background_has_a_log() {
    let home = Home::new();
    prepared(&home);
    let script = "
set -e
for program in \"$R overlay\" \"$F\"; do
  RUST_LOG=trace $program -o $O,log=log m; touch m/f; umount m
  grep -c . log | sed 's/^[1-9][0-9]*$/some/'; rm log
done
$R overlay -o $O,log=none/log m || echo $?";
    let out = inside(&home, script).run();
    assert!(
        out.text() == "some\nsome\n2" && out.errors().contains("cannot open the log file none/log"),
        "{out}"
    );
}

#[test]
fn errors_say_what_can_be_done() {
    let home = Home::new();
    prepared(&home);
    let dead = "
$R overlay -f -o lowerdir=a m & server=$!
until grep -q \" $PWD/m \" /proc/mounts; do kill -0 $server || exit 3; done
kill -KILL $server; wait $server
$R overlay -o lowerdir=a m; umount m";
    let out = inside(&home, dead).run();
    assert!(out.errors().contains("ENOTCONN") && out.errors().contains("`umount` it"), "{out}");
    let out = inside(&home, "mount -t tmpfs none /dev; $R overlay -o lowerdir=a m").run();
    assert!(
        out.errors().contains("cannot open /dev/fuse") && out.errors().contains("rootlet doctor"),
        "{out}"
    );
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

/// Whether there are more ids than one in the namespaces of [`inside`].
fn has_ids() -> bool {
    is_root() || has_subids()
}

#[test]
fn owners_and_modes_are_on_the_disk() {
    let home = Home::new();
    prepared(&home);
    let script = "
set -e
$R overlay -o $O m
touch m/f m/both; mkdir m/d; chmod 6755 m/both; chmod 3770 m/d; mkfifo m/p; ln -s x m/l
mknod m/c c 0 0 2>/dev/null || echo refused
umask 022; mkdir m/d/sub; touch m/d/sub/f
umount m
getfattr -R -n user.containers.override_stat u 2>/dev/null | grep -c override || :
cd u; stat -c '%n %F %a' f both d p l d/sub d/sub/f; find . -type c";
    let text = "refused\n0\nf regular empty file 644\nboth regular file 6755\nd directory 3770\np fifo 644\n\
                l symbolic link 777\nd/sub directory 2755\nd/sub/f regular empty file 644";
    inside(&home, script).run().ok().prints(text);
    // What exists already is as it is on the disk, too.
    let again = "set -e; chmod 4711 u/f; $R overlay -o $O m; stat -c '%a %F' m/f m/both m/p; chmod 600 m/p; umount m; stat -c %a u/p";
    inside(&home, again).run().ok().prints("4711 regular empty file\n6755 regular file\n644 fifo\n600");
}

#[test]
fn other_ids_own_files_on_the_disk() {
    if !has_ids() {
        skip!("only one id exists without subordinate ids");
    }
    let home = Home::new();
    prepared(&home);
    let script = "
set -e
chown 33:44 a/both; chmod 4755 a/both; chown 0:50 b; chmod 2775 b
$R overlay -o $O m
stat -c '%u %g %a' m/both
echo more >>m/both; touch m/f; chown 10:20 m/f; ln -s x m/l; chown -h 7:8 m/l; mkfifo m/p; chown 9:9 m/p
mkdir -m 1777 m/tmp
setpriv --reuid 12 --regid 13 --clear-groups sh -c 'umask 027; touch m/tmp/f; mkdir m/tmp/d; ln -s . m/tmp/l; echo x >>m/f' 2>/dev/null || :
setpriv --reuid 12 --regid 13 --clear-groups chmod 600 m/f 2>/dev/null || echo refused
cp m/both m/copy; chmod 4755 m/copy; setpriv --reuid 0 --regid 0 --clear-groups sh -c 'echo y >>m/copy'
umount m
cd u; stat -c '%n %u %g %a' both f l p tmp tmp/f tmp/d tmp/l copy";
    inside(&home, script).run().ok().prints(
        "33 44 4755\nrefused\nboth 33 44 4755\nf 10 20 644\nl 7 8 777\np 9 9 644\ntmp 0 0 1777\ntmp/f 12 13 640\n\
         tmp/d 12 13 750\ntmp/l 12 13 777\ncopy 0 0 4755",
    );
    // The files belong to ids that the caller is not.
    inside(&home, "rm -rf u a").run().ok();
}

#[test]
fn acls_and_capabilities_are_the_disks_own() {
    let home = Home::new();
    prepared(&home);
    let script = "
set -e
setfacl -m g:0:rwx a/both; setfacl -d -m g:0:rx a
$R overlay -o $O m
getfacl -ncp m/both | grep -c group:0:rwx
mkdir m/d; setfacl -d -m u:0:rwx m/d; umask 077; touch m/d/f; cp $R m/d/prog; setcap cap_net_raw+ep m/d/prog
touch m/both; chmod 640 m/both
umount m
getfacl -ncp u/both u/d/f | grep :0:; getcap u/d/prog; echo >>u/d/prog; getcap u/d/prog
$R overlay -o $O,noacl m; getfacl -ncp m/d/f | grep -c :0: || :; setfacl -m u:0:r m/d/f 2>/dev/null || echo refused; umount m";
    let acls = "group:0:rwx\t#effective:r--\nuser:0:rwx\t#effective:rw-";
    inside(&home, script).run().ok().prints(&format!("1\n{acls}\nu/d/prog cap_net_raw=ep\n0\nrefused"));
}

#[test]
fn recorded_owners_are_in_the_form_of_containers_storage() {
    let home = Home::new();
    prepared(&home);
    let script = "
set -e
$R overlay -o $O,xattr_permissions=2 m
touch m/f; chmod 4751 m/f; mkfifo m/p; mkdir m/d
umount m
getfattr --only-values -n user.containers.override_stat u/f u/p 2>/dev/null; echo; stat -c '%a %F' u/f u/p
$R overlay -o $O,xattr_permissions=2 m; stat -c '%n %a %F' m/f m/p; umount m
# In a layer, and read natively, they say the same; what changes then is native.
mkdir u2 w2; $R overlay -o lowerdir=u:b,upperdir=u2,workdir=w2 m; stat -c '%n %a %F' m/f m/p; umount m
$R overlay -o $O m; stat -c '%n %a %F' m/f m/p; chmod 4755 m/f; umount m
getfattr -n user.containers.override_stat u/f 2>&1 | grep -c 'No such attribute'; stat -c '%a' u/f
$R overlay -o $O,xattr_permissions=2 m || echo $?";
    let out = inside(&home, script).run();
    let all = "m/f 4751 regular empty file\nm/p 644 fifo\n".repeat(3);
    assert_eq!(
        out.text(),
        format!(
            "0:0:04751:file0:0:0644:pipe\n751 regular empty file\n600 regular empty file\n{all}1\n4755\n1"
        ),
        "{out}"
    );
    assert!(out.errors().contains("keeps owners as native"), "{out}");
}

#[test]
fn the_upper_of_a_run_is_read_natively() {
    let home = Home::new();
    prepared(&home);
    let upper = home.text("work/changes");
    let script = "touch /f; chown 0:0 /f; chmod 6711 /f; ln -s x /l; mkfifo /p; mkdir /d; touch /d/plain";
    home.run(["--upper", &upper, "--network=none"], ["sh", "-c", script]).run().ok();
    for name in home.boxes() {
        home.keeps(&name);
    }
    let script = "
set -e
work=$(dirname $(readlink -f changes))/w
$R overlay -o lowerdir=a,upperdir=changes,workdir=$work m
stat -c '%n %u %g %a %F' m/f m/l m/p m/d/plain; chmod 755 m/f; umount m; stat -c %a changes/f";
    let kinds = "m/f 0 0 6711 regular empty file\nm/l 0 0 777 symbolic link\nm/p 0 0 644 fifo\n\
                 m/d/plain 0 0 644 regular empty file\n755";
    inside(&home, script).run().ok().prints(kinds);
    let again = home.run(["--upper", &upper], ["true"]).run().exits(125);
    assert!(again.errors().contains("keeps owners as native"), "{again}");
}

#[test]
fn ids_are_mapped_and_squashed() {
    let home = Home::new();
    prepared(&home);
    let script = "
set -e
$R overlay -o $O,squash_to_root,squash_to_gid=0 m; touch m/s; stat -c '%u %g' m/s m/both; umount m
$R overlay -o $O,uidmapping=0:0:1,gidmapping=0:0:1 m; stat -c '%u %g' m/both; touch m/n; umount m";
    inside(&home, script).run().ok().prints("0 0\n0 0\n0 0");
    if !has_ids() {
        return;
    }
    let script = "
set -e
chown 33:44 a/both
$R overlay -o $O,uidmapping=0:0:1:33:7:2,gidmapping=0:0:1:44:45:1 m
stat -c '%u %g' m/both m/below m; touch m/made; chown 8:45 m/made; chown 9:0 m/made 2>/dev/null || echo refused
chmod 600 m/both; umount m; stat -c '%u %g' u/made u/both
$R overlay -o $O,squash_to_uid=5,squash_to_gid=6 m; stat -c '%u %g' m/both m/made; touch m/as; chown 3:4 m/as; stat -c '%u %g' m/as
umount m; stat -c '%u %g' u/as; rm -rf a u";
    inside(&home, script).run().ok().prints("7 45\n0 0\n0 0\nrefused\n34 44\n33 44\n5 6\n5 6\n5 6\n3 4");
}

#[test]
fn links_of_directories_are_counted_or_not() {
    let home = Home::new();
    prepared(&home);
    home.dir("work/u/x/y");
    let script = "$R overlay -o $O m && stat -c %h m/x && umount m && $R overlay -o $O,static_nlink m && stat -c %h m/x && umount m";
    inside(&home, script).run().ok().prints("3\n1");
}

#[test]
fn volatile_syncs_nothing() {
    let home = Home::new();
    prepared(&home);
    let syncs = |options: &str| {
        let script = format!(
            "strace -f -qq -y -e trace=fsync,fdatasync -o log $R overlay -f -o $O{options} m & server=$!
until grep -q \" $PWD/m \" /proc/mounts; do kill -0 $server || exit 3; done
python3 -c 'import os; f = os.open(\"m/f\", os.O_CREAT | os.O_RDWR); os.write(f, b\"x\"); os.fsync(f)'
umount m; wait $server; grep -c 'sync(.*u/f>' log"
        );
        inside(&home, &script).run().text()
    };
    assert_eq!(syncs(""), "1");
    assert_eq!((syncs(",volatile"), syncs(",fsync=0")), ("0".to_owned(), "0".to_owned()));
}

#[test]
fn a_renamed_directory_is_copied_where_redirects_are_off() {
    let home = Home::new();
    prepared(&home);
    home.file("work/b/dir/sub/f", "f");
    let script = "
set -e
for program in \"$R overlay\" \"$F\"; do
  $program -o $O m; mv m/dir m/new; cat m/new/sub/f; umount m
  getfattr -n user.overlay.redirect u/new 2>/dev/null | grep -c redirect || :
  find u -name f | wc -l; rm -rf u w; mkdir u w
done";
    inside(&home, script).run().ok().prints("f1\n0\nf0\n1");
}

#[test]
fn who_has_the_helper_needs_no_namespace() {
    if is_root() {
        skip!("root may mount");
    }
    let home = Home::new();
    let helper = home.command("sh").args(["-c", "command -v fusermount3"]).run();
    if helper.code() != 0 {
        skip!("there is no fusermount3");
    }
    prepared(&home);
    let script = "
set -e
$R overlay -o $O m
echo kept >m/f; chmod 444 m/f; cat m/both; stat -c '%U' m/f
fusermount3 -u m; cat u/f; stat -c %a u/f";
    let user = home.command("id").arg("-un").run().text();
    let out = home.command("sh").args(["-c", script]).env("R", rootlet_binary());
    out.env("O", "lowerdir=a:b,upperdir=u,workdir=w").run().ok().prints(&format!("a{user}\nkept\n444"));
}

#[test]
fn whiteouts_by_name_count_in_layers_where_that_is_asked_for() {
    let home = Home::new();
    prepared(&home);
    for file in ["d/one", "d/two", "closed/below", "gone/below", "again/below", ".wh.plain.x", "x"] {
        home.file(format!("work/b/{file}"), "b");
    }
    for file in ["d/.wh.one", "closed/.wh..wh..opq", "closed/top", ".wh.gone", ".wh.again", "again/top"] {
        home.file(format!("work/a/{file}"), "");
    }
    let show = "find . -mindepth 1 | sort | tr '\\n' ' '; stat d/one gone closed/below again/below 2>&1 | grep -c cannot";
    let script = format!(
        "
set -e
$R overlay -o $O m; (cd m; ls -A . d closed | grep -c '\\.wh'); umount m
for options in oci_whiteouts ro,oci_whiteouts; do $R overlay -o $O,$options m; (cd m; {show}); umount m; done
$F -o $O m; cd m; {show}
# What is made in the mount is what it is called, also in the next one and as a layer.
echo new >d/one; mkdir gone; echo mine >.wh.x; echo mine >d/.wh.two; cd ..; umount m
$F -o $O m; cat m/.wh.x m/x m/d/.wh.two m/d/two m/d/one; ls m/gone | wc -l; umount m
mkdir u2 w2; $F -o lowerdir=u:a:b,upperdir=u2,workdir=w2 m; cat m/.wh.x m/x m/d/.wh.two m/d/two m/d/one; ls m/gone | wc -l; umount m"
    );
    let seen = "./.wh.plain.x ./again ./again/top ./below ./both ./closed ./closed/top ./d ./d/two ./x 4\n";
    // In `b`, the lowest, there is nothing below that could be gone; a name that says so does not show.
    let seen = seen.replace("./.wh.plain.x ", "");
    let made = "mine\nbmine\nbnew\n0\n";
    inside(&home, &script).run().ok().prints(format!("5\n{}{}", seen.repeat(3), made.repeat(2)).trim_end());
}

#[test]
fn an_upper_of_fuse_overlayfs_is_read() {
    let home = Home::new();
    prepared(&home);
    for file in ["d/one", "d/two", "closed/below", "marked/below", "again/below", "dev"] {
        home.file(format!("work/b/{file}"), "b");
    }
    for file in
        ["d/.wh.one", "closed/.wh..wh..opq", "closed/top", ".wh.both", ".wh.again", "again/top", "marked/top"]
    {
        home.file(format!("work/u/{file}"), "");
    }
    let script = "
set -e
mknod u/dev c 0 0; setfattr -n user.fuseoverlayfs.opaque -v y u/marked; setfattr -n user.fuseoverlayfs.origin -v x u/marked/top
for again in 1 2; do
  $F -o $O m; (cd m; find . -mindepth 1 | sort | tr '\\n' ' '; cat both dev d/one again/below closed/below marked/below 2>&1 | grep -c 'No such')
  getfattr -d m/marked m/marked/top 2>/dev/null | grep -c fuseoverlayfs || :; umount m
done
find u -name '.wh.*' | wc -l; find u -type c | sort | tr '\\n' ' '; getfattr -n user.overlay.opaque u/closed u/again 2>/dev/null | grep -c y";
    let seen = "./again ./again/top ./below ./closed ./closed/top ./d ./d/two ./marked ./marked/top 6\n0\n";
    inside(&home, script).run().ok().prints(&format!("{}0\nu/both u/d/one u/dev 2", seen.repeat(2)));
}
