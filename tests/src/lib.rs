//! Testbeds and helpers for the tests.
//!
//! A *testbed* is a set of network namespaces wired like the nodes and pods of a cluster, with real servers and clients in them. It
//! is shared by the namespace tests (`tests/ns_*.rs`) and the demo. Whatever a testbed makes carries the id of the process that made
//! it, and is gone after that process, however it ends: guards remove it, then a guardian process, then the next run's sweep.

pub mod cgroup;
pub mod clients;
pub mod cluster;
pub mod cni;
pub mod daemon;
pub mod dns;
pub mod exec;
pub mod frames;
pub mod guardian;
pub mod lab;
pub mod load;
pub mod netns;
pub mod places;
pub mod raw;
pub mod run;
pub mod servers;
pub mod sockets;
pub mod sweep;
pub mod testing;
pub mod topology;
