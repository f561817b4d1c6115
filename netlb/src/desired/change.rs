//! Changes the API asks for: checked against the state, and turned into edits.

use std::{collections::HashSet, net::SocketAddr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::DesiredState;
use crate::{
    model::{
        Affinity, Algorithm, Backend, BackendState, Conditions, Definition, Frontend, Mode, Owner, Publish, Service,
        ServiceError, SnatMode, TrafficPolicy, Weight, describe_claim, parse_claim,
    },
    nearest::nearest,
    spec::{
        AddressSpec, BackendEntry, BackendSpec, NodePortSpec, ServiceSpec, SourceRange, SpecError, addresses, placed,
        ports, servers,
    },
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
    /// Adds the backend or replaces all that is said of it.
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

/// The parts of a service to replace. An empty list leaves none of its kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ServicePatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Replaces all frontends
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub frontends: Option<Vec<Frontend>>,
    /// Replaces all external addresses: ADDRESS:PORT/PROTOCOL, or ADDRESS for every port of the frontends there are then
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub external_ips: Option<Vec<AddressSpec>>,
    /// Replaces all addresses of load balancers, written like `external_ips`
    #[serde(skip_serializing_if = "Option::is_none", alias = "lb_ips")]
    #[schema(value_type = Option<Vec<String>>)]
    pub load_balancer_ips: Option<Vec<AddressSpec>>,
    /// Replaces all node ports
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_ports: Option<Vec<NodePortSpec>>,
    /// Replaces all published ports
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub publish: Option<Vec<Publish>>,
    /// Replaces all source ranges
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub source_ranges: Option<Vec<SourceRange>>,
    /// Replaces all backends
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<BackendEntry>>)]
    pub backends: Option<Vec<BackendSpec>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub algorithm: Option<Algorithm>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub snat: Option<SnatMode>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub mode: Option<Mode>,
    /// `none`, `client-ip` or `client-ip:SECONDS`
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub affinity: Option<Affinity>,
    /// `cluster` or `local`
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub external_traffic_policy: Option<TrafficPolicy>,
    /// `cluster` or `local`
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub internal_traffic_policy: Option<TrafficPolicy>,
}

/// The parts of a backend to replace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BackendPatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u16>, minimum = 1, maximum = 1000)]
    pub weight: Option<Weight>,
    /// `active` or `draining`
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub state: Option<BackendState>,
    /// A backend whose `serving` was as its `ready` stays so, if that is not given as well
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serving: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub terminating: Option<bool>,
    /// Name of the node it is on; `null` for none
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    pub node: Option<Option<String>>,
    /// `null` for none
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    pub zone: Option<Option<String>>,
    /// Replaces the nodes and zones whose clients it is meant for
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hints: Option<HintsPatch>,
}

/// Those of a backend's hints to replace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HintsPatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<String>>,
}

/// Reads what is there, `null` included.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl BackendPatch {
    /// Changes a backend.
    pub fn apply(self, backend: &mut Backend) {
        let Self { weight, state, ready, serving, terminating, node, zone, hints } = self;
        replace(&mut backend.weight, weight);
        replace(&mut backend.state, state);
        let was = backend.conditions;
        let follows = was.serving == was.ready && ready.is_some();
        backend.conditions = Conditions::new(
            ready.or(Some(was.ready)),
            serving.or((!follows).then_some(was.serving)),
            terminating.or(Some(was.terminating)),
        );
        let mut placement = backend.placement.take().map(Arc::unwrap_or_clone).unwrap_or_default();
        let HintsPatch { nodes, zones } = hints.unwrap_or_default();
        replace(&mut placement.node, node);
        replace(&mut placement.zone, zone);
        replace(&mut placement.hint_nodes, nodes);
        replace(&mut placement.hint_zones, zones);
        backend.placement = placed(placement);
    }
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
    #[error("{} belongs to service {service}, declared by the {owner}", describe_claim(frontend))]
    FrontendTaken { frontend: Frontend, service: String, owner: Owner },
    #[error("service {service} has backend {address} already")]
    BackendTaken { service: String, address: SocketAddr },
    #[error("service {service} is declared by the {owner} and would come back as it is there")]
    Owned { service: String, owner: Owner },
    #[error("the service in the request is not {reference}: that is neither its name nor one of its frontends")]
    Mismatch { reference: String },
    #[error("service {service} has no name of its own, and would be {renamed} with this backend")]
    NameFollows { service: String, renamed: String },
    #[error(transparent)]
    Invalid(#[from] SpecError),
}

