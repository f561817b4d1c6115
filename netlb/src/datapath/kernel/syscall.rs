//! The calls that aya does not make, or makes by interface name only: links by interface index, and grace periods.

use std::{
    ffi::CString,
    io,
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use aya::Pod;

use crate::datapath::Portion;

/// `enum bpf_cmd` in linux/bpf.h.
mod command {
    pub(super) const MAP_CREATE: libc::c_int = 0;
    pub(super) const MAP_UPDATE_ELEM: libc::c_int = 2;
    pub(super) const PROG_LOAD: libc::c_int = 5;
    pub(super) const OBJ_PIN: libc::c_int = 6;
    pub(super) const OBJ_GET: libc::c_int = 7;
    pub(super) const PROG_TEST_RUN: libc::c_int = 10;
    pub(super) const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    pub(super) const PROG_QUERY: libc::c_int = 16;
    pub(super) const MAP_LOOKUP_BATCH: libc::c_int = 24;
    pub(super) const LINK_CREATE: libc::c_int = 28;
    pub(super) const LINK_UPDATE: libc::c_int = 29;
    pub(super) const LINK_DETACH: libc::c_int = 34;
}

/// The way packets go through an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub(super) const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    /// `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS`.
    const fn tcx_attach_type(self) -> u32 {
        match self {
            Self::Ingress => 46,
            Self::Egress => 47,
        }
    }
}

/// A place in a TCX chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Order {
    First,
    Last,
}

impl Order {
    pub(super) const BOTH: [Self; 2] = [Self::First, Self::Last];
}

/// Calls bpf(2). What the kernel does not find in a short `attr` it takes for zero.
fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is as long as we say, and what it points to is alive for the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: bpf(2) has just returned this descriptor, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

#[derive(Default)]
#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Opens a pin.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    bpf(command::OBJ_GET, &mut Object { path: path.as_ptr() as u64, ..Object::default() }).map(owned)
}

pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(command::OBJ_PIN, &mut Object { path: path.as_ptr() as u64, fd: raw(object), flags: 0 }).map(drop)
}

/// Loads an XDP program of these instructions.
pub(super) fn load_xdp(instructions: &[u64]) -> io::Result<OwnedFd> {
    /// `BPF_PROG_TYPE_XDP`.
    const XDP: u32 = 6;
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
    }
    let (count, instructions) = (instructions.len() as u32, instructions.as_ptr() as u64);
    let license = c"Dual MIT/GPL".as_ptr() as u64;
    bpf(command::PROG_LOAD, &mut Load { kind: XDP, count, instructions, license }).map(owned)
}

/// Runs a program on a packet, and leaves there what it made of it.
pub(super) fn test_run(program: BorrowedFd<'_>, packet: &mut [u8]) -> io::Result<()> {
    #[derive(Default)]
    #[repr(C)]
    struct TestRun {
        program: u32,
        result: u32,
        len_in: u32,
        len_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
    }
    let (len, data) = (packet.len() as u32, packet.as_mut_ptr() as u64);
    let mut attr = TestRun {
        program: raw(program),
        len_in: len,
        len_out: len,
        data_in: data,
        data_out: data,
        ..TestRun::default()
    };
    bpf(command::PROG_TEST_RUN, &mut attr).map(drop)
}

/// Makes an array. The kernel keeps the first 15 bytes of its name.
pub(super) fn create_map(name: &str, kind: u32, value_size: u32, max_entries: u32, flags: u32) -> io::Result<OwnedFd> {
    #[derive(Default)]
    #[repr(C)]
    struct MapCreate {
        kind: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        flags: u32,
        inner: u32,
        node: u32,
        name: [u8; 16],
    }
    let mut attr = MapCreate { kind, key_size: 4, value_size, max_entries, flags, ..MapCreate::default() };
    let [room @ .., _] = &mut attr.name;
    room.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    bpf(command::MAP_CREATE, &mut attr).map(owned)
}

#[derive(Default)]
#[repr(C)]
struct LinkCreate {
    program: u32,
    index: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    expected_revision: u64,
}

/// Attaches a program to an interface of this network namespace, for as long as the link is open or pinned.
pub(super) fn create_tcx_link(
    program: BorrowedFd<'_>,
    index: u32,
    direction: Direction,
    order: Order,
) -> io::Result<OwnedFd> {
    // `BPF_F_BEFORE` and `BPF_F_AFTER`: with no other program named, before or after all of them.
    let flags = match order {
        Order::First => 1 << 3,
        Order::Last => 1 << 4,
    };
    let attach_type = direction.tcx_attach_type();
    let mut attr = LinkCreate { program: raw(program), index, attach_type, flags, ..LinkCreate::default() };
    bpf(command::LINK_CREATE, &mut attr).map(owned)
}

