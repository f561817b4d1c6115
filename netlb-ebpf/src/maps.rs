//! The maps, their sizes as the loader sets them, and how the pipeline reads them.

use core::ptr::{self, addr_of};

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
    helpers::{bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_jiffies64, bpf_ktime_get_coarse_ns},
    macros::btf_map,
};
use netlb_common::{
    addr::{Addr, Address, Ipv6Be},
    atomic::Word,
    balance::{Lookup, Tables, Translation},
    conntrack::{Segment, State},
    counters::{self, Counter},
    directory::{self, Line, Lines},
    flow::{Family, Fingerprint, HashKey, Parsed},
    fragment::{self, First, HeldFrame, Region},
    hop::{self, Hop, Lead, Way},
    icmp::{Error, Meaning},
    limit::Limit,
    maps::{
        Affinity, AffinityKey, Backend, Config, ConfigRef, Counterpart, EndpointKey, Frontend, Interface, MemberLine,
        Meta, NodePortKey, RangeKey, RingLine, ServiceStats, Settings, SocketKey, SocketSettings, Tally,
    },
    network::{Network, Networks},
    relay::Told,
    snat::{self, Pool, Ports, Source},
    socket,
    stranger::Strangers,
    table::{Bucket, Data, New, Overflow, Place, Record, Storage},
    time::{Jiffies, Ticks},
};

use crate::subprograms;

/// Bits of a whole key of `SOURCE_RANGES`.
const RANGE_BITS: u32 = RangeKey::SERVICE_BITS + 128;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
static SERVICES: Array<Line, 1, MMAPABLE> = Array::new();
#[btf_map]
static CONFIGS: Array<Config, 1, MMAPABLE> = Array::new();
#[btf_map]
static RINGS: Array<RingLine, 1, MMAPABLE> = Array::new();
#[btf_map]
static MEMBERS: Array<MemberLine, 1, MMAPABLE> = Array::new();
#[btf_map]
static BACKENDS: Array<Backend, 1, MMAPABLE> = Array::new();
#[btf_map]
static FRONTENDS: Array<Frontend, 1, MMAPABLE> = Array::new();
#[btf_map]
static OWNERS: Array<Line, 1, MMAPABLE> = Array::new();
#[btf_map]
static FILTER: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static FLOWS: Array<Bucket, 1, MMAPABLE> = Array::new();
#[btf_map]
static FLOW_RECORDS: Array<Record, 1, MMAPABLE> = Array::new();
#[btf_map]
static FLOW_OVERFLOWS: Array<Overflow, 1, MMAPABLE> = Array::new();
#[btf_map]
static SERVICE_STATS: Array<ServiceStats, 1, MMAPABLE> = Array::new();
#[btf_map]
static BACKEND_STATS: Array<Tally, 1, MMAPABLE> = Array::new();
#[btf_map]
static CURSORS: Array<Tally, 1, MMAPABLE> = Array::new();
#[btf_map]
static COUNTERS: PerCpuArray<[u64; counters::ROOM], 1> = PerCpuArray::new();
#[btf_map]
static INTERFACES: Array<Line, { Interface::LINES as usize }, MMAPABLE> = Array::new();
#[btf_map]
static HOPS: Array<Hop, { hop::COUNT as usize }, MMAPABLE> = Array::new();
#[btf_map]
static LEADS: Array<Lead, { hop::LEADS as usize }> = Array::new();
#[btf_map]
static SNAT_ADDRESSES: Array<Source, { snat::ADDRESSES as usize }, MMAPABLE> = Array::new();
#[btf_map]
static SOCKETS: LruHashMap<SocketKey, Counterpart, 1> = LruHashMap::new();
#[btf_map]
static ADDRESSES: HashMap<Addr, u32, 1, NO_PREALLOC> = HashMap::new();
#[btf_map]
static SOURCE_RANGES: LpmTrie<RangeKey, u32, 1> = LpmTrie::new();
#[btf_map]
static AFFINITY: HashMap<AffinityKey, Affinity, 1, NO_PREALLOC> = HashMap::new();
#[btf_map]
static NODE_PORTS: HashMap<NodePortKey, u32, 1, NO_PREALLOC> = HashMap::new();
#[btf_map]
static FRAGMENTS: LruHashMap<u64, First, { fragment::DATAGRAMS as usize }> = LruHashMap::new();
#[btf_map]
static HELD: Array<Region, { Region::COUNT as usize }> = Array::new();
#[btf_map]
static HELD_FRAMES: Array<HeldFrame, { (Region::COUNT * Region::PLACES) as usize }> = Array::new();
/// What is under way on a CPU. In a map, because a program and all it calls have 512 bytes of stack.
#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();
/// Written and read by the loader only; here so that it is made and pinned with the others.
#[btf_map]
static META: Array<Meta, 1> = Array::new();

