//! Rings: which of a service's backends each slot names.
//!
//! A Maglev ring (Eisenbud et al., NSDI 2016, §3.4) is made from the backends alone, so that every node that knows the
//! same backends builds the same ring, and a backend more or less moves about its own share of the flows. Each backend
//! has exactly the slots its weight is worth, and takes them in an order of its own, by turns; a heavy one has more
//! turns, spread evenly.
//!
//! The other algorithms need no particular slot for a flow, only right shares: their ring is the sequence of turns
//! itself, as short as the weights allow. Nothing here does I/O.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use foldhash::{HashMap, HashMapExt as _};

#[cfg(test)]
use crate::model::BackendState;
use crate::model::{Algorithm, Backend};

/// Sizes of Maglev rings: primes, so that every step visits every slot. Few sizes, because another size moves nearly
/// every flow.
const SIZES: [u32; 5] = [251, 1021, 4093, 16_381, 65_521];
/// Slots per backend that keep a change from moving more than its share of flows.
const SLOTS_PER_MEMBER: u64 = 100;
/// Slots per unit of weight that make shares exact to a quarter of a unit.
const SLOTS_PER_UNIT: u64 = 4;
/// No member.
const FREE: u16 = u16::MAX;
/// Rings that are worth a second thread.
const PARALLEL: usize = 64;

/// The backends of a service, in the order in which its ring numbers them: those that take new flows, then those that drain. The latter
/// are in no ring, but a connection that lost its place in the flow table is looked for at them as well.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Members(Vec<Member>, Vec<SocketAddr>);

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Member {
    address: SocketAddr,
    weight: u32,
}

impl Members {
    /// Those that take new flows, and those that drain, which may be among the former.
    pub(crate) fn new<'a>(
        accepting: impl Iterator<Item = &'a Backend>,
        draining: impl Iterator<Item = &'a Backend>,
    ) -> Self {
        let member = |backend: &Backend| Member { address: backend.address, weight: backend.weight.get().into() };
        let mut accepting: Vec<_> = accepting.map(member).collect();
        accepting.sort_unstable_by_key(|member| member.address);
        let is_new = |address: &SocketAddr| accepting.binary_search_by_key(address, |member| member.address).is_err();
        let mut draining: Vec<_> = draining.map(|backend| backend.address).filter(is_new).collect();
        draining.sort_unstable();
        Self(accepting, draining)
    }

    #[cfg(test)]
    pub(crate) fn of(backends: &[Backend]) -> Self {
        let accepts = |backend: &&Backend| backend.state == BackendState::Active;
        let draining = backends.iter().filter(|backend| !accepts(backend));
        Self::new(backends.iter().filter(accepts), draining)
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.iter().map(|member| member.address).chain(self.1.iter().copied())
    }

    pub(crate) const fn len(&self) -> usize {
        self.0.len() + self.1.len()
    }

    /// The members' numbers, slot by slot. No member, no slot.
    pub(crate) fn ring(&self, algorithm: Algorithm) -> Vec<u16> {
        match algorithm {
            _ if self.0.is_empty() => Vec::new(),
            Algorithm::Maglev | Algorithm::SourceHash => self.maglev(),
            Algorithm::Random | Algorithm::RoundRobin | Algorithm::LeastConn => {
                turns(&self.quotas(self.units().min(SIZES[4].into()) as u32))
            }
        }
    }

    /// The sum of the weights, reduced.
    fn units(&self) -> u64 {
        let weights = || self.0.iter().map(|member| u64::from(member.weight));
        weights().sum::<u64>() / weights().fold(0, greatest_common_divisor).max(1)
    }

    fn maglev(&self) -> Vec<u16> {
        let wanted = (self.0.len() as u64 * SLOTS_PER_MEMBER).max(self.units() * SLOTS_PER_UNIT);
        // A lone backend needs no more than the smallest, whatever its weight.
        let size = SIZES.into_iter().find(|size| u64::from(*size) >= wanted).unwrap_or(SIZES[4]);
        let mut ring = vec![FREE; size as usize];
        let mut walks: Vec<_> = self.0.iter().map(|member| Walk::new(member.address, size)).collect();
        for member in turns(&self.quotas(size)) {
            let walk = &mut walks[usize::from(member)];
            while ring[walk.at as usize] != FREE {
                walk.step(size);
            }
            ring[walk.at as usize] = member;
        }
        ring
    }

    /// How many of a ring's slots each member gets: its weight's worth, rounded by largest remainder, and at least one.
    fn quotas(&self, size: u32) -> Vec<u32> {
        let mut quotas = vec![1; self.0.len()];
        let mut slots = u64::from(size);
        let mut weights: u64 = self.0.iter().map(|member| u64::from(member.weight)).sum();
        let mut by_weight: Vec<_> = (0..self.0.len()).collect();
        by_weight.sort_by_key(|index| self.0[*index].weight);
        let mut rest = by_weight.as_slice();
        // Those worth less than a slot get one all the same; the others share what is left.
        while let [lightest, others @ ..] = rest
            && u64::from(self.0[*lightest].weight) * slots < weights
        {
            weights -= u64::from(self.0[*lightest].weight);
            slots -= 1;
            rest = others;
        }
        let mut left = slots;
        let mut remainders = Vec::with_capacity(rest.len());
        for index in rest {
            let share = u64::from(self.0[*index].weight) * slots;
            quotas[*index] = (share / weights) as u32;
            left -= share / weights;
            remainders.push((std::cmp::Reverse(share % weights), *index));
        }
        remainders.sort_unstable();
        for (_, index) in remainders.into_iter().take(left as usize) {
            quotas[index] += 1;
        }
        quotas
    }
}

