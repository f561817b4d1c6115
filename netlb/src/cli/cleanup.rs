//! `netlb cleanup`: what a daemon leaves on purpose when it stops, removed.

use std::{
    fs,
    io::{self, BufRead as _, IsTerminal as _, Write},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::output::Output;
use crate::{
    config::Api,
    daemon::{DEFAULT_BPFFS, DEFAULT_STATE_DIR, lock::Locks, preflight, socket},
    datapath::{kernel, reserved::Reserved},
    exit::{ExitCode, Failure},
    store::Store,
};

#[derive(clap::Args, Debug)]
pub(super) struct Cleanup {
    /// Where kernel objects are pinned
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    bpffs: PathBuf,
    /// Where services added by the API are kept
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Also forget the services added by the API
    #[arg(long)]
    state: bool,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

impl Cleanup {
    pub(super) fn run(&self, socket: Option<PathBuf>, out: &mut Output<'_>, err: &mut dyn Write) -> anyhow::Result<()> {
        let Self { bpffs, state_dir, state, dry_run, yes } = self;
        let socket = socket.unwrap_or_else(|| PathBuf::from(Api::DEFAULT_SOCKET));
        if socket::is_live(&socket) || Locks::are_held(state_dir, bpffs) {
            let failure = Failure::new(ExitCode::Conflict, "netlb is running, and would put back what is removed");
            return Err(failure.with_hint("stop it first: `systemctl stop netlb`").into());
        }
        // To the end: a daemon that is started meanwhile would lose what it makes.
        let _locks = if *dry_run { None } else { Some(Locks::take_present(state_dir, bpffs)?) };
        let pins = pins(bpffs)?;
        let mut files = Vec::new();
        files.extend(fs::symlink_metadata(&socket).is_ok().then_some(socket));
        if *state {
            files.extend(Store::files(state_dir));
        }
        let mut reserved = Reserved::open(state_dir);
        let ports = reserved.own();
        let elsewhere = reserved.elsewhere();
        if !elsewhere.is_empty() {
            out.say(&format!("port {elsewhere} stays reserved in another network namespace, until a cleanup there"))?;
        }
        if pins.is_empty() && files.is_empty() && ports.is_empty() {
            return out.say("nothing to remove");
        }
        if *dry_run {
            if !ports.is_empty() {
                out.say(&format!("would end the reservation of port {ports}"))?;
            }
            return pins.iter().chain(&files).try_for_each(|path| out.say(&format!("would remove {}", path.display())));
        }
        if !yes && !confirmed(pins.len() + files.len(), err)? {
            return out.say("nothing removed");
        }
        if !pins.is_empty() {
            // Filters of the clsact qdisc are no pins, and pinned links end some time after their pins.
            kernel::detach_all(bpffs)?;
        }
        remove_pins(bpffs)?;
        reserved.clear().context("cannot end the reservation of ports")?;
        if !ports.is_empty() {
            out.say(&format!("ended the reservation of port {ports}"))?;
        }
        let mut removed = pins;
        for file in files {
            fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
            removed.push(file);
        }
        removed.iter().try_for_each(|path| out.say(&format!("removed {}", path.display())))
    }
}

fn confirmed(count: usize, err: &mut dyn Write) -> anyhow::Result<bool> {
    if !io::stdin().is_terminal() {
        let failure =
            Failure::new(ExitCode::Usage, "cleanup takes services down and asks first, but there is no terminal");
        return Err(failure.with_hint("pass --yes, or --dry-run to see what would be removed").into());
    }
    write!(err, "remove {count} files and stop serving all services on this node? [y/N] ")?;
    err.flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Everything in the bpffs directory, and the directory, in the order in which it can be removed.
fn pins(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let metadata = match fs::symlink_metadata(directory) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", directory.display())),
    };
    if !preflight::is_on_bpffs(directory)? {
        let failure = Failure::new(ExitCode::Failed, format!("{} is not on a BPF file system", directory.display()));
        return Err(failure.with_hint("--bpffs is the directory netlb pins its objects in").into());
    }
    let above = directory.parent().map(fs::metadata).transpose()?;
    if above.is_some_and(|above| above.dev() != metadata.dev()) {
        let message = format!("{} is the BPF file system itself and may hold the pins of others", directory.display());
        return Err(Failure::new(ExitCode::Failed, message).with_hint("give netlb's own directory in it").into());
    }
    let mut paths = Vec::new();
    walk(directory, &mut paths)?;
    Ok(paths)
}

fn walk(directory: &Path, paths: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), paths)?;
        } else {
            paths.push(entry.path());
        }
    }
    paths.push(directory.to_owned());
    Ok(())
}

/// Removes the pins: with its last pin a link is detached and a map freed.
fn remove_pins(directory: &Path) -> anyhow::Result<()> {
    for path in pins(directory)? {
        let removed = if path.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
