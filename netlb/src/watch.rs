//! The configuration file over time: read, and watched for changes.
//!
//! The directory is watched, not the file: editors write a new file and rename it, and a ConfigMap swaps a symbolic link beside it. A watch
//! stays with its directory, so that one that takes its place is watched anew. What no watch tells, such as a change behind a symbolic link
//! to elsewhere, is found by a look now and then.
//!
//! A file that had something in it and is empty now is taken for one that is being written. One that was empty before is what it says.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::sync::watch;

use crate::config::{Config, ConfigError, Diagnostic};

/// A file is read when it was left alone for this long.
const QUIET: Duration = Duration::from_millis(100);
/// A file that is written again and again is read after this long all the same.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// How often a file is looked at without any event.
const LOOK: Duration = Duration::from_secs(30);
/// How often a directory that is missing is looked for.
const SEARCH: Duration = Duration::from_secs(1);

/// A configuration file and what it said last.
#[derive(Debug)]
pub struct ConfigFile {
    path: PathBuf,
    /// A hash of the text; the text may be long. None for a file that could not be read.
    said: Option<u64>,
    /// Whether what is in use came from an empty file.
    is_empty: bool,
}

/// Says when something happened in the file's directory, or when it is time to look.
#[derive(Debug)]
pub struct Changes {
    directory: PathBuf,
    /// Kept: without it the watch ends. None where there is nothing to be watched, or no way to.
    watcher: Option<RecommendedWatcher>,
    /// The directory that is watched, or would be.
    identity: Option<Identity>,
    sender: watch::Sender<()>,
    events: watch::Receiver<()>,
    /// Something happened that was not told yet.
    pending: bool,
    look: Duration,
}

/// What tells a directory from others that had its name: device, number, and when it was made, because numbers are used again.
type Identity = (u64, u64, Option<SystemTime>);

impl ConfigFile {
    /// Reads a file for the first time.
    pub fn open(path: &Path) -> Result<(Self, Config), ConfigError> {
        let mut file = Self { path: path.to_owned(), said: None, is_empty: true };
        let config = file.read()?;
        Ok((file, config))
    }

    #[must_use]
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Reads the file again.
    pub fn read(&mut self) -> Result<Config, ConfigError> {
        let text = self.read_text();
        self.parse(text)
    }

    /// Reads the file again if it says something else than before.
    pub fn read_if_changed(&mut self) -> Option<Result<Config, ConfigError>> {
        let text = self.read_text();
        (text.as_ref().ok().map(hash) != self.said).then(|| self.parse(text))
    }

    fn parse(&mut self, text: Result<String, ConfigError>) -> Result<Config, ConfigError> {
        // Remembered also when it is wrong: the same error need not be told twice.
        self.said = text.as_ref().ok().map(hash);
        let text = text?;
        let is_empty = text.trim().is_empty();
        if is_empty && !self.is_empty {
            // What a file looks like between being opened for writing and being written.
            let empty = Diagnostic::new(&self.name(), &text, 0..0, "the file is empty now: half written?")
                .with_help("a file with a comment in it is taken for one without services");
            return Err(ConfigError::Invalid(Box::new(empty)));
        }
        let config = Config::parse(&self.name(), &text)?;
        self.is_empty = is_empty;
        Ok(config)
    }

    /// Watches the file's directory. Where that cannot be done, the file is looked at now and then.
    #[must_use]
    pub fn watch(&self) -> Changes {
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let (sender, events) = watch::channel(());
        let mut changes = Changes {
            directory: directory.to_owned(),
            watcher: None,
            identity: None,
            sender,
            events,
            // The file was read before this, and may have changed in between.
            pending: true,
            look: LOOK,
        };
        changes.follow();
        changes
    }

    fn read_text(&self) -> Result<String, ConfigError> {
        fs::read_to_string(&self.path).map_err(|source| ConfigError::Read { path: self.path.clone(), source })
    }
}

impl Changes {
    /// Returns when something changed and is quiet again, or when it is time to look. Nothing is lost when the wait is given up.
    pub async fn changed(&mut self) {
        if !self.pending {
            let wait = if self.identity.is_some() { self.look } else { SEARCH };
            if tokio::time::timeout(wait, self.events.changed()).await.is_err() {
                return self.follow();
            }
            self.pending = true;
        }
        let quiet = async {
            while tokio::time::timeout(QUIET, self.events.changed()).await.is_ok_and(|event| event.is_ok()) {}
        };
        // Quiet or not, it is time.
        drop(tokio::time::timeout(LONGEST_WAIT, quiet).await);
        // Before the file is read: what comes after that is an event.
        self.follow();
        self.pending = false;
    }

