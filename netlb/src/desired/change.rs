//! Changes the API asks for: checked against the state, and turned into edits.

use std::{collections::HashSet, net::SocketAddr, sync::Arc};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::DesiredState;
use crate::{
    model::{Algorithm, Backend, BackendState, Frontend, Owner, Service, ServiceError, SnatMode, Weight},
    nearest::nearest,
    spec::{BackendSpec, ServiceSpec},
};

/// Something the API asks for. A `reference` is a service's name or any of its frontends.
#[derive(Clone, Debug)]
pub enum Change {
    Create(Service),
    /// Creates the service or replaces all of it.
    Put {
        reference: String,
        spec: ServiceSpec,
    },
    Patch {
        reference: String,
        patch: ServicePatch,
    },
    Remove {
        reference: String,
    },
    AddBackend {
        reference: String,
        backend: Backend,
    },
    /// Adds the backend or replaces its weight and state.
    PutBackend {
        reference: String,
        backend: Backend,
    },
    PatchBackend {
        reference: String,
        address: SocketAddr,
        patch: BackendPatch,
    },
    RemoveBackend {
        reference: String,
        address: SocketAddr,
    },
    /// Creates or replaces all of these, or none.
    Apply {
        services: Vec<Service>,
        prune: bool,
    },
}

/// The parts of a service to replace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ServicePatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Replaces all frontends
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub frontends: Option<Vec<Frontend>>,
    /// Replaces all backends
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backends: Option<Vec<BackendSpec>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub algorithm: Option<Algorithm>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub snat: Option<SnatMode>,
}

/// The parts of a backend to replace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BackendPatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u16>, minimum = 1, maximum = 1000)]
    pub weight: Option<Weight>,
    /// `active` or `draining`
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub state: Option<BackendState>,
}

/// One step of a change, complete in itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Edit {
    Put(Arc<Service>),
    Remove(String),
}

impl Edit {
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Put(service) => service.name(),
            Self::Remove(name) => name,
        }
    }

    #[must_use]
    pub fn service(&self) -> Option<&Service> {
        match self {
            Self::Put(service) => Some(service),
            Self::Remove(_) => None,
        }
    }
}

/// Names of the services a change made, changed and removed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Done {
    pub created: Vec<String>,
    pub updated: Vec<String>,
    pub unchanged: Vec<String>,
    pub removed: Vec<String>,
}

/// Why a change is refused. Nothing has changed then.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ChangeError {
    #[error("service {reference} not found")]
    NotFound { reference: String, nearest: Option<String> },
    #[error("service {service} has no backend {address}")]
    BackendNotFound { service: String, address: SocketAddr, nearest: Option<String> },
    #[error("service {name} exists already, declared by the {owner}")]
    NameTaken { name: String, owner: Owner },
    #[error("frontend {frontend} belongs to service {service}, declared by the {owner}")]
    FrontendTaken { frontend: Frontend, service: String, owner: Owner },
    #[error("service {service} has backend {address} already")]
    BackendTaken { service: String, address: SocketAddr },
    #[error("service {service} is declared by the {owner} and would come back as it is there")]
    Owned { service: String, owner: Owner },
    #[error("the service in the request is not {reference}: that is neither its name nor one of its frontends")]
    Mismatch { reference: String },
    #[error(transparent)]
    Invalid(#[from] ServiceError),
}