impl From<ServiceError> for ChangeError {
    fn from(error: ServiceError) -> Self {
        Self::Invalid(error.into())
    }
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
            Self::NameFollows { service, .. } => Some(format!("name it first: `netlb svc set {service} --name NAME`")),
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
                with_backends(service, |backends| patch.clone().apply(&mut backends[at]))?
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
        let claim = parse_claim(reference);
        if spec.name.is_none() && claim.is_none() {
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
        if service.name() != reference && !claim.is_some_and(|claim| service.claims().any(|own| own == claim)) {
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

fn patched(old: &Service, patch: &ServicePatch) -> Result<Service, SpecError> {
    let ServicePatch {
        name,
        frontends,
        external_ips,
        load_balancer_ips,
        node_ports,
        publish,
        source_ranges,
        backends,
        algorithm,
        snat,
        mode,
        affinity,
        external_traffic_policy,
        internal_traffic_policy,
    } = patch.clone();
    let mut result = Ok(());
    let new = old.redefine(|definition| {
        definition.name = name.or(definition.name.take());
        replace(&mut definition.frontends, frontends);
        replace(&mut definition.publish, publish);
        replace(
            &mut definition.source_ranges,
            source_ranges.map(|ranges| ranges.into_iter().map(|SourceRange(range)| range).collect()),
        );
        replace(&mut definition.algorithm, algorithm);
        replace(&mut definition.snat, snat);
        replace(&mut definition.mode, mode);
        replace(&mut definition.affinity, affinity);
        replace(&mut definition.external_traffic_policy, external_traffic_policy);
        replace(&mut definition.internal_traffic_policy, internal_traffic_policy);
        result = replace_open(definition, external_ips, load_balancer_ips, node_ports, backends);
        // Of what there is now, if that says it.
        definition.family = definition.first_family().or(definition.family);
    });
    result?;
    Ok(new?)
}

/// Replaces what may leave something open, which is then as the rest is by now.
fn replace_open(
    definition: &mut Definition,
    external_ips: Option<Vec<AddressSpec>>,
    load_balancer_ips: Option<Vec<AddressSpec>>,
    node_ports: Option<Vec<NodePortSpec>>,
    backends: Option<Vec<BackendSpec>>,
) -> Result<(), SpecError> {
    let external_ips = external_ips.map(|specs| addresses(specs, definition)).transpose()?;
    let load_balancer_ips = load_balancer_ips.map(|specs| addresses(specs, definition)).transpose()?;
    let node_ports = node_ports.map(|specs| ports(&specs, definition));
    let backends = backends.map(|specs| servers(specs, definition)).transpose()?;
    replace(&mut definition.external_ips, external_ips);
    replace(&mut definition.load_balancer_ips, load_balancer_ips);
    replace(&mut definition.node_ports, node_ports);
    replace(&mut definition.backends, backends);
    Ok(())
}

fn replace<T>(old: &mut T, new: Option<T>) {
    if let Some(new) = new {
        *old = new;
    }
}

fn with_backends(service: &Service, edit: impl FnOnce(&mut Vec<Backend>)) -> Result<Vec<Edit>, ChangeError> {
    let changed = service.redefine(|definition| edit(&mut definition.backends))?;
    // One of ports alone has the family of its backends, and without a name another one then.
    if changed.name() != service.name() {
        let (service, renamed) = (service.name().to_owned(), changed.name().to_owned());
        return Err(ChangeError::NameFollows { service, renamed });
    }
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
