//! `rootlet run`

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use serde::Serialize;

use super::args::{Network, RunArgs};
use super::output::{self, Failure};
use super::{RUN_FAILED, own_env};
use crate::error::{errno_of, errno_text};
use crate::host::{HostFacts, hints, layers};
use crate::launch::{self, LaunchError};
use crate::plan::{self, BoxPlace, NetPlan, Plan, UpperPlan};
use crate::report::{NetworkRecords, PublishedPort, RunReport};
use crate::sandbox::{BoxRecord, BoxState, ExternalUpper, LockedBox, StateError, StateRoot, external_upper};
use crate::spec::{
    self, LayerSpec, LoopbackSpec, NetMode, PublishSpec, RootSpec, SandboxSpec, SpecError, TimeSpec,
    ValidSpec,
};

/// What `--report` writes.
#[derive(Debug, Serialize)]
struct ReportFile<'a> {
    /// Version of this format.
    format: u32,
    /// Name of the box, kept or not.
    name: Option<&'a str>,
    /// Exit status of rootlet.
    exit_code: u8,
    /// What happened to the payload; null when rootlet failed.
    run: Option<&'a RunReport>,
    /// The box was kept, with its changes.
    kept: bool,
    /// Why rootlet failed; null when it did not.
    error: Option<String>,
}

/// A run that came to its end.
struct Done {
    name: String,
    report: RunReport,
    kept: bool,
}

/// Runs a command in a new sandbox.
pub(super) fn run(args: &RunArgs) -> Result<u8, Failure> {
    // Opened first: a report that cannot be written is a reason not to begin.
    let report = args.report.as_deref().map(open_report).transpose()?;
    let outcome = run_spec(args);
    let code = match &outcome {
        Ok(Some(done)) => done.report.outcome.exit_code(),
        Ok(None) => 0,
        Err(failure) => failure.code,
    };
    if let Some((path, mut file)) = report {
        let done = outcome.as_ref().ok().and_then(Option::as_ref);
        let text = ReportFile {
            format: 1,
            name: done.map(|done| done.name.as_str()),
            exit_code: code,
            run: done.map(|done| &done.report),
            kept: done.is_some_and(|done| done.kept),
            error: outcome.as_ref().err().map(|failure| {
                std::iter::once(&failure.text).chain(&failure.causes).cloned().collect::<Vec<_>>().join(": ")
            }),
        };
        let mut bytes = serde_json::to_vec_pretty(&text).unwrap_or_default();
        bytes.push(b'\n');
        // Told, but no outcome of its own: by now the payload has run, or something failed before.
        if let Err(source) = file.write_all(&bytes) {
            output::fail(&report_failed(&path, &source));
        }
    }
    outcome.map(|_| code)
}

fn open_report(path: &Path) -> Result<(PathBuf, File), Failure> {
    crate::report::open_unlinked(OpenOptions::new().write(true).create(true).truncate(true), 0, path)
        .map(|file| (path.to_owned(), file))
        .map_err(|source| report_failed(path, &source))
}

fn report_failed(path: &Path, source: &std::io::Error) -> Failure {
    Failure::text(format!("cannot write the report {}", path.display()))
        .cause(source.raw_os_error().map_or_else(|| source.to_string(), |n| errno_text(Errno::from_raw(n))))
        .code(RUN_FAILED)
}

/// Opens what `--network-log` and `--network-capture` name.
fn open_network_records(args: &RunArgs, spec: &ValidSpec) -> Result<NetworkRecords, Failure> {
    let wanted = |field, path: &Option<PathBuf>| match spec.net.mode {
        _ if path.is_none() => Ok(()),
        NetMode::Stack => Ok(()),
        mode => Err(usage(&SpecError::Conflict {
            field,
            other: if mode == NetMode::Host { "network host" } else { "network none" },
            reason: "only what goes through the stack can be recorded".into(),
        })),
    };
    wanted("network-log", &args.network_log)?;
    wanted("network-capture", &args.network_capture)?;
    NetworkRecords::open(args.network_log.as_deref(), args.network_capture.as_deref())
        .map_err(|error| Failure::new(&error).code(RUN_FAILED))
}