#[repr(C)]
struct Scratch {
    work: [u64; 24],
    new: New,
    /// What an ICMP message quotes, and zeros.
    quote: [u64; QUOTE / size_of::<u64>()],
    answers: Limit,
    strangers: Strangers,
}

/// The longest quote.
pub(crate) const QUOTE: usize = 256;

/// The packet under way: what is known of it, and what is to become of it.
#[repr(C)]
pub(crate) struct Work<A> {
    pub(crate) packet: Parsed<A>,
    pub(crate) translation: Translation<A>,
    pub(crate) lookup: Lookup,
}

/// An ICMP error under way: what it says, and what it is to say.
#[repr(C)]
pub(crate) struct Errand<A> {
    pub(crate) error: Error<A>,
    pub(crate) meaning: Meaning<A>,
}

const _: () = assert!(size_of::<Work<Ipv6Be>>() <= size_of::<[u64; 24]>());
const _: () = assert!(size_of::<Errand<Ipv6Be>>() <= size_of::<[u64; 24]>());
const _: () = assert!(size_of::<Told<Ipv6Be>>() <= size_of::<[u64; 24]>());

/// This CPU's place for the packet under way. Whoever takes it fills it in before reading it.
#[inline(always)]
pub(crate) fn work<A: Family>() -> Option<*mut Work<A>> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: within the element.
    Some(unsafe { &raw mut (*scratch).work }.cast())
}

/// The same place, for an ICMP error.
#[inline(always)]
pub(crate) fn errand<A: Family>() -> Option<*mut Errand<A>> {
    Some(work::<A>()?.cast())
}

/// The same place, for what an error says of a wrapped packet.
#[inline(always)]
pub(crate) fn told<A: Family>() -> Option<*mut Told<A>> {
    Some(work::<A>()?.cast())
}

/// The same pointer, of whose contents the compiler knows nothing any more: it reads them again where it needs them, instead of keeping
/// them on the stack.
#[inline(always)]
pub(crate) fn forget<T>(mut pointer: *mut T) -> *mut T {
    // SAFETY: copies a register onto itself. Without an instruction the line information would name one place twice, which kernels refuse.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) pointer, options(nostack)) };
    pointer
}

/// Gives a direction of a flow a slot.
#[cfg(not(feature = "lru"))]
#[inline(always)]
pub(crate) fn insert(new: &New) -> netlb_common::table::Inserted {
    netlb_common::table::insert(Kernel, new)
}

#[cfg(feature = "lru")]
pub(crate) use lru::insert;

/// The kernel's own table of recently used flows.
#[cfg(feature = "lru")]
mod lru {
    use aya_ebpf::{btf_maps::LruHashMap, macros::btf_map};
    pub(super) use netlb_common::table::Found;
    use netlb_common::{
        atomic::Word,
        flow::Fingerprint,
        table::{Data, Inserted, New, Place, Slot, is_live},
        time::Ticks,
    };

    use super::Kernel;

    /// Both directions of the million connections that the bench has.
    const SLOTS: usize = 3 << 20;

    #[btf_map]
    static FLOWS_LRU: LruHashMap<u64, Slot, SLOTS> = LruHashMap::new();

    #[inline(always)]
    pub(super) fn find<'a>(fingerprint: Fingerprint, now: Ticks) -> Option<Found<'a>> {
        // SAFETY: an element in use elsewhere shows another flow's data at worst; this is measured, not used.
        let slot: &Slot = unsafe { FLOWS_LRU.get(&fingerprint.0) }?;
        let data = Data(slot.data.load());
        is_live(&Kernel, data, now).then_some(Found { slot, place: Place(u32::MAX), data })
    }

