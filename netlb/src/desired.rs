//! The desired state: what each source wants, who holds which frontend, and what a change would make of it.
//!
//! Pure: nothing here touches a file, a socket or a map. Services come from the configuration file and from the API. A name and a
//! frontend belong to one service. The API is refused what the file holds; so where both claim the same, the API had it first (the file
//! was edited later), and keeps it: the file's claim is a [`Conflict`] that waits until the other lets go.
//!
//! What is to be served follows each edit, and an edit costs what it touches: the state remembers the names it touched, so that the data
//! plane need not compare everything.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

pub use self::change::{BackendPatch, Change, ChangeError, Done, Edit, HintsPatch, ServicePatch};
use crate::{
    dataplane::{Desired, Touched},
    model::{Claims, Frontend, Owner, Service, parse_claim},
};

mod change;
#[cfg(test)]
mod tests;

/// What every source wants.
#[derive(Clone, Debug, Default)]
pub struct DesiredState {
    file: Vec<FileService>,
    file_names: HashMap<String, usize>,
    file_claims: Claims<usize>,
    /// Of services in `file`, by their place in it.
    conflicts: BTreeMap<usize, Vec<Conflict>>,
    api: BTreeMap<String, Arc<Service>>,
    api_claims: Claims<String>,
    /// Names under which something else may be served than when they were last asked for.
    touched: BTreeSet<String>,
}