fn run_spec(args: &RunArgs) -> Result<Option<Done>, Failure> {
    let spec = spec_of(args)?.validate().map_err(|error| usage(&error))?;
    let records = open_network_records(args, &spec)?;
    let facts = HostFacts::gather();
    let root = layers::inspect(&spec, &facts).map_err(|error| {
        let hint = error.hint();
        Failure::new(&error).hint(hint).code(RUN_FAILED)
    })?;
    // A plan makes nothing, the state directory included.
    let state = if args.dry_run { StateRoot::locate() } else { StateRoot::open() };
    let state = state.map_err(|error| state_failed(&error, &facts))?;
    let external = spec
        .fs
        .upper
        .as_deref()
        .map(external_upper)
        .transpose()
        .map_err(|error| state_failed(&error, &facts))?;
    let place = |name: &str, upper: Option<UpperPlan>| BoxPlace {
        name: name.to_owned(),
        state_root: state.path().to_owned(),
        state_dir: state.dir_of(name),
        upper: upper.filter(|_| !spec.fs.read_only),
        root,
    };

    if args.dry_run {
        let name = spec.name.clone().unwrap_or_else(|| state.free_name());
        let dir = state.dir_of(&name);
        let own = UpperPlan { dir: dir.join("upper"), work: dir.join("work") };
        let plan = make_plan(&spec, &facts, &place(&name, Some(external.unwrap_or(own))))?;
        if args.json {
            output::print_json(&plan::explain_json(&plan));
        } else {
            output::print(&plan::explain(&plan));
        }
        return Ok(None);
    }

    // From here on there is something to clean up: signals wait until the event loop of the
    // launch, or our end, takes them.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)
        .map_err(|errno| Failure::text("cannot block signals").cause(errno_text(errno)).code(RUN_FAILED))?;
    let made = state.make_box(spec.name.as_deref()).map_err(|error| state_failed(&error, &facts))?;
    let upper = external.clone().unwrap_or_else(|| made.upper());
    let place = place(made.name(), Some(upper));
    match launch_in(&made, &spec, &facts, &place, external.as_ref(), records) {
        Ok((report, record)) => Ok(Some(finish(made, &spec, report, record, &facts))),
        Err(failure) => {
            // The failure is what counts; what could not be removed, `prune` finds.
            made.remove().ok();
            Err(failure)
        }
    }
}

fn make_plan(spec: &ValidSpec, facts: &HostFacts, place: &BoxPlace) -> Result<Plan, Failure> {
    plan::plan(spec, facts, place).map_err(|error| {
        let hint = error.hint();
        Failure::new(&error).hint(hint).code(RUN_FAILED)
    })
}

fn launch_in(
    made: &LockedBox,
    spec: &ValidSpec,
    facts: &HostFacts,
    place: &BoxPlace,
    external: Option<&UpperPlan>,
    records: NetworkRecords,
) -> Result<(RunReport, BoxRecord), Failure> {
    let plan = make_plan(spec, facts, place)?;
    for note in &plan.notes {
        if note.weaker {
            output::note(&format!("{}: {}", note.what, note.reason));
        }
        tracing::info!(what = %note.what, reason = %note.reason, "plan");
    }
    tracing::info!(name = %plan.name, "starting the sandbox");
    let failed = |error: StateError| state_failed(&error, facts);
    let record = BoxRecord::new(&plan, external.is_some());
    made.write_record(&record).map_err(failed)?;
    let external = external.map(ExternalUpper::lock).transpose().map_err(failed)?;
    let outcome = launch::prepare(&plan, records).and_then(|prepared| {
        tell_chosen_ports(&plan, prepared.published());
        prepared.run()
    });
    // What cannot be tidied up is told; how the run ended is what counts.
    if let Some(Err(error)) = external.map(ExternalUpper::release) {
        output::fail(&failed(error));
    }
    let report = outcome.map_err(|error| launch_failed(&error, facts))?;
    tracing::info!(name = %plan.name, outcome = ?report.outcome, changed = report.changed, "the run is over");
    Ok((report, record))
}

