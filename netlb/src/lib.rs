//! netlb: a load balancer for service virtual IPs.
//!
//! The library holds everything; the binary only parses arguments and chooses the exit code.

pub mod api;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod daemon;
pub mod datapath;
pub mod dataplane;
pub mod desired;
pub mod exit;
mod interfaces;
mod maglev;
pub mod model;
mod nearest;
pub mod resolve;
mod rfc3339;
pub mod spec;
pub mod store;
#[cfg(test)]
mod testing;
mod text;
pub mod view;
pub mod watch;
