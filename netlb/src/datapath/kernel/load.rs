//! Loading the programs: into the maps of the daemon before this one where they fit, else into new ones.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use aya::{
    Ebpf, EbpfError, EbpfLoader, VerifierLogLevel,
    maps::{Array, Map, MapData, MapInfo},
    programs::{ProgramError, ProgramFd, SchedClassifier, Xdp},
    util::nr_cpus,
};
use netlb_common::{ABI_VERSION, flow::HashKey, maps::Meta, network::Networks, time::Jiffies};

use super::{
    clock,
    layout::{Kind, Layout, Spec, settings, timeouts},
    logs,
    maps::{KernelMaps, io_error},
    pins::{Pins, ignore_missing},
    sockets::{self, Programs},
    syscall::{self, Direction},
};
use crate::config::{Forwarding, Limits, LogLevel, Snat, SocketScope, Timeouts};

/// Empty in a build without the BPF programs.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/netlb-bpf"));

/// What the programs are loaded with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options<'a> {
    /// The programs.
    pub(super) object: &'a [u8],
    pub(super) limits: &'a Limits,
    pub(super) timeouts: &'a Timeouts,
    pub(super) snat: &'a Snat,
    pub(super) forwarding: Forwarding,
    pub(super) log: LogLevel,
    /// Addresses that are services' or nobody's.
    pub(super) owned: Networks,
    /// Addresses of the node's pods.
    pub(super) pods: Networks,
    /// Addresses that leave with one of the node in their place, and destinations where they do not.
    pub(super) masquerade: (Networks, Networks),
    /// Nodes whose wrapped packets are unwrapped.
    pub(super) dsr_from: Networks,
    /// Whether services answer echo requests.
    pub(super) echo: bool,
    /// Whether the XDP program is wanted.
    pub(super) xdp: bool,
    /// The network namespaces whose sockets are served; see [`sockets`](super::sockets) for the programs.
    pub(super) sockets: SocketScope,
}

/// The maps, and the programs on their way.
pub(super) struct Loaded {
    pub(super) maps: KernelMaps,
    /// Where `META` is written to when the maps are filled; nowhere for maps that were adopted.
    pub(super) unfinished: Option<Unfinished>,
    pub(super) memory: Memory,
    pub(super) verification: Verification,
}

/// The programs, which the kernel verifies in threads of their own. That takes most of a start, and the maps can be filled meanwhile.
pub(super) struct Verification(JoinHandle<anyhow::Result<Verified>>);

/// Programs that can be attached.
pub(super) struct Verified {
    /// With all maps.
    pub(super) ebpf: Ebpf,
    /// The programs at the calls of processes, if they are wanted. Packets are served without them as well.
    pub(super) sockets: Option<anyhow::Result<Programs>>,
}

impl Verification {
    fn start(mut ebpf: Ebpf, with_xdp: bool, with_sockets: bool) -> anyhow::Result<Self> {
        let run = move || {
            verify(&mut ebpf, with_xdp)?;
            let sockets = with_sockets.then(|| sockets::load(&mut ebpf));
            Ok(Verified { ebpf, sockets })
        };
        let thread = thread::Builder::new().name("verification".to_owned()).spawn(run);
        Ok(Self(thread.context("cannot start a thread that loads the programs")?))
    }

