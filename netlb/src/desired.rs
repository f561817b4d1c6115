//! The desired state: what each source wants, who holds which frontend, and what a change would make of it.
//!
//! Pure: nothing here touches a file, a socket or a map. Services come from the configuration file and from the API. A name and a
//! frontend belong to one service. The API is refused what the file holds; so where both claim the same, the API had it first (the file
//! was edited later), and keeps it: the file's claim is a [`Conflict`] that waits until the other lets go.

use std::collections::{BTreeMap, HashMap, HashSet, hash_map::Entry};

pub use self::change::{BackendPatch, Change, ChangeError, Done, Edit, ServicePatch};
use crate::{
    dataplane::Desired,
    model::{Frontend, Owner, Service},
};

mod change;
#[cfg(test)]
mod tests;

/// What every source wants.
#[derive(Clone, Debug, Default)]
pub struct DesiredState {
    file: Vec<Service>,
    file_names: HashMap<String, usize>,
    file_frontends: HashMap<Frontend, usize>,
    api: BTreeMap<String, Service>,
    api_frontends: HashMap<Frontend, String>,
}

/// A claim that another source's service stands against.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Conflict {
    /// The service that does not get what it claims.
    pub service: String,
    pub owner: Owner,
    pub claim: Claim,
    pub held_by: String,
    pub held_by_owner: Owner,
}

/// What two services want and one can have.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Claim {
    Name,
    Frontend(Frontend),
}

impl DesiredState {
    /// The state at start. The API services were checked against each other when they were stored, the file's when it was read.
    #[must_use]
    pub fn new(file: Vec<Service>, api: Vec<Service>) -> Self {
        let mut state = Self::default();
        state.set_file(file);
        for service in api {
            state.edit(Edit::Put(service));
        }
        state
    }

    /// Replaces everything the file wants.
    pub fn set_file(&mut self, services: Vec<Service>) {
        self.file_names = services.iter().enumerate().map(|(at, service)| (service.name().to_owned(), at)).collect();
        self.file_frontends = services
            .iter()
            .enumerate()
            .flat_map(|(at, service)| service.frontends().iter().map(move |frontend| (*frontend, at)))
            .collect();
        self.file = services;
    }

    /// The services the API added, by name: what is stored.
    pub fn api_services(&self) -> impl ExactSizeIterator<Item = &Service> {
        self.api.values()
    }

    /// The service with this name or frontend, and its owner.
    #[must_use]
    pub fn find(&self, reference: &str) -> Option<(&Service, Owner)> {
        let by_name = || {
            let api = self.api.get(reference).map(|service| (service, Owner::Api));
            api.or_else(|| Some((&self.file[*self.file_names.get(reference)?], Owner::File)))
        };
        let by_frontend = || {
            let frontend = reference.parse().ok()?;
            let api = self.api_frontends.get(&frontend).map(|name| (&self.api[name], Owner::Api));
            api.or_else(|| Some((&self.file[*self.file_frontends.get(&frontend)?], Owner::File)))
        };
        by_name().or_else(by_frontend)
    }

    /// What is to be programmed, and which claims of the file have to wait.
    #[must_use]
    pub fn merge(&self) -> (Vec<Desired>, Vec<Conflict>) {
        let api = |service: &Service| Desired { service: service.clone(), owner: Owner::Api };
        let mut desired: Vec<_> = self.api.values().map(api).collect();
        let mut conflicts = Vec::new();
        for service in &self.file {
            desired.extend(
                self.without_conflicts(service, &mut conflicts).map(|service| Desired { service, owner: Owner::File }),
            );
        }
        (desired, conflicts)
    }

    /// Every name and frontend in use, for "did you mean".
    pub(crate) fn references(&self) -> impl Iterator<Item = String> {
        let services = || self.api.values().chain(&self.file);
        let names = services().map(|service| service.name().to_owned());
        names.chain(services().flat_map(|service| service.frontends().iter().map(Frontend::to_string)))
    }

    /// What is left of a file service beside the claims the API holds.
    fn without_conflicts(&self, service: &Service, conflicts: &mut Vec<Conflict>) -> Option<Service> {
        let conflict = |claim, held_by: &str| Conflict {
            service: service.name().to_owned(),
            owner: Owner::File,
            claim,
            held_by: held_by.to_owned(),
            held_by_owner: Owner::Api,
        };
        if self.api.contains_key(service.name()) {
            conflicts.push(conflict(Claim::Name, service.name()));
            return None;
        }
        let before = conflicts.len();
        let mut frontends = service.frontends().to_vec();
        frontends.retain(|frontend| match self.api_frontends.get(frontend) {
            Some(holder) => {
                conflicts.push(conflict(Claim::Frontend(*frontend), holder));
                false
            }
            None => true,
        });
        if conflicts.len() == before {
            return Some(service.clone());
        }
        // A service named after the frontend it lost is named after the next one.
        let named = service.name() != service.frontends()[0].to_string();
        let name = named.then(|| service.name().to_owned());
        Service::new(name, frontends, service.backends().to_vec(), service.algorithm()).ok()
    }

    /// Carries out one edit, and returns the one that undoes it.
    pub fn edit(&mut self, edit: Edit) -> Edit {
        let (name, new) = match edit {
            Edit::Put(service) => (service.name().to_owned(), Some(service)),
            Edit::Remove(name) => (name, None),
        };
        let old = self.api.remove(&name);
        for frontend in old.iter().flat_map(|service| service.frontends()) {
            // A transaction may have given it to another service already.
            if let Entry::Occupied(holder) = self.api_frontends.entry(*frontend)
                && *holder.get() == name
            {
                holder.remove();
            }
        }
        if let Some(service) = new {
            for frontend in service.frontends() {
                self.api_frontends.insert(*frontend, name.clone());
            }
            self.api.insert(name.clone(), service);
        }
        old.map_or(Edit::Remove(name), Edit::Put)
    }

    /// Whether these edits leave every name and frontend with one service.
    fn check(&self, edits: &[Edit]) -> Result<(), ChangeError> {
        let edited: HashSet<&str> = edits.iter().map(Edit::name).collect();
        let mut claimed: HashMap<Frontend, &str> = HashMap::new();
        for service in edits.iter().filter_map(Edit::service) {
            if self.file_names.contains_key(service.name()) && !self.api.contains_key(service.name()) {
                return Err(ChangeError::NameTaken { name: service.name().to_owned(), owner: Owner::File });
            }
            for frontend in service.frontends() {
                let taken = |holder: &str, owner| {
                    Err(ChangeError::FrontendTaken { frontend: *frontend, service: holder.to_owned(), owner })
                };
                if let Some(other) = claimed.insert(*frontend, service.name()) {
                    return taken(other, Owner::Api);
                }
                match self.api_frontends.get(frontend) {
                    Some(holder) if !edited.contains(holder.as_str()) => return taken(holder, Owner::Api),
                    Some(_) => {}
                    None => {
                        if let Some(at) = self.file_frontends.get(frontend) {
                            return taken(self.file[*at].name(), Owner::File);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
