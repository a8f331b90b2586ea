//! What an upper promises: synced, volatile, and whole after an internal error.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use fsoverlay::{Overlay, OverlaySpec};

use crate::harness::{Case, Check, World, errno, holds, mount_above, same};

pub(crate) const CASES: &[Case] = &[
    Case { name: "syncs_go_to_the_disk", outside: count_syncs, inside: sync_over },
    Case { name: "a_volatile_upper_is_marked", outside: marked, inside: change },
    Case { name: "an_internal_error_ends_one_operation", outside: bombed, inside: meet_bomb },
];

/// The server of the mount below counts what the one above syncs.
fn count_syncs(world: &mut World) -> Check {
    let syncs = |world: &World, volatile: &str| -> Result<u64, crate::harness::Failure> {
        let mount = world.mount().arg("below").arg(world.dir.display().to_string()).arg(volatile);
        let output = mount.output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        holds!(output.status.success(), "{text}");
        let (_, rest) = text.split_once(" syncs: ").ok_or(format!("no syncs in {text}"))?;
        Ok(rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default().parse()?)
    };
    fs::create_dir(world.path("other/mnt"))?;
    // A file twice and a directory, each where somebody asked for it.
    same!(syncs(world, "")?, 3);
    world.empty_upper()?;
    // The mark alone: the file, and the four directories that lead to it.
    same!(syncs(world, "--volatile")?, 5);
    Ok(())
}

fn sync_over(args: &[String]) -> Check {
    let [at, rest @ ..] = args else { return Err("where?".into()) };
    if at == "below" {
        let [dir, volatile] = rest else { return Err("a directory and an option are wanted".into()) };
        let dir = Path::new(dir);
        for part in ["upper", "work"] {
            fs::create_dir(part)?;
        }
        let mut mount = mount_above("syncs_go_to_the_disk", dir, &dir.join("mnt"));
        mount.option("--lower", dir.join("lower2"));
        if !volatile.is_empty() {
            mount = mount.flag(volatile);
        }
        return mount.run().map(drop);
    }
    fs::create_dir("dir")?;
    let file = File::create("dir/file")?;
    file.write_all_at(b"content", 0)?;
    file.sync_all()?;
    file.write_all_at(b"C", 0)?;
    file.sync_data()?;
    File::open("dir")?.sync_all()?;
    Ok(())
}

fn marked(world: &mut World) -> Check {
    let mark = world.path("work/work/incompat/volatile");
    fs::write(world.lower().join("file"), "content")?;
    world.mount().flag("--volatile").run()?;
    holds!(mark.is_dir());
    // The machine has run on: nothing can be missing.
    world.mount().flag("--volatile").run()?;
    let open = |volatile: bool| {
        let mut spec = OverlaySpec { layers: Vec::new(), ..crate::disk::spec(world) };
        spec.upper.as_mut().expect("an upper").volatile = volatile;
        Overlay::open(&spec).map(drop).map_err(|err| err.to_string())
    };
    let ours = fs::read(mark.join("boot_id"))?;
    for another in [Some(&b"6f9b9af3-5b1a-4f3b-8d4e-000000000000\n"[..]), Some(&b""[..]), None] {
        match another {
            Some(boot) => fs::write(mark.join("boot_id"), boot)?,
            // As the kernel's overlayfs leaves it.
            None => fs::remove_file(mark.join("boot_id"))?,
        }
        for volatile in [false, true] {
            let refused = open(volatile);
            holds!(refused.as_ref().is_err_and(|text| text.contains("incompat/volatile")), "{refused:?}");
        }
        holds!(mark.is_dir());
    }
    // Reading what it changed is always possible.
    holds!(fsoverlay::changes_of(&crate::disk::spec(world))?.len() == 1);
    fs::write(mark.join("boot_id"), ours)?;
    same!(open(false), Ok(()));
    holds!(!world.path("work/work/incompat").exists());
    same!(fs::read(world.upper().join("file"))?, b"changed");
    Ok(())
}

fn change(_: &[String]) -> Check {
    fs::write("file", "changed")?;
    File::open("file")?.sync_all()?;
    File::open(".")?.sync_all()?;
    Ok(())
}

fn bombed(world: &mut World) -> Check {
    fs::create_dir(world.lower().join("dir"))?;
    for name in ["dir/bomb", "dir/file"] {
        fs::write(world.lower().join(name), "content")?;
    }
    let output = world.mount().with("--panic-at", "dir/bomb").output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    holds!(output.status.success(), "{text}");
    let logged = text.lines().find(|line| line.contains("internal error")).ok_or("nothing was logged")?;
    holds!(logged.contains("Lookup") && logged.contains("dir"), "{logged}");
    // Each is counted after it was answered: the last one perhaps after the counters were printed.
    holds!([" panics: 20,", " panics: 19,"].iter().any(|count| text.contains(count)), "{text}");
    Ok(())
}

fn meet_bomb(_: &[String]) -> Check {
    // More often than there are workers; others go on, in the same directory, too.
    for i in 0..20 {
        errno!(fs::metadata("dir/bomb"), IO);
        same!(fs::read("dir/file")?, b"content");
        fs::write(format!("dir/new{i}"), "new")?;
        fs::remove_file(format!("dir/new{i}"))?;
    }
    Ok(())
}