    /// The programs, or why the kernel refused them.
    pub(super) fn wait(self) -> anyhow::Result<Verified> {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Maps that no later start adopts yet.
pub(super) struct Unfinished {
    map: Array<MapData, Meta>,
    meta: Meta,
}

impl Unfinished {
    /// Says that the maps are complete.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.map.set(0, self.meta, 0).map_err(io_error)
    }
}

/// Loads the programs and pins their maps.
pub(super) fn load(options: &Options<'_>, pins: &Pins) -> anyhow::Result<Loaded> {
    let layout = layout(options)?;
    pins.recover(|directory| read_meta(directory).is_ok_and(|meta| meta.abi_version != 0))
        .context("cannot tidy up the pinned maps")?;
    let adopted = match adoptable(&pins.maps(), &layout)? {
        Adoptable::Nothing => None,
        Adoptable::This(meta) => Some(meta),
        Adoptable::Differs(differences) => {
            tracing::warn!(
                "the flow table cannot be carried over: {}. Connections that are open now are balanced again, and may break where their \
                 service's backends have changed",
                few(&differences)
            );
            None
        }
    };
    match adopted {
        Some(meta) => {
            tracing::info!("using the maps and the flow table of the netlb before this one");
            load_into(options, &layout, meta, Some(&pins.maps()), true)
        }
        None => {
            let directory = pins.begin_maps().context("cannot make a directory for the maps")?;
            load_into(options, &layout, new_meta(&layout)?, Some(&directory), false)
        }
    }
}

/// Loads the programs with maps that end with them.
pub(super) fn load_unpinned(options: &Options<'_>) -> anyhow::Result<Loaded> {
    let layout = layout(options)?;
    load_into(options, &layout, new_meta(&layout)?, None, false)
}

fn layout(options: &Options<'_>) -> anyhow::Result<Layout> {
    let cpus = nr_cpus().map_err(|(file, error)| anyhow!("cannot tell how many CPUs there are: {file}: {error}"))?;
    let layout = Layout::new(options.limits, cpus as u32);
    Ok(if options.sockets == SocketScope::Off { layout.without_sockets() } else { layout })
}

fn new_meta(layout: &Layout) -> anyhow::Result<Meta> {
    Ok(Meta {
        abi_version: ABI_VERSION,
        flow_buckets_log2: layout.flow_buckets_log2,
        filter_bits_log2: layout.sizes.filter_bits_log2,
        pad: 0,
        hash_key: HashKey::new(syscall::random().context("cannot get random numbers")?),
    })
}

fn load_into(
    options: &Options<'_>,
    layout: &Layout,
    meta: Meta,
    directory: Option<&Path>,
    adopted: bool,
) -> anyhow::Result<Loaded> {
    ensure!(!options.object.is_empty(), "this netlb was built without its BPF programs");
    ensure!(syscall::has_bpf(), "this kernel has no bpf(2); it needs CONFIG_BPF_SYSCALL");
    ensure!(
        aya::features().btf().is_some(),
        "this kernel cannot load BTF, which describes the maps (since Linux 4.18)"
    );
    let timeouts = timeouts(options.timeouts);
    let jiffies = clock::jiffies().unwrap_or_else(|error| {
        tracing::debug!("the programs ask a helper for the time: {error}");
        Jiffies::default()
    });
    let settings = settings(layout, &meta, &timeouts, jiffies, options);
    let socket_settings = sockets::settings(options.sockets).context("cannot tell this network namespace")?;
    // aya-log counts its levels as we do.
    let log_level = settings.log_level as u8;
    let specs = layout.maps();
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTINGS", &settings, true);
    loader.override_global("SOCKET_SETTINGS", &socket_settings, true);
    // The programs have it only if they log anything.
    loader.override_global(aya_log::LEVEL, &log_level, false);
    // With statistics comes the reason of a refusal. The way to it may be megabytes long, and take minutes to be told.
    loader.verifier_log_level(if tracing::enabled!(tracing::Level::DEBUG) {
        VerifierLogLevel::DEBUG | VerifierLogLevel::STATS
    } else {
        VerifierLogLevel::STATS
    });
    for spec in &specs {
        loader.map_max_entries(spec.name, spec.max_entries);
        if let Some(directory) = directory {
            loader.map_pin_path(spec.name, directory.join(spec.name));
        }
    }
    if let (Some(directory), false) = (directory, adopted) {
        create_arrays(&specs, directory)?;
    }
    let mut ebpf = loader.load(options.object).map_err(explain)?;
    let mut memory = Memory { maps: Vec::with_capacity(specs.len()), hash_key: meta.hash_key };
    for spec in &specs {
        let map = ebpf.map(spec.name).with_context(|| format!("the BPF programs have no map {}", spec.name))?;
        let map = map_data(map).with_context(|| format!("map {} is of an unexpected kind", spec.name))?;
        if let Some(difference) = difference(spec, &map.info()?) {
            bail!("the BPF programs do not belong to this netlb: {difference}");
        }
        memory.maps.push((spec.name, map.fd().as_fd().try_clone_to_owned().context("cannot duplicate a descriptor")?));
    }
    if options.log != LogLevel::Off {
        logs::forward(&mut ebpf).context("cannot read the log of the BPF programs")?;
    }
    let verification = Verification::start(ebpf, options.xdp, options.sockets != SocketScope::Off)?;
    let maps = KernelMaps::new(&memory, layout, &timeouts)?;
    let map = Array::try_from(Map::Array(memory.map("META")?)).map_err(io_error)?;
    let unfinished = (!adopted).then_some(Unfinished { map, meta });
    Ok(Loaded { maps, unfinished, memory, verification })
}

/// Makes and pins the large arrays, on every CPU there is: the kernel clears all of their memory. The loader finds them by their pins.
fn create_arrays(specs: &[Spec], directory: &Path) -> anyhow::Result<()> {
    /// Bytes that are worth it.
    const LARGE: u64 = 1 << 20;
    let bytes = |spec: &Spec| u64::from(spec.value_size) * u64::from(spec.max_entries);
    let mut large: Vec<_> =
        specs.iter().filter(|spec| spec.kind == Kind::MappedArray && bytes(spec) >= LARGE).collect();
    large.sort_by_key(|spec| bytes(spec));
    let create = |spec: &Spec| {
        let map =
            syscall::create_map(spec.name, spec.kind.number(), spec.value_size, spec.max_entries, spec.kind.flags());
        map.and_then(|map| syscall::pin(map.as_fd(), &directory.join(spec.name)))
            .with_context(|| format!("cannot make the BPF map {}", spec.name))
    };
    let left = Mutex::new(large);
    // The largest first.
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let work = || std::iter::from_fn(next).try_for_each(create);
    thread::scope(|scope| {
        let others = thread::available_parallelism().map_or(0, |threads| threads.get() - 1);
        let threads: Vec<_> = (0..others).map(|_| scope.spawn(work)).collect();
        let joined =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        std::iter::once_with(work).chain(joined).collect()
    })
}

const XDP: &str = "netlb_xdp";
const SOCKETS: &str = "SOCKETS";

pub(super) const fn program_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "netlb_ingress",
        Direction::Egress => "netlb_egress",
    }
}

