//! What tests return.

use std::fmt;

/// Result of a test in which `?` panics where it stands: the report names the line, and guards that are dropped by the unwinding
/// (a daemon, a server) know that the test failed and show their logs.
pub type TestResult = Result<(), Failure>;

#[derive(Debug)]
pub struct Failure(());

impl<E: fmt::Display> From<E> for Failure {
    #[track_caller]
    fn from(error: E) -> Self {
        panic!("{error:#}")
    }
}
