//! What is known of addresses and of clients: the maps `ADDRESSES`, `SOURCE_RANGES` and `AFFINITY`.

use foldhash::{HashMap, HashSet};
use ipnet::IpNet;
use netlb_common::filter::Kind;
use netlb_common::maps::{Affinity, AffinityKey, RangeKey, address};

use super::*;

/// Entries of `AFFINITY` that are looked at in a tick.
const SWEPT: usize = 4096;
/// Seconds after which it is looked at although nobody asks for entries: a packet under way may have made one late.
const SWEEP_EMPTY: u64 = 300;

/// A network of clients.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Range {
    /// Bits of the address in the form of the maps.
    pub(super) bits: u32,
    addr: [u64; 2],
}

impl Range {
    pub(super) fn new(net: IpNet) -> Self {
        let (addr, before) = match net.trunc() {
            IpNet::V4(net) => (Addr::from_v4(net.addr().octets()), 96),
            IpNet::V6(net) => (Addr::from_bytes(net.addr().octets()), 0),
        };
        Self { bits: before + u32::from(net.prefix_len()), addr: addr.0 }
    }

    /// The bits of the key, and the key.
    pub(super) const fn key(self, service: u32) -> (u32, RangeKey) {
        (RangeKey::SERVICE_BITS + self.bits, RangeKey::new(service, Addr(self.addr)))
    }
}

/// Who has which address.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// How many services.
    services: HashMap<Addr, u32>,
    node: HashSet<Addr>,
    /// Whether packets to the node's addresses must be looked at: replies to what is masqueraded come to them.
    masquerades: bool,
    /// Those that have the bit in the filter for it.
    answered: HashSet<Addr>,
    /// The entries there are.
    pub(super) written: HashMap<Addr, u32>,
    /// Whether entries may be taken away: not before all services are known.
    is_known: bool,
    /// Services let go of them in the change under way.
    released: Vec<Addr>,
}

impl Addresses {
    pub(super) fn new(masquerades: bool) -> Self {
        Self { masquerades, ..Self::default() }
    }

    fn wanted(&self, addr: Addr) -> u32 {
        let service = if self.services.contains_key(&addr) { address::SERVICE } else { 0 };
        let node = if self.node.contains(&addr) { address::NODE } else { 0 };
        let kept = if self.is_known { 0 } else { self.written.get(&addr).copied().unwrap_or_default() };
        service | node | kept
    }
}

impl<M: Maps> Programmer<M> {
    /// A service has these addresses from now on. Says which of them are new to it.
    pub(super) fn add_addresses(&mut self, service: u32, wanted: &[Addr]) -> Result<Vec<Addr>, ApplyError> {
        let mut added = Vec::new();
        for addr in wanted {
            let Some(entry) = self.services.get_mut(service) else { break };
            if entry.addresses.contains(addr) {
                continue;
            }
            entry.addresses.push(*addr);
            *self.addresses.services.entry(*addr).or_default() += 1;
            added.push(*addr);
            if let Err(error) = self.write_address(*addr) {
                self.drop_addresses(service, &added);
                return Err(error);
            }
        }
        Ok(added)
    }

