//! The services the API added, on disk.
//!
//! A snapshot has all of them, and a journal the changes since then: a change costs one record and one sync, however many services there
//! are. When the journal has grown as long as the snapshot, a new snapshot takes the place of both.
//!
//! The snapshot is one JSON file, replaced whole: a temporary file is written and synced, renamed over the old one, and the directory
//! synced. It names its journal by number, so that a journal it has taken in is never read again. After a crash at any moment there is the
//! old snapshot with its journal, or the new one. The journal's last record may be cut off by a crash, and was then not acknowledged; any
//! other damage stops the start, and what cannot be read is never overwritten.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use self::journal::Entry;
use crate::{
    model::{Claims, Service, describe_claim},
    spec::ServiceSpec,
};

mod journal;
#[cfg(test)]
mod tests;

/// Bytes that a journal may always have.
const LEAST_JOURNAL: u64 = 1 << 20;

/// Where API services are kept.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    /// The number of the journal that goes on from the snapshot.
    journal: u64,
    /// Bytes of the journal. None where it cannot be written to, because there is no snapshot or because what is at its end is not known:
    /// then the next change makes a new snapshot.
    length: Option<u64>,
    /// Bytes of the snapshot.
    snapshot: u64,
}

/// Why services could not be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("state file {} is damaged: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("state file {} has version {version}, this netlb knows version {known}", path.display(), known = Store::VERSION)]
    Version { path: PathBuf, version: u64 },
}

impl StoreError {
    /// The way out.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let Self::Damaged { path, .. } = self else { return None };
        let path = path.display();
        Some(format!(
            "the services added through the API are in it and it was left as it is: repair it, or start without them after `mv {path} {path}.damaged`"
        ))
    }
}

#[derive(Serialize)]
struct Written<'a> {
    version: u64,
    journal: u64,
    services: &'a [ServiceSpec],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    #[expect(dead_code, reason = "checked before the rest is read")]
    version: u64,
    #[serde(default)]
    journal: u64,
    services: Vec<ServiceSpec>,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u64,
}

impl Store {
    pub const FILE: &str = "services.json";
    const VERSION: u64 = 1;
    const TEMPORARY: &str = ".services-";

    /// Opens the state directory, made if it is missing, and reads what was kept.
    pub fn open(directory: &Path) -> Result<(Self, Vec<Service>), StoreError> {
        let mut store = Self { directory: directory.to_owned(), journal: 0, length: None, snapshot: 0 };
        let write = |source| StoreError::Write { path: directory.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o750).create(directory).map_err(write)?;
        store.remove_leftovers();
        let services = store.read()?;
        Ok((store, services))
    }

