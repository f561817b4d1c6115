//! The services the API added, on disk.
//!
//! One JSON file, replaced whole: a temporary file is written and synced, renamed over the old one, and the directory synced. After a
//! crash at any moment the file is the old one or the new one. A file that cannot be read stops the start and is never overwritten.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{model::Service, spec::ServiceSpec};

/// Where API services are kept.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
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
    services: &'a [ServiceSpec],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    #[expect(dead_code, reason = "checked before the rest is read")]
    version: u64,
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
        let store = Self { directory: directory.to_owned() };
        let write = |source| StoreError::Write { path: directory.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o750).create(directory).map_err(write)?;
        store.remove_leftovers();
        let services = store.read()?;
        Ok((store, services))
    }

    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.join(Self::FILE)
    }

    /// Keeps these services and no others. They are on disk when this returns.
    pub fn save<'a>(&self, services: impl Iterator<Item = &'a Service>) -> Result<(), StoreError> {
        let services: Vec<_> = services.map(ServiceSpec::from).collect();
        self.replace(&Written { version: Self::VERSION, services: &services })
            .map_err(|source| StoreError::Write { path: self.path(), source })
    }

    fn replace(&self, content: &Written<'_>) -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(Self::TEMPORARY).tempfile_in(&self.directory)?;
        let mut text = serde_json::to_vec(content)?;
        text.push(b'\n');
        file.write_all(&text)?;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o640))?;
        file.as_file().sync_all()?;
        file.persist(self.path())?;
        File::open(&self.directory)?.sync_all()
    }

    fn read(&self) -> Result<Vec<Service>, StoreError> {
        let path = self.path();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(StoreError::Read { path, source }),
        };
        let damaged = |reason: String| StoreError::Damaged { path: path.clone(), reason };
        let VersionOnly { version } = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if version != Self::VERSION {
            return Err(StoreError::Version { path, version });
        }
        let Read { services, .. } = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        let services: Vec<_> = services
            .into_iter()
            .map(|spec| spec.into_service().map_err(|error| damaged(error.to_string())))
            .collect::<Result<_, _>>()?;
        let mut names = HashSet::with_capacity(services.len());
        let mut frontends = HashSet::with_capacity(services.len());
        for service in &services {
            if !names.insert(service.name()) {
                return Err(damaged(format!("service `{}` is in it twice", service.name())));
            }
            if let Some(twice) = service.frontends().iter().find(|frontend| !frontends.insert(**frontend)) {
                return Err(damaged(format!("frontend {twice} is in it twice")));
            }
        }
        Ok(services)
    }

    /// Removes temporary files of a daemon that was killed while it wrote.
    fn remove_leftovers(&self) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(Self::TEMPORARY)) {
            if let Err(error) = fs::remove_file(entry.path()) {
                tracing::debug!("cannot remove {}: {error}", entry.path().display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Algorithm;

    fn service(name: &str, frontend: &str) -> Service {
        Service::new(Some(name.to_owned()), vec![frontend.parse().unwrap()], vec![], Algorithm::Random).unwrap()
    }

    #[test]
    fn what_was_saved_is_read_and_a_missing_file_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        let (store, services) = Store::open(&directory.path().join("deep/er")).unwrap();
        assert!(services.is_empty());
        let saved = [service("a", "10.0.0.1:1/tcp"), service("b", "[fd00::1]:1/udp")];
        store.save(saved.iter()).unwrap();
        assert_eq!(Store::open(&store.directory).unwrap().1, saved);
    }

    #[test]
    fn a_file_cut_anywhere_is_refused_by_name_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(directory.path()).unwrap();
        store.save([service("a", "10.0.0.1:1/tcp")].iter()).unwrap();
        let whole = fs::read(store.path()).unwrap();
        // The last byte is the newline after the document.
        for cut in 0..whole.len() - 1 {
            fs::write(store.path(), &whole[..cut]).unwrap();
            let error = Store::open(directory.path()).unwrap_err();
            assert!(error.to_string().contains("services.json is damaged: "), "{error}");
            assert!(error.hint().unwrap().contains("services.json.damaged"));
            assert_eq!(fs::read(store.path()).unwrap(), whole[..cut]);
        }
    }

    #[test]
    fn a_newer_version_and_double_claims_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(directory.path()).unwrap();
        for (text, problem) in [
            (r#"{"version":2,"services":[],"more":1}"#, "has version 2, this netlb knows version 1"),
            (
                r#"{"version":1,"services":[{"frontend":"10.0.0.1:1/tcp"},{"name":"b","frontend":"10.0.0.1:1/tcp"}]}"#,
                "frontend 10.0.0.1:1/tcp is in it twice",
            ),
            (r#"{"version":1,"services":[{"name":"b"}]}"#, "service `b` has no frontend"),
        ] {
            fs::write(store.path(), text).unwrap();
            let error = Store::open(directory.path()).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_temporary_file_of_a_killed_daemon_is_no_state_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let leftover = directory.path().join(".services-abc");
        fs::write(&leftover, r#"{"version":1,"serv"#).unwrap();
        assert!(Store::open(directory.path()).unwrap().1.is_empty());
        assert!(!leftover.exists());
    }
}
