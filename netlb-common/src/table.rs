//! The flow table: set-associative, one cache line per look-up in the common case, no collector, and a policy for who makes room.
//!
//! A bucket is a cache line of four slots. A flow's direction has one slot, found by its fingerprint in one of three buckets. What a
//! packet needs stands in the slot itself; a record beside each slot, which packets of the established path do not touch, holds the whole
//! 5-tuple.
//!
//! **Writing a slot.** Compare-and-swap its data to CLAIMING, store the fingerprint, swap the data in. A reader uses data only if it is not
//! CLAIMING and its tag is the fingerprint's. Everybody else changes data by compare-and-swap of the whole word and does nothing on failure.
//! A writer that publishes looks at the buckets once more: of two slots with one fingerprint the lower place stays, and whoever sees both
//! frees the other. So two CPUs that create one flow end with one.
//!
//! **Writing a record.** By plain stores, after the slot where nothing hangs on it: a record is a miss of the cache, and a compare-and-swap
//! after it would wait for that. So a reader may find another flow's record, or parts of two; the first word is a sum that tells.
//!
//! **Time.** A slot older than its state's timeout is free, for look-ups as for inserts. The field holds [`Ticks`], or four of them as a
//! unit while the flow is established, and wraps; timeouts are at most a quarter of the wrap.

use crate::{
    addr::{Addr, PortBe},
    atomic::Word,
    conntrack::{Direction, Segment, State},
    flow::Fingerprint,
    opaque::{any, rolled},
    snat::Snat,
    time::Ticks,
};

/// Slots of a bucket.
pub const SLOTS: usize = 4;
/// Buckets a fingerprint may stand in.
const CHOICES: u32 = 3;
/// The most buckets there can be, as a power of two: as many bits as each choice draws from a fingerprint.
pub const MAX_BUCKETS_LOG2: u32 = 26;
/// Ticks after which a claimed slot was abandoned.
const CLAIM_TICKS: u32 = 2;
/// Units a slot's time may be ahead: CPUs read a coarse clock one after the other.
const AHEAD: u32 = 4;
/// Ticks for which a live flow that was heard of is safe from new ones: at least 60 s.
pub const SAFE_TICKS: u32 = 56;
/// Free slots of a bucket for which later candidates need not be looked at.
const ENOUGH: u64 = 2;
/// Attempts at a slot before a new flow is refused: others were faster each time.
const ATTEMPTS: u32 = 3;

/// A cache line of slots.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Bucket {
    pub slots: [Slot; SLOTS],
}

#[derive(Debug)]
#[repr(C)]
pub struct Slot {
    pub fingerprint: Word,
    pub data: Word,
}

const _: () = assert!(size_of::<Bucket>() == 64);

/// Of eight buckets, how many slots of later candidates have a flow that would rather stand there; eight bits each.
///
/// Counted before such a flow can be found, and discounted when its slot is written anew. So where this says none, nobody need look at the
/// later candidates. More than 255 would want as many flows with the same bucket, which a keyed hash does not give.
#[derive(Debug)]
#[repr(transparent)]
pub struct Overflow(Word);

impl Overflow {
    /// Buckets that one tells of.
    pub const BUCKETS: u32 = 8;

    #[cfg(test)]
    pub(crate) const fn empty() -> Self {
        Self(Word::new(0))
    }

    #[cfg(test)]
    fn count(&self, bucket: u32) -> u32 {
        (self.0.load() >> Self::shift(bucket)) as u32 & 0xff
    }

    #[inline(always)]
    const fn shift(bucket: u32) -> u32 {
        bucket % Self::BUCKETS * 8
    }

    #[inline(always)]
    fn has(&self, bucket: u32) -> bool {
        self.0.load() >> Self::shift(bucket) & 0xff != 0
    }

    #[inline(always)]
    fn change(&self, bucket: u32, is_more: bool) {
        let one = 1_u64 << Self::shift(bucket);
        if is_more {
            self.0.add(one);
        } else if self.has(bucket) {
            self.0.add(one.wrapping_neg());
        }
    }
}

/// What a slot says of its flow, from bit 0: time 14, next hop 16, tag 6, flags 3, state 4, id 21.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(transparent)]
pub struct Data(pub u64);

impl Data {
    const TIME_BITS: u32 = 14;
    const TIME: u64 = (1 << Self::TIME_BITS) - 1;
    const HOP_SHIFT: u32 = Self::TIME_BITS;
    const HOP: u64 = 0xffff << Self::HOP_SHIFT;
    const TAG_SHIFT: u32 = 30;
    const TAG: u64 = 0x3f << Self::TAG_SHIFT;
    /// Translates replies: the id is a frontend's, else a backend's.
    const REPLY: u64 = 1 << 36;
    /// The flow has another source at its backend: the record tells both.
    const SNAT: u64 = 1 << 37;
    /// Packets are wrapped for their backend: the record tells the outer source. There is no other direction.
    const WRAPPED: u64 = 1 << 38;
    const STATE_SHIFT: u32 = 39;
    const STATE: u64 = 0xf << Self::STATE_SHIFT;
    const ID_SHIFT: u32 = 43;