/// Where XDP programs run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum XdpMode {
    Native,
    Generic,
}

impl XdpMode {
    pub(super) const BOTH: [Self; 2] = [Self::Native, Self::Generic];
}

/// Attaches an XDP program in the same way.
pub(super) fn create_xdp_link(program: BorrowedFd<'_>, index: u32, mode: XdpMode) -> io::Result<OwnedFd> {
    /// `BPF_XDP`.
    const XDP: u32 = 37;
    // `XDP_FLAGS_DRV_MODE` and `XDP_FLAGS_SKB_MODE`.
    let flags = match mode {
        XdpMode::Native => 1 << 2,
        XdpMode::Generic => 1 << 1,
    };
    let mut attr = LinkCreate { program: raw(program), index, attach_type: XDP, flags, ..LinkCreate::default() };
    bpf(command::LINK_CREATE, &mut attr).map(owned)
}

/// Attaches a program to a cgroup, beside others' programs. The kernel takes no flags for such links.
pub(super) fn create_cgroup_link(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate { program: raw(program), index: raw(cgroup), attach_type, ..LinkCreate::default() };
    bpf(command::LINK_CREATE, &mut attr).map(owned)
}

/// Puts another program in a link's place. No packet goes without one.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(command::LINK_UPDATE, &mut [raw(link), raw(program), 0, 0]).map(drop)
}

/// Detaches a link, pinned or not.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(command::LINK_DETACH, &mut [raw(link)]).map(drop)
}

#[derive(Default)]
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Some entries of a hash map, and where the next ones begin if there are more. What comes or goes meanwhile does not disturb that: the
/// kernel counts buckets.
pub(super) fn lookup_batch<K: Pod + Default, V: Pod + Default>(
    map: BorrowedFd<'_>,
    from: Option<u32>,
    most: usize,
) -> io::Result<Portion<K, V>> {
    let (mut keys, mut values) = (vec![K::default(); most], vec![V::default(); most]);
    let (first, mut next) = (from.unwrap_or_default(), 0_u32);
    let mut batch = Batch {
        in_batch: from.map_or(0, |_| ptr::from_ref(&first) as u64),
        out_batch: ptr::from_mut(&mut next) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: most as u32,
        map: raw(map),
        ..Batch::default()
    };
    let next = match bpf(command::MAP_LOOKUP_BATCH, &mut batch) {
        Ok(_) => Some(next),
        // With the last ones.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok((keys.into_iter().zip(values).take(batch.count as usize).collect(), next))
}

/// What the kernel says of a link to an interface.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub(super) struct LinkInfo {
    kind: u32,
    pub(super) id: u32,
    pub(super) program: u32,
    pad: u32,
    /// 0 after the interface is gone. Both kinds of links have it here.
    pub(super) index: u32,
    attach_type: u32,
    /// Room for what other kinds of links say.
    rest: [u64; 8],
}

impl LinkInfo {
    /// Of a link to a cgroup, the cgroup's id; 0 after the cgroup is gone.
    pub(super) fn cgroup(&self) -> u64 {
        let ([a, b, c, d], [e, f, g, h]) = (self.index.to_ne_bytes(), self.attach_type.to_ne_bytes());
        u64::from_ne_bytes([a, b, c, d, e, f, g, h])
    }
}

pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    #[repr(C)]
    struct GetInfo {
        fd: u32,
        len: u32,
        info: u64,
    }
    let mut info = LinkInfo::default();
    let pointer = ptr::from_mut(&mut info) as u64;
    bpf(command::OBJ_GET_INFO_BY_FD, &mut GetInfo { fd: raw(link), len: size_of::<LinkInfo>() as u32, info: pointer })?;
    Ok(info)
}

