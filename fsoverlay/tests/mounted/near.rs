//! One who asks again and again is served on his own processor.

use std::fs;
use std::time::{Duration, Instant};

use crate::harness::{Case, Check, Failure, World, count_in, holds};

pub(crate) const CASES: &[Case] = &[Case {
    name: "who_asks_again_and_again_is_served_near",
    outside: report_near,
    inside: ask_again_and_again,
}];

fn report_near(world: &mut World) -> Check {
    // What sched_getattr(2) says of turns, the kernel's own list says, too.
    let release = nix::sys::utsname::uname()?;
    let mut numbers = release.release().to_string_lossy().into_owned();
    numbers.retain(|c| c.is_ascii_digit() || c == '.');
    let mut numbers = numbers.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    if (numbers.next(), numbers.next()) < (Some(6), Some(12)) {
        return Err(Failure::Skip("threads have no turns of their own before Linux 6.12".to_owned()));
    }
    if std::thread::available_parallelism()?.get() < 2 {
        return Err(Failure::Skip("there is one processor".to_owned()));
    }
    let output = world.mount().output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    holds!(output.status.success(), "{text}");
    holds!(count_in(&text, "near")? > 0, "{text}");
    Ok(())
}

/// How long the threads of the server that give way have worked, in nanoseconds.
fn worked() -> Result<u64, Failure> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{}/task", nix::unistd::getppid()))? {
        let task = task?.path();
        // (One that has ended meanwhile has neither.)
        let stat = fs::read_to_string(task.join("stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map(|(_, fields)| fields).unwrap_or_default();
        // SCHED_IDLE, proc_pid_stat(5).
        if fields.split_ascii_whitespace().nth(41 - 3) == Some("5") {
            let times = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
            sum += times.split(' ').next().and_then(|time| time.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(sum)
}

fn ask_again_and_again(_: &[String]) -> Check {
    let end = Instant::now() + Duration::from_secs(60);
    let mut asked = 0_u64;
    // Elsewhere it has served one request at most.
    while worked()? < 1_000_000 {
        for _ in 0..500 {
            asked += 1;
            holds!(fs::symlink_metadata(format!("none{asked}")).is_err());
        }
        holds!(Instant::now() < end, "asked {asked} times");
    }
    Ok(())
}