/// The rings of many services, each of them built once, on every CPU there is.
pub(crate) fn rings(services: &[(&Members, Algorithm)]) -> Vec<Arc<[u16]>> {
    if services.len() < PARALLEL {
        return build(services);
    }
    // Services with equal backends have equal rings.
    let (mut numbers, mut different) = (HashMap::with_capacity(services.len()), Vec::new());
    let mut of_service = Vec::with_capacity(services.len());
    for &(members, algorithm) in services {
        of_service.push(*numbers.entry((&members.0, algorithm)).or_insert(different.len()));
        if of_service.last() == Some(&different.len()) {
            different.push((members, algorithm));
        }
    }
    let rings = build_in_parallel(&different);
    of_service.into_iter().map(|number| Arc::clone(&rings[number])).collect()
}

fn build(services: &[(&Members, Algorithm)]) -> Vec<Arc<[u16]>> {
    services.iter().map(|(members, algorithm)| members.ring(*algorithm).into()).collect()
}

fn build_in_parallel(services: &[(&Members, Algorithm)]) -> Vec<Arc<[u16]>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    if services.len() < PARALLEL || threads == 1 {
        return build(services);
    }
    std::thread::scope(|scope| {
        let parts = services.chunks(services.len().div_ceil(threads));
        let parts: Vec<_> = parts.map(|part| (part, scope.spawn(move || build(part)))).collect();
        // A thread ends without its rings only by a panic, which would come again here, where it is seen.
        parts.into_iter().flat_map(|(part, thread)| thread.join().unwrap_or_else(|_| build(part))).collect()
    })
}

/// Members in turn, each as often as its quota says, as evenly spread as can be.
fn turns(quotas: &[u32]) -> Vec<u16> {
    let most = quotas.iter().copied().max().unwrap_or(0);
    let least = quotas.iter().copied().min().unwrap_or(0);
    if most - least <= 1 {
        let round = |round| (0_u16..).zip(quotas).filter(move |(_, quota)| **quota > round).map(|(member, _)| member);
        return (0..most).flat_map(round).collect();
    }
    // The k-th turn of n comes at (k + 1/2) / n of the way.
    let mut turns: Vec<u64> = (0_u64..)
        .zip(quotas)
        .flat_map(|(member, quota)| {
            let quota = u64::from(*quota);
            (0..quota).map(move |k| (((2 * k + 1) << 31) / quota) << 16 | member)
        })
        .collect();
    turns.sort_unstable();
    turns.into_iter().map(|turn| turn as u16).collect()
}

/// The order in which a member wants slots: from somewhere, in equal steps, through all of them.
struct Walk {
    at: u32,
    step: u32,
}

impl Walk {
    fn new(address: SocketAddr, size: u32) -> Self {
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
            IpAddr::V6(ip) => ip.to_bits(),
        };
        let hash =
            [(ip >> 64) as u64, ip as u64, address.port().into()].into_iter().fold(0, |hash, word| mix(hash ^ word));
        let size = u64::from(size);
        Self { at: (hash % size) as u32, step: (mix(hash) % (size - 1)) as u32 + 1 }
    }

    fn step(&mut self, size: u32) {
        self.at += self.step;
        if self.at >= size {
            self.at -= size;
        }
    }
}

/// Spreads the bits of a word (SplitMix64, Steele et al., OOPSLA 2014).
const fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

const fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::model::{Service, Weight};

    fn backend(number: u32, weight: u64) -> Backend {
        let address = SocketAddr::new(IpAddr::from((0x0af4_0000 + number).to_be_bytes()), 8080);
        Backend { weight: Weight::new(weight).unwrap(), ..Backend::new(address) }
    }

    fn equal(numbers: impl IntoIterator<Item = u32>) -> Vec<Backend> {
        numbers.into_iter().map(|number| backend(number, 1)).collect()
    }

    /// The backend of every slot, which is what flows see.
    fn slots(backends: &[Backend], algorithm: Algorithm) -> Vec<SocketAddr> {
        let members = Members::of(backends);
        let addresses: Vec<_> = members.addresses().collect();
        members.ring(algorithm).into_iter().map(|member| addresses[usize::from(member)]).collect()
    }

    fn shares(backends: &[Backend], algorithm: Algorithm) -> HashMap<SocketAddr, usize> {
        let mut shares = HashMap::new();
        for slot in slots(backends, algorithm) {
            *shares.entry(slot).or_default() += 1;
        }
        shares
    }

    fn moved(before: &[Backend], after: &[Backend]) -> f64 {
        let (before, after) = (slots(before, Algorithm::Maglev), slots(after, Algorithm::Maglev));
        assert_eq!(before.len(), after.len(), "another size moves nearly everything");
        before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 / before.len() as f64
    }

    #[test]
    fn the_ring_is_the_smallest_with_a_hundred_slots_per_backend() {
        let size = |count| Members::of(&equal(0..count)).ring(Algorithm::Maglev).len();
        assert_eq!(
            [0, 1, 2, 3, 10, 11, 40, 41, 163, 164].map(size),
            [0, 251, 251, 1021, 1021, 4093, 4093, 16_381, 16_381, 65_521]
        );
        assert_eq!(size(Service::MAX_BACKENDS as u32), 65_521);
    }

    #[test]
    fn uneven_weights_get_a_ring_that_can_tell_them_apart() {
        let size = |weights: &[u64]| {
            let backends: Vec<_> = (0..).zip(weights).map(|(number, weight)| backend(number, *weight)).collect();
            Members::of(&backends).ring(Algorithm::Maglev).len()
        };
        assert_eq!(size(&[1000, 1]), 4093);
        assert_eq!(size(&[1000, 500]), 251, "which is two to one");
        assert_eq!(size(&[1000]), 251);
    }

    #[test]
    fn a_ring_stays_as_it_is_from_version_to_version() {
        let ring = Members::of(&[backend(1, 1), backend(2, 3), backend(3, 2)]).ring(Algorithm::Maglev);
        assert_eq!(ring.len(), 1021);
        assert_eq!(ring[..32], PINNED);
        let hash = ring.iter().fold(0, |hash, slot| mix(hash ^ u64::from(*slot)));
        assert_eq!(hash, PINNED_HASH);
    }

    const PINNED: [u16; 32] =
        [1, 1, 2, 0, 2, 0, 2, 1, 1, 2, 1, 1, 1, 1, 0, 1, 1, 1, 2, 2, 0, 2, 0, 2, 1, 1, 2, 1, 1, 1, 0, 2];
    const PINNED_HASH: u64 = 0x6aa9_da9f_87b4_d914;

    #[test]
    fn a_backend_more_or_less_moves_little_more_than_its_share() {
        // In shares of one backend. Longer walks in larger sets move more shares, of a smaller size: never more than 3
        // % of the flows.
        for (count, most) in
            [(4, 2.0), (7, 2.5), (12, 2.0), (20, 2.0), (39, 2.5), (60, 2.5), (100, 3.0), (200, 3.0), (500, 7.0)]
        {
            let moved = (0..10).map(|seed| {
                let all = equal((0..count).map(|number| seed * 10_000 + number * 3));
                let mut fewer = all.clone();
                fewer.remove((seed * 7) as usize % all.len());
                moved(&all, &fewer) * f64::from(count)
            });
            let worst = moved.fold(0.0, f64::max);
            assert!((1.0..=most).contains(&worst), "{count} backends: {worst:.2} shares moved");
        }
    }

    #[test]
    fn a_changed_weight_moves_little() {
        let before: Vec<_> = (0..10).map(|number| backend(number, 10)).collect();
        let mut after = before.clone();
        after[3].weight = Weight::new(11).unwrap();
        let moved = moved(&before, &after);
        assert!(moved < 0.06, "{moved}");
    }

    #[test]
    fn turns_of_a_heavy_backend_are_spread() {
        let order = |weights: &[u64]| {
            let backends: Vec<_> = (0..).zip(weights).map(|(number, weight)| backend(number, *weight)).collect();
            Members::of(&backends).ring(Algorithm::RoundRobin)
        };
        assert_eq!(order(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(order(&[7, 7, 7]), [0, 1, 2]);
        assert_eq!(order(&[4, 1, 1]), [0, 0, 1, 2, 0, 0]);
        assert_eq!(order(&[2, 1]), [0, 1, 0]);
        assert_eq!(order(&[300]), [0]);
    }

    #[test]
    fn draining_backends_are_in_no_ring() {
        let mut backends = equal(0..3);
        backends[1].state = BackendState::Draining;
        assert_eq!(shares(&backends, Algorithm::RoundRobin).get(&backends[1].address), None);
        assert_eq!(
            slots(&backends, Algorithm::Maglev),
            slots(&[backends[0].clone(), backends[2].clone()], Algorithm::Maglev)
        );
    }

    #[test]
    fn the_most_backends_all_have_a_slot() {
        for heavy in [1, 1000] {
            let mut backends = equal(0..Service::MAX_BACKENDS as u32);
            backends[17].weight = Weight::new(heavy).unwrap();
            for algorithm in [Algorithm::Maglev, Algorithm::Random] {
                let shares = shares(&backends, algorithm);
                assert_eq!(shares.len(), Service::MAX_BACKENDS);
            }
        }
    }

    #[test]
    fn many_rings_are_those_built_one_by_one() {
        // Each is wanted by three services.
        let members: Vec<_> = (0..201).map(|n| n / 3 * 2).map(|n| Members::of(&equal(n..n + n % 12))).collect();
        let jobs: Vec<_> = members.iter().map(|members| (members, Algorithm::Maglev)).collect();
        let expected: Vec<_> = members.iter().map(|members| members.ring(Algorithm::Maglev).into()).collect();
        let rings = rings(&jobs);
        assert_eq!(rings, expected);
        assert!(rings.chunks(3).all(|same| same.iter().all(|ring| Arc::ptr_eq(ring, &same[0]))), "and built once");
    }

    #[test]
    #[expect(clippy::print_stdout, reason = "for whoever asks how long it takes")]
    fn ten_thousand_rings_take_a_moment() {
        let members: Vec<_> = (0..10_000).map(|n| Members::of(&equal(n * 10..n * 10 + 10))).collect();
        let jobs: Vec<_> = members.iter().map(|members| (members, Algorithm::Maglev)).collect();
        let start = Instant::now();
        assert_eq!(rings(&jobs).len(), 10_000);
        println!("10 000 rings of 10 backends: {:?}", start.elapsed());
    }

    fn backends() -> impl Strategy<Value = Vec<Backend>> {
        let weight = prop_oneof![Just(1), 1..=10_u64, 1..=1000_u64];
        prop::collection::btree_map(0_u32..5000, weight, 1..40)
            .prop_map(|all| all.into_iter().map(|(number, weight)| backend(number, weight)).collect())
    }

    proptest! {
        // Large rings take their time without optimisation.
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn shares_are_within_a_slot_of_exact(backends in backends()) {
            let total: f64 = backends.iter().map(|backend| f64::from(backend.weight.get())).sum();
            for algorithm in [Algorithm::Maglev, Algorithm::Random, Algorithm::RoundRobin, Algorithm::LeastConn] {
                let shares = shares(&backends, algorithm);
                let slots = shares.values().sum::<usize>() as f64;
                let small = |backend: &&Backend| f64::from(backend.weight.get()) * slots / total < 1.0;
                // Each backend that gets a slot it is not worth takes it from the others.
                let slack = backends.iter().filter(small).count() as f64;
                for backend in &backends {
                    let exact = f64::from(backend.weight.get()) * slots / total;
                    let share = shares[&backend.address] as f64;
                    prop_assert!((share - exact).abs() < 1.0 + slack, "{share} instead of {exact} of {slots}");
                }
            }
        }

        #[test]
        fn the_order_of_the_backends_does_not_matter(backends in backends(), seed: u64) {
            let mut shuffled = backends.clone();
            shuffled.sort_by_key(|backend| mix(seed ^ u64::from(Walk::new(backend.address, SIZES[4]).at)));
            for algorithm in [Algorithm::Maglev, Algorithm::Random, Algorithm::RoundRobin, Algorithm::LeastConn] {
                prop_assert_eq!(slots(&backends, algorithm), slots(&shuffled, algorithm));
            }
        }
    }
}