    /// No flow.
    pub const NONE: Self = Self(0);

    /// A new flow's slot. The table adds tag and time.
    #[inline(always)]
    #[must_use]
    pub const fn new(direction: Direction, state: State, id: u32) -> Self {
        let reply = match direction {
            Direction::Forward => 0,
            Direction::Reply => Self::REPLY,
        };
        Self((id as u64) << Self::ID_SHIFT | (state.0 as u64) << Self::STATE_SHIFT | reply)
    }

    #[inline(always)]
    #[must_use]
    pub const fn id(self) -> u32 {
        (self.0 >> Self::ID_SHIFT) as u32
    }

    #[inline(always)]
    #[must_use]
    pub const fn state(self) -> State {
        State((self.0 >> Self::STATE_SHIFT) as u8 & 0xf)
    }

    #[inline(always)]
    #[must_use]
    pub const fn direction(self) -> Direction {
        if self.0 & Self::REPLY == 0 { Direction::Forward } else { Direction::Reply }
    }

    /// Whether the flow has another source at its backend.
    #[inline(always)]
    #[must_use]
    pub const fn has_snat(self) -> bool {
        self.0 & Self::SNAT != 0
    }

    /// Whether the flow is no service's: its source is an address of the node, and that is all.
    #[inline(always)]
    #[must_use]
    pub const fn is_masqueraded(self) -> bool {
        self.has_snat() && self.id() == 0
    }

    #[inline(always)]
    #[must_use]
    pub const fn with_snat(self, has_snat: bool) -> Self {
        if has_snat { Self(self.0 | Self::SNAT) } else { self }
    }

    /// Whether the flow's packets are wrapped for their backend instead of being translated. Such flows have an address of the node as well,
    /// as those with SNAT do, and no other direction.
    #[inline(always)]
    #[must_use]
    pub const fn is_wrapped(self) -> bool {
        self.0 & Self::WRAPPED != 0
    }

    #[inline(always)]
    #[must_use]
    pub const fn wrapped(self) -> Self {
        Self(self.0 | Self::SNAT | Self::WRAPPED)
    }

    /// The index in `HOPS` of the way its packets leave by, or 0 if it is not known.
    #[inline(always)]
    #[must_use]
    pub const fn hop(self) -> u16 {
        (self.0 >> Self::HOP_SHIFT) as u16
    }

    #[inline(always)]
    #[must_use]
    pub const fn with_hop(self, hop: u16) -> Self {
        Self(self.0 & !Self::HOP | (hop as u64) << Self::HOP_SHIFT)
    }

    /// Whether this was written in another unit of time than the present one.
    #[inline(always)]
    #[must_use]
    pub const fn is_due(self, now: Ticks) -> bool {
        (self.0 ^ self.at(now).0) & Self::TIME != 0
    }

    /// Whether one more packet, in the unit of time in which this was written, leaves it as it is.
    #[inline(always)]
    #[must_use]
    pub const fn is_kept_by(self, segment: Segment) -> bool {
        // Whose answers do not pass by, that is taken for answered which its client goes on with.
        let is_unanswered = self.is_wrapped() && matches!(self.state(), State::UDP_ONE_WAY);
        self.state().is_kept_by(self.direction(), segment) && !is_unanswered
    }

    /// Ticks since a packet was noted.
    #[inline(always)]
    #[must_use]
    pub const fn idle(self, now: Ticks) -> u32 {
        self.idle_units(now) << self.state().unit_shift()
    }

    #[inline(always)]
    const fn idle_units(self, now: Ticks) -> u32 {
        let now = now.0 >> self.state().unit_shift();
        let units = now.wrapping_sub(self.0 as u32) & Self::TIME as u32;
        if units > Self::TIME as u32 - AHEAD { 0 } else { units }
    }

    #[inline(always)]
    const fn at(self, now: Ticks) -> Self {
        Self(self.0 & !Self::TIME | (now.0 >> self.state().unit_shift()) as u64 & Self::TIME)
    }

    #[inline(always)]
    const fn with_state(self, state: State) -> Self {
        Self(self.0 & !Self::STATE | (state.0 as u64) << Self::STATE_SHIFT)
    }

    #[inline(always)]
    const fn with_tag(self, fingerprint: Fingerprint) -> Self {
        Self(self.0 & !Self::TAG | fingerprint.tag() << Self::TAG_SHIFT)
    }

