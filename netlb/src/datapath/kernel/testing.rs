//! The programs by themselves, for tests that run packets through them: nothing is pinned, nothing is attached.

use std::{
    fmt, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
};

use anyhow::Context as _;
use aya::{
    Ebpf,
    maps::{
        HashMap, Map, MapData,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{ProgramError, ProgramInfo, SchedClassifier, TestRun as _, TestRunOptions, TestRunResult},
};
use netlb_common::{
    addr::Addr,
    counters,
    maps::{Affinity, AffinityKey, Backend, Config, ConfigRef, EndpointKey, Interface, RangeKey},
    network::Networks,
    table::Storage,
};

use super::{
    counts::Counts,
    directory::Interfaces,
    layout,
    load::{self, Options},
    maps::{KernelMaps, hash, io_error},
    pins::Pins,
    syscall::{self, Direction, Order},
};
use crate::{
    config::{Forwarding, Limits, LogLevel, Snat, SocketScope, Timeouts},
    datapath::{Maps as _, Programmer},
};

/// Buckets of a flow table for that many flows.
#[must_use]
pub fn flow_buckets(flows: u32) -> u32 {
    1 << layout::flow_buckets_log2(flows)
}

/// What the programs of a netlb that pins its maps there are told of an interface.
pub fn announced(bpffs: &Path, index: u32) -> anyhow::Result<Option<Interface>> {
    let map = MapData::from_pin(Pins::new(bpffs).maps().join("INTERFACES"))?;
    Ok(Interfaces::of(&map)?.get(index))
}

/// Where the links of a netlb that pins them there stand among those of an interface of this network namespace, ingress first.
pub fn tcx_places(bpffs: &Path, index: u32) -> io::Result<Vec<usize>> {
    let mut places = Vec::new();
    for direction in Direction::BOTH {
        let links = syscall::tcx_links(index, direction)?;
        for order in Order::BOTH {
            let link = match syscall::open_pin(&Pins::new(bpffs).link(index, direction, order)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                link => syscall::link_info(link?.as_fd())?,
            };
            places.extend(links.iter().position(|id| *id == link.id));
        }
    }
    Ok(places)
}

/// One of the programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Program {
    Ingress,
    Egress,
    Xdp,
}

impl Program {
    /// `bpf_attr.test.ctx_in` for a frame that came in on an interface: the whole `struct __sk_buff`, or `struct xdp_md`.
    pub fn context(self, frame: &[u8], interface: u32) -> Vec<u8> {
        let (len, fields): (usize, &[(usize, u32)]) = match self {
            Self::Ingress | Self::Egress => (192, &[(40, interface)]),
            Self::Xdp => (24, &[(4, frame.len() as u32), (12, interface)]),
        };
        let mut context = vec![0; len];
        for (at, value) in fields {
            context[*at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        context
    }
}

/// Loaded programs with maps of their own. Everything ends when this is dropped.
pub struct Harness {
    ebpf: Ebpf,
    programmer: Programmer<KernelMaps>,
    interfaces: Interfaces,
    counts: Counts,
    addresses: HashMap<MapData, Addr, u32>,
    ranges: LpmTrie<MapData, RangeKey, u32>,
    affinity: HashMap<MapData, AffinityKey, Affinity>,
    /// Records of `CONFIGS` that tests wrote, from the last on.
    configs: u32,
}

/// What the programs are told of addresses when they are loaded.
#[derive(Clone, Debug)]
pub struct Site {
    pub owned: Networks,
    pub pods: Networks,
    /// Addresses that leave with one of the node in their place, and destinations where they do not.
    pub masquerade: (Networks, Networks),
    /// Nodes whose wrapped packets are unwrapped.
    pub dsr_from: Networks,
    pub echo: bool,
    pub snat: Snat,
}

impl Default for Site {
    fn default() -> Self {
        let none = Networks::NONE;
        let masquerade = (none, none);
        Self { owned: none, pods: none, masquerade, dsr_from: none, echo: true, snat: Snat::default() }
    }
}

impl fmt::Debug for Harness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").field("programmer", &self.programmer.maps()).finish_non_exhaustive()
    }
}