    #[inline(always)]
    pub(crate) fn insert(new: &New) -> Inserted {
        if let Some(found) = find(new.fingerprint, new.now) {
            return Inserted::existing(found.data);
        }
        let slot = Slot { fingerprint: Word::new(new.fingerprint.0), data: Word::new(new.slot_data().0) };
        match FLOWS_LRU.insert(&new.fingerprint.0, &slot, 0) {
            Ok(()) => Inserted::new(Place(0), false),
            Err(_) => Inserted::FULL,
        }
    }
}

/// Hands an insert to the subprogram that does it.
#[inline(always)]
pub(crate) fn stage(new: New) -> Option<*const New> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: this CPU's element, large enough.
    unsafe {
        let staged = &raw mut (*scratch).new;
        staged.write(new);
        Some(staged)
    }
}

/// This CPU's place for what a message quotes.
#[inline(always)]
pub(crate) fn quote() -> Option<*mut [u64; QUOTE / size_of::<u64>()]> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: within the element.
    Some(unsafe { &raw mut (*scratch).quote })
}

/// Whether one more packet of our own may be sent.
#[inline(always)]
pub(crate) fn may_answer() -> bool {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return false };
    // SAFETY: this CPU's element, and the helper only reads a clock.
    unsafe { (*scratch).answers.take(bpf_ktime_get_coarse_ns()) }
}

/// Set by the loader. Frozen when the programs are verified, which lets the verifier drop the branches it rules out.
#[unsafe(no_mangle)]
static SETTINGS: Constant<Settings> = Constant(Settings {
    hash_key: HashKey::ZERO,
    jiffies: Jiffies { length: 0, epoch: 0 },
    flow_mask: 0,
    filter_bits_log2: 15,
    timeouts: [0; State::COUNT],
    forwarding: 0,
    log_level: 0,
    snat_ports: Ports { first: 0, more: 0 },
    echo: 0,
    services_mask: 0,
    owners_mask: 0,
    stats_stride: 0,
    pad: 0,
    owned: Networks::NONE,
    pods: Networks::NONE,
    masquerade: Networks::NONE,
    masquerade_except: Networks::NONE,
    dsr_from: Networks::NONE,
    snat_pools: [Pool::NONE; 2],
});

/// The same for the socket hooks.
#[unsafe(no_mangle)]
static SOCKET_SETTINGS: Constant<SocketSettings> =
    Constant(SocketSettings { namespace: 0, node: 0, chooses_errors: 0, pad: 0 });

#[repr(transparent)]
struct Constant<T>(T);

/// Reads a constant as the loader set it, not as the compiler sees it.
macro_rules! setting {
    (socket.$($field:tt)+) => {
        // SAFETY: the field is there and initialised.
        unsafe { ptr::read_volatile(addr_of!(SOCKET_SETTINGS.0.$($field)+)) }
    };
    ($($field:tt)+) => {
        // SAFETY: the field is there and initialised.
        unsafe { ptr::read_volatile(addr_of!(SETTINGS.0.$($field)+)) }
    };
}

/// One of `netlb_common::maps::forwarding`.
#[inline(always)]
pub(crate) fn forwarding() -> u32 {
    setting!(forwarding)
}

/// One of `netlb_common::maps::log_level`.
#[inline(always)]
pub(crate) fn log_level() -> u32 {
    setting!(log_level)
}

/// The cookie of the network namespace whose sockets are served; 0 for all.
#[inline(always)]
pub(crate) fn served_namespace() -> u64 {
    setting!(socket.namespace)
}

/// The cookie of the node's own network namespace; 0 if it is not known.
#[inline(always)]
pub(crate) fn node_namespace() -> u64 {
    setting!(socket.node)
}

/// Whether there are networks where whatever is no service is nobody.
#[inline(always)]
pub(crate) fn has_owned() -> bool {
    setting!(owned.len) != 0
}

#[inline(always)]
pub(crate) fn owned_have(addr: Addr) -> bool {
    has(addr_of!(SETTINGS.0.owned), addr)
}

#[inline(always)]
pub(crate) fn has_pods() -> bool {
    setting!(pods.len) != 0
}

#[inline(always)]
pub(crate) fn pods_have(addr: Addr) -> bool {
    has(addr_of!(SETTINGS.0.pods), addr)
}

#[inline(always)]
pub(crate) fn has_masquerade() -> bool {
    setting!(masquerade.len) != 0
}