    #[inline(always)]
    const fn has_tag(self, fingerprint: Fingerprint) -> bool {
        (self.0 ^ fingerprint.tag() << Self::TAG_SHIFT) & Self::TAG == 0
    }

    /// The data after one more packet.
    #[inline(always)]
    #[must_use]
    pub const fn after(self, segment: Segment, now: Ticks) -> Self {
        let state = self.state();
        let next = if self.is_wrapped() {
            // Its other direction does not pass by.
            state.next_unanswered(segment)
        } else {
            state.next(self.direction(), segment)
        };
        self.with_state(next).at(now)
    }

    /// Whom to evict first: the greatest. 0 is nobody to be evicted.
    const fn eviction_rank(self, now: Ticks) -> u32 {
        let idle = self.idle(now);
        let class = match self.state() {
            State::FREE | State::CLAIMING => return 0,
            State::CLOSING | State::RESET_FORWARD | State::RESET_REPLY => 4,
            State::SYN_SENT | State::SYN_RECEIVED => 3,
            State::UDP_ONE_WAY => 2,
            _ if idle > SAFE_TICKS => 1,
            _ => return 0,
        };
        class << 20 | idle
    }
}

impl Fingerprint {
    /// Bits that no choice of a bucket draws from.
    #[inline(always)]
    const fn tag(self) -> u64 {
        self.0 >> MAX_BUCKETS_LOG2 & 0x3f
    }

    #[inline(always)]
    const fn bucket(self, choice: u32, mask: u32) -> u32 {
        let bits = match choice {
            0 => self.0,
            1 => self.0 >> 32,
            // 2^64 divided by the golden ratio, odd.
            _ => self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 38,
        };
        bits as u32 & mask
    }
}

/// What stands beside a slot: everything of its flow. Belongs to the slot only while its sum says so.
#[derive(Debug)]
#[repr(C)]
pub struct Record {
    /// The slot's fingerprint, and all of the rest.
    sum: Word,
    twin: Word,
    client: [Word; 2],
    /// Client port 16, protocol 8, source 32 from bit 24.
    client_end: Word,
    /// Frontend id 32, backend id 32.
    ids: Word,
}

const _: () = assert!(size_of::<Record>() == 48);

/// A flow, as its records have it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Flow {
    /// The fingerprint of the other direction.
    pub twin: Fingerprint,
    pub client: Addr,
    pub client_port: PortBe,
    pub protocol: u8,
    /// The source it has at the backend, if that is not the client.
    pub snat: Snat,
    pub frontend: u32,
    pub backend: u32,
}

impl Record {
    #[cfg(test)]
    pub(crate) const fn empty() -> Self {
        const fn word() -> Word {
            Word::new(0)
        }
        Self { sum: word(), twin: word(), client: [word(), word()], client_end: word(), ids: word() }
    }

    /// Of parts of two records it is neither's: each word is weighed by an odd number of its own.
    #[inline(always)]
    const fn sum(fingerprint: Fingerprint, [twin, a, b, end, ids]: [u64; 5]) -> u64 {
        fingerprint.0
            ^ twin
            ^ a.wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ b.wrapping_mul(0xbf58_476d_1ce4_e5b9)
            ^ end.wrapping_mul(0x94d0_49bb_1331_11eb)
            ^ ids.wrapping_mul(0xff51_afd7_ed55_8ccd)
    }

    #[inline(always)]
    pub fn write(&self, fingerprint: Fingerprint, flow: &Flow) {
        let snat = (flow.snat.0 as u64) << 24;
        let end = flow.client_port.0 as u64 | (flow.protocol as u64) << 16 | snat;
        let ids = flow.frontend as u64 | (flow.backend as u64) << 32;
        let [a, b] = flow.client.0;
        self.sum.store(Self::sum(fingerprint, [flow.twin.0, a, b, end, ids]));
        self.twin.store(flow.twin.0);
        self.client[0].store(a);
        self.client[1].store(b);
        self.client_end.store(end);
        self.ids.store(ids);
    }

    /// The flow of the slot beside which this stands, if it is still the slot's.
    #[inline(always)]
    pub fn read(&self, fingerprint: Fingerprint) -> Option<Flow> {
        let (twin, a, b) = (self.twin.load(), self.client[0].load(), self.client[1].load());
        let (end, ids) = (self.client_end.load(), self.ids.load());
        if self.sum.load() != Self::sum(fingerprint, [twin, a, b, end, ids]) {
            return None;
        }
        Some(Flow {
            twin: Fingerprint(twin),
            client: Addr([a, b]),
            client_port: PortBe(end as u16),
            protocol: (end >> 16) as u8,
            snat: Snat((end >> 24) as u32),
            frontend: ids as u32,
            backend: (ids >> 32) as u32,
        })
    }
}

