//! The command line: text in, a spec out; reports in, text out.
//!
//! One file per command. Nothing but [`output`] prints.

mod args;
mod boxes;
mod diff;
mod docs;
mod doctor;
mod netstack;
pub mod output;
mod overlay;
mod run;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Parser;
use clap::error::ErrorKind;

use self::args::{Cli, Command};
use self::output::Failure;
use crate::host::probe;
use crate::log;

/// Exit status of `run` for everything that is our failure, wrong flags included.
const RUN_FAILED: u8 = 125;
/// Exit status of the other commands for wrong usage.
const WRONG_USAGE: u8 = 2;

/// Runs the command line; gives the exit status.
pub fn main(args: impl Iterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.collect();
    if is_called(overlay::FUSE_OVERLAYFS, args.first()) {
        return main_by_name(&args, overlay::main_by_name);
    }
    if is_called(netstack::SLIRP4NETNS, args.first()) {
        return main_by_name(&args, netstack::main_by_name);
    }
    // Not in the definitions: it is the doctor's, and would show in completions.
    if let [_, word, probe, argument @ ..] = args.as_slice()
        && word == probe::WORD
    {
        return probe::run(&probe.to_string_lossy(), argument.first().map(OsString::as_os_str));
    }
    let is_run = is_run(&args);
    let outcome = match Cli::try_parse_from(&args) {
        Ok(cli) => dispatch(cli),
        Err(error) => Ok(usage(&error, &args, is_run)),
    };
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            output::fail(&failure);
            if is_run && failure.code == 1 { RUN_FAILED } else { failure.code }
        }
    }
}

fn dispatch(cli: Cli) -> Result<u8, Failure> {
    let mut level = cli.log_level.as_deref();
    let mut file = cli.log_file.clone();
    if let Command::Overlay(args) = &cli.command {
        overlay::close_inherited();
        level = level.or(overlay::is_debug(args).then_some("debug"));
        file = file.or_else(|| overlay::log_file(args));
    }
    let mut inherited = None;
    if let Command::Netstack(args) = &cli.command {
        inherited = Some(netstack::Inherited::take(args)?);
    }
    log::init(level, file.as_deref()).map_err(|error| Failure::new(&error).code(WRONG_USAGE)).map_err(
        |failure| match cli.command {
            Command::Run(_) => failure.code(RUN_FAILED),
            _ => failure,
        },
    )?;
    match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Diff(args) => diff::diff(&args),
        Command::Ls(args) => boxes::ls(&args),
        Command::Rm(args) => boxes::rm(&args),
        Command::Prune(args) => boxes::prune(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Overlay(args) => overlay::overlay(&args, "rootlet"),
        Command::Netstack(args) => netstack::netstack(&args, inherited.unwrap_or_default()),
        Command::Completions { shell } => Ok(docs::completions(shell)),
        Command::Man { subcommand } => docs::man(subcommand.as_deref()),
    }
}

/// Whether the program was called by another name of one of its commands.
fn is_called(name: &str, program: Option<&OsString>) -> bool {
    program.is_some_and(|program| Path::new(program).file_name() == Some(OsStr::new(name)))
}

/// The program by such a name; gives the exit status, which is 1 for every failure.
fn main_by_name<P: Parser>(args: &[OsString], run: impl FnOnce(P) -> Result<u8, Failure>) -> u8 {
    match P::try_parse_from(args) {
        Ok(parsed) => run(parsed).unwrap_or_else(|failure| {
            output::fail(&failure);
            1
        }),
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            output::print(&error.render().to_string());
            0
        }
        Err(error) => {
            output::print_error(&log::escape_message(&error.render().to_string()));
            1
        }
    }
}

/// Says why a rootlet with privilege of its own does nothing: it would run the caller's payload and
/// read the caller's paths with rights the caller does not have. Gives the exit status.
pub fn refuse_privilege() -> u8 {
    output::fail(
        &Failure::text("rootlet does not run set-user-ID, set-group-ID or with file capabilities")
            .hint(Some("it needs no privilege: chmod ug-s and setcap -r on the program")),
    );
    RUN_FAILED
}

/// Whether the first word that is not a global option is `run`.
fn is_run(args: &[OsString]) -> bool {
    let mut words = args.iter().skip(1);
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("--log-level" | "--log-file") => {
                words.next();
            }
            Some(option) if option.starts_with('-') => {}
            other => return other == Some("run"),
        }
    }
    false
}

fn usage(error: &clap::Error, args: &[OsString], is_run: bool) -> u8 {
    let text = error.render().to_string();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        output::print(&text);
        return 0;
    }
    output::print_error(&log::escape_message(&text));
    // `rootlet run ls -l`: the option of the command is taken for ours.
    if is_run && !args.iter().any(|arg| arg == "--") {
        output::print_error(
            "  hint:  write the command after `--`: rootlet run [OPTIONS] -- COMMAND [ARG]...\n",
        );
    }
    if is_run { RUN_FAILED } else { WRONG_USAGE }
}

/// The caller's value of a variable.
fn own_env(name: &OsStr) -> Option<OsString> {
    std::env::var_os(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_is_recognised_behind_global_options() {
        let is = |text: &str| is_run(&text.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert!(is("rootlet run --bad"));
        assert!(is("rootlet --log-level debug run"));
        assert!(is("rootlet --log-level=debug run"));
        assert!(!is("rootlet ls run"));
        assert!(!is("rootlet"));
    }
}
