//! What the demo shows: a live view, redrawn in place on a terminal and as plain lines elsewhere, and the summary.

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use netlb_integration::load::Tally;

use crate::phases::{PHASES, Totals};

/// A backend whose requests are further than this from its share gets a mark.
const TOLERANCE: f64 = 0.2;
const BAR: usize = 30;

/// A backend as it is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    pub addr: SocketAddr,
    pub state: &'static str,
}

/// Where the demo tells of its progress.
pub(crate) struct View {
    out: Box<dyn Write>,
    in_place: bool,
    drawn_lines: usize,
    last: Option<(Instant, Tally)>,
    since_line: Instant,
}

impl View {
    /// On standard output, or on standard error when that is wanted for JSON alone.
    pub(crate) fn new(json: bool) -> Self {
        let (out, in_place): (Box<dyn Write>, bool) = if json {
            (Box::new(io::stderr()), io::stderr().is_terminal())
        } else {
            (Box::new(io::stdout()), io::stdout().is_terminal())
        };
        Self { out, in_place, drawn_lines: 0, last: None, since_line: Instant::now() }
    }

    pub(crate) fn line(&mut self, line: &str) -> io::Result<()> {
        self.drawn_lines = 0;
        writeln!(self.out, "{line}")?;
        self.out.flush()
    }

    /// How often there is something new to show.
    pub(crate) fn interval(&self) -> Duration {
        if self.in_place { Duration::from_millis(200) } else { Duration::from_secs(1) }
    }

    pub(crate) fn begin_phase(&mut self, phase: usize) -> io::Result<()> {
        if !self.in_place {
            self.line(&format!("phase {} of {}: {}", phase + 1, PHASES.len(), PHASES[phase].title))?;
        }
        Ok(())
    }

    /// Shows the rates since the last time.
    pub(crate) fn draw(&mut self, at: Duration, phase: usize, backends: &[Shown], total: &Tally) -> io::Result<()> {
        let now = Instant::now();
        let (then, before) = self.last.replace((now, total.clone())).unwrap_or_else(|| (now, total.clone()));
        let seconds = (now - then).as_secs_f64();
        if seconds == 0.0 {
            return Ok(());
        }
        let rate = |addr| (total.of(addr).saturating_sub(before.of(addr))) as f64 / seconds;
        if self.in_place {
            self.redraw(at, phase, backends, total, rate)
        } else if now - self.since_line >= self.interval() / 2 {
            self.since_line = now;
            let rates: Vec<_> = backends
                .iter()
                .enumerate()
                .map(|(i, shown)| format!("backend-{} {:.0}/s", i + 1, rate(shown.addr)))
                .collect();
            self.line(&format!(
                "{:5.1} s  {}  requests {}  failed {}",
                at.as_secs_f64(),
                rates.join("  "),
                total.requests,
                total.failed
            ))
        } else {
            Ok(())
        }
    }

    fn redraw(
        &mut self,
        at: Duration,
        phase: usize,
        backends: &[Shown],
        total: &Tally,
        rate: impl Fn(SocketAddr) -> f64,
    ) -> io::Result<()> {
        let most = backends.iter().map(|shown| rate(shown.addr)).fold(1.0, f64::max);
        let mut lines = vec![format!(
            "{:5.1} s   phase {} of {}: {}",
            at.as_secs_f64(),
            phase + 1,
            PHASES.len(),
            PHASES[phase].title
        )];
        lines.push(String::new());
        for (number, &Shown { addr, state }) in (1..).zip(backends) {
            let rate = rate(addr);
            let bar = "█".repeat((rate / most * BAR as f64).round() as usize);
            lines.push(format!("  backend-{number}  {addr:<28} {state:<9} {rate:>6.0}/s  {bar}"));
        }
        lines.push(String::new());
        lines.push(format!("  requests {}   failed {}", total.requests, total.failed));
        if self.drawn_lines > 0 {
            write!(self.out, "\x1b[{}A", self.drawn_lines)?; // cursor up
        }
        for line in &lines {
            writeln!(self.out, "\x1b[2K{line}")?; // clear the line first
        }
        // What the last picture had below this one goes.
        write!(self.out, "\x1b[J")?;
        self.drawn_lines = lines.len();
        self.out.flush()
    }

    /// One row for each phase, then the totals and how they compare with what each backend was due.
    pub(crate) fn summary(&mut self, backends: &[Shown], totals: &Totals) -> io::Result<()> {
        let row = |title: &str, cells: &mut dyn Iterator<Item = String>| {
            cells.fold(format!("{title:<40}"), |row, cell| format!("{row}{cell:>11}"))
        };
        let counts = |title: &str, tally: &Tally| {
            let answered = backends.iter().map(|shown| tally.of(shown.addr));
            row(title, &mut answered.chain([tally.failed]).map(|count| count.to_string()))
        };
        let names = (1..=backends.len()).map(|number| format!("backend-{number}"));
        self.line("")?;
        self.line(&row("requests answered", &mut names.chain(["failed".to_owned()])))?;
        for (phase, tally) in PHASES.iter().zip(&totals.phases) {
            self.line(&counts(phase.title, tally))?;
        }
        self.line(&counts("while changes were made", &totals.changing))?;
        self.line(&counts("in all", &totals.all))?;
        let offs = backends.iter().enumerate().map(|(backend, shown)| totals.off(backend, shown.addr));
        let marked = |off: f64| format!("{}{:+.1} %", if off.abs() > TOLERANCE { "!" } else { "" }, off * 100.0);
        self.line(&row("off its share of its phases", &mut offs.map(marked)))?;
        for failure in &totals.all.failures {
            self.line(&format!("failed: {failure}"))?;
        }
        Ok(())
    }
}
