//! The program: a stage inside a sandbox, or the command line.

use std::ffi::OsStr;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything looks at an argument: the caller chooses all of them, argv[0] too.
    if rootlet::has_foreign_privilege() {
        return ExitCode::from(rootlet::cli::refuse_privilege());
    }
    let mut args = std::env::args_os().peekable();
    if args.peek().is_some_and(|name| name == OsStr::new(rootlet::stage::EXEC_STAGE)) {
        return ExitCode::from(rootlet::stage::exec_stage(args));
    }
    ExitCode::from(rootlet::cli::main(args))
}
