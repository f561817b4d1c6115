//! The programs by themselves, for tests that run packets through them: nothing is pinned, nothing is attached.

use std::{
    fmt, io,
    os::fd::{AsFd as _, BorrowedFd},
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
    programs::{ProgramError, TestRun as _, TestRunOptions},
};
use netlb_common::{
    counters,
    maps::{Backend, Interface},
    table::Storage,
};

use super::{
    counts::Counts,
    load::{self, Options},
    maps::{KernelMaps, io_error, take_hash},
    syscall::Direction,
};
use crate::{
    config::{Forwarding, Limits, LogLevel, Timeouts},
    datapath::{Maps as _, Programmer},
};

/// One of the two programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Program {
    Ingress,
    Egress,
}

/// Loaded programs with maps of their own. Everything ends when this is dropped.
pub struct Harness {
    ebpf: Ebpf,
    programmer: Programmer<KernelMaps>,
    interfaces: HashMap<MapData, u32, Interface>,
    counts: Counts,
}

impl fmt::Debug for Harness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").field("programmer", &self.programmer.maps()).finish_non_exhaustive()
    }
}

impl Harness {
    pub fn new(limits: &Limits, timeouts: &Timeouts, forwarding: Forwarding) -> anyhow::Result<Self> {
        let options = Options { limits, timeouts, forwarding, log: LogLevel::Off };
        let mut loaded = load::load_unpinned(&options)?;
        Ok(Self {
            programmer: Programmer::new(loaded.maps)?,
            interfaces: take_hash(&mut loaded.ebpf, "INTERFACES")?,
            counts: Counts::new(&mut loaded.ebpf)?,
            ebpf: loaded.ebpf,
        })
    }

    /// Runs a frame through a program as if it were on that interface of the calling thread's network namespace, and returns the verdict
    /// and the frame as the program left it. Frames have at least an Ethernet header.
    pub fn test_run(&self, program: Program, frame: &[u8], interface: u32) -> io::Result<(i32, Vec<u8>)> {
        /// Bytes of `struct __sk_buff`, and where the interface is in it.
        const CONTEXT: usize = 192;
        const INTERFACE: usize = 40;
        /// A program may make a frame longer.
        const SPARE: usize = 512;
        let direction = match program {
            Program::Ingress => Direction::Ingress,
            Program::Egress => Direction::Egress,
        };
        let program = load::program(&self.ebpf, direction).map_err(io::Error::other)?;
        let mut context = [0; CONTEXT];
        context[INTERFACE..INTERFACE + 4].copy_from_slice(&interface.to_ne_bytes());
        let mut out = vec![0; frame.len() + SPARE];
        let result = program.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        });
        let result = result.map_err(|error| match error {
            ProgramError::SyscallError(error) => error.io_error,
            error => io::Error::other(error),
        })?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value as i32, out))
    }

    /// The program itself, for what [`test_run`](Self::test_run) cannot ask of the kernel.
    pub fn descriptor(&self, program: Program) -> io::Result<BorrowedFd<'_>> {
        let direction = match program {
            Program::Ingress => Direction::Ingress,
            Program::Egress => Direction::Egress,
        };
        let program = load::program(&self.ebpf, direction).map_err(io::Error::other)?;
        Ok(program.fd().map_err(io::Error::other)?.as_fd())
    }

    /// Instructions that the verifier looked at, of the million it is willing to.
    pub fn verified_instructions(&self, program: Program) -> io::Result<u32> {
        let direction = match program {
            Program::Ingress => Direction::Ingress,
            Program::Egress => Direction::Egress,
        };
        let program = load::program(&self.ebpf, direction).map_err(io::Error::other)?;
        Ok(program.info().map_err(io::Error::other)?.verified_instruction_count().unwrap_or_default())
    }

    /// As [`test_run`](Self::test_run), this many times, and returns the mean time of one in nanoseconds. From the second time on the
    /// program sees what it has made of the frame: only a frame that it leaves alone, or rewrites to itself, measures anything.
    pub fn measure(&self, program: Program, frame: &[u8], interface: u32, repeat: u32) -> io::Result<u64> {
        let direction = match program {
            Program::Ingress => Direction::Ingress,
            Program::Egress => Direction::Egress,
        };
        let program = load::program(&self.ebpf, direction).map_err(io::Error::other)?;
        let mut context = [0; 192];
        context[40..44].copy_from_slice(&interface.to_ne_bytes());
        let options = TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), repeat, ..TestRunOptions::new() };
        Ok(program.test_run(options).map_err(io::Error::other)?.duration.as_nanos() as u64)
    }

    pub fn programmer(&self) -> &Programmer<KernelMaps> {
        &self.programmer
    }

    pub fn programmer_mut(&mut self) -> &mut Programmer<KernelMaps> {
        &mut self.programmer
    }

    /// The flow table, to be looked at and to be aged.
    pub fn flow_table(&self) -> &dyn Storage {
        self.programmer.maps().flows()
    }

    pub fn backend(&self, id: u32) -> Backend {
        self.programmer.maps().backend(id)
    }

    /// Over all CPUs.
    pub fn counter(&self, counter: counters::Counter) -> u64 {
        self.counts.get(counter)
    }

    pub fn set_interface(&mut self, index: u32, interface: Interface) -> io::Result<()> {
        self.interfaces.insert(index, interface, 0).map_err(io_error)
    }
}
