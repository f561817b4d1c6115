//! Programs: run with a time limit, or kept going in the background until a guard is dropped.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getppid};

use crate::cgroup::{self, Cgroup};
use crate::netns::{Handle, Namespace};
use crate::run::Run;

/// How long a command may take unless told otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A command to be run.
#[derive(Debug)]
pub struct Cmd {
    command: Command,
    line: String,
    inside: Option<Handle>,
    cgroup: Option<cgroup::Handle>,
    input: Vec<u8>,
    timeout: Duration,
}

impl Cmd {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let program = program.as_ref();
        Self {
            command: Command::new(program),
            line: program.to_string_lossy().into_owned(),
            inside: None,
            cgroup: None,
            input: Vec::new(),
            timeout: DEFAULT_TIMEOUT,
        }
    }

    pub fn inside(mut self, namespace: &Namespace) -> Self {
        self.line = format!("[{}] {}", namespace.name(), self.line);
        self.inside = Some(namespace.handle());
        self
    }

    /// As [`inside`](Self::inside), for where only the handle is at hand.
    pub fn handle(mut self, handle: &Handle) -> Self {
        self.inside = Some(handle.clone());
        self
    }

    /// Runs it in a cgroup.
    pub fn cgroup(mut self, cgroup: &Cgroup) -> Self {
        self.cgroup = Some(cgroup.handle());
        self
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.line.push(' ');
        self.line.push_str(&arg.as_ref().to_string_lossy());
        self.command.arg(arg);
        self
    }

    pub fn args(self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Runs the command to its end. An exit status other than 0 is a result, not an error; a command over its time is an error.
    pub fn run(mut self) -> Result<Output> {
        self.prepare(true);
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().with_context(|| format!("failed to start `{}`", self.line))?;
        let stdin = child.stdin.take();
        let input = std::mem::take(&mut self.input);
        let writer = thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(&input)));
        let stdout = read_all(child.stdout.take());
        let stderr = read_all(child.stderr.take());
        let ended = wait(&mut child, self.timeout)?;
        if ended.is_none() {
            signal_group(&child, Signal::SIGKILL);
        }
        let status = child.wait()?;
        // A program need not read its input to the end.
        let _ = writer.join();
        let output = Output { line: self.line, status, stdout: joined(stdout), stderr: joined(stderr) };
        if ended.is_none() {
            bail!("not done after {:?}: {output}", self.timeout);
        }
        Ok(output)
    }

    /// Starts the command in the background; its output goes to a log file.
    pub fn spawn(mut self) -> Result<Process> {
        let run = Run::current()?;
        self.prepare(!run.is_kept());
        let program =
            Path::new(self.command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log = run.id().dir().join(format!("{}-{program}.log", run.next_number()));
        let file = File::create(&log).with_context(|| format!("failed to create {}", log.display()))?;
        self.command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = self.command.spawn().with_context(|| format!("failed to start `{}`", self.line))?;
        Ok(Process { child, ended: None, line: self.line, log })
    }

    /// Starts the command to talk with it, a line for a line.
    pub fn converse(mut self) -> Result<Conversation> {
        self.prepare(true);
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = self.command.spawn().with_context(|| format!("failed to start `{}`", self.line))?;
        let (stdin, stdout) = child.stdin.take().zip(child.stdout.take()).context("the program has no pipes")?;
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Ok(Conversation { child, stdin, answers, line: self.line, timeout: self.timeout })
    }

    /// The child gets a process group, so that a Ctrl-C does not reach it and its own children end with it.
    fn prepare(&mut self, dies_with_us: bool) {
        let inside = self.inside.take();
        let cgroup = self.cgroup.take();
        let parent = nix::unistd::getpid();
        self.command.process_group(0);
        // SAFETY: the closure makes system calls only, which is allowed between fork and exec.
        unsafe {
            self.command.pre_exec(move || {
                if dies_with_us {
                    // The signal comes when the *thread* that started the child ends: start processes from a thread that outlives them.
                    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                    if getppid() != parent {
                        return Err(io::Error::from_raw_os_error(libc::ESRCH));
                    }
                }
                cgroup.as_ref().map_or(Ok(()), cgroup::Handle::enter)?;
                inside.as_ref().map_or(Ok(()), Handle::enter_this_thread)
            });
        }
    }
}

