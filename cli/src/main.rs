//! The `pagewire` program: reads the command line, calls the facade, shows what happens, and ends with an exit code
//! that says where the guest is.
#![forbid(unsafe_code)]

mod args;
mod command;
mod demo;
mod exit;
mod live;
mod plot;
mod resolve;
mod show;
mod signals;
mod status;
mod store;
mod throttle;
mod verbs;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = args::Args::parse();
    match verbs::run(args) {
        Ok(code) => code,
        Err(error) => exit::explain(&error),
    }
}