#[inline(always)]
pub(crate) fn masquerade_has(addr: Addr) -> bool {
    has(addr_of!(SETTINGS.0.masquerade), addr)
}

#[inline(always)]
pub(crate) fn masquerade_spares(addr: Addr) -> bool {
    has(addr_of!(SETTINGS.0.masquerade_except), addr)
}

/// Whether packets of other nodes are unwrapped.
#[inline(always)]
pub(crate) fn unwraps() -> bool {
    setting!(dsr_from.len) != 0
}

#[inline(always)]
pub(crate) fn unwraps_from(addr: Addr) -> bool {
    has(addr_of!(SETTINGS.0.dsr_from), addr)
}

/// How many addresses of a family flows are given, if not those that routing prefers.
#[inline(always)]
pub(crate) fn pool_len<A: Address>() -> u32 {
    setting!(snat_pools[A::IS_V6 as usize].len) as u32
}

/// Those, beginning with another one for each hash; none after the last.
#[inline(always)]
pub(crate) fn pooled<A: Address>(hash: u32, n: u32) -> Option<Addr> {
    let len = pool_len::<A>();
    if n >= len {
        return None;
    }
    let at = (hash % len + n) % len % Pool::MAX as u32;
    let pool = addr_of!(SETTINGS.0.snat_pools[A::IS_V6 as usize].all).cast::<Addr>();
    // SAFETY: initialised, and the index is below the array's length.
    Some(unsafe { ptr::read_volatile(pool.add(at as usize)) })
}

/// Whether an address is of one of some networks among the settings.
#[inline(always)]
fn has(networks: *const Networks, addr: Addr) -> bool {
    for n in 0..Networks::MAX {
        // SAFETY: the fields are there and initialised, and the index is below the array's length.
        let (len, network) = unsafe {
            let all = addr_of!((*networks).all).cast::<Network>();
            (ptr::read_volatile(addr_of!((*networks).len)), ptr::read_volatile(all.add(n)))
        };
        if n as u64 >= len {
            return false;
        }
        if network.has(addr) {
            return true;
        }
    }
    false
}

/// Of which families a port is served at addresses of the node, as `netlb_common::maps::family` says it.
#[inline(always)]
pub(crate) fn node_port_families(key: &NodePortKey) -> u32 {
    // SAFETY: copied at once.
    unsafe { NODE_PORTS.get(key) }.copied().unwrap_or(0)
}

/// Whether services answer echo requests.
#[inline(always)]
pub(crate) fn answers_echo() -> bool {
    setting!(echo) != 0
}

/// Whether a program can choose the error of a call.
#[inline(always)]
pub(crate) fn chooses_errors() -> bool {
    setting!(socket.chooses_errors) != 0
}

/// The time, in the flow table's unit.
#[inline(always)]
pub(crate) fn now() -> Ticks {
    let jiffies = Jiffies { length: setting!(jiffies.length), epoch: setting!(jiffies.epoch) };
    // SAFETY: the helpers only read a clock. The verifier puts a load in the place of the first.
    let nanos = unsafe { if jiffies.length == 0 { bpf_ktime_get_coarse_ns() } else { jiffies.nanos(bpf_jiffies64()) } };
    Ticks::from_nanos(nanos)
}

/// What the control loop knows of an interface.
#[inline(always)]
pub(crate) fn interface(index: u32) -> Option<Interface> {
    directory::get(&Interfaces, directory::numbered(index)).map(Interface::from_word)
}

/// The way with this index, whatever its flag, or none: [`Way::NONE`].
#[inline(always)]
pub(crate) fn way(hop: u16) -> Way {
    HOPS.get(hop as u32 % hop::COUNT).and_then(Hop::way).unwrap_or(Way::NONE)
}

/// Remembers a way, and returns its index with its flag.
#[inline(always)]
pub(crate) fn keep_way(way: &Way, now: Ticks) -> u16 {
    hop::keep(|index| HOPS.get(index), way, now)
}

/// The index of the way to an address for what comes in by an interface, if packets went there a moment ago; else 0.
#[inline(always)]
pub(crate) fn lead<A: Address>(address: A, input: u32, now: Ticks) -> u16 {
    let hash = Lead::hash(&Kernel.hash_key(), address, input);
    LEADS.get(Lead::index(hash)).map_or(0, |lead| lead.hop(hash, now))
}