/// A service of the file.
#[derive(Clone, Debug)]
struct FileService {
    wanted: Arc<Service>,
    /// What is left of it beside the claims the API holds.
    served: Option<Arc<Service>>,
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
            state.edit(Edit::Put(Arc::new(service)));
        }
        state
    }

    /// Replaces everything the file wants: all that is served is to be applied anew. A service that is as it was stays the same one.
    pub fn set_file(&mut self, services: Vec<Service>) {
        let before = std::mem::take(&mut self.file);
        let known = std::mem::take(&mut self.file_names);
        let same = |service: Service| {
            let old = known.get(service.name()).map(|at| &before[*at].wanted);
            old.filter(|old| ***old == service).cloned().unwrap_or_else(|| Arc::new(service))
        };
        let services: Vec<_> = services.into_iter().map(same).collect();
        self.file_names = services.iter().enumerate().map(|(at, service)| (service.name().to_owned(), at)).collect();
        self.file_claims = Claims::default();
        for (at, service) in services.iter().enumerate() {
            self.file_claims.insert(service, &at);
        }
        self.file = services.into_iter().map(|wanted| FileService { wanted, served: None }).collect();
        self.conflicts.clear();
        for at in 0..self.file.len() {
            self.settle(at);
        }
    }

    /// The services the API added, by name: what is stored.
    pub fn api_services(&self) -> impl ExactSizeIterator<Item = &Service> {
        self.api.values().map(|service| &**service)
    }

    /// What the API wants of a name.
    #[must_use]
    pub fn api_service(&self, name: &str) -> Option<&Service> {
        self.api.get(name).map(|service| &**service)
    }

    /// The service with this name or frontend, and its owner.
    #[must_use]
    pub fn find(&self, reference: &str) -> Option<(&Service, Owner)> {
        let file = |at: &usize| (&*self.file[*at].wanted, Owner::File);
        let by_name = || {
            let api = self.api.get(reference).map(|service| (&**service, Owner::Api));
            api.or_else(|| self.file_names.get(reference).map(file))
        };
        let by_frontend = || {
            let frontend = parse_claim(reference)?;
            let api = self.api_claims.holder(&frontend).map(|name| (&*self.api[name], Owner::Api));
            api.or_else(|| self.file_claims.holder(&frontend).map(file))
        };
        by_name().or_else(by_frontend)
    }

    /// What is to be served.
    pub fn served(&self) -> impl Iterator<Item = Desired> {
        let api = self.api.values().map(|service| Desired { service: Arc::clone(service), owner: Owner::Api });
        let file = self.file.iter().filter_map(|service| service.served.clone());
        api.chain(file.map(|service| Desired { service, owner: Owner::File }))
    }

    /// What is to be served under this name, or at this frontend.
    #[must_use]
    pub fn find_served(&self, reference: &str) -> Option<Desired> {
        self.served_as(reference).or_else(|| {
            let frontend = parse_claim(reference)?;
            if let Some(name) = self.api_claims.holder(&frontend) {
                return self.served_as(name);
            }
            let service = self.file[*self.file_claims.holder(&frontend)?].served.clone()?;
            Some(Desired { service, owner: Owner::File })
        })
    }

    /// What is to be served under this name.
    fn served_as(&self, name: &str) -> Option<Desired> {
        if let Some(service) = self.api.get(name) {
            return Some(Desired { service: Arc::clone(service), owner: Owner::Api });
        }
        // One that lost its first frontend may be named after another.
        let by_frontend = || self.file_claims.holder(&parse_claim(name)?);
        let at = self.file_names.get(name).or_else(by_frontend)?;
        let service = self.file[*at].served.clone().filter(|service| service.name() == name)?;
        Some(Desired { service, owner: Owner::File })
    }

    /// The names that edits touched since the last call, and what is to be served under them.
    pub fn take_touched(&mut self) -> Vec<Touched> {
        let names = std::mem::take(&mut self.touched);
        names.into_iter().map(|name| Touched { wanted: self.served_as(&name), name }).collect()
    }

    /// Claims of the file that have to wait.
    pub fn conflicts(&self) -> impl Iterator<Item = &Conflict> {
        self.conflicts.values().flatten()
    }

    /// Every name and frontend in use, for "did you mean".
    pub(crate) fn references(&self) -> impl Iterator<Item = String> {
        let services = || self.api.values().chain(self.file.iter().map(|service| &service.wanted));
        let names = services().map(|service| service.name().to_owned());
        names.chain(services().flat_map(|service| service.claims().map(|claim| claim.to_string())))
    }

    /// Finds out what is left of a file service beside the API's claims, and returns what was left before.
    fn settle(&mut self, at: usize) -> Option<Arc<Service>> {
        let mut conflicts = Vec::new();
        let served = self.without_conflicts(&self.file[at].wanted, &mut conflicts);
        if conflicts.is_empty() {
            self.conflicts.remove(&at);
        } else {
            self.conflicts.insert(at, conflicts);
        }
        std::mem::replace(&mut self.file[at].served, served)
    }

    /// What is left of a file service beside the claims the API holds.
    fn without_conflicts(&self, service: &Arc<Service>, conflicts: &mut Vec<Conflict>) -> Option<Arc<Service>> {
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
        let mut lost = HashSet::new();
        for rival in self.api_claims.rivals(service) {
            lost.insert(rival.claim);
            let conflict = conflict(Claim::Frontend(rival.claim), rival.holder);
            // A port on all addresses may be held on several.
            if !conflicts.contains(&conflict) {
                conflicts.push(conflict);
            }
        }
        if conflicts.is_empty() {
            return Some(Arc::clone(service));
        }
        // A service named after the frontend it lost is named after the next one.
        service.without(|claim| lost.contains(claim)).map(Arc::new)
    }

    /// Carries out one edit, and returns the one that undoes it.
    pub fn edit(&mut self, edit: Edit) -> Edit {
        let (name, new) = match edit {
            Edit::Put(service) => (service.name().to_owned(), Some(service)),
            Edit::Remove(name) => (name, None),
        };
        let old = self.api.remove(&name);
        let rivals = old.iter().chain(&new).flat_map(|service| self.file_claims.rivals(service));
        let mut contenders: BTreeSet<_> = rivals.map(|rival| *rival.holder).collect();
        contenders.extend(self.file_names.get(&name));
        if let Some(old) = &old {
            // A transaction may have given its claims to another service already.
            self.api_claims.remove(old, &name);
        }
        if let Some(service) = new {
            self.api_claims.insert(&service, &name);
            self.api.insert(name.clone(), service);
        }
        for at in contenders {
            let before = self.settle(at);
            let names = before.iter().chain(&self.file[at].served).map(|service| service.name().to_owned());
            self.touched.extend(names);
        }
        self.touched.insert(name.clone());
        old.map_or(Edit::Remove(name), Edit::Put)
    }

    /// Whether these edits leave every name and frontend with one service.
    fn check(&self, edits: &[Edit]) -> Result<(), ChangeError> {
        let edited: HashSet<&str> = edits.iter().map(Edit::name).collect();
        let mut claimed: Claims<&str> = Claims::default();
        let taken = |frontend, holder: &str, owner| {
            Err(ChangeError::FrontendTaken { frontend, service: holder.to_owned(), owner })
        };
        for service in edits.iter().filter_map(Edit::service) {
            if self.file_names.contains_key(service.name()) && !self.api.contains_key(service.name()) {
                return Err(ChangeError::NameTaken { name: service.name().to_owned(), owner: Owner::File });
            }
            if let Some(rival) = claimed.rivals(service).next() {
                return taken(rival.held, rival.holder, Owner::Api);
            }
            claimed.insert(service, &service.name());
            if let Some(rival) = self.api_claims.rivals(service).find(|rival| !edited.contains(rival.holder.as_str())) {
                return taken(rival.held, rival.holder, Owner::Api);
            }
            // Where the API has it already, the file's claim waits.
            let is_free = |claim: &Frontend| self.api_claims.holder(claim).is_none();
            if let Some(rival) = self.file_claims.rivals(service).find(|rival| is_free(&rival.claim)) {
                return taken(rival.held, self.file[*rival.holder].wanted.name(), Owner::File);
            }
        }
        Ok(())
    }
}
