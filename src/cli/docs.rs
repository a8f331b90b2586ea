//! `rootlet completions` and `rootlet man`

use clap::CommandFactory as _;

use super::args::Cli;
use super::output::{self, Failure};

/// Prints a completion script.
pub(super) fn completions(shell: clap_complete::Shell) -> u8 {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "rootlet", &mut script);
    output::print(&String::from_utf8_lossy(&script));
    0
}

/// Prints a manual page.
pub(super) fn man(subcommand: Option<&str>) -> Result<u8, Failure> {
    let mut command = Cli::command();
    // Fills in what the pages take from the parents.
    command.build();
    let page = match subcommand {
        None => command,
        Some(name) => {
            let found = command.get_subcommands().find(|sub| sub.get_name() == name && !sub.is_hide_set());
            let found = found.ok_or_else(|| {
                Failure::text(format!("there is no command {name:?}"))
                    .hint(Some("`rootlet --help` lists the commands"))
                    .code(super::WRONG_USAGE)
            })?;
            // The page's name: rootlet-run(1).
            found.clone().display_name(format!("rootlet-{name}"))
        }
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page)
        .render(&mut text)
        .map_err(|error| Failure::text("cannot write the manual page").cause(error.to_string()))?;
    output::print(&String::from_utf8_lossy(&text));
    Ok(0)
}