/// Where buckets and records are: maps of the kernel, their mapping in user space, or memory of a test.
pub trait Storage {
    /// Buckets, less one.
    fn mask(&self) -> u32;
    fn bucket(&self, index: u32) -> Option<&Bucket>;
    fn record(&self, place: Place) -> Option<&Record>;
    fn overflow(&self, index: u32) -> Option<&Overflow>;
    /// How long a flow in this state is kept, in the state's units.
    fn timeout(&self, state: State) -> u32;

    /// Looks a direction of a flow up.
    #[inline(always)]
    fn find(&self, fingerprint: Fingerprint, now: Ticks) -> Option<Found<'_>> {
        find(self, fingerprint, now)
    }
}

/// What is done with the table beside look-ups on the way of most packets.
///
/// Provided for every storage. The programs override it with calls of BPF subprograms that do the same, each of which the verifier looks at
/// once: inlined wherever they are used, the ways through them would multiply.
pub trait Operations: Storage + Copy {
    /// Looks a direction of a flow up: what most packets need.
    #[inline(always)]
    fn look_up(&self, fingerprint: Fingerprint, now: Ticks) -> Option<Found<'_>> {
        look_up(self, fingerprint, now)
    }

    /// Where a direction of a flow stands.
    #[inline(always)]
    fn locate(&self, fingerprint: Fingerprint, now: Ticks) -> Option<Place> {
        Some(self.find(fingerprint, now)?.place)
    }

    /// Looks at one bucket for an insert.
    #[inline(always)]
    fn scan(self, index: u32, new: &New) -> Scan {
        scan(&self, index, new)
    }

    /// Gives a direction of a flow a slot.
    #[inline(always)]
    fn insert(self, new: New) -> Inserted {
        insert(self, &new)
    }

    /// Writes the record of a slot that an insert with [`New::defers`] gave a direction of a flow.
    #[inline(always)]
    fn record_at(self, place: Place, fingerprint: Fingerprint, flow: &Flow) {
        if let Some(record) = self.record(place) {
            record.write(fingerprint, flow);
        }
    }

    /// Counts that a slot has a flow instead of the one it had, for the buckets where either would rather stand.
    #[inline(always)]
    fn recount(self, place: Place, old: Data, new: &New) {
        recount(&self, place, old, new);
    }

    /// Sees to it that a flow just published has one slot: returns the data of the other's, where that one stays, or [`Data::NONE`].
    #[inline(always)]
    fn settle(self, new: &New, mine: Place) -> Data {
        settle(&self, new, mine)
    }

    /// The data of a direction of a flow, or [`Data::NONE`].
    #[inline(always)]
    fn probe(self, fingerprint: Fingerprint, now: Ticks) -> Data {
        self.find(fingerprint, now).map_or(Data::NONE, |found| found.data)
    }

    /// The source that a direction of a flow has at its backend.
    #[inline(always)]
    fn snat(self, fingerprint: Fingerprint, now: Ticks) -> Snat {
        snat(&self, fingerprint, now)
    }

    /// The other direction of the flow that a slot is of, if there is one: see [`claimant`].
    #[inline(always)]
    fn claimant(self, fingerprint: Fingerprint, now: Ticks) -> Option<Fingerprint> {
        claimant(&self, fingerprint, now)
    }

    /// Tells a direction of a flow the state the other came to, as of now. Says whether it is there.
    #[inline(always)]
    fn follow(self, fingerprint: Fingerprint, state: State, now: Ticks) -> bool {
        follow(&self, fingerprint, state, now)
    }

    /// Notes the way by which a direction of a flow leaves.
    #[inline(always)]
    fn leave_by(self, fingerprint: Fingerprint, hop: u16, now: Ticks) {
        leave_by(&self, fingerprint, hop, now);
    }

    /// Frees a direction of a flow, wherever it stands. Says whether it was there.
    #[inline(always)]
    fn remove(self, fingerprint: Fingerprint, now: Ticks) -> bool {
        remove(&self, fingerprint, now)
    }
}

/// A slot's number: bucket × 4 + slot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct Place(pub u32);

impl Place {
    #[inline(always)]
    #[must_use]
    pub const fn new(bucket: u32, slot: usize) -> Self {
        Self(bucket * SLOTS as u32 + slot as u32)
    }

    #[inline(always)]
    const fn bucket(self) -> u32 {
        self.0 / SLOTS as u32
    }

    #[inline(always)]
    pub fn slot<S: Storage + ?Sized>(self, storage: &S) -> Option<&Slot> {
        let bucket = storage.bucket(self.bucket() & storage.mask())?;
        Some(&bucket.slots[self.0 as usize % SLOTS])
    }
}

/// Whether a slot's flow is alive: neither free, nor being written, nor past its timeout.
#[inline(always)]
pub fn is_live<S: Storage + ?Sized>(storage: &S, data: Data, now: Ticks) -> bool {
    let state = data.state();
    state.0 > State::CLAIMING.0 && data.idle_units(now) <= storage.timeout(state)
}

