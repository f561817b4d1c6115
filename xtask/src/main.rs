//! The project's own commands, run as `cargo xtask COMMAND`.

#![forbid(unsafe_code)]

mod artifacts;
mod bench;
mod bpf;
mod bpf_stats;
mod ci;
mod demo;
mod doctor;
mod host;
mod libtest;
mod lint;
mod requirements;
mod setup;
mod shell;
mod test;
mod toolchain;
mod ui;

use std::process::ExitCode;

use clap::Parser;

/// netlb's own commands
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
enum Xtask {
    Setup(setup::Setup),
    Doctor(doctor::Doctor),
    Demo(demo::Demo),
    Bench(bench::Bench),
    Test(test::Test),
    Lint(lint::Lint),
    Ci(ci::Ci),
    BpfStats(bpf_stats::BpfStats),
}

fn main() -> ExitCode {
    let result = match Xtask::parse() {
        Xtask::Setup(setup) => setup.run(),
        Xtask::Doctor(doctor) => doctor.run(),
        Xtask::Demo(demo) => demo.run(),
        Xtask::Bench(bench) => bench.run(),
        Xtask::Test(test) => test.run(),
        Xtask::Lint(lint) => lint.run(),
        Xtask::Ci(ci) => ci.run(),
        Xtask::BpfStats(stats) => stats.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::error(&error);
            ExitCode::FAILURE
        }
    }
}
