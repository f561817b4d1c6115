//! Removes what dead runs of the tests and the demo left behind.

use std::io::{self, Write};

use anyhow::{Result, bail};
use clap::Parser;
use netlb_integration::run::RunId;
use netlb_integration::{guardian, sweep};

/// Remove the leftovers of test and demo runs whose process is gone
#[derive(Debug, Parser)]
struct Args {
    /// Also remove this kept testbed, e.g. nl1234
    #[arg(long, value_name = "RUN", conflicts_with = "all_kept")]
    kept: Option<String>,
    /// Also remove all kept testbeds
    #[arg(long)]
    all_kept: bool,
}

fn main() -> Result<()> {
    if guardian::serve_if_asked()? {
        return Ok(());
    }
    let args = Args::parse();
    let mut removed = sweep::remove_dead_runs()?.what;
    if let Some(name) = args.kept {
        match RunId::from_name(&name) {
            Some(run) if run.is_kept() && !run.is_alive() => removed.extend(sweep::remove(run)?.what),
            _ => bail!("no kept testbed is called `{name}`"),
        }
    }
    if args.all_kept {
        for run in sweep::kept_runs()? {
            removed.extend(sweep::remove(run)?.what);
        }
    }
    let mut out = io::stdout().lock();
    for what in &removed {
        writeln!(out, "removed {what}")?;
    }
    if removed.is_empty() {
        writeln!(out, "nothing to remove")?;
    }
    for run in sweep::kept_runs()? {
        writeln!(out, "{run} was kept; `netlb-sweep --kept {run}` removes it")?;
    }
    Ok(())
}