/// Has the kernel verify the programs, all at the same time.
fn verify(ebpf: &mut Ebpf, with_xdp: bool) -> anyhow::Result<()> {
    let wanted = Direction::BOTH.map(program_name).into_iter().chain(with_xdp.then_some(XDP));
    let mut missing: Vec<_> = wanted.collect();
    let mut programs = Vec::with_capacity(missing.len());
    for (name, program) in ebpf.programs_mut() {
        if let Some(at) = missing.iter().position(|wanted| *wanted == name) {
            programs.push((missing.swap_remove(at), program));
        }
    }
    if let Some(name) = missing.first() {
        bail!("there is no BPF program {name}");
    }
    thread::scope(|scope| {
        let load = |(name, program): (&'static str, &'_ mut aya::programs::Program)| {
            let loaded = match program {
                aya::programs::Program::SchedClassifier(program) => program.load(),
                aya::programs::Program::Xdp(program) => program.load(),
                _ => bail!("BPF program {name} is of an unexpected kind"),
            };
            loaded.map_err(|error| refused(name, error))
        };
        let threads: Vec<_> = programs.into_iter().map(|program| scope.spawn(move || load(program))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

pub(super) fn program(ebpf: &Ebpf, direction: Direction) -> anyhow::Result<&SchedClassifier> {
    let name = program_name(direction);
    let program = ebpf.program(name).with_context(|| format!("there is no BPF program {name}"))?;
    Ok(program.try_into()?)
}

pub(super) fn xdp(ebpf: &Ebpf) -> anyhow::Result<&Xdp> {
    Ok(ebpf.program(XDP).with_context(|| format!("there is no BPF program {XDP}"))?.try_into()?)
}

/// A loaded program.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) fd: OwnedFd,
    pub(super) id: u32,
}

impl Program {
    /// A program of its own, which outlives the object.
    pub(super) fn new(ebpf: &Ebpf, direction: Direction) -> anyhow::Result<Self> {
        let program = program(ebpf, direction)?;
        Self::of(program.fd()?, program.info()?.id())
    }

    /// The same of the XDP program.
    pub(super) fn new_xdp(ebpf: &Ebpf) -> anyhow::Result<Self> {
        let program = xdp(ebpf)?;
        Self::of(program.fd()?, program.info()?.id())
    }

    pub(super) fn of(fd: &ProgramFd, id: u32) -> anyhow::Result<Self> {
        Ok(Self { fd: fd.as_fd().try_clone_to_owned().context("cannot duplicate a descriptor")?, id })
    }
}

/// The sources of an object's error say what the kernel says.
fn explain(error: EbpfError) -> anyhow::Error {
    anyhow::Error::new(error).context("cannot load the BPF maps")
}

/// A verifier's log ends with the reason, above some statistics.
pub(super) fn refused(name: &str, error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError { io_error, verifier_log } = &error else {
        return anyhow::Error::new(error).context(format!("cannot load the BPF program {name}"));
    };
    let log = verifier_log.to_string();
    tracing::debug!("the verifier's log of {name}:\n{log}");
    let is_statistics = |line: &&str| {
        ["processed ", "verification time", "stack depth", "insns processed"]
            .iter()
            .any(|start| line.starts_with(start))
    };
    let reason = log.lines().map(str::trim).rfind(|line| !line.is_empty() && !is_statistics(line));
    anyhow::anyhow!("the kernel refused the BPF program {name}: {} ({io_error})", reason.unwrap_or("it gave no reason"))
}

/// What a start finds pinned.
enum Adoptable {
    Nothing,
    This(Meta),
    /// Maps that cannot be used, and why.
    Differs(Vec<String>),
}

fn adoptable(directory: &Path, layout: &Layout) -> anyhow::Result<Adoptable> {
    let meta = match read_meta(directory) {
        Ok(meta) if meta.abi_version != 0 => meta,
        Ok(_) => return Ok(Adoptable::Differs(vec!["the maps before were not complete".to_owned()])),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Adoptable::Nothing),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", directory.join("META").display()));
        }
    };
    if meta.abi_version != ABI_VERSION {
        let Meta { abi_version, .. } = meta;
        return Ok(Adoptable::Differs(vec![format!("the maps' layout changed from {abi_version} to {ABI_VERSION}")]));
    }
    let mut differences = Vec::new();
    let mut has_other_sockets = false;
    for spec in layout.maps() {
        let found = match MapInfo::from_pin(directory.join(spec.name)) {
            Ok(info) => difference(&spec, &info),
            Err(error) => Some(format!("map {} is gone ({})", spec.name, io_error(error))),
        };
        if spec.name == SOCKETS {
            has_other_sockets = found.is_some();
        } else {
            differences.extend(found);
        }
    }
    if !differences.is_empty() {
        return Ok(Adoptable::Differs(differences));
    }
    // Its size depends on whether sockets are served at all: it is made anew beside the others.
    if has_other_sockets {
        ignore_missing(fs::remove_file(directory.join(SOCKETS))).context("cannot remove the pinned map SOCKETS")?;
    }
    Ok(Adoptable::This(meta))
}

/// The first of a list in words, and how many more there are: with one limit, several maps change.
fn few(list: &[String]) -> String {
    match list {
        [first, second, rest @ ..] if rest.len() > 1 => {
            format!("{first}, {second}, and {} more like these", rest.len())
        }
        list => list.join(", "),
    }
}

fn read_meta(directory: &Path) -> io::Result<Meta> {
    let map = MapData::from_pin(directory.join("META")).map_err(io_error)?;
    let map: Array<_, Meta> = Array::try_from(Map::Array(map)).map_err(io_error)?;
    map.get(&0, 0).map_err(io_error)
}

/// In what a map is not what it should be.
fn difference(spec: &Spec, info: &MapInfo) -> Option<String> {
    let name = spec.name;
    let kind = info.map_type().map_or(0, |kind| kind as u32);
    [
        ("the type", kind, spec.kind.number()),
        ("the key size", info.key_size(), spec.key_size),
        ("the value size", info.value_size(), spec.value_size),
        ("the flags", info.map_flags(), spec.kind.flags()),
        ("the size", info.max_entries(), spec.max_entries),
    ]
    .into_iter()
    .find(|(_, is, should)| is != should)
    .map(|(what, is, should)| format!("{what} of {name} changed from {is} to {should}"))
}

fn map_data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(map) | Map::HashMap(map) | Map::LpmTrie(map) | Map::LruHashMap(map) | Map::PerCpuArray(map) => {
            Some(map)
        }
        _ => None,
    }
}