    /// A service has these addresses no more, once the change under way is done.
    pub(super) fn drop_addresses(&mut self, service: u32, addresses: &[Addr]) {
        for addr in addresses {
            let Some(entry) = self.services.get_mut(service) else { continue };
            let Some(at) = entry.addresses.iter().position(|known| known == addr) else { continue };
            entry.addresses.swap_remove(at);
            if let std::collections::hash_map::Entry::Occupied(mut count) = self.addresses.services.entry(*addr) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                    self.addresses.released.push(*addr);
                }
            }
        }
    }

    /// Forgets addresses that no service took in the place of those that let go of them.
    pub(super) fn forget_addresses(&mut self) {
        for addr in std::mem::take(&mut self.addresses.released) {
            self.write_address_or_warn(addr);
        }
    }

    /// All services were programmed once: what is still said of other addresses is from a daemon before this one.
    pub(super) fn know_addresses(&mut self) {
        if !std::mem::replace(&mut self.addresses.is_known, true) {
            for addr in self.addresses.written.keys().copied().collect::<Vec<_>>() {
                self.write_address_or_warn(addr);
            }
        }
    }

    pub(super) fn set_node_addresses(&mut self) {
        let addresses = &self.node.addresses;
        let node: HashSet<_> = addresses.iter().map(|ip| endpoint_key(SocketAddr::new(*ip, 0), 0).addr).collect();
        let before = std::mem::replace(&mut self.addresses.node, node);
        let changed: Vec<_> = before.symmetric_difference(&self.addresses.node).copied().collect();
        for addr in changed {
            self.write_address_or_warn(addr);
        }
        if self.addresses.masquerades {
            let wanted = self.addresses.node.clone();
            let before = std::mem::replace(&mut self.addresses.answered, wanted);
            for addr in self.addresses.answered.difference(&before).copied().collect::<Vec<_>>() {
                self.add_filter_bit(&EndpointKey::new(addr, PortBe(0), 0), Kind::Frontend);
            }
            for addr in before.difference(&self.addresses.answered).copied().collect::<Vec<_>>() {
                self.remove_filter_bit(&EndpointKey::new(addr, PortBe(0), 0), Kind::Frontend);
            }
        }
    }

    fn write_address_or_warn(&mut self, addr: Addr) {
        if let Err(error) = self.write_address(addr) {
            tracing::warn!("an address is not what it should be to the programs: {error}");
        }
    }

    fn write_address(&mut self, addr: Addr) -> Result<(), ApplyError> {
        let wanted = self.addresses.wanted(addr);
        if self.addresses.written.get(&addr).copied().unwrap_or_default() == wanted {
            return Ok(());
        }
        let written = match wanted {
            0 => self.maps.remove_address(&addr),
            _ => self.maps.set_address(&addr, wanted),
        };
        written.map_err(|error| match is_full(&error) {
            true => {
                ApplyError::MapFull { map: "ADDRESSES", size: self.sizes.addresses.into(), option: "limits.services" }
            }
            false => kernel_error("ADDRESSES", &error),
        })?;
        match wanted {
            0 => self.addresses.written.remove(&addr),
            _ => self.addresses.written.insert(addr, wanted),
        };
        Ok(())
    }

    /// Lets clients from these networks in as well. Says which of them are new.
    pub(super) fn add_ranges(&mut self, service: u32, wanted: &[Range]) -> Result<Vec<Range>, ApplyError> {
        let mut added = Vec::new();
        let Some(entry) = self.services.get_mut(service) else { return Ok(added) };
        let known: HashSet<_> = entry.ranges.iter().copied().collect();
        let new: Vec<_> = wanted.iter().filter(|range| !known.contains(range)).copied().collect();
        for range in new {
            let (bits, key) = range.key(service);
            if let Err(error) = self.maps.set_source_range(bits, &key) {
                self.drop_ranges(service, &added);
                return Err(match error.raw_os_error() {
                    // A trie says it so that it is full.
                    Some(libc::ENOSPC | libc::E2BIG) => ApplyError::MapFull {
                        map: "SOURCE_RANGES",
                        size: self.sizes.source_ranges.into(),
                        option: "limits.services",
                    },
                    _ => kernel_error("SOURCE_RANGES", &error),
                });
            }
            self.source_ranges += 1;
            added.push(range);
            if let Some(entry) = self.services.get_mut(service) {
                entry.ranges.push(range);
            }
        }
        Ok(added)
    }

    /// Lets clients from these networks in no more.
    pub(super) fn drop_ranges(&mut self, service: u32, ranges: &[Range]) {
        for range in ranges {
            let Some(entry) = self.services.get_mut(service) else { return };
            let Some(at) = entry.ranges.iter().position(|known| known == range) else { continue };
            let (bits, key) = range.key(service);
            match self.maps.remove_source_range(bits, &key) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    // It stays with its service, and goes with the next change.
                    tracing::warn!("map SOURCE_RANGES: an entry that is out of use could not be removed: {error}");
                }
                _ => {
                    entry.ranges.swap_remove(at);
                    self.source_ranges -= 1;
                }
            }
        }
    }

    /// Reads back what a daemon before this one said of addresses and clients.
    pub(super) fn adopt_addresses(&mut self) -> io::Result<()> {
        self.addresses.written = self.maps.addresses()?.into_iter().collect();
        if self.addresses.masquerades {
            let of_node = self.addresses.written.iter().filter(|(_, known)| *known & address::NODE != 0);
            self.addresses.answered = of_node.map(|(addr, _)| *addr).collect();
            for addr in self.addresses.answered.iter().copied().collect::<Vec<_>>() {
                self.add_counted_bit(&EndpointKey::new(addr, PortBe(0), 0), Kind::Frontend);
            }
        }
        for (bits, key) in self.maps.source_ranges()? {
            let range = bits.checked_sub(RangeKey::SERVICE_BITS).map(|bits| Range { bits, addr: halves(key.addr) });
            match (self.services.get_mut(key.service), range) {
                (Some(entry), Some(range)) => {
                    entry.ranges.push(range);
                    self.source_ranges += 1;
                }
                _ => self.maps.remove_source_range(bits, &key)?,
            }
        }
        Ok(())
    }

    /// Forgets clients that were not heard of for too long, and those of services that keep none: a part of them at a time.
    pub(super) fn sweep_affinity(&mut self) {
        let now = (self.clock)();
        let is_recent = |empty: Ticks| u64::from(now.0.wrapping_sub(empty.0)) < ticks_from_seconds(SWEEP_EMPTY);
        if self.affine == 0 && self.empty_affinity.is_some_and(is_recent) {
            return;
        }
        let (entries, next) = match self.maps.affinities(self.swept_affinity, SWEPT) {
            Ok(part) => part,
            Err(error) => {
                tracing::debug!("map AFFINITY cannot be read: {error}");
                (Vec::new(), None)
            }
        };
        self.affinities.0 += entries.len() as u64;
        for (key, value) in entries {
            if self.is_over(&key, value, now) {
                match self.maps.remove_affinity(&key, value) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::debug!("map AFFINITY: an entry cannot be removed: {error}");
                    }
                    _ => self.affinities.0 -= 1,
                }
            }
        }
        if next.is_none() {
            self.affinities = (0, self.affinities.0);
            self.empty_affinity = (self.affinities.1 == 0 && self.affine == 0).then_some(now);
        }
        self.swept_affinity = next;
    }

    fn is_over(&self, key: &AffinityKey, value: Affinity, now: Ticks) -> bool {
        let Some(entry) = self.services.get(key.service) else { return true };
        let is_backend = self.backends.get(value.backend()).is_some_and(|backend| backend.service == key.service);
        !is_backend || !entry.is_there() || value.age(now) > entry.affinity
    }
}

/// An address in a key, as [`Addr`] has it.
const fn halves([a, b, c, d]: [u32; 4]) -> [u64; 2] {
    const fn join(low: u32, high: u32) -> u64 {
        if cfg!(target_endian = "little") { (high as u64) << 32 | low as u64 } else { (low as u64) << 32 | high as u64 }
    }
    [join(a, b), join(c, d)]
}