impl ChangeError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { nearest: Some(nearest), .. } => {
                Some(format!("nearest is {nearest}; `netlb svc list` shows all"))
            }
            Self::NotFound { nearest: None, .. } => Some("`netlb svc list` shows all".to_owned()),
            Self::BackendNotFound { service, nearest: Some(nearest), .. } => {
                Some(format!("nearest is {nearest}; `netlb backend list {service}` shows all"))
            }
            Self::BackendNotFound { service, .. } => Some(format!("`netlb backend list {service}` shows all")),
            Self::NameTaken { owner: Owner::File, .. }
            | Self::FrontendTaken { owner: Owner::File, .. }
            | Self::Owned { .. } => Some("change the configuration file, it is read again when it changes".to_owned()),
            Self::NameTaken { name, .. } => {
                Some(format!("change it with `netlb svc set {name}`, or choose another name"))
            }
            Self::FrontendTaken { service, .. } => Some(format!("see `netlb svc show {service}`")),
            Self::BackendTaken { service, address } => {
                Some(format!("change it with `netlb backend set {service} {address} --weight N`"))
            }
            Self::Mismatch { .. } | Self::Invalid(_) => None,
        }
    }
}

impl DesiredState {
    /// The edits a change comes to, and what they do. The state stays as it is.
    pub fn plan(&self, change: &Change) -> Result<(Vec<Edit>, Done), ChangeError> {
        let edits = match change {
            Change::Create(service) => {
                self.name_is_free(service.name())?;
                vec![Edit::Put(Arc::new(service.clone()))]
            }
            Change::Put { reference, spec } => self.put(reference, spec)?,
            Change::Patch { reference, patch } => {
                let old = self.find_owned(reference)?;
                self.replace(old, patched(old, patch)?)?
            }
            Change::Remove { reference } => vec![Edit::Remove(self.find_owned(reference)?.name().to_owned())],
            Change::AddBackend { reference, backend } => {
                let service = self.find_owned(reference)?;
                if service.backends().iter().any(|known| known.address == backend.address) {
                    let (service, address) = (service.name().to_owned(), backend.address);
                    return Err(ChangeError::BackendTaken { service, address });
                }
                with_backends(service, |backends| backends.push(backend.clone()))?
            }
            Change::PutBackend { reference, backend } => with_backends(self.find_owned(reference)?, |backends| {
                match backends.iter_mut().find(|known| known.address == backend.address) {
                    Some(known) => known.clone_from(backend),
                    None => backends.push(backend.clone()),
                }
            })?,
            Change::PatchBackend { reference, address, patch } => {
                let service = self.find_owned(reference)?;
                let at = find_backend(service, *address)?;
                with_backends(service, |backends| {
                    backends[at].weight = patch.weight.unwrap_or(backends[at].weight);
                    backends[at].state = patch.state.unwrap_or(backends[at].state);
                })?
            }
            Change::RemoveBackend { reference, address } => {
                let service = self.find_owned(reference)?;
                let at = find_backend(service, *address)?;
                with_backends(service, |backends| {
                    backends.remove(at);
                })?
            }
            Change::Apply { services, prune } => self.apply(services, *prune)?,
        };
        self.check(&edits)?;
        let mut done = Done::default();
        for edit in &edits {
            let names = match (self.api.get(edit.name()), edit.service()) {
                (None, _) => &mut done.created,
                (Some(_), None) => &mut done.removed,
                (Some(old), Some(new)) if **old == *new => &mut done.unchanged,
                (Some(_), Some(_)) => &mut done.updated,
            };
            names.push(edit.name().to_owned());
        }
        Ok((edits, done))
    }

    /// A service the API may change.
    fn find_owned(&self, reference: &str) -> Result<&Service, ChangeError> {
        match self.find(reference) {
            Some((service, Owner::Api)) => Ok(service),
            Some((service, owner)) => Err(ChangeError::Owned { service: service.name().to_owned(), owner }),
            None => Err(self.not_found(reference)),
        }
    }

    pub(crate) fn not_found(&self, reference: &str) -> ChangeError {
        let known: Vec<_> = self.references().collect();
        let nearest = nearest(reference, known.iter().map(String::as_str)).map(str::to_owned);
        ChangeError::NotFound { reference: reference.to_owned(), nearest }
    }

    fn name_is_free(&self, name: &str) -> Result<(), ChangeError> {
        let taken = |owner| Err(ChangeError::NameTaken { name: name.to_owned(), owner });
        match (self.api.contains_key(name), self.file_names.contains_key(name)) {
            (true, _) => taken(Owner::Api),
            (_, true) => taken(Owner::File),
            _ => Ok(()),
        }
    }

