//! Lines for whoever watches: progress, and what could not be measured and why. They go to standard error.

use std::fmt::Display;
use std::io::{self, Write as _};

pub(crate) fn note(line: impl Display) {
    // Nobody may be listening, which is no reason to stop.
    let _ = writeln!(io::stderr().lock(), "{line}");
}