/// Says where a port is that was left to the system to choose: nothing else would.
fn tell_chosen_ports(plan: &Plan, published: &[PublishedPort]) {
    let NetPlan::Stack(stack) = &plan.net else { return };
    for port in published {
        let chosen =
            |p: &PublishSpec| p.host_port == 0 && p.inside_port == port.inside_port && p.udp == port.udp;
        if stack.publish.iter().any(chosen) {
            let protocol = if port.udp { "udp" } else { "tcp" };
            output::note(&format!("{} leads to port {}/{protocol} inside", port.host, port.inside_port));
        }
    }
}

/// Keeps or removes the box, and says so in one line if it is kept. The payload has run: what
/// goes wrong here is told, and the exit status stays the payload's.
fn finish(
    made: LockedBox,
    spec: &ValidSpec,
    report: RunReport,
    mut record: BoxRecord,
    facts: &HostFacts,
) -> Done {
    let tell = |result: Result<(), StateError>| {
        if let Err(error) = result {
            output::fail(&state_failed(&error, facts));
        }
    };
    let name = made.name().to_owned();
    let count = match record.upper() {
        Some(upper) if report.changed && !spec.remove => count_changes(&upper.dir, &record),
        _ => Count::Exactly(0),
    };
    let what = match count {
        Count::Exactly(0) => {
            tell(made.remove());
            return Done { name, report, kept: false };
        }
        Count::Exactly(1) => "1 change".to_owned(),
        Count::Exactly(count) => format!("{count} changes"),
        Count::Unknown => "changes".to_owned(),
    };
    record.state = BoxState::Ended(report.outcome.clone());
    tell(made.write_record(&record));
    output::note(&match (record.upper(), record.upper_is_external) {
        (Some(upper), true) => {
            format!("box {name} left {what} in {}: see 'rootlet diff {name}'", upper.dir.display())
        }
        _ => format!("box {name} keeps {what}: see 'rootlet diff {name}', drop with 'rootlet rm {name}'"),
    });
    Done { name, report, kept: true }
}

/// How many objects differ.
enum Count {
    Exactly(usize),
    /// Too many to count, or they cannot be listed.
    Unknown,
}

/// Counts the changes where that is quick: telling a modified file from one of which only the
/// times differ means reading it.
fn count_changes(upper: &Path, record: &BoxRecord) -> Count {
    let mut budget = Budget { entries: 500, bytes: 16 << 20 };
    match budget.spend_on(upper).and_then(|()| record.changes().ok()) {
        Some(changes) => Count::Exactly(changes.len()),
        None => Count::Unknown,
    }
}

struct Budget {
    entries: u32,
    bytes: u64,
}

impl Budget {
    fn spend_on(&mut self, dir: &Path) -> Option<()> {
        for entry in std::fs::read_dir(dir).ok()? {
            let entry = entry.ok()?;
            let meta = entry.metadata().ok()?;
            self.entries = self.entries.checked_sub(1)?;
            if meta.is_dir() {
                self.spend_on(&entry.path())?;
            } else {
                self.bytes = self.bytes.checked_sub(meta.len())?;
            }
        }
        Some(())
    }
}

fn usage(error: &SpecError) -> Failure {
    Failure::new(error).code(RUN_FAILED)
}

/// A failure of the state directory, with the hint of the doctor's table.
fn state_failed(error: &StateError, facts: &HostFacts) -> Failure {
    let hint = error.hint().or_else(|| {
        errno_of(error).and_then(|errno| hints::hint("state", "", errno, facts)).map(|h| h.to_string())
    });
    Failure::new(error).hint(hint).code(RUN_FAILED)
}

fn launch_failed(error: &LaunchError, facts: &HostFacts) -> Failure {
    let mut failure = Failure::new(error).code(error.exit_code());
    let (step, object, errno) = match error {
        LaunchError::Setup(setup) => {
            let errno = Some(setup.cause()).filter(|_| setup.errno != 0);
            if let Some(errno) = errno {
                failure = failure.cause(errno_text(errno));
            }
            (setup.step.name(), setup.object.as_str(), errno)
        }
        LaunchError::Network(below) => {
            failure = failure.cause_of_port(below);
            let step = if matches!(below, netstack::Error::Listen { .. }) { "listen" } else { "network" };
            (step, "", errno_of(below))
        }
        LaunchError::Overlay(fsoverlay::Error::NoXattrs { .. }) => {
            return failure.hint(Some(hints::MEND_XATTRS));
        }
        LaunchError::Overlay(below) => ("overlay", "", errno_of(below)),
        other => match other.step() {
            Some((step, errno)) => (step, "", Some(errno)),
            None => ("supervise", "", errno_of(other)),
        },
    };
    let hint = errno.and_then(|errno| hints::hint(step, object, errno, facts));
    failure.hint(hint)
}