/// The maps, to be opened again, or to ask the kernel how much memory they take.
#[derive(Debug)]
pub(super) struct Memory {
    maps: Vec<(&'static str, OwnedFd)>,
    hash_key: HashKey,
}

impl Memory {
    /// Bytes of each map.
    pub(super) fn by_map(&self) -> HashMap<&'static str, u64> {
        self.maps.iter().map(|(name, map)| (*name, memory_of(map))).collect()
    }

    /// A map once more.
    pub(super) fn map(&self, name: &str) -> anyhow::Result<MapData> {
        let map = self.descriptor(name)?;
        Ok(MapData::from_fd(map.try_clone_to_owned().context("cannot duplicate a descriptor")?)?)
    }

    /// The key of the hashes in them.
    pub(super) const fn hash_key(&self) -> HashKey {
        self.hash_key
    }

    pub(super) fn descriptor(&self, name: &str) -> anyhow::Result<BorrowedFd<'_>> {
        let (_, map) = self.maps.iter().find(|(known, _)| *known == name).with_context(|| format!("no map {name}"))?;
        Ok(map.as_fd())
    }
}

/// The kernel tells it in a text file only. 0 where it does not.
fn memory_of(map: &OwnedFd) -> u64 {
    fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd()))
        .ok()
        .and_then(|text| text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok()))
        .unwrap_or(0)
}
