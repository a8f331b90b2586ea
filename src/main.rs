//! The program: the command line. (Started as `rootlet-exec` it never gets here: `sys::exec_stage`.)

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything looks at an argument: the caller chooses all of them, argv[0] too.
    if rootlet::has_foreign_privilege() {
        return ExitCode::from(rootlet::cli::refuse_privilege());
    }
    ExitCode::from(rootlet::cli::main(std::env::args_os()))
}