fn absolute(field: &'static str, path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|_| {
        usage(&SpecError::Invalid {
            field,
            value: path.to_string_lossy().into_owned(),
            reason: "it is empty, or the current directory is gone".into(),
        })
    })
}

/// The spec that the flags describe.
fn spec_of(args: &RunArgs) -> Result<SandboxSpec, Failure> {
    check_words(args)?;
    let mut spec = SandboxSpec::new(args.command.clone());
    spec.name.clone_from(&args.name);
    spec.remove = args.rm;
    spec.hostname.clone_from(&args.hostname);
    spec.domainname.clone_from(&args.domainname);
    spec.nested = args.nested;
    if args.monotonic.is_some() || args.boottime.is_some() {
        spec.time =
            Some(TimeSpec { monotonic: args.monotonic.unwrap_or(0), boottime: args.boottime.unwrap_or(0) });
    }

    if let Some(rootfs) = &args.rootfs {
        spec.fs.root = RootSpec::Layers(vec![absolute("rootfs", rootfs)?.into()]);
    } else if !args.layer.is_empty() {
        let mut layers = args.layer.iter().map(|text| branch_of(text)).collect::<Result<Vec<_>, _>>()?;
        if let Some(upper) = layers.pop_if(|layer| layer.mode == Mode::Writable) {
            if args.upper.is_some() {
                return Err(no_upper(&upper, "--upper names another place for the changes"));
            }
            spec.fs.upper = Some(upper.dir);
        }
        if let Some(layer) = layers.iter().find(|layer| layer.mode == Mode::Writable) {
            return Err(no_upper(layer, "only the last layer can be written to: changes go to one place"));
        }
        let spec_of =
            |layer: Branch| LayerSpec { host_path: layer.dir, whiteouts: layer.mode == Mode::Whiteouts };
        spec.fs.root = RootSpec::Layers(layers.into_iter().map(spec_of).collect());
    }
    if let Some(upper) = &args.upper {
        spec.fs.upper = Some(absolute("upper", upper)?);
    }
    spec.fs.read_only = args.read_only;
    for text in &args.volume {
        let mut volume = spec::parse::volume(text).map_err(|error| usage(&error))?;
        volume.host_path = absolute("volume", &volume.host_path)?;
        spec.fs.volumes.push(volume);
    }
    for text in &args.tmpfs {
        spec.fs.tmpfs.push(spec::parse::tmpfs(text).map_err(|error| usage(&error))?);
    }

    spec.process.inherit_env = spec.fs.root == RootSpec::Host;
    spec.process.terminal = args.tty;
    spec.process.interactive = args.interactive;
    spec.process.workdir.clone_from(&args.workdir);
    for path in &args.env_file {
        let content = std::fs::read(path).map_err(|source| {
            Failure::text(format!("cannot read the file of variables {}", path.display()))
                .cause(
                    source
                        .raw_os_error()
                        .map_or_else(|| source.to_string(), |n| errno_text(Errno::from_raw(n))),
                )
                .code(RUN_FAILED)
        })?;
        spec.process.env.extend(spec::parse::env_file(&content, &own_env));
    }
    spec.process.env.extend(args.env.iter().map(|text| spec::parse::env(text, &own_env)));
    let text = |text: &Option<String>| text.clone();
    if let Some(user) = text(&args.user) {
        spec.process.user = Some(spec::parse::user(&user).map_err(|error| usage(&error))?);
    }
    if let Some(timeout) = text(&args.timeout) {
        spec.process.timeout = Some(spec::parse::duration(&timeout).map_err(|error| usage(&error))?);
    }
    let extents = |field, texts: &[String]| {
        let parse = |text: &String| spec::parse::id_extent(field, text).map_err(|error| usage(&error));
        (!texts.is_empty()).then(|| texts.iter().map(parse).collect::<Result<Vec<_>, _>>()).transpose()
    };
    spec.ids.uid_map = extents("uidmap", &args.uidmap)?;
    spec.ids.gid_map = extents("gidmap", &args.gidmap)?;

    spec.net.mode = match args.network {
        Network::Stack => NetMode::Stack,
        Network::None => NetMode::None,
        Network::Host => NetMode::Host,
    };
    for text in &args.allow_host_loopback {
        let more = spec::parse::host_loopback(text).map_err(|error| usage(&error))?;
        spec.net.host_loopback = match (std::mem::take(&mut spec.net.host_loopback), more) {
            (LoopbackSpec::Ports(mut ports), LoopbackSpec::Ports(more)) => {
                ports.extend(more);
                LoopbackSpec::Ports(ports)
            }
            (LoopbackSpec::All, _) | (_, LoopbackSpec::All) => LoopbackSpec::All,
            (LoopbackSpec::Refused, more) | (more, LoopbackSpec::Refused) => more,
        };
    }
    for text in &args.allow {
        spec.net.allow.push(spec::parse::allow(text).map_err(|error| usage(&error))?);
    }
    for text in &args.deny {
        spec.net.deny.push(spec::parse::deny(text).map_err(|error| usage(&error))?);
    }
    [spec.net.rate_in, spec.net.rate_out] =
        spec::parse::network_rates(&args.network_rate).map_err(|error| usage(&error))?;
    if let Some(path) = &args.network_control {
        spec.net.control = Some(absolute("network-control", path)?);
    }
    for text in &args.dns {
        spec.net.dns.push(spec::parse::dns(text).map_err(|error| usage(&error))?);
    }
    for text in &args.dns_search {
        let domain = spec::parse::dns_search(text).map_err(|error| usage(&error))?;
        spec.net.dns_search.get_or_insert_default().extend(domain);
    }
    for text in &args.add_host {
        spec.net.add_host.push(spec::parse::add_host(text).map_err(|error| usage(&error))?);
    }
    for text in &args.publish {
        spec.net.publish.extend(spec::parse::publish(text).map_err(|error| usage(&error))?);
    }
    Ok(spec)
}

