//! Servers behind services.

use std::{fmt, net::SocketAddr, num::NonZeroU16, sync::Arc};

use serde::{Deserialize, Serialize};

/// A backend's share of new flows, relative to the service's other backends: 1 to 1000.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Weight(NonZeroU16);

/// A number that is no weight.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("weight {0} is not 1 to {max}; to stop new flows to a backend, drain it", max = Weight::MAX)]
pub struct WeightError(pub u64);

impl Weight {
    pub const MAX: u16 = 1000;
    pub const ONE: Self = Self(NonZeroU16::MIN);

    pub fn new(weight: u64) -> Result<Self, WeightError> {
        u16::try_from(weight)
            .ok()
            .filter(|weight| *weight <= Self::MAX)
            .and_then(NonZeroU16::new)
            .map(Self)
            .ok_or(WeightError(weight))
    }

    #[must_use]
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl Default for Weight {
    fn default() -> Self {
        Self::ONE
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(u64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// Whether a backend takes new flows.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// Takes new flows.
    #[default]
    Active,
    /// Keeps its flows and gets no new ones.
    Draining,
}

impl fmt::Display for BackendState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Active => "active",
            Self::Draining => "draining",
        })
    }
}

/// A server behind a service.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Backend {
    pub address: SocketAddr,
    pub weight: Weight,
    pub state: BackendState,
    pub conditions: Conditions,
    pub placement: Option<Arc<Placement>>,
}

impl Backend {
    /// One that takes new flows.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            weight: Weight::ONE,
            state: BackendState::Active,
            conditions: Conditions::default(),
            placement: None,
        }
    }

    /// Whether it is on the node with this name.
    #[must_use]
    pub fn is_on(&self, node: &str) -> bool {
        self.placement.as_ref().is_some_and(|placement| placement.node.as_deref() == Some(node))
    }

    /// Whether it takes new flows.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        matches!(self.state, BackendState::Active) && self.conditions.ready
    }

    /// Whether it takes new flows where no backend is ready: it is on its way out, and answers still.
    #[must_use]
    pub const fn is_last_resort(&self) -> bool {
        let Conditions { serving, terminating, .. } = self.conditions;
        matches!(self.state, BackendState::Active) && serving && terminating
    }
}

/// What those who watch a backend say of it (Kubernetes: the conditions of an endpoint).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Conditions {
    pub ready: bool,
    /// Keeps its datagrams.
    pub serving: bool,
    pub terminating: bool,
}

impl Conditions {
    /// What is not said is as with Kubernetes: ready, serving as it is ready, not terminating.
    #[must_use]
    pub fn new(ready: Option<bool>, serving: Option<bool>, terminating: Option<bool>) -> Self {
        let ready = ready.unwrap_or(true);
        Self { ready, serving: serving.unwrap_or(ready), terminating: terminating.unwrap_or(false) }
    }
}

impl Default for Conditions {
    fn default() -> Self {
        Self::new(None, None, None)
    }
}

/// Where a backend is, and whom it is meant for.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Placement {
    pub node: Option<String>,
    pub zone: Option<String>,
    /// Nodes and zones whose clients it is meant for; none says nothing.
    pub hint_nodes: Vec<String>,
    pub hint_zones: Vec<String>,
}