impl Harness {
    pub fn new(limits: &Limits, timeouts: &Timeouts, forwarding: Forwarding) -> anyhow::Result<Self> {
        Self::of(load::OBJECT, limits, timeouts, forwarding)
    }

    /// The same, with networks that the programs know.
    pub fn at(site: &Site, limits: &Limits, timeouts: &Timeouts, forwarding: Forwarding) -> anyhow::Result<Self> {
        Self::load(load::OBJECT, site, limits, timeouts, forwarding)
    }

    /// The same with the programs of another object, which has the same maps.
    pub fn of(object: &[u8], limits: &Limits, timeouts: &Timeouts, forwarding: Forwarding) -> anyhow::Result<Self> {
        Self::load(object, &Site::default(), limits, timeouts, forwarding)
    }

    fn load(
        object: &[u8],
        site: &Site,
        limits: &Limits,
        timeouts: &Timeouts,
        forwarding: Forwarding,
    ) -> anyhow::Result<Self> {
        let options = Options {
            object,
            limits,
            timeouts,
            snat: &site.snat,
            forwarding,
            log: LogLevel::Off,
            owned: site.owned,
            pods: site.pods,
            masquerade: site.masquerade,
            dsr_from: site.dsr_from,
            echo: site.echo,
            xdp: true,
            sockets: SocketScope::Off,
        };
        let loaded = load::load_unpinned(&options)?;
        Ok(Self {
            programmer: Programmer::new(loaded.maps, site.masquerade.0.len > 0)?,
            interfaces: Interfaces::new(&loaded.memory)?,
            counts: Counts::new(&loaded.memory)?,
            addresses: hash(&loaded.memory, "ADDRESSES")?,
            ranges: LpmTrie::try_from(Map::LpmTrie(loaded.memory.map("SOURCE_RANGES")?))?,
            affinity: hash(&loaded.memory, "AFFINITY")?,
            configs: 0,
            ebpf: loaded.verification.wait()?.ebpf,
        })
    }

