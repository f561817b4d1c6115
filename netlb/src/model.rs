//! Services as users speak of them, checked on construction.
//!
//! Nothing here knows of files, sockets or maps. A value that exists is valid: a [`Service`] is reached somewhere, has one address
//! family, no backend twice and none that is its own frontend.

pub use self::{
    backend::{Backend, BackendState, Conditions, Placement, Weight, WeightError},
    frontend::{Frontend, FrontendError, NodePort, Protocol, Publish, PublishError, parse_claim, parse_endpoint},
    options::{Affinity, AffinityError, Algorithm, Owner, SnatMode, TrafficPolicy},
    service::{Claim, Definition, Service, ServiceError},
};

mod backend;
mod frontend;
mod options;
mod service;
