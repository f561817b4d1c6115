//! How services treat their flows, and who owns services.

use std::{fmt, net::IpAddr, num::NonZeroU32, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::text::serde_by_text;

serde_by_text! {
    TrafficPolicy: "cluster or local",
    Affinity: "none, client-ip or client-ip:SECONDS",
}

/// How a backend is chosen for a new flow.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Consistent hashing of the flow's 5-tuple: every node chooses alike, and a change of the set moves few flows.
    #[default]
    Maglev,
    Random,
    RoundRobin,
    /// Consistent hashing of the client's address alone.
    SourceHash,
    /// Of two backends drawn at random, the one with fewer flows for its weight.
    LeastConn,
}

impl Algorithm {
    pub const ALL: [Self; 5] = [Self::Maglev, Self::Random, Self::RoundRobin, Self::SourceHash, Self::LeastConn];
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Maglev => "maglev",
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::SourceHash => "source-hash",
            Self::LeastConn => "least-conn",
        })
    }
}

/// Which flows of a service get an address of the node as their source.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnatMode {
    /// Those whose replies would not come back through this node.
    #[default]
    Auto,
    Always,
    /// None but those of a pod to itself: replies come back through this node, as the operator knows.
    Never,
}

impl fmt::Display for SnatMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        })
    }
}

/// The family of a service's addresses.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4,
            IpAddr::V6(_) => Self::Ipv6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        })
    }
}

/// How packets from outside get to backends that are not behind this node.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Translated; replies come back through this node.
    #[default]
    Nat,
    /// Wrapped in a packet to the backend. Its node unwraps it, and replies go straight to the client ("direct server return").
    Dsr,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nat => "nat",
            Self::Dsr => "dsr",
        })
    }
}

/// The source that declared a service. Only its owner changes a service.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// The configuration file.
    File,
    /// `netlb svc add`, `netlb apply` and the HTTP API.
    Api,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Api => "api",
        })
    }
}

/// Which backends a service's clients get.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum TrafficPolicy {
    /// Those of all nodes.
    #[default]
    Cluster,
    /// Those of the node that the client's packets come to.
    Local,
}

impl fmt::Display for TrafficPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "cluster",
            Self::Local => "local",
        })
    }
}

/// A text that is no traffic policy.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("`{0}` is not a traffic policy; write cluster or local")]
pub struct TrafficPolicyError(String);

impl FromStr for TrafficPolicy {
    type Err = TrafficPolicyError;

    /// Kubernetes begins them with capitals.
    fn from_str(text: &str) -> Result<Self, TrafficPolicyError> {
        match text {
            "cluster" | "Cluster" => Ok(Self::Cluster),
            "local" | "Local" => Ok(Self::Local),
            _ => Err(TrafficPolicyError(text.to_owned())),
        }
    }
}

/// How long a client keeps its backend: `none`, or `client-ip[:SECONDS]`, counted from its last new flow.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Affinity(Option<NonZeroU32>);

impl Affinity {
    pub const NONE: Self = Self(None);
    /// As with Kubernetes.
    const DEFAULT_SECONDS: u32 = 10_800;
    const MAX_SECONDS: u32 = 86_400;

    /// Seconds, if there is any affinity.
    #[must_use]
    pub const fn seconds(self) -> Option<NonZeroU32> {
        self.0
    }
}

/// A text that is no affinity.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("affinity `{0}` is not none, client-ip or client-ip:SECONDS with 1 to {max} seconds", max = Affinity::MAX_SECONDS)]
pub struct AffinityError(String);

impl FromStr for Affinity {
    type Err = AffinityError;

    fn from_str(text: &str) -> Result<Self, AffinityError> {
        let seconds = match text.split_once(':') {
            None if text == "none" => return Ok(Self::NONE),
            None if text == "client-ip" => Some(Self::DEFAULT_SECONDS),
            Some(("client-ip", seconds)) => seconds.parse().ok(),
            _ => None,
        };
        let seconds = seconds.filter(|seconds| *seconds <= Self::MAX_SECONDS).and_then(NonZeroU32::new);
        seconds.map(|seconds| Self(Some(seconds))).ok_or_else(|| AffinityError(text.to_owned()))
    }
}

impl fmt::Display for Affinity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("none"),
            Some(seconds) => write!(f, "client-ip:{seconds}"),
        }
    }
}