    /// Runs a frame through a program as if it were on that interface of the calling thread's network namespace, and returns the verdict
    /// and the frame as the program left it. Frames have at least an Ethernet header.
    pub fn test_run(&self, program: Program, frame: &[u8], interface: u32) -> io::Result<(i32, Vec<u8>)> {
        /// A program may make a frame longer.
        const SPARE: usize = 512;
        let mut out = vec![0; frame.len() + SPARE];
        let context = program.context(frame, interface);
        let result = self.run(
            program,
            TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                ..TestRunOptions::new()
            },
        )?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value as i32, out))
    }

    fn run(&self, program: Program, options: TestRunOptions<'_>) -> io::Result<TestRunResult> {
        let result = match program {
            Program::Ingress => self.classifier(Direction::Ingress)?.test_run(options),
            Program::Egress => self.classifier(Direction::Egress)?.test_run(options),
            Program::Xdp => load::xdp(&self.ebpf).map_err(io::Error::other)?.test_run(options),
        };
        result.map_err(|error| match error {
            ProgramError::SyscallError(error) => error.io_error,
            error => io::Error::other(error),
        })
    }

    fn classifier(&self, direction: Direction) -> io::Result<&SchedClassifier> {
        load::program(&self.ebpf, direction).map_err(io::Error::other)
    }

    /// The program itself, for what [`test_run`](Self::test_run) cannot ask of the kernel.
    pub fn descriptor(&self, program: Program) -> io::Result<BorrowedFd<'_>> {
        let fd = match program {
            Program::Ingress => self.classifier(Direction::Ingress)?.fd(),
            Program::Egress => self.classifier(Direction::Egress)?.fd(),
            Program::Xdp => load::xdp(&self.ebpf).map_err(io::Error::other)?.fd(),
        };
        Ok(fd.map_err(io::Error::other)?.as_fd())
    }

    /// What the kernel says of a program, such as the instructions that the verifier looked at.
    pub fn info(&self, program: Program) -> io::Result<ProgramInfo> {
        let info = match program {
            Program::Ingress => self.classifier(Direction::Ingress)?.info(),
            Program::Egress => self.classifier(Direction::Egress)?.info(),
            Program::Xdp => load::xdp(&self.ebpf).map_err(io::Error::other)?.info(),
        };
        info.map_err(io::Error::other)
    }

    /// As [`test_run`](Self::test_run), this many times, and returns the mean time of one in nanoseconds. From the second time on the
    /// program sees what it has made of the frame: only a frame that it leaves alone, or rewrites to itself, measures anything.
    pub fn measure(&self, program: Program, frame: &[u8], interface: u32, repeat: u32) -> io::Result<u64> {
        let context = program.context(frame, interface);
        let options = TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), repeat, ..TestRunOptions::new() };
        Ok(self.run(program, options)?.duration.as_nanos() as u64)
    }

    pub fn programmer(&self) -> &Programmer<KernelMaps> {
        &self.programmer
    }

    pub fn programmer_mut(&mut self) -> &mut Programmer<KernelMaps> {
        &mut self.programmer
    }

    /// Forgets the flows of a build whose flow table is the kernel's LRU hash.
    pub fn clear_lru(&mut self) -> anyhow::Result<()> {
        let map = self.ebpf.map_mut("FLOWS_LRU").context("this build has no FLOWS_LRU")?;
        let mut map: HashMap<_, u64, [u64; 2]> = HashMap::try_from(map)?;
        for key in map.keys().collect::<Result<Vec<_>, _>>()? {
            map.remove(&key)?;
        }
        Ok(())
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
        self.interfaces.set(index, interface)
    }

    /// The record in force for an address, port and protocol.
    pub fn config(&self, key: &EndpointKey) -> Option<Config> {
        let maps = self.programmer.maps();
        Some(maps.config(maps.service(key)?.index()))
    }

    /// Puts a record in force, for its own key. The programmer does not know of it.
    pub fn set_config(&mut self, config: Config) -> io::Result<()> {
        self.configs += 1;
        let maps = self.programmer.maps_mut();
        let (index, generation) = (maps.sizes().configs - self.configs, u32::MAX - self.configs);
        maps.set_config(index, &Config { generation, ..config });
        maps.set_service(&config.key, ConfigRef::new(index, generation))
    }

    /// Sets flags of the backends with an address, and says how many there are.
    pub fn set_backend_flags(&mut self, addr: Addr, flags: u8) -> usize {
        let maps = self.programmer.maps_mut();
        let ids = Vec::from_iter((1..maps.sizes().backends).filter(|id| maps.backend(*id).addr == addr));
        for id in &ids {
            maps.set_backend_flags(*id, flags);
        }
        ids.len()
    }

    /// Says of an address what the programs know of it: one of [`netlb_common::maps::address`].
    pub fn set_address(&mut self, addr: Addr, what: u32) -> io::Result<()> {
        self.addresses.insert(addr, what, 0).map_err(io_error)
    }

    /// Lets the clients of a service be in a network: the first `bits` of an address in the form of the maps.
    pub fn add_range(&mut self, service: u32, addr: Addr, bits: u32) -> io::Result<()> {
        let key = Key::new(RangeKey::SERVICE_BITS + bits, RangeKey::new(service, addr));
        self.ranges.insert(&key, 1, 0).map_err(io_error)
    }

    /// What clients keep their backends by.
    pub fn affinities(&self) -> io::Result<Vec<(AffinityKey, Affinity)>> {
        self.affinity.iter().collect::<Result<_, _>>().map_err(io_error)
    }

    pub fn set_affinity(&mut self, key: AffinityKey, value: Affinity) -> io::Result<()> {
        self.affinity.insert(key, value, 0).map_err(io_error)
    }
}