    fn put(&self, reference: &str, spec: &ServiceSpec) -> Result<Vec<Edit>, ChangeError> {
        let mut spec = spec.clone();
        let exists = self.find(reference).is_some();
        if spec.name.is_none() && reference.parse::<Frontend>().is_err() {
            spec.name = Some(reference.to_owned());
        } else if exists && spec.name.is_none() {
            spec.name = self.find(reference).map(|(service, _)| service.name().to_owned());
        }
        if exists {
            let old = self.find_owned(reference)?;
            // Named after a frontend that it no longer begins with: it is named after the one it begins with now.
            if spec.name.as_deref() == Some(old.name()) && Service::is_unnamed(old) {
                spec.name = None;
            }
            return self.replace(old, spec.into_service()?);
        }
        let service = spec.into_service()?;
        let frontend = reference.parse::<Frontend>().ok();
        if service.name() != reference && !frontend.is_some_and(|frontend| service.frontends().contains(&frontend)) {
            return Err(ChangeError::Mismatch { reference: reference.to_owned() });
        }
        self.name_is_free(service.name())?;
        Ok(vec![Edit::Put(Arc::new(service))])
    }

    /// Puts `new` in the place of `old`, under another name perhaps.
    fn replace(&self, old: &Service, new: Service) -> Result<Vec<Edit>, ChangeError> {
        if new.name() == old.name() {
            return Ok(vec![Edit::Put(Arc::new(new))]);
        }
        self.name_is_free(new.name())?;
        Ok(vec![Edit::Remove(old.name().to_owned()), Edit::Put(Arc::new(new))])
    }

    fn apply(&self, services: &[Service], prune: bool) -> Result<Vec<Edit>, ChangeError> {
        let mut names = HashSet::with_capacity(services.len());
        for service in services {
            if !names.insert(service.name()) {
                return Err(ChangeError::NameTaken { name: service.name().to_owned(), owner: Owner::Api });
            }
        }
        let pruned = self.api.keys().filter(|name| prune && !names.contains(name.as_str()));
        let removals = pruned.map(|name| Edit::Remove(name.clone()));
        Ok(removals.chain(services.iter().cloned().map(Arc::new).map(Edit::Put)).collect())
    }
}

fn patched(old: &Service, patch: &ServicePatch) -> Result<Service, ServiceError> {
    let ServicePatch { name, frontends, backends, algorithm, snat } = patch.clone();
    old.redefine(|definition| {
        definition.name = name.or(definition.name.take());
        replace(&mut definition.frontends, frontends);
        replace(&mut definition.backends, backends.map(|new| new.into_iter().map(Backend::from).collect()));
        replace(&mut definition.algorithm, algorithm);
        replace(&mut definition.snat, snat);
    })
}

fn replace<T>(old: &mut T, new: Option<T>) {
    if let Some(new) = new {
        *old = new;
    }
}

fn with_backends(service: &Service, edit: impl FnOnce(&mut Vec<Backend>)) -> Result<Vec<Edit>, ChangeError> {
    let changed = service.redefine(|definition| {
        // Its name does not follow its family.
        definition.name = Some(service.name().to_owned());
        edit(&mut definition.backends);
    })?;
    Ok(vec![Edit::Put(Arc::new(changed))])
}

fn find_backend(service: &Service, address: SocketAddr) -> Result<usize, ChangeError> {
    let found = service.backends().iter().position(|backend| backend.address == address);
    found.ok_or_else(|| {
        let known: Vec<_> = service.backends().iter().map(|backend| backend.address.to_string()).collect();
        let nearest = nearest(&address.to_string(), known.iter().map(String::as_str)).map(str::to_owned);
        ChangeError::BackendNotFound { service: service.name().to_owned(), address, nearest }
    })
}
