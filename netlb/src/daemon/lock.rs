//! One daemon per state directory and per bpffs directory.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::Path,
};

use anyhow::Context as _;

use crate::exit::{ExitCode, Failure};

/// Held while the daemon runs; the kernel lets go of them with the process.
#[derive(Debug)]
pub(crate) struct Locks {
    _state: Option<File>,
    _bpffs: Option<File>,
}

impl Locks {
    const FILE: &str = "lock";

    /// Locks both, made if they are missing, or says who has them.
    pub(crate) fn take(state_dir: &Path, bpffs: &Path) -> anyhow::Result<Self> {
        let create = |directory: &Path| {
            let made = DirBuilder::new().recursive(true).mode(0o750).create(directory);
            made.with_context(|| format!("cannot create {}", directory.display()))
        };
        create(state_dir)?;
        let state = Self::lock_state(state_dir)?;
        create(bpffs)?;
        Ok(Self { _state: Some(state), _bpffs: Some(lock_bpffs(bpffs)?) })
    }

    /// Locks those that are there, and makes none: in what is missing there is nothing to be removed.
    pub(crate) fn take_present(state_dir: &Path, bpffs: &Path) -> anyhow::Result<Self> {
        let state = state_dir.exists().then(|| Self::lock_state(state_dir)).transpose()?;
        let bpffs = bpffs.exists().then(|| lock_bpffs(bpffs)).transpose()?;
        Ok(Self { _state: state, _bpffs: bpffs })
    }

    fn lock_state(state_dir: &Path) -> anyhow::Result<File> {
        let path = state_dir.join(Self::FILE);
        let mut state = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        if is_taken(&state, &path)? {
            let mut holder = String::new();
            // Only for the message.
            drop(state.read_to_string(&mut holder));
            return Err(taken(state_dir, holder.trim()));
        }
        state.set_len(0).and_then(|()| state.rewind()).and_then(|()| writeln!(state, "pid {}", std::process::id()))?;
        Ok(state)
    }

    /// Whether a daemon runs that uses one of these directories.
    pub(crate) fn are_held(state_dir: &Path, bpffs: &Path) -> bool {
        [state_dir.join(Self::FILE), bpffs.to_owned()].iter().any(|path| {
            File::open(path).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
        })
    }
}

fn lock_bpffs(bpffs: &Path) -> anyhow::Result<File> {
    let file = File::open(bpffs).with_context(|| format!("cannot open {}", bpffs.display()))?;
    if is_taken(&file, bpffs)? {
        return Err(taken(bpffs, ""));
    }
    Ok(file)
}

fn is_taken(file: &File, path: &Path) -> anyhow::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

fn taken(directory: &Path, holder: &str) -> anyhow::Error {
    let holder = if holder.is_empty() { String::new() } else { format!(" ({holder})") };
    let message = format!("another netlb{holder} uses {}", directory.display());
    Failure::new(ExitCode::Conflict, message)
        .with_hint("stop it, or give this one its own --state-dir, --bpffs and --socket")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_and_told_of_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let (state, bpffs) = (directory.path().join("state"), directory.path().join("bpf"));
        assert!(!Locks::are_held(&state, &bpffs));
        let locks = Locks::take(&state, &bpffs).unwrap();
        assert!(Locks::are_held(&state, &bpffs));
        let error = Locks::take(&state, &directory.path().join("other")).unwrap_err().to_string();
        assert_eq!(error, format!("another netlb (pid {}) uses {}", std::process::id(), state.display()));
        let error = Locks::take(&directory.path().join("other"), &bpffs).unwrap_err().to_string();
        assert_eq!(error, format!("another netlb uses {}", bpffs.display()));
        drop(locks);
        assert!(!Locks::are_held(&state, &bpffs));
        Locks::take(&state, &bpffs).unwrap();
    }

    #[test]
    fn somebody_who_makes_nothing_locks_what_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let (state, bpffs) = (directory.path().join("state"), directory.path().join("bpf"));
        Locks::take_present(&state, &bpffs).unwrap();
        assert!(!state.exists() && !bpffs.exists());
        drop(Locks::take(&state, &bpffs).unwrap());
        let locks = Locks::take_present(&state, &bpffs).unwrap();
        assert!(Locks::take(&state, &directory.path().join("other")).is_err());
        assert!(Locks::take(&directory.path().join("other"), &bpffs).is_err());
        drop(locks);
        let _daemon = Locks::take(&state, &directory.path().join("other")).unwrap();
        assert!(Locks::take_present(&state, &bpffs).is_err());
    }
}
