//! What netlb decides without a kernel, and what its two sides share.
//!
//! The same source is compiled into the BPF programs, into user space and into the unit tests: packet headers, flows and their
//! fingerprints, checksum arithmetic, connection states, the flow table, ring look-up, and the layout of every map. Nothing here
//! allocates, does I/O or reads a clock: the time is an argument.
#![no_std]
// 64-bit compare-and-swap on a target whose `core` offers no atomics; see `atomic.rs`.
#![cfg_attr(target_arch = "bpf", allow(internal_features))]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch, core_intrinsics))]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod atomic;
pub mod balance;
pub mod checksum;
pub mod conntrack;
pub mod counters;
pub mod directory;
pub mod filter;
pub mod flow;
pub mod fragment;
pub mod hop;
pub mod icmp;
pub mod limit;
pub mod maps;
pub mod network;
mod opaque;
pub mod ping;
pub mod relay;
pub mod select;
pub mod snat;
pub mod socket;
pub mod stranger;
pub mod stray;
pub mod table;
#[cfg(test)]
mod testing;
pub mod time;
pub mod tunnel;
pub mod wire;

/// The layout of the pinned maps. A daemon adopts maps of its own number and no others.
pub const ABI_VERSION: u32 = 8;