    /// The files in this directory in which services are kept.
    #[must_use]
    pub fn files(directory: &Path) -> Vec<PathBuf> {
        let snapshot = directory.join(Self::FILE);
        let journals = journals(directory).into_iter().map(|number| directory.join(journal_name(number)));
        snapshot.exists().then_some(snapshot).into_iter().chain(journals).collect()
    }

    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.join(Self::FILE)
    }

    /// Keeps what edits made of the services with these names: they may be gone. `all` are the services there are now. It is on disk when
    /// this returns; if it fails, what was kept before is kept.
    pub fn append<'a>(
        &mut self,
        edits: impl Iterator<Item = (&'a str, Option<&'a Service>)>,
        all: impl Iterator<Item = &'a Service>,
    ) -> Result<(), StoreError> {
        let path = self.directory.join(journal_name(self.journal));
        let entry = |(name, service): (&str, Option<&Service>)| match service {
            Some(service) => Entry::Put(Box::new(service.into())),
            None => Entry::Remove(name.to_owned()),
        };
        let record = journal::record(&edits.map(entry).collect::<Vec<_>>())
            .map_err(|source| StoreError::Write { path: path.clone(), source })?;
        match self.length.take() {
            Some(length) if length + record.len() as u64 <= self.snapshot.max(LEAST_JOURNAL) => {
                let appended = self.append_record(&path, length, &record);
                if !appended.map_err(|source| StoreError::Write { path, source })? {
                    return self.save(all);
                }
                self.length = Some(length + record.len() as u64);
                Ok(())
            }
            _ => self.save(all),
        }
    }

    /// Says whether the journal was as it was left, and has the record now.
    fn append_record(&self, path: &Path, length: u64, record: &[u8]) -> io::Result<bool> {
        // Opened each time: a directory that was moved away or mounted over is noticed.
        let mut file = match OpenOptions::new().append(true).create(length == 0).mode(0o640).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() != length {
            return Ok(false);
        }
        let written = file.write_all(record).and_then(|()| file.sync_data());
        if let Err(error) = written {
            // Best without it: it will be refused. Whether this works or not, the next change makes a new snapshot.
            file.set_len(length).and_then(|()| file.sync_data()).ok();
            return Err(error);
        }
        if length == 0 {
            self.sync_directory()?;
        }
        Ok(true)
    }

    /// Keeps these services and no others, in a new snapshot. They are on disk when this returns.
    pub fn save<'a>(&mut self, services: impl Iterator<Item = &'a Service>) -> Result<(), StoreError> {
        let services: Vec<_> = services.map(ServiceSpec::from).collect();
        self.replace(&services).map_err(|source| StoreError::Write { path: self.path(), source })
    }

    fn replace(&mut self, services: &[ServiceSpec]) -> io::Result<()> {
        self.length = None;
        let before = journals(&self.directory);
        // A number that no journal has, whatever it belongs to.
        let journal = before.iter().copied().max().unwrap_or(0).max(self.journal) + 1;
        let mut file = tempfile::Builder::new().prefix(Self::TEMPORARY).tempfile_in(&self.directory)?;
        let mut text = serde_json::to_vec(&Written { version: Self::VERSION, journal, services })?;
        text.push(b'\n');
        file.write_all(&text)?;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o640))?;
        file.as_file().sync_all()?;
        file.persist(self.path())?;
        let old = std::mem::replace(&mut self.journal, journal);
        self.snapshot = text.len() as u64;
        self.sync_directory()?;
        self.length = Some(0);
        // Those of a snapshot that somebody has put aside stay with it.
        for number in before.into_iter().filter(|number| *number <= old) {
            self.remove(&self.directory.join(journal_name(number)));
        }
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }

    fn read(&mut self) -> Result<Vec<Service>, StoreError> {
        let path = self.path();
        let Some(text) = read_if_there(&path)? else { return Ok(Vec::new()) };
        let damaged = |reason: String| StoreError::Damaged { path: path.clone(), reason };
        let VersionOnly { version } = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if version != Self::VERSION {
            return Err(StoreError::Version { path, version });
        }
        let Read { journal, services: specs, .. } =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        let mut services = BTreeMap::new();
        for spec in specs {
            let service = spec.into_service().map_err(|error| damaged(error.to_string()))?;
            if let Some(twice) = services.insert(service.name().to_owned(), service) {
                return Err(damaged(format!("service `{}` is in it twice", twice.name())));
            }
        }
        (self.journal, self.snapshot) = (journal, text.len() as u64);
        self.length = self.replay(&mut services)?;
        let mut claims = Claims::default();
        for service in services.values() {
            if let Some(twice) = claims.rivals(service).next() {
                return Err(damaged(format!("{} is in it twice", describe_claim(&twice.claim))));
            }
            claims.insert(service, &());
        }
        Ok(services.into_values().collect())
    }

    /// Carries out what the journal says, and returns its length if it can be continued.
    fn replay(&self, services: &mut BTreeMap<String, Service>) -> Result<Option<u64>, StoreError> {
        let path = self.directory.join(journal_name(self.journal));
        let Some(text) = read_if_there(&path)? else { return Ok(Some(0)) };
        let (entries, length) =
            journal::read(&text).map_err(|reason| StoreError::Damaged { path: path.clone(), reason })?;
        for entry in entries {
            match entry {
                Entry::Put(spec) => {
                    let service = spec
                        .into_service()
                        .map_err(|error| StoreError::Damaged { path: path.clone(), reason: error.to_string() })?;
                    services.insert(service.name().to_owned(), service);
                }
                Entry::Remove(name) => drop(services.remove(&name)),
            }
        }
        let is_whole = length == text.len();
        if !is_whole {
            tracing::warn!(
                "the last change in {} was cut off before it was acknowledged, and is left out",
                path.display()
            );
        }
        Ok(is_whole.then_some(length as u64))
    }

    /// Removes temporary files of a daemon that was killed while it wrote.
    fn remove_leftovers(&self) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(Self::TEMPORARY)) {
            self.remove(&entry.path());
        }
    }

    fn remove(&self, path: &Path) {
        if let Err(error) = fs::remove_file(path) {
            tracing::debug!("cannot remove {}: {error}", path.display());
        }
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StoreError::Read { path: path.to_owned(), source }),
    }
}

fn journal_name(number: u64) -> String {
    format!("services-{number}.journal")
}

/// The numbers of the journals in a directory.
fn journals(directory: &Path) -> Vec<u64> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let number = |entry: fs::DirEntry| {
        let name = entry.file_name();
        let name = name.to_str()?;
        let number = name.strip_prefix("services-")?.strip_suffix(".journal")?.parse().ok()?;
        (journal_name(number) == name).then_some(number)
    };
    entries.filter_map(number).collect()
}
