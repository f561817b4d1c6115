//! `cargo xtask test`: all tests, suite by suite.
//!
//! A failing suite does not stop the run. At the end there is a table of the suites, and a line `N passed, M failed` for whoever reads that
//! with a program. A run without a single test fails: a filter with a typing error must not look like a success.

mod suite;

use std::io::{BufRead as _, BufReader};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::artifacts::Artifacts;
use crate::libtest::{self, Tally};
use crate::{host, setup, shell, ui};
use suite::{Invocation, Miri, Selection, Suite};

/// Run all tests, or those named
#[derive(Debug, clap::Args)]
pub(crate) struct Test {
    /// Run a suite, a test target, or the tests whose names contain NAME
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Show suites and tests, run none
    #[arg(long)]
    list: bool,
    /// How many namespace tests run at a time
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_NAMESPACE_THREADS)]
    namespace_threads: u16,
    #[command(flatten)]
    setup: setup::Options,
}

const DEFAULT_NAMESPACE_THREADS: u16 = 2;

/// How a suite ended.
#[derive(Debug)]
enum Outcome {
    Ran { tally: Tally, time: Duration },
    NotRun { reason: String },
}

impl Test {
    /// All suites.
    pub(crate) fn everything(setup: setup::Options) -> Self {
        Self { only: None, list: false, namespace_threads: DEFAULT_NAMESPACE_THREADS, setup }
    }

    pub(crate) fn run(self) -> Result<()> {
        let selection = Selection::new(self.only.as_deref(), &suite::test_targets()?);
        if self.list {
            self.setup.run()?;
            return self.list(&selection);
        }
        // Before anything is installed or built, where that can be told.
        if selection.filter.is_none() {
            require_root(&selection.suites)?;
        }
        self.setup.run()?;
        let mut suites = selection.suites.clone();
        if let Some(filter) = &selection.filter {
            suites = suites_with_tests(&selection, self.namespace_threads)?;
            ensure!(
                !suites.is_empty(),
                "no suite, test target or test is called `{filter}` (`cargo xtask test --list`)"
            );
            require_root(&suites)?;
        }
        let artifacts =
            if suites.iter().any(|suite| suite.runs_programs()) { Artifacts::build()? } else { Artifacts::locate()? };

        let mut outcomes = Vec::new();
        for suite in suites {
            if suite == Suite::Namespace {
                sweep(&artifacts);
            }
            ui::step(format_args!("suite {}", suite.name()));
            outcomes.push((suite, self.run_suite(suite, &selection, &artifacts)?));
        }
        report(&outcomes)
    }

    fn run_suite(&self, suite: Suite, selection: &Selection, artifacts: &Artifacts) -> Result<Outcome> {
        if suite == Suite::Miri
            && let Miri::Missing(reason) = Miri::look()?
        {
            if selection.suites == [Suite::Miri] {
                bail!("Miri is not installed: {reason}");
            }
            ui::note(format_args!("Miri is not installed, so the suite miri is not run: {reason}"));
            return Ok(Outcome::NotRun { reason: "Miri is not installed".to_owned() });
        }
        let invocations = suite.invocations(selection, self.namespace_threads);
        if invocations.is_empty() {
            return Ok(Outcome::NotRun { reason: "there are no such tests".to_owned() });
        }
        let start = Instant::now();
        let mut tally = Tally::default();
        for Invocation { mut command, .. } in invocations {
            command.env("NETLB_BIN", artifacts.netlb());
            tally += run_tests(&mut command)?;
        }
        Ok(Outcome::Ran { tally, time: start.elapsed() })
    }

    fn list(&self, selection: &Selection) -> Result<()> {
        let mut found = false;
        for &suite in &selection.suites {
            if suite == Suite::Miri {
                // The unit tests of netlb-common once more.
                ui::result("miri: the tests of netlb-common, under Miri");
                continue;
            }
            ui::result(format_args!("{}: {}", suite.name(), suite.description()));
            for Invocation { target, command } in suite.listing(selection, self.namespace_threads) {
                for test in list_tests(command)? {
                    found = true;
                    match &target {
                        Some(target) => ui::result(format_args!("    {target}::{test}")),
                        None => ui::result(format_args!("    {test}")),
                    }
                }
            }
        }
        ensure!(found || selection.suites == [Suite::Miri], "no test is called so");
        Ok(())
    }
}