#[inline(always)]
pub(crate) fn set_lead<A: Address>(address: A, input: u32, hop: u16, now: Ticks) {
    let hash = Lead::hash(&Kernel.hash_key(), address, input);
    if let Some(lead) = LEADS.get(Lead::index(hash)) {
        lead.set_hop(hash, hop, now);
    }
}

/// The index of the address that the node would send from to an address, if it is known and the way there still is; else 0.
#[inline(always)]
pub(crate) fn lead_source<A: Address>(address: A, input: u32, now: Ticks) -> u32 {
    let hash = Lead::hash(&Kernel.hash_key(), address, input);
    let Some(lead) = LEADS.get(Lead::index(hash)) else { return 0 };
    if way(lead.hop(hash, now)).interface == 0 { 0 } else { lead.source(hash, now) }
}

#[inline(always)]
pub(crate) fn set_lead_source<A: Address>(address: A, input: u32, source: u32, now: Ticks) {
    let hash = Lead::hash(&Kernel.hash_key(), address, input);
    if let Some(lead) = LEADS.get(Lead::index(hash)) {
        lead.set_source(hash, source, now);
    }
}

/// The index of an address that flows are given as their source, or 0.
#[inline(always)]
pub(crate) fn keep_source(addr: Addr) -> u32 {
    snat::keep(|index| SNAT_ADDRESSES.get(index), addr)
}

/// What the first fragment of a datagram said, if that was seen lately.
#[inline(always)]
pub(crate) fn first_fragment(datagram: Fingerprint, now: Ticks) -> Option<First> {
    // SAFETY: copied at once; an element in use elsewhere meanwhile shows another datagram's, which loses this one.
    unsafe { FRAGMENTS.get(datagram.0) }.copied().filter(|first| first.is_fresh(now))
}

#[inline(always)]
pub(crate) fn remember_fragment(datagram: Fingerprint, first: First) {
    // It fails only where this CPU is amid a change of the map already. Losing an entry is allowed.
    let _ = FRAGMENTS.insert(datagram.0, first, 0);
}

/// The places for fragments that wait for their datagram's first one.
#[inline(always)]
pub(crate) fn held_region(datagram: Fingerprint) -> Option<&'static Region> {
    HELD.get(Region::of(datagram))
}

/// The frame in a place of a datagram's region.
#[inline(always)]
pub(crate) fn held_frame(datagram: Fingerprint, place: usize) -> Option<*mut HeldFrame> {
    HELD_FRAMES.get_ptr_mut(Region::of(datagram) * Region::PLACES + place as u32)
}

/// This CPU's counters of a service.
#[inline(always)]
fn service_stats(service: u32) -> Option<*mut ServiceStats> {
    // SAFETY: the helper takes nothing. Kernels put a load in its place.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    SERVICE_STATS.get_ptr_mut(cpu.wrapping_mul(setting!(stats_stride)).wrapping_add(service))
}

/// Counts a packet for its service.
#[inline(always)]
pub(crate) fn count_packets(service: u32, is_reply: bool, packets: u64, bytes: u64) {
    let Some(stats) = service_stats(service) else { return };
    // SAFETY: this CPU's element; programs do not preempt each other on a CPU.
    unsafe {
        if is_reply {
            (*stats).packets_out += packets;
            (*stats).bytes_out += bytes;
        } else {
            (*stats).packets_in += packets;
            (*stats).bytes_in += bytes;
        }
    }
}

/// Counts an event. There are hundreds of places that do, nearly all of them for what is rare: those share a part of the program.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if counter.is_frequent() {
        count_here(counter as u32);
    } else {
        subprograms::count(counter);
    }
}

#[inline(always)]
pub(crate) fn count_here(counter: u32) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: this CPU's element, and within it.
        unsafe { *counters.cast::<u64>().add(counter as usize % counters::ROOM) += 1 };
    }
}

/// The kernel's map of sockets.
pub(crate) struct Sockets;

impl socket::Sockets for Sockets {
    #[inline(always)]
    fn get(&self, key: &SocketKey) -> Option<Counterpart> {
        // SAFETY: copied at once. An entry evicted meanwhile may show another socket's, as a wrong one only to two threads that race.
        unsafe { SOCKETS.get(key) }.copied()
    }

