//! What the commands say: results on stdout, everything else on stderr.
//!
//! A reader that went away is no reason to stop a run, so a failed write is ignored.

use std::fmt::Display;
use std::io::{self, Write as _};

/// Tells what happens next.
pub(crate) fn step(what: impl Display) {
    let _ = writeln!(io::stderr().lock(), "==> {what}");
}

/// Tells something that is good to know and stops nothing.
pub(crate) fn note(what: impl Display) {
    let _ = writeln!(io::stderr().lock(), "note: {what}");
}

/// Tells why a command failed.
pub(crate) fn error(error: &anyhow::Error) {
    let _ = writeln!(io::stderr().lock(), "error: {error:#}");
}

/// Writes a line of the result.
pub(crate) fn result(line: impl Display) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{line}");
    let _ = stdout.flush();
}

/// Writes rows as aligned columns. The last column is as wide as it likes.
pub(crate) fn table<const N: usize>(rows: &[[String; N]]) {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        result(Vec::from_iter(cells).join("  ").trim_end());
    }
}
