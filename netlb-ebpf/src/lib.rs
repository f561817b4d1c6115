//! Nothing for the host: `netlb` depends on this library so that a change to the programs' sources rebuilds them.
#![no_std]
