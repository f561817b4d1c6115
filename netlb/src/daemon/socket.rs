//! The API's socket file: made for root and its group, replaced when nobody listens on it any more.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::{
        fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use tokio::net::UnixListener;

use crate::exit::{ExitCode, Failure};

/// A path that was free for a socket.
#[derive(Debug)]
pub(crate) struct Socket(PathBuf);

impl Socket {
    /// Looks whether another daemon listens at this path, or something else is there.
    pub(crate) fn check(path: &Path) -> anyhow::Result<Self> {
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                let message = format!("{} exists and is not a socket", path.display());
                Err(Failure::new(ExitCode::Conflict, message).with_hint("move it away, or set --socket").into())
            }
            Ok(_) if is_live(path) => {
                let message = format!("another netlb runs here: it listens on {}", path.display());
                Err(Failure::new(ExitCode::Conflict, message).with_hint("stop it, or set --socket").into())
            }
            _ => Ok(Self(path.to_owned())),
        }
    }

    #[must_use]
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Listens. The path has its final mode from the first moment; a stale socket is replaced.
    pub(crate) fn listen(&self) -> anyhow::Result<UnixListener> {
        let cannot = || format!("cannot listen on {}", self.0.display());
        let directory = self.0.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        DirBuilder::new()
            .recursive(true)
            .mode(0o750)
            .create(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let mut temporary = self.0.clone().into_os_string();
        temporary.push(".new");
        let temporary = PathBuf::from(temporary);
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(cannot),
            _ => {}
        }
        let listener = UnixListener::bind(&temporary).with_context(cannot)?;
        fs::set_permissions(&temporary, Permissions::from_mode(0o660)).with_context(cannot)?;
        fs::rename(&temporary, &self.0).with_context(cannot)?;
        Ok(listener)
    }

    /// Removes the file; the next daemon would replace it anyway.
    pub(crate) fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Whether somebody accepts connections there.
pub(crate) fn is_live(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_for_owner_and_group_and_a_stale_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/netlb.sock");
        let listener = Socket::check(&path).unwrap().listen().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o750);
        let error = Socket::check(&path).unwrap_err().to_string();
        assert!(error.starts_with("another netlb runs here"), "{error}");
        drop(listener);
        let _listener = Socket::check(&path).unwrap().listen().unwrap();
        assert!(is_live(&path));
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        fs::write(&path, "x").unwrap();
        assert!(Socket::check(&path).unwrap_err().to_string().ends_with("exists and is not a socket"));
        assert_eq!(fs::read(&path).unwrap(), b"x");
    }
}