    /// Watches the directory that has the name now, if it is not watched yet.
    fn follow(&mut self) {
        // Before it is watched: should another one come in between, this is not its identity.
        let identity = identity(&self.directory);
        let is_same = identity == self.identity;
        if is_same && (self.watcher.is_some() || identity.is_none()) {
            return;
        }
        self.identity = identity;
        self.watcher = None;
        if identity.is_none() {
            return;
        }
        match self.watcher() {
            Ok(watcher) => self.watcher = Some(watcher),
            Err(_) if is_same => {}
            Err(error) => tracing::warn!(
                "cannot watch {}: {error}; it is looked at every {} seconds",
                self.directory.display(),
                self.look.as_secs()
            ),
        }
    }

    fn watcher(&self) -> notify::Result<RecommendedWatcher> {
        let sender = self.sender.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // An error means that events were lost, so look.
            if event.is_ok_and(|event| is_read_only(event.kind)) {
                return;
            }
            // Nobody listens any more when the daemon stops.
            let _ = sender.send(());
        })?;
        watcher.watch(&self.directory, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }
}

/// Of a directory, if it is there.
fn identity(directory: &Path) -> Option<Identity> {
    let metadata = fs::metadata(directory).ok()?;
    Some((metadata.dev(), metadata.ino(), metadata.created().ok()))
}