/// Whether a slot can be written.
#[inline(always)]
fn is_free<S: Storage + ?Sized>(storage: &S, data: Data, now: Ticks) -> bool {
    match data.state() {
        State::FREE => true,
        State::CLAIMING => data.idle(now) > CLAIM_TICKS,
        state => data.idle_units(now) > storage.timeout(state),
    }
}

/// A live slot.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    pub slot: &'a Slot,
    pub place: Place,
    pub data: Data,
}

/// Looks a direction of a flow up.
#[inline(always)]
pub fn find<S: Storage + ?Sized>(storage: &S, fingerprint: Fingerprint, now: Ticks) -> Option<Found<'_>> {
    for choice in 0..CHOICES {
        let index = fingerprint.bucket(choice, storage.mask());
        let bucket = storage.bucket(index)?;
        for (number, slot) in bucket.slots.iter().enumerate() {
            if slot.fingerprint.load() == fingerprint.0 {
                let data = Data(slot.data.load());
                if data.has_tag(fingerprint) && is_live(storage, data, now) {
                    return Some(Found { slot, place: Place::new(index, number), data });
                }
            }
        }
        if choice + 1 == CHOICES || !overflows(storage, index) {
            break;
        }
    }
    None
}

/// The same. Looks first where nearly every flow stands: in the first slot of its first bucket that has its fingerprint. The rest is
/// [located](Operations::locate), and need not be inlined. So a program goes on with a slot from two places instead of a dozen, and the
/// verifier goes that way as often.
#[inline(always)]
pub fn look_up<O: Operations>(table: &O, fingerprint: Fingerprint, now: Ticks) -> Option<Found<'_>> {
    let index = fingerprint.bucket(0, table.mask());
    let bucket = table.bucket(index)?;
    let mut number = SLOTS;
    for (n, slot) in bucket.slots.iter().enumerate() {
        if slot.fingerprint.load() == fingerprint.0 {
            number = n;
            break;
        }
    }
    if number < SLOTS {
        let number = any(number as u64, now.0 as u64) as usize % SLOTS;
        let slot = &bucket.slots[number];
        let data = Data(slot.data.load());
        if data.has_tag(fingerprint) && is_live(table, data, now) {
            return Some(Found { slot, place: Place::new(index, number), data });
        }
    } else if !overflows(table, index) {
        return None;
    }
    let place = table.locate(fingerprint, now)?;
    let slot = place.slot(table)?;
    let data = Data(slot.data.load());
    let is_still = slot.fingerprint.load() == fingerprint.0 && data.has_tag(fingerprint) && is_live(table, data, now);
    is_still.then_some(Found { slot, place, data })
}

/// Whether flows that would rather stand in a bucket stand in later ones.
#[inline(always)]
fn overflows<S: Storage + ?Sized>(storage: &S, index: u32) -> bool {
    storage.overflow(index / Overflow::BUCKETS).is_none_or(|overflow| overflow.has(index))
}

/// Counts that a slot has a flow instead of the one it had, for the buckets where either would rather stand.
#[inline(always)]
pub fn recount<S: Storage>(storage: &S, place: Place, old: Data, new: &New) {
    let Some(slot) = place.slot(storage) else { return };
    // Whoever abandoned a claim may have counted already. Counted twice does no harm.
    if old.state() != State::CLAIMING {
        count_overflow(storage, Fingerprint(slot.fingerprint.load()), place, false);
    }
    count_overflow(storage, new.fingerprint, place, true);
}

/// Counts that a slot has a flow, or no longer has it.
#[inline(always)]
fn count_overflow<S: Storage>(storage: &S, fingerprint: Fingerprint, place: Place, is_more: bool) {
    // Marks a slot that was never used.
    if fingerprint.0 == 0 {
        return;
    }
    for choice in 0..CHOICES {
        let index = fingerprint.bucket(choice, storage.mask());
        if index == place.bucket() {
            break;
        }
        if let Some(overflow) = storage.overflow(index / Overflow::BUCKETS) {
            overflow.change(index, is_more);
        }
    }
}

/// A direction of a flow to be given a slot.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct New {
    pub fingerprint: Fingerprint,
    pub data: Data,
    pub flow: Flow,
    pub now: Ticks,
    /// Whether the caller [writes the record](Operations::record_at) of a new slot when it has done all else: where neither packets nor claims
    /// ask for it.
    pub defers: bool,
}

impl New {
    /// What its slot says.
    #[inline(always)]
    #[must_use]
    pub const fn slot_data(&self) -> Data {
        self.data.with_tag(self.fingerprint).at(self.now)
    }
}

/// What came of an insert, as one word: what a subprogram returns. Data of a live slot has a state, hence is greater than the rest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct Inserted(pub u64);

