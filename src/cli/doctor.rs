//! `rootlet doctor`

use super::args::DoctorArgs;
use super::output::{self, Failure};
use crate::host::doctor;
use crate::sandbox::StateRoot;

/// Checks what this host allows.
pub(super) fn doctor(args: &DoctorArgs) -> Result<u8, Failure> {
    let state = StateRoot::open();
    let report = doctor::examine(match &state {
        Ok(state) => Ok(state.path()),
        Err(error) => {
            let failure = Failure::new(error).hint(error.hint());
            let said = std::iter::once(failure.text).chain(failure.causes).collect::<Vec<_>>();
            Err((said.join(": "), failure.hint))
        }
    });
    if args.json {
        output::print_json(&report);
    } else {
        output::print_escaped(&report.render());
    }
    Ok(u8::from(!report.can_run))
}