    #[inline(always)]
    fn set(&self, key: &SocketKey, value: &Counterpart) {
        // It fails only where this CPU is amid a change of the map already. Losing an entry is allowed.
        let _ = SOCKETS.insert(key, value, 0);
    }

    #[inline(always)]
    fn forget(&self, key: &SocketKey) {
        let _ = SOCKETS.remove(key);
    }

    #[inline(always)]
    fn count_event(&self, counter: Counter) {
        count_call(counter);
    }

    #[inline(always)]
    fn count(&self, service: u32, backend: u32) {
        count_call(Counter::SocketsBalanced);
        if let Some(stats) = service_stats(service) {
            // SAFETY: within the element, and aligned.
            unsafe { &*(&raw const (*stats).flows).cast::<Word>() }.add(1);
        }
        if let Some(flows) = BACKEND_STATS.get(backend) {
            flows.0.add(1);
        }
    }
}

/// Counts what a process did. Packets may interrupt this on the same CPU, and so may another process, hence one instruction.
#[inline(always)]
pub(crate) fn count_call(counter: Counter) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: within this element, and aligned.
        unsafe { &*counters.cast::<Word>().add(counter as usize % counters::ROOM) }.add(1);
    }
}

/// `SERVICES`.
pub(crate) struct Services;

impl Lines for Services {
    #[inline(always)]
    fn mask(&self) -> u32 {
        setting!(services_mask)
    }

    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Line> {
        SERVICES.get(index)
    }

    #[inline(always)]
    fn beyond(&self, key: u64) -> u64 {
        subprograms::service_beyond(key)
    }
}

/// `OWNERS`.
pub(crate) struct OwnerPairs;

impl Lines for OwnerPairs {
    #[inline(always)]
    fn mask(&self) -> u32 {
        setting!(owners_mask)
    }

    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Line> {
        OWNERS.get(index)
    }

    #[inline(always)]
    fn beyond(&self, key: u64) -> u64 {
        subprograms::owners_beyond(key)
    }
}

/// `INTERFACES`.
pub(crate) struct Interfaces;

impl Lines for Interfaces {
    #[inline(always)]
    fn mask(&self) -> u32 {
        Interface::LINES - 1
    }

    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Line> {
        INTERFACES.get(index)
    }

    #[inline(always)]
    fn beyond(&self, key: u64) -> u64 {
        subprograms::interface_beyond(key)
    }
}

/// The kernel's maps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel;

impl Storage for Kernel {
    #[inline(always)]
    fn mask(&self) -> u32 {
        setting!(flow_mask)
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        FLOWS.get(index)
    }

    #[inline(always)]
    fn record(&self, place: Place) -> Option<&Record> {
        FLOW_RECORDS.get(place.0)
    }

    #[inline(always)]
    fn overflow(&self, index: u32) -> Option<&Overflow> {
        FLOW_OVERFLOWS.get(index)
    }

    #[cfg(feature = "lru")]
    #[inline(always)]
    fn find(&self, fingerprint: Fingerprint, now: Ticks) -> Option<lru::Found<'_>> {
        lru::find(fingerprint, now)
    }

    #[inline(always)]
    fn timeout(&self, state: State) -> u32 {
        let timeouts = addr_of!(SETTINGS.0.timeouts).cast::<u32>();
        // SAFETY: the index is below the array's length.
        unsafe { ptr::read_volatile(timeouts.add(state.0 as usize % State::COUNT)) }
    }
}

impl Tables for Kernel {
    #[inline(always)]
    fn hash_key(&self) -> HashKey {
        HashKey {
            seeds: [setting!(hash_key.seeds[0]), setting!(hash_key.seeds[1])],
            multipliers: [setting!(hash_key.multipliers[0]), setting!(hash_key.multipliers[1])],
        }
    }

    #[inline(always)]
    fn filter_bits_log2(&self) -> u32 {
        setting!(filter_bits_log2)
    }

    #[inline(always)]
    fn filter_has(&self, bit: u32) -> bool {
        FILTER.get(bit / u64::BITS).is_some_and(|word| word >> (bit % u64::BITS) & 1 != 0)
    }

    #[inline(always)]
    fn config_ref(&self, key: &EndpointKey) -> Option<ConfigRef> {
        // The record behind it is checked.
        directory::get(&Services, self.hash_key().endpoint(key)).map(ConfigRef)
    }