/// The suites in which the selection's filter finds a test.
fn suites_with_tests(selection: &Selection, threads: u16) -> Result<Vec<Suite>> {
    let mut suites = Vec::new();
    for &suite in &selection.suites {
        let mut found = false;
        for Invocation { command, .. } in suite.invocations(selection, threads) {
            // Miri would build everything once more for a list that the unit tests give as well.
            found = found || (suite != Suite::Miri && !list_tests(command)?.is_empty());
        }
        if found {
            suites.push(suite);
        }
    }
    Ok(suites)
}

fn list_tests(mut command: Command) -> Result<Vec<String>> {
    let output = shell::output(command.args(["--list", "--format", "terse"]))?;
    Ok(output.lines().filter_map(libtest::listed).map(str::to_owned).collect())
}

/// Runs `cargo test`, shows what it prints and counts. A run that fails without a failed test, as when the build breaks, counts as one.
fn run_tests(command: &mut Command) -> Result<Tally> {
    let name = shell::name(command);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("failed to run {name}"))?;
    let stdout = child.stdout.take().with_context(|| format!("{name} has no stdout"))?;
    let lines = read_lines(stdout);
    let mut tally = Tally::default();
    let mut status = None;
    loop {
        match lines.recv_timeout(GRACE) {
            Ok(line) => {
                ui::result(&line);
                if let Some(counted) = Tally::from_line(&line) {
                    tally += counted;
                }
            }
            // What a test leaves running may keep our pipe open for ever: once cargo is gone, silence is the end.
            Err(RecvTimeoutError::Timeout) if status.is_some() => {
                ui::note(format_args!("{name} has ended, but a process that it started still runs"));
                break;
            }
            Err(RecvTimeoutError::Timeout) => {
                status = child.try_wait().with_context(|| format!("failed to wait for {name}"))?;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = child.wait().with_context(|| format!("failed to wait for {name}"))?;
    if !status.success() && tally.failed == 0 {
        ui::error(&anyhow!("{name} failed: {status}"));
        tally.failed = 1;
    }
    Ok(tally)
}

/// How long a test run that has ended may be silent before its output counts as complete.
const GRACE: Duration = Duration::from_millis(500);

fn read_lines(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n') {
            let Ok(line) = line else { break };
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    receiver
}

fn require_root(suites: &[Suite]) -> Result<()> {
    let names = Vec::from_iter(suites.iter().filter(|suite| suite.runs_programs()).map(|suite| suite.name()));
    ensure!(
        names.is_empty() || host::is_root()?,
        "the suites {} load BPF programs, which needs root; `--only unit` runs without",
        names.join(" and "),
    );
    Ok(())
}

/// Takes away what killed runs have left: namespaces, interfaces, processes.
fn sweep(artifacts: &Artifacts) {
    let program = artifacts.helper("netlb-sweep");
    if program.exists()
        && let Err(error) = shell::run(&mut Command::new(program))
    {
        ui::note(format_args!("leftovers of earlier runs may still be here: {error:#}"));
    }
}

fn report(outcomes: &[(Suite, Outcome)]) -> Result<()> {
    let mut total = Tally::default();
    let mut rows = vec![["suite", "passed", "failed", "ignored", "time"].map(str::to_owned)];
    for (suite, outcome) in outcomes {
        let name = suite.name().to_owned();
        rows.push(match outcome {
            Outcome::Ran { tally, time } => {
                total += *tally;
                let Tally { passed, failed, ignored } = tally.to_owned();
                let time = format!("{:.1} s", time.as_secs_f64());
                [name, passed.to_string(), failed.to_string(), ignored.to_string(), time]
            }
            Outcome::NotRun { reason } => {
                [name, "-".to_owned(), "-".to_owned(), "-".to_owned(), format!("not run: {reason}")]
            }
        });
    }
    ui::result("");
    ui::table(&rows);
    ui::result(format_args!("{} passed, {} failed", total.passed, total.failed));
    ensure!(total.failed == 0, "{} failed", total.failed);
    ensure!(total.ran() > 0, "no test ran");
    Ok(())
}