impl Inserted {
    /// Only live flows are where it could stand.
    pub const FULL: Self = Self(0);
    const NEW: u64 = 1 << 32;
    /// Another flow was evicted for it.
    const EVICTING: u64 = 1 << 33;

    /// The flow has this slot.
    #[inline(always)]
    #[must_use]
    pub const fn new(place: Place, is_evicting: bool) -> Self {
        Self(place.0 as u64 | Self::NEW | if is_evicting { Self::EVICTING } else { 0 })
    }

    /// It was there already.
    #[inline(always)]
    #[must_use]
    pub const fn existing(data: Data) -> Self {
        Self(data.0)
    }

    #[inline(always)]
    #[must_use]
    pub const fn is_existing(self) -> bool {
        self.0 >= 1 << Data::STATE_SHIFT
    }

    #[inline(always)]
    #[must_use]
    pub const fn is_new(self) -> bool {
        !self.is_existing() && self.0 & Self::NEW != 0
    }

    /// Whether it is new, and another flow was evicted for it.
    #[inline(always)]
    #[must_use]
    pub const fn is_evicting(self) -> bool {
        !self.is_existing() && self.0 & Self::EVICTING != 0
    }

    /// The slot, if it is new.
    #[inline(always)]
    #[must_use]
    pub const fn place(self) -> Place {
        Place(self.0 as u32)
    }

    /// What was there already, if it was.
    #[inline(always)]
    #[must_use]
    pub const fn data(self) -> Data {
        Data(self.0)
    }
}

/// Gives a direction of a flow a slot.
pub fn insert<O: Operations>(table: O, new: &New) -> Inserted {
    let New { fingerprint, now, .. } = *new;
    for _ in 0..ATTEMPTS {
        let choice = match usual(&table, new) {
            Some(place) => Choice::Take(place, Data::NONE),
            None => choose(table, new),
        };
        let (place, old) = match choice {
            Choice::Existing(data) => return Inserted::existing(data),
            Choice::Take(place, old) => (place, old),
            Choice::Full => return Inserted::FULL,
            Choice::Changed => continue,
        };
        let (Some(slot), Some(record)) = (place.slot(&table), table.record(place)) else {
            return Inserted::FULL;
        };
        let claim = Data::new(Direction::Forward, State::CLAIMING, 0).at(now);
        if !slot.data.replace(old.0, claim.0) {
            continue;
        }
        let evicted = is_live(&table, old, now);
        if evicted && let Some(victim) = record.read(Fingerprint(slot.fingerprint.load())) {
            table.remove(victim.twin, now);
        }
        // For nearly all flows there is nothing to be counted.
        let displaced = displacement(&table, fingerprint, place)
            | displacement(&table, Fingerprint(slot.fingerprint.load()), place);
        if displaced != 0 {
            table.recount(place, old, new);
        }
        if !new.defers {
            record.write(fingerprint, &new.flow);
        }
        slot.fingerprint.store(fingerprint.0);
        slot.data.swap(new.slot_data().0);
        if is_alone(&table, fingerprint, place) {
            return Inserted::new(place, evicted);
        }
        return match table.settle(new, place) {
            Data::NONE => Inserted::new(place, evicted),
            data => Inserted::existing(data),
        };
    }
    Inserted::FULL
}

/// Not 0 if a flow would rather stand in another bucket.
#[inline(always)]
fn displacement<S: Storage>(storage: &S, fingerprint: Fingerprint, place: Place) -> u32 {
    fingerprint.bucket(0, storage.mask()) ^ place.bucket()
}

/// What a bucket has for a new flow, as one word: what a subprogram returns.
///
/// Slot of interest 2 bits, kind 3, whether to look further 1, and from bit 8 how good it is: the free slots, or the rank of the one to be
/// evicted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct Scan(pub u64);

impl Scan {
    const SLOT: u64 = 3;
    /// Nobody in this bucket can make room.
    pub const FULL: Self = Self(0);
    /// The flow stands in this slot.
    const EXISTING: u64 = 4;
    /// This slot may be evicted.
    const VICTIM: u64 = 8;
    /// This slot is free.
    const FREE: u64 = 16;
    /// The flow may stand in a later bucket.
    const OVERFLOWS: u64 = 32;
    const WORTH_SHIFT: u32 = 8;

    #[inline(always)]
    const fn new(kind: u64, slot: u64, worth: u32) -> Self {
        Self(((worth as u64) << Self::WORTH_SHIFT) | kind | slot)
    }

    #[inline(always)]
    const fn has(self, kind: u64) -> bool {
        self.0 & kind != 0
    }

    #[inline(always)]
    const fn slot(self) -> usize {
        (self.0 & Self::SLOT) as usize
    }

    #[inline(always)]
    const fn worth(self) -> u64 {
        self.0 >> Self::WORTH_SHIFT
    }
}