fn hash(text: &String) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// Whether an event came from somebody reading, as we do ourselves.
fn is_read_only(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "[[service]]\nfrontend = \"10.96.0.1:80/tcp\"\n";

    async fn changed(changes: &mut Changes) -> bool {
        tokio::time::timeout(Duration::from_secs(3), changes.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn a_file_renamed_into_place_is_noticed_and_reading_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("netlb.toml");
        fs::write(&path, "# nothing\n").unwrap();
        let (mut file, config) = ConfigFile::open(&path).unwrap();
        assert!(config.services.is_empty());
        let mut changes = file.watch();
        let temporary = directory.path().join("x");
        fs::write(&temporary, ONE).unwrap();
        fs::rename(&temporary, &path).unwrap();
        assert!(changed(&mut changes).await);
        assert_eq!(file.read_if_changed().unwrap().unwrap().services.len(), 1);
        assert!(file.read_if_changed().is_none());
        assert!(tokio::time::timeout(Duration::from_millis(300), changes.changed()).await.is_err());
    }

    #[tokio::test]
    async fn a_swapped_symbolic_link_beside_the_file_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (version, text) in [("v1", "# nothing\n"), ("v2", ONE)] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("netlb.toml"), text).unwrap();
        }
        std::os::unix::fs::symlink("v1", at("..data")).unwrap();
        std::os::unix::fs::symlink("..data/netlb.toml", at("netlb.toml")).unwrap();
        let (mut file, _) = ConfigFile::open(&at("netlb.toml")).unwrap();
        let mut changes = file.watch();
        std::os::unix::fs::symlink("v2", at("..tmp")).unwrap();
        fs::rename(at("..tmp"), at("..data")).unwrap();
        assert!(changed(&mut changes).await);
        assert_eq!(file.read_if_changed().unwrap().unwrap().services.len(), 1);
    }

    #[tokio::test]
    async fn a_change_between_reading_and_watching_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("netlb.toml");
        fs::write(&path, "# nothing\n").unwrap();
        let (mut file, _) = ConfigFile::open(&path).unwrap();
        fs::write(&path, ONE).unwrap();
        assert!(changed(&mut file.watch()).await);
        assert_eq!(file.read_if_changed().unwrap().unwrap().services.len(), 1);
    }

    #[tokio::test]
    async fn a_wait_that_is_given_up_loses_no_change() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("netlb.toml");
        fs::write(&path, "# nothing\n").unwrap();
        let (file, _) = ConfigFile::open(&path).unwrap();
        let mut changes = file.watch();
        fs::write(&path, ONE).unwrap();
        // Long enough to have seen the event, too short for the quiet after it.
        assert!(tokio::time::timeout(QUIET / 2, changes.changed()).await.is_err());
        assert!(changed(&mut changes).await);
    }

    /// Beside another directory, of which it takes the place.
    fn a_directory_with_the_file() -> (tempfile::TempDir, PathBuf, ConfigFile) {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (version, text) in [("netlb", "# nothing\n"), ("netlb.new", ONE)] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("netlb.toml"), text).unwrap();
        }
        let path = at("netlb").join("netlb.toml");
        let (file, _) = ConfigFile::open(&path).unwrap();
        (directory, path, file)
    }

    /// Waits until the file says something else, and says how many services that are.
    async fn services(changes: &mut Changes, file: &mut ConfigFile) -> Option<usize> {
        let read = async {
            loop {
                changes.changed().await;
                if let Some(Ok(config)) = file.read_if_changed() {
                    break config.services.len();
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(3), read).await.ok()
    }

    #[tokio::test]
    async fn a_directory_that_took_the_place_of_another_is_watched() {
        let (directory, path, mut file) = a_directory_with_the_file();
        let mut changes = file.watch();
        assert!(changed(&mut changes).await && file.read_if_changed().is_none());
        fs::rename(directory.path().join("netlb"), directory.path().join("netlb.old")).unwrap();
        fs::rename(directory.path().join("netlb.new"), directory.path().join("netlb")).unwrap();
        assert_eq!(services(&mut changes, &mut file).await, Some(1));
        fs::write(&path, "# nothing\n").unwrap();
        assert_eq!(services(&mut changes, &mut file).await, Some(0));
    }

    #[tokio::test]
    async fn a_directory_that_is_made_again_is_watched() {
        let (_directory, path, mut file) = a_directory_with_the_file();
        let mut changes = file.watch();
        assert!(changed(&mut changes).await && file.read_if_changed().is_none());
        for pause in [Duration::ZERO, 4 * QUIET] {
            fs::remove_dir_all(path.parent().unwrap()).unwrap();
            if !pause.is_zero() {
                assert!(changed(&mut changes).await && file.read_if_changed().unwrap().is_err());
                assert!(tokio::time::timeout(pause, changes.changed()).await.is_err());
            }
            fs::create_dir(path.parent().unwrap()).unwrap();
            fs::write(&path, ONE).unwrap();
            assert_eq!(services(&mut changes, &mut file).await, Some(1), "{pause:?}");
            fs::write(&path, "# nothing\n").unwrap();
            assert_eq!(services(&mut changes, &mut file).await, Some(0), "{pause:?}");
        }
    }

    #[tokio::test]
    async fn a_file_elsewhere_is_looked_at_now_and_then() {
        let (directory, path, _) = a_directory_with_the_file();
        let link = directory.path().join("link.toml");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let (mut file, _) = ConfigFile::open(&link).unwrap();
        let mut changes = file.watch();
        changes.changed().await;
        fs::write(&path, ONE).unwrap();
        assert_eq!(changes.look, Duration::from_secs(30));
        changes.look = Duration::from_millis(300);
        assert!(tokio::time::timeout(changes.look / 2, changes.changed()).await.is_err());
        assert_eq!(services(&mut changes, &mut file).await, Some(1));
    }

    #[test]
    fn a_file_that_becomes_empty_or_missing_is_an_error_and_told_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("netlb.toml");
        fs::write(&path, ONE).unwrap();
        let (mut file, _) = ConfigFile::open(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert!(
            file.read_if_changed().unwrap().unwrap_err().summary().ends_with("the file is empty now: half written?")
        );
        assert!(file.read_if_changed().is_none());
        assert!(file.read().is_err(), "nor when asked again");
        fs::remove_file(&path).unwrap();
        assert!(matches!(file.read_if_changed().unwrap(), Err(ConfigError::Read { .. })));
        assert!(file.read_if_changed().is_none());
        fs::write(&path, ONE).unwrap();
        assert_eq!(file.read_if_changed().unwrap().unwrap().services.len(), 1);
    }

    #[test]
    fn a_file_that_was_empty_may_stay_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("netlb.toml");
        fs::write(&path, "").unwrap();
        let (mut file, config) = ConfigFile::open(&path).unwrap();
        assert!(config.services.is_empty());
        assert_eq!(file.read().unwrap(), config);
        fs::write(&path, "\n").unwrap();
        assert_eq!(file.read_if_changed().unwrap().unwrap(), config);
        fs::write(&path, "[[serv").unwrap();
        assert!(file.read_if_changed().unwrap().is_err());
        fs::write(&path, "").unwrap();
        assert_eq!(file.read_if_changed().unwrap().unwrap(), config, "as what is in use");
    }
}