/// What stands before `--` is an image, and what stands after it the command.
fn check_words(args: &RunArgs) -> Result<(), Failure> {
    let words: Vec<String> = args.before.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    match (words.as_slice(), args.command.is_empty()) {
        ([], false) => Ok(()),
        ([], true) => Err(Failure::text("no command is given")
            .hint(Some("rootlet run [OPTIONS] -- COMMAND [ARG]..."))
            .code(RUN_FAILED)),
        (words, true) => {
            let words = words.join(" ");
            Err(Failure::text("`--` is missing before the command")
                .hint(Some(format!("what stands before `--` is an image; write: rootlet run -- {words}")))
                .code(RUN_FAILED))
        }
        ([image, ..], false) => Err(Failure::text(format!(
            "cannot use the image {image:?}: images are not available in this version"
        ))
        .hint(Some("name an unpacked root file system with --rootfs DIR, or write nothing before `--`"))
        .code(RUN_FAILED)),
    }
}

/// What may be done with a branch of the union, in the words of AUFS.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// `ro`
    ReadOnly,
    /// `ro+wh`
    Whiteouts,
    /// `rw`
    Writable,
}

struct Branch {
    dir: PathBuf,
    mode: Mode,
}

/// `DIR[:ro|:ro+wh|:rw]`
fn branch_of(text: &OsStr) -> Result<Branch, Failure> {
    let bytes = text.as_bytes();
    let (dir, mode) = match bytes.iter().rposition(|&b| b == b':').map(|at| bytes.split_at(at)) {
        Some((dir, b":ro")) => (dir, Mode::ReadOnly),
        Some((dir, b":ro+wh")) => (dir, Mode::Whiteouts),
        Some((dir, b":rw")) => (dir, Mode::Writable),
        _ => (bytes, Mode::Whiteouts),
    };
    Ok(Branch { dir: absolute("layer", Path::new(OsStr::from_bytes(dir)))?, mode })
}

fn no_upper(branch: &Branch, reason: &str) -> Failure {
    let value = format!("{}:rw", branch.dir.display());
    usage(&SpecError::Invalid { field: "layer", value, reason: reason.into() })
}
