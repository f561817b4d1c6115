//! A process that outlives the run and cleans up after it, also when the run is killed.
//!
//! It holds the reading end of a pipe whose other end only the run has: the end of the run, by whatever cause, is the end of the pipe.
//! It lives in a session of its own, so that a Ctrl-C for the run does not reach it.

use std::env;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use crate::exec::sibling_program;
use crate::run::RunId;
use crate::sweep;

const ASKED: &str = "NETLB_GUARD_RUN";
const DISMISSED: &[u8] = b"dismissed";

static SERVES: AtomicBool = AtomicBool::new(false);

/// The running guardian, seen from the run.
#[derive(Debug)]
pub(crate) struct Guardian {
    child: Mutex<Child>,
}

impl Guardian {
    pub(crate) fn start(run: RunId) -> Result<Self> {
        let program = program()?;
        let mut command = Command::new(&program);
        command.env(ASKED, run.pid().to_string()).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: setsid is async-signal-safe, and it is all that happens between fork and exec.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
        }
        let child = command.spawn().with_context(|| format!("failed to start {}", program.display()))?;
        Ok(Self { child: Mutex::new(child) })
    }

    /// Lets the guardian go without cleaning up.
    pub(crate) fn dismiss(&self) -> Result<()> {
        let mut child = self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(mut pipe) = child.stdin.take() {
            pipe.write_all(DISMISSED)?;
        }
        child.wait().context("the guardian did not end")?;
        Ok(())
    }
}

/// To be called first in the `main` of every program of this package that builds testbeds or serves as a guardian: when this process
/// was started as a guardian, it does that work and returns true.
pub fn serve_if_asked() -> Result<bool> {
    let Ok(pid) = env::var(ASKED) else {
        SERVES.store(true, Ordering::Relaxed);
        return Ok(false);
    };
    let run = RunId::of(pid.parse().with_context(|| format!("{ASKED}={pid} is not a pid"))?);
    let mut message = Vec::new();
    io::stdin().lock().read_to_end(&mut message)?;
    if message != DISMISSED {
        sweep::remove(run)?;
    }
    Ok(true)
}

/// This very program where it can be a guardian, else the one that was built beside the running test.
fn program() -> Result<PathBuf> {
    if SERVES.load(Ordering::Relaxed) {
        Ok(fs::canonicalize("/proc/self/exe")?)
    } else {
        sibling_program("netlb-sweep")
    }
}