/// Looks at one bucket for an insert.
#[inline(always)]
pub fn scan<S: Storage>(storage: &S, index: u32, new: &New) -> Scan {
    let New { fingerprint, flow: Flow { twin, .. }, now, .. } = *new;
    let Some(bucket) = storage.bucket(index) else { return Scan::FULL };
    let mut free = 0;
    let mut first = 0;
    let mut victim = if overflows(storage, index) { Scan(Scan::OVERFLOWS) } else { Scan::FULL };
    let mut next = 0;
    while let Some(slot) = bucket.slots.get(next) {
        let number = next;
        next = rolled(number + 1);
        let data = Data(slot.data.load());
        if is_free(storage, data, now) {
            if free == 0 {
                first = number as u64;
            }
            free += 1;
            continue;
        }
        if slot.fingerprint.load() == fingerprint.0 && data.has_tag(fingerprint) && data.state() != State::CLAIMING {
            return Scan::new(Scan::EXISTING, number as u64, 0);
        }
        // A flow that evicted its own other direction would have one half of itself, for which there may be no room later.
        let is_twin = slot.fingerprint.load() == twin.0;
        let rank = data.eviction_rank(now);
        if rank as u64 > victim.worth() && !is_twin {
            victim = Scan::new(Scan::VICTIM | victim.0 & Scan::OVERFLOWS, number as u64, rank);
        }
    }
    if free > 0 { Scan::new(Scan::FREE | victim.0 & Scan::OVERFLOWS, first, free) } else { victim }
}

/// Where a new slot goes.
enum Choice {
    Existing(Data),
    /// This slot, if its data is still this.
    Take(Place, Data),
    Full,
    /// What was seen has changed.
    Changed,
}

/// Where most new flows go, whose first bucket has slots that nobody has, and no trace of them. The rest is [chosen](choose), in a part that
/// is called.
#[inline(always)]
fn usual<S: Storage>(storage: &S, new: &New) -> Option<Place> {
    let index = new.fingerprint.bucket(0, storage.mask());
    let bucket = storage.bucket(index)?;
    let (mut first, mut free) = (0, 0);
    for (number, slot) in bucket.slots.iter().enumerate() {
        if slot.fingerprint.load() == new.fingerprint.0 {
            return None;
        }
        if slot.data.load() == Data::NONE.0 {
            if free == 0 {
                first = number as u64;
            }
            free += 1;
        }
    }
    if free < ENOUGH || overflows(storage, index) {
        return None;
    }
    Some(Place::new(index, any(first, new.fingerprint.0) as usize % SLOTS))
}

/// Whether a flow just published has no other slot for certain: none in its first bucket, which is its slot's, and none beyond.
#[inline(always)]
fn is_alone<S: Storage>(storage: &S, fingerprint: Fingerprint, mine: Place) -> bool {
    let index = fingerprint.bucket(0, storage.mask());
    let Some(bucket) = storage.bucket(index) else { return false };
    let found = bucket.slots.iter().filter(|slot| slot.fingerprint.load() == fingerprint.0).count();
    mine.bucket() == index && found == 1 && !overflows(storage, index)
}

/// The first bucket with two free slots, else the emptiest, else the slot that is worth least.
#[inline(always)]
fn choose<O: Operations>(table: O, new: &New) -> Choice {
    let New { fingerprint, now, .. } = *new;
    let (mut bucket, mut best) = (0, Scan::FULL);
    for choice in 0..CHOICES {
        let index = fingerprint.bucket(choice, table.mask());
        let seen = table.scan(index, new);
        if seen.has(Scan::EXISTING) {
            (bucket, best) = (index, seen);
            break;
        }
        let is_enough = best.has(Scan::FREE) && best.worth() >= ENOUGH;
        let is_better = if seen.has(Scan::FREE) == best.has(Scan::FREE) {
            seen.worth() > best.worth()
        } else {
            seen.has(Scan::FREE)
        };
        if is_better && !is_enough {
            (bucket, best) = (index, seen);
        }
        if !seen.has(Scan::OVERFLOWS) && best.has(Scan::FREE) && best.worth() >= ENOUGH {
            break;
        }
    }
    if best.worth() == 0 && !best.has(Scan::EXISTING) {
        return Choice::Full;
    }
    let place = Place::new(bucket, best.slot());
    let Some(slot) = place.slot(&table) else { return Choice::Full };
    let data = Data(slot.data.load());
    if best.has(Scan::EXISTING) {
        let is_there = slot.fingerprint.load() == fingerprint.0 && data.has_tag(fingerprint);
        return if is_there && is_live(&table, data, now) { Choice::Existing(data) } else { Choice::Changed };
    }
    // Another CPU may have taken it; then the slot is worth what it is worth now.
    let is_still = if best.has(Scan::FREE) { is_free(&table, data, now) } else { data.eviction_rank(now) > 0 };
    if is_still { Choice::Take(place, data) } else { Choice::Changed }
}