    #[inline(always)]
    fn config(&self, index: u32) -> Option<&Config> {
        CONFIGS.get(index)
    }

    #[inline(always)]
    fn ring(&self, slot: u32) -> Option<u16> {
        let line = RINGS.get(slot / RingLine::SLOTS)?;
        Some(line.0[(slot % RingLine::SLOTS) as usize])
    }

    #[inline(always)]
    fn member(&self, index: u32) -> Option<u32> {
        let line = MEMBERS.get(index / MemberLine::MEMBERS)?;
        Some(line.0[(index % MemberLine::MEMBERS) as usize])
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<&Backend> {
        BACKENDS.get(id)
    }

    #[inline(always)]
    fn frontend(&self, id: u32) -> Option<&Frontend> {
        FRONTENDS.get(id)
    }

    #[inline(always)]
    fn owners(&self, key: u64) -> u64 {
        // What it names is checked against the flow table.
        directory::get(&OwnerPairs, key).unwrap_or(0)
    }

    #[inline(always)]
    fn is_in_range(&self, service: u32, client: Addr) -> bool {
        SOURCE_RANGES.get(&Key::new(RANGE_BITS, RangeKey::new(service, client))).is_some()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: one aligned word; what it names is checked.
        unsafe { AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, value: Affinity) -> bool {
        AFFINITY.insert(key, value, 0).is_ok()
    }

    #[inline(always)]
    fn forget_affinity(&self, key: &AffinityKey) {
        let _ = AFFINITY.remove(key);
    }

    #[inline(always)]
    fn address(&self, addr: Addr) -> u32 {
        // SAFETY: copied at once.
        unsafe { ADDRESSES.get(addr) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn is_owned(&self, addr: Addr) -> bool {
        has_owned() && subprograms::is_owned(addr)
    }

    #[inline(always)]
    fn is_masqueraded(&self, source: Addr, destination: Addr) -> bool {
        has_masquerade() && subprograms::is_masqueraded(source, destination)
    }

    #[inline(always)]
    fn source(&self, index: u32) -> Option<Addr> {
        SNAT_ADDRESSES.get(index)?.addr()
    }

    #[inline(always)]
    fn source_index(&self, addr: Addr) -> u32 {
        snat::find(|index| SNAT_ADDRESSES.get(index), addr)
    }

    #[inline(always)]
    fn snat_ports(&self) -> Ports {
        Ports { first: setting!(snat_ports.first), more: setting!(snat_ports.more) }
    }

    #[inline(always)]
    fn flows_of(&self, backend: u32) -> u64 {
        BACKEND_STATS.get(backend).map_or(0, |flows| flows.0.load())
    }

    #[inline(always)]
    fn turn(&self, service: u32) -> u64 {
        CURSORS.get(service).map_or(0, |cursor| cursor.0.add(1))
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes nothing.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn is_stranger(&self, fingerprint: Fingerprint, now: Ticks) -> bool {
        // SAFETY: this CPU's element.
        SCRATCH.get_ptr_mut(0).is_some_and(|scratch| unsafe { (*scratch).strangers.has(fingerprint, now) })
    }

    #[inline(always)]
    fn note_stranger(&self, fingerprint: Fingerprint, now: Ticks) {
        if let Some(scratch) = SCRATCH.get_ptr_mut(0) {
            // SAFETY: this CPU's element.
            unsafe { (*scratch).strangers.add(fingerprint, now) };
        }
    }

    #[inline(always)]
    fn note(self, fingerprint: Fingerprint, segment: Segment, now: Ticks) {
        subprograms::note(fingerprint, segment, now);
    }

    #[inline(always)]
    fn leave(self, fingerprint: Fingerprint, data: Data, now: Ticks) {
        subprograms::leave(fingerprint, data, now);
    }

    #[inline(always)]
    fn count(&self, counter: Counter) {
        count(counter);
    }

    #[inline(always)]
    fn count_flow(&self, service: u32, backend: u32) {
        if let Some(stats) = service_stats(service) {
            // SAFETY: this CPU's element.
            unsafe { (*stats).flows += 1 };
        }
        if let Some(flows) = BACKEND_STATS.get(backend) {
            flows.0.add(1);
        }
    }
}