/// A program that answers each line with one, killed on drop.
#[derive(Debug)]
pub struct Conversation {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
    line: String,
    timeout: Duration,
}

impl Conversation {
    pub fn ask(&mut self, line: &str) -> Result<String> {
        writeln!(self.stdin, "{line}").with_context(|| format!("`{}` has ended", self.line))?;
        self.answers.recv_timeout(self.timeout).with_context(|| format!("`{}` did not answer `{line}`", self.line))
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        signal_group(&self.child, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// What a command gave.
#[derive(Debug)]
pub struct Output {
    line: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// The output of a command that must succeed.
    pub fn success(self) -> Result<Self> {
        if !self.status.success() {
            bail!("{self}");
        }
        Ok(self)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, status, stdout, stderr } = self;
        write!(f, "`{line}` ended with {status}")?;
        for (name, text) in [("stdout", stdout), ("stderr", stderr)] {
            if !text.trim().is_empty() {
                write!(f, "\n{name}: {}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// A program in the background, killed on drop with the children it started.
#[derive(Debug)]
pub struct Process {
    child: Child,
    ended: Option<ExitStatus>,
    line: String,
    log: PathBuf,
}

impl Process {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the program wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// An error when the program ended by itself.
    pub fn check(&mut self) -> Result<()> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        match self.ended {
            Some(status) => bail!("`{}` ended with {status}", self.line),
            None => Ok(()),
        }
    }

    /// Ends the program at once.
    pub fn kill(&mut self) -> Result<()> {
        // Once it is reaped its id may be another program's.
        if self.ended.is_none() {
            signal_group(&self.child, Signal::SIGKILL);
            self.ended = Some(self.child.wait()?);
        }
        Ok(())
    }

    /// Waits for the program to end by itself.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        if self.ended.is_none() {
            self.ended = wait(&mut self.child, timeout)?;
        }
        self.ended.with_context(|| format!("`{}` still runs after {timeout:?}\n{}", self.line, self.log()))
    }

    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.check()?;
        signal_group(&self.child, signal);
        Ok(())
    }

    /// Asks the program to end, and gives its exit status; kills it when it takes longer than `timeout`.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.ended = wait(&mut self.child, timeout)?;
        if let Some(status) = self.ended {
            return Ok(status);
        }
        self.kill()?;
        bail!("`{}` did not end within {timeout:?} of SIGTERM\n{}", self.line, self.log())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Tries until there is an answer, a few hundred times a second.
pub fn wait_until<T>(what: &str, timeout: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("waited {timeout:?} for {what}");
        }
        thread::sleep(Duration::from_millis(3));
    }
}

/// A program of this package, built in the same directory as the running one; tests lie one directory below.
pub fn sibling_program(name: &str) -> Result<PathBuf> {
    let this = env::current_exe()?;
    this.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|program| program.is_file()).with_context(|| {
        format!(
            "no {name} beside {}: build the package's programs with `cargo build -p netlb-integration`",
            this.display()
        )
    })
}

fn signal_group(child: &Child, signal: Signal) {
    // It fails only when the group is gone.
    let _ = killpg(Pid::from_raw(child.id().cast_signed()), signal);
}

fn wait(child: &mut Child, timeout: Duration) -> Result<Option<ExitStatus>> {
    // SAFETY: pidfd_open takes two integers; the pid is that of a child that has not been reaped.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    let Ok(fd @ 0..) = i32::try_from(fd) else { return Err(io::Error::last_os_error()).context("pidfd_open failed") };
    // SAFETY: the call above made this descriptor, and nobody else has it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last millisecond is not spent turning.
        let millis = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)) {
            Ok(0) if left.is_zero() => return Ok(None),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(Some(child.wait()?)),
            Err(error) => return Err(error).context("poll failed"),
        }
    }
}

fn read_all(stream: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn joined(reader: JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
}
