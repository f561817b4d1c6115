//! Services as users speak of them, checked on construction.
//!
//! Nothing here knows of files, sockets or maps. A value that exists is valid: a [`Service`] is reached somewhere, has one address
//! family, no backend twice and none that is its own frontend.

pub use self::{
    backend::{Backend, BackendState, Conditions, Placement, Weight, WeightError},
    claims::{Claims, Rival},
    frontend::{
        Frontend, FrontendError, NodePort, Protocol, Publish, PublishError, describe_claim, parse_address, parse_claim,
        parse_endpoint, parse_port,
    },
    options::{Affinity, AffinityError, Algorithm, Family, Mode, Owner, SnatMode, TrafficPolicy, TrafficPolicyError},
    service::{Claim, Definition, Service, ServiceError},
};

mod backend;
mod claims;
mod frontend;
mod options;
mod service;