/// Sees to it that a flow just published has one slot.
#[inline(always)]
pub fn settle<S: Storage>(storage: &S, new: &New, mine: Place) -> Data {
    let New { fingerprint, now, .. } = *new;
    let mut choice = 0;
    while choice < CHOICES as usize {
        let index = fingerprint.bucket(choice as u32, storage.mask());
        choice = rolled(choice + 1);
        let Some(bucket) = storage.bucket(index) else { break };
        let mut next = 0;
        while let Some(slot) = bucket.slots.get(next) {
            let place = Place::new(index, next);
            next = rolled(next + 1);
            if place == mine || slot.fingerprint.load() != fingerprint.0 {
                continue;
            }
            let data = Data(slot.data.load());
            if !data.has_tag(fingerprint) || !is_live(storage, data, now) {
                continue;
            }
            if place.0 > mine.0 {
                release(slot, data);
            } else {
                if let Some(slot) = mine.slot(storage) {
                    release(slot, new.slot_data());
                }
                return data;
            }
        }
        if !overflows(storage, index) {
            break;
        }
    }
    Data::NONE
}

impl<S: Storage + ?Sized> Storage for &S {
    fn mask(&self) -> u32 {
        S::mask(self)
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        S::bucket(self, index)
    }

    fn record(&self, place: Place) -> Option<&Record> {
        S::record(self, place)
    }

    fn overflow(&self, index: u32) -> Option<&Overflow> {
        S::overflow(self, index)
    }

    fn timeout(&self, state: State) -> u32 {
        S::timeout(self, state)
    }

    fn find(&self, fingerprint: Fingerprint, now: Ticks) -> Option<Found<'_>> {
        S::find(self, fingerprint, now)
    }
}

/// Frees a slot, unless it changed since it was read. Says whether it did.
#[inline(always)]
pub fn release(slot: &Slot, data: Data) -> bool {
    slot.data.replace(data.0, 0)
}

/// Frees a direction of a flow, wherever it stands. Says whether it was there.
#[inline(always)]
pub fn remove<S: Storage>(storage: &S, fingerprint: Fingerprint, now: Ticks) -> bool {
    storage.find(fingerprint, now).is_some_and(|found| release(found.slot, found.data))
}

/// The other direction of the flow that a slot is of: who has claimed the port that the slot stands for.
#[inline(always)]
pub fn claimant<S: Storage>(storage: &S, fingerprint: Fingerprint, now: Ticks) -> Option<Fingerprint> {
    let found = storage.find(fingerprint, now)?;
    let flow = storage.record(found.place).and_then(|record| record.read(fingerprint));
    // One whose record is being written is somebody else's.
    Some(flow.map_or(Fingerprint(u64::MAX), |flow| flow.twin))
}

/// The source that a direction of a flow has at its backend.
#[inline(always)]
pub fn snat<S: Storage>(storage: &S, fingerprint: Fingerprint, now: Ticks) -> Snat {
    let Some(found) = storage.find(fingerprint, now) else { return Snat::NONE };
    let flow = storage.record(found.place).and_then(|record| record.read(fingerprint));
    flow.map_or(Snat::NONE, |flow| flow.snat)
}

/// Tells a direction of a flow the state the other came to, as of now. Says whether it is there.
#[inline(always)]
pub fn follow<S: Storage>(storage: &S, fingerprint: Fingerprint, state: State, now: Ticks) -> bool {
    let Some(found) = storage.find(fingerprint, now) else { return false };
    change(found.slot, found.data, |data| data.with_state(data.state().merge(state)).at(now));
    true
}

/// Notes the way by which a direction of a flow leaves.
#[inline(always)]
pub fn leave_by<S: Storage>(storage: &S, fingerprint: Fingerprint, hop: u16, now: Ticks) {
    if let Some(found) = storage.find(fingerprint, now) {
        change(found.slot, found.data, |data| data.with_hop(hop));
    }
}

/// Changes a live slot's data, and says whether it did. Where another CPU was faster, it starts from what that one made of it.
#[inline(always)]
pub fn change(slot: &Slot, mut data: Data, to: impl Fn(Data) -> Data) -> bool {
    for _ in 0..ATTEMPTS {
        let new = to(data);
        if new == data {
            return false;
        }
        if slot.data.replace(data.0, new.0) {
            return true;
        }
        let now = Data(slot.data.load());
        let is_same_flow = (now.0 ^ data.0) & !(Data::TIME | Data::HOP | Data::STATE) == 0;
        if !is_same_flow || now.state().0 <= State::CLAIMING.0 {
            return false;
        }
        data = now;
    }
    false
}

#[cfg(test)]
mod tests;