/// The ids of the links on an interface of this network namespace; 0 where a program has no link.
pub(super) fn tcx_links(index: u32, direction: Direction) -> io::Result<Vec<u32>> {
    /// `BPF_MPROG_MAX`.
    const MOST: usize = 64;
    #[derive(Default)]
    #[repr(C)]
    struct Query {
        index: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        pad: u32,
        program_flags: u64,
        links: u64,
        link_flags: u64,
        revision: u64,
    }
    let (mut programs, mut links) = ([0_u32; MOST], [0_u32; MOST]);
    let mut attr = Query {
        index,
        attach_type: direction.tcx_attach_type(),
        programs: programs.as_mut_ptr() as u64,
        count: MOST as u32,
        links: links.as_mut_ptr() as u64,
        ..Query::default()
    };
    match bpf(command::PROG_QUERY, &mut attr) {
        Ok(_) => Ok(links[..(attr.count as usize).min(MOST)].to_vec()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether the kernel has TCX (since 6.6). The loopback interface is number 1 in every network namespace.
pub(super) fn has_tcx() -> bool {
    tcx_links(1, Direction::Ingress).is_ok()
}

/// Whether the kernel has bpf(2) at all.
pub(super) fn has_bpf() -> bool {
    let error = bpf(command::OBJ_GET, &mut Object::default()).err().and_then(|error| error.raw_os_error());
    error != Some(libc::ENOSYS)
}

/// The cookie of this network namespace (since Linux 5.14).
pub(super) fn namespace_cookie() -> io::Result<u64> {
    /// `SO_NETNS_COOKIE`, as most architectures number it.
    const NETNS_COOKIE: libc::c_int = 71;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0_u64;
    let mut len = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: the option's value is that long.
    let result = unsafe {
        let value = ptr::from_mut(&mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, NETNS_COOKIE, value, &raw mut len)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Waits for RCU grace periods.
#[derive(Debug)]
pub(super) enum Grace {
    /// `MEMBARRIER_CMD_GLOBAL` is `synchronize_rcu()`, unless there is one CPU only, which is then out of softirq by itself.
    Membarrier,
    /// Where CPUs run without a tick there is no such command. But a change of a map in a map waits as well, so that user space can rely
    /// on the old one being out of use (`maybe_wait_bpf_programs()`).
    MapInMap { outer: OwnedFd, inner: OwnedFd },
}

impl Grace {
    pub(super) fn new() -> io::Result<Self> {
        const QUERY: libc::c_int = 0;
        match membarrier(QUERY) {
            Ok(commands) if commands & i64::from(MEMBARRIER_GLOBAL) != 0 => Ok(Self::Membarrier),
            _ => Self::map_in_map(),
        }
    }

    fn map_in_map() -> io::Result<Self> {
        /// `BPF_MAP_TYPE_ARRAY` and `BPF_MAP_TYPE_ARRAY_OF_MAPS`.
        const ARRAY: u32 = 2;
        const ARRAY_OF_MAPS: u32 = 12;
        // Type, key size, value size, entries, flags, inner map.
        let inner = bpf(command::MAP_CREATE, &mut [ARRAY, 4, 4, 1, 0, 0]).map(owned)?;
        let inner_fd = inner.as_raw_fd() as u32;
        let outer = bpf(command::MAP_CREATE, &mut [ARRAY_OF_MAPS, 4, 4, 1, 0, inner_fd]).map(owned)?;
        let grace = Self::MapInMap { outer, inner };
        grace.try_wait()?;
        Ok(grace)
    }

    /// Returns when every program that ran at the call has ended.
    pub(super) fn wait(&self) {
        if let Err(error) = self.try_wait() {
            // It worked when it was made, and neither way has a reason to fail later. To go on at once would be wrong for some packets.
            tracing::error!("cannot wait for the end of running programs: {error}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }

    fn try_wait(&self) -> io::Result<()> {
        match self {
            Self::Membarrier => membarrier(MEMBARRIER_GLOBAL).map(drop),
            Self::MapInMap { outer, inner } => {
                #[repr(C)]
                struct Update {
                    map: u32,
                    pad: u32,
                    key: u64,
                    value: u64,
                    flags: u64,
                }
                let (key, value) = (0_u32, inner.as_raw_fd() as u32);
                let mut attr = Update {
                    map: outer.as_raw_fd() as u32,
                    pad: 0,
                    key: ptr::from_ref(&key) as u64,
                    value: ptr::from_ref(&value) as u64,
                    flags: 0,
                };
                bpf(command::MAP_UPDATE_ELEM, &mut attr).map(drop)
            }
        }
    }
}

const MEMBARRIER_GLOBAL: libc::c_int = 1;

fn membarrier(command: libc::c_int) -> io::Result<i64> {
    // SAFETY: membarrier(2) takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0_u32, 0_i32) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Fills an array from the kernel's random number generator.
pub(super) fn random<const N: usize>() -> io::Result<[u64; N]> {
    let mut numbers = [0_u64; N];
    let bytes = size_of_val(&numbers);
    // SAFETY: the array has room for that many bytes, and any bytes are numbers.
    let got = unsafe { libc::getrandom(numbers.as_mut_ptr().cast(), bytes, 0) };
    // At most 256 bytes are never cut short (getrandom(2)).
    if got == bytes as isize { Ok(numbers) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_differ() {
        assert_ne!(random::<4>().unwrap(), random::<4>().unwrap());
    }
}
