//! The parts that are BPF subprograms.
//!
//! Functions with external linkage, arguments of plain types and a number as result: such the verifier checks once by themselves, and
//! knows nothing of what they return. Everything else is inlined into the programs.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_log_ebpf::debug;
use netlb_common::{
    addr::{Addr, Ipv4Be, Ipv6Be},
    balance::{self, At, Known, Lookup, Reach, Scope, Selection, Tables as _, Verdict},
    conntrack::{Segment, State},
    counters::Counter,
    directory,
    flow::{Fingerprint, Parsed},
    fragment::Region,
    snat::{Pool, Snat},
    table::{self, Data, Inserted, New, Operations, Place, Scan, Storage as _},
    time::Ticks,
};

use crate::{
    answer, fragment,
    frame::{Frame, Skb, Xdp},
    icmp,
    maps::{self, Errand, Kernel, Work},
    ping, pipeline, relay, tc,
    tunnel::{self, Wrapped},
    xdp,
};

macro_rules! subprogram {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty $body:block)+) => {$(
        #[inline(never)]
        #[unsafe(no_mangle)]
        extern "C" fn $name($($arg: $type),*) -> $result $body
    )+};
}

/// What a subprogram was given: nothing, or what can be read; the verifier sees to it.
#[inline(always)]
fn given<'a, T>(pointer: *const T) -> Option<&'a T> {
    // SAFETY: null or readable, of this CPU alone.
    unsafe { pointer.as_ref() }
}

/// The same of what can be written.
#[inline(always)]
fn given_mut<'a, T>(pointer: *mut T) -> Option<&'a mut T> {
    // SAFETY: null or writable, of this CPU alone.
    unsafe { pointer.as_mut() }
}

/// No [`Place`].
const NOWHERE: u64 = u64::MAX;

subprogram! {
    fn flow_scan(index: u32, new: *const New) -> u64 {
        given(new).map_or(Scan::FULL, |new| table::scan(&Kernel, index, new)).0
    }

    fn count_event(counter: u32) -> u32 {
        maps::count_here(counter);
        0
    }

    fn directory_services(key: u64) -> u64 {
        directory::beyond(&maps::Services, key)
    }

    fn directory_owners(key: u64) -> u64 {
        directory::beyond(&maps::OwnerPairs, key)
    }

    fn directory_interfaces(key: u64) -> u64 {
        directory::beyond(&maps::Interfaces, key)
    }

    fn flow_insert(new: *const New) -> u64 {
        given(new).map_or(Inserted::FULL, maps::insert).0
    }

    fn flow_recount(place: u32, old: u64, new: *const New) -> u32 {
        if let Some(new) = given(new) {
            table::recount(&Kernel, Place(place), Data(old), new);
        }
        0
    }

    fn flow_settle(new: *const New, mine: u32) -> u64 {
        given(new).map_or(Data::NONE, |new| table::settle(&Kernel, new, Place(mine))).0
    }

    fn flow_locate(fingerprint: u64, now: u32) -> u64 {
        Kernel.find(Fingerprint(fingerprint), Ticks(now)).map_or(NOWHERE, |found| found.place.0 as u64)
    }

    fn flow_note(fingerprint: u64, segment: u32, now: u32) -> u32 {
        balance::note(Kernel, Fingerprint(fingerprint), Segment(segment as u8), Ticks(now));
        0
    }

    fn flow_leave(fingerprint: u64, data: u64, now: u32) -> u32 {
        balance::leave(Kernel, Fingerprint(fingerprint), Data(data), Ticks(now));
        0
    }

    fn flow_probe(fingerprint: u64, now: u32) -> u64 {
        Kernel.find(Fingerprint(fingerprint), Ticks(now)).map_or(Data::NONE, |found| found.data).0
    }

    fn flow_snat(fingerprint: u64, now: u32) -> u32 {
        table::snat(&Kernel, Fingerprint(fingerprint), Ticks(now)).0
    }

    fn flow_claimant(fingerprint: u64, now: u32) -> u64 {
        table::claimant(&Kernel, Fingerprint(fingerprint), Ticks(now)).map_or(0, |claimant| claimant.0)
    }

    fn flow_follow(fingerprint: u64, state: u32, now: u32) -> u32 {
        table::follow(&Kernel, Fingerprint(fingerprint), State(state as u8), Ticks(now)) as u32
    }

    fn flow_leave_by(fingerprint: u64, hop: u32, now: u32) -> u32 {
        table::leave_by(&Kernel, Fingerprint(fingerprint), hop as u16, Ticks(now));
        0
    }

    fn owned_have(a: u64, b: u64) -> u32 {
        maps::owned_have(Addr([a, b])) as u32
    }

    fn masquerade_has(a: u64, b: u64) -> u32 {
        maps::masquerade_has(Addr([a, b])) as u32
    }

    fn masquerade_spares(a: u64, b: u64) -> u32 {
        maps::masquerade_spares(Addr([a, b])) as u32
    }

    fn dsr_member_at(config: u32, member: u32, a: u64, b: u64) -> u32 {
        balance::member_at(Kernel, config, member, Addr([a, b]))
    }

    fn dsr_unwraps_from(a: u64, b: u64) -> u32 {
        maps::unwraps_from(Addr([a, b])) as u32
    }

    fn pods_have(a: u64, b: u64) -> u32 {
        maps::pods_have(Addr([a, b])) as u32
    }

    fn flow_remove(fingerprint: u64, now: u32) -> u32 {
        table::remove(&Kernel, Fingerprint(fingerprint), Ticks(now)) as u32
    }
}

subprogram! {
    fn log_new_flow(skb: *mut __sk_buff, service: u32) -> u32 {
        let frame = Skb::new(skb);
        debug!(frame.context(), "new flow of service {} on interface {}", service, frame.interface());
        0
    }
}

subprogram! {
    fn fragment_hold(skb: *mut __sk_buff, datagram: u64, now: u32) -> u32 {
        fragment::hold(&Skb::new(skb), Fingerprint(datagram), Ticks(now)) as u32
    }

    fn fragment_release(skb: *mut __sk_buff, datagram: u64, now: u32) -> u32 {
        fragment::release(&Skb::new(skb), Fingerprint(datagram), Ticks(now)) as u32
    }

    fn fragment_send(skb: *mut __sk_buff, datagram: u64, place: u32, is_sent: u32) -> u32 {
        fragment::send_held(&Skb::new(skb), Fingerprint(datagram), place as usize, is_sent != 0) as u32
    }

    fn fragment_free_place(datagram: u64, from: u32, now: u32) -> u32 {
        let region = maps::held_region(Fingerprint(datagram));
        region.map_or(Region::PLACES as usize, |region| region.free_place(from as usize, Ticks(now))) as u32
    }

    fn fragment_place_of(datagram: u64, from: u32) -> u32 {
        let region = maps::held_region(Fingerprint(datagram));
        region.map_or(Region::PLACES as usize, |region| region.place_of(from as usize, Fingerprint(datagram))) as u32
    }
}

/// See [`fragment::hold`].
#[inline(always)]
pub(crate) fn hold(frame: &Skb, datagram: Fingerprint, now: Ticks) -> Verdict {
    verdict(fragment_hold(frame.skb(), datagram.0, now.0))
}

/// See [`fragment::release`].
#[inline(always)]
pub(crate) fn release(frame: &Skb, datagram: Fingerprint, now: Ticks) -> bool {
    fragment_release(frame.skb(), datagram.0, now.0) != 0
}

/// See [`fragment::send_held`].
#[inline(always)]
pub(crate) fn send_held(frame: &Skb, datagram: Fingerprint, place: usize, is_sent: bool) -> bool {
    fragment_send(frame.skb(), datagram.0, place as u32, is_sent as u32) != 0
}

/// See [`Region::free_place`].
#[inline(always)]
pub(crate) fn free_place(datagram: Fingerprint, from: usize, now: Ticks) -> usize {
    fragment_free_place(datagram.0, from as u32, now.0) as usize
}

/// See [`Region::place_of`].
#[inline(always)]
pub(crate) fn place_of(datagram: Fingerprint, from: usize) -> usize {
    fragment_place_of(datagram.0, from as u32) as usize
}

/// Logs that a flow began.
#[inline(always)]
pub(crate) fn log_flow(frame: &Skb, service: u32) {
    log_new_flow(frame.skb(), service);
}

/// Whether an address is of the networks that are services' or nobody's.
#[inline(always)]
pub(crate) fn is_owned(addr: Addr) -> bool {
    owned_have(addr.0[0], addr.0[1]) != 0
}

/// Whether what goes from one address to another gets an address of the node as its source where it leaves.
#[inline(always)]
pub(crate) fn is_masqueraded(source: Addr, Addr([a, b]): Addr) -> bool {
    masquerade_has(source.0[0], source.0[1]) != 0 && masquerade_has(a, b) == 0 && masquerade_spares(a, b) == 0
}

/// Whether an address is a pod's of this node, as the configuration says.
#[inline(always)]
pub(crate) fn is_pod(Addr([a, b]): Addr) -> bool {
    pods_have(a, b) != 0
}

/// Counts an event.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    count_event(counter as u32);
}

/// See [`directory::Lines::beyond`].
#[inline(always)]
pub(crate) fn service_beyond(key: u64) -> u64 {
    directory_services(key)
}

/// The same.
#[inline(always)]
pub(crate) fn owners_beyond(key: u64) -> u64 {
    directory_owners(key)
}

/// The same.
#[inline(always)]
pub(crate) fn interface_beyond(key: u64) -> u64 {
    directory_interfaces(key)
}

/// See [`balance::note`].
#[inline(always)]
pub(crate) fn note(fingerprint: Fingerprint, segment: Segment, now: Ticks) {
    flow_note(fingerprint.0, segment.0 as u32, now.0);
}

/// See [`balance::leave`].
#[inline(always)]
pub(crate) fn leave(fingerprint: Fingerprint, data: Data, now: Ticks) {
    flow_leave(fingerprint.0, data.0, now.0);
}

/// Whether wrapped packets from an address are unwrapped.
#[inline(always)]
pub(crate) fn unwraps_from(Addr([a, b]): Addr) -> bool {
    dsr_unwraps_from(a, b) != 0
}

/// The parts of the pipeline that are subprograms, for each family.
pub(crate) trait Parts: Sized {
    fn select(work: &Work<Self>, interface: u32) -> Selection;
    /// Has the client keep its backend.
    fn remember(work: &Work<Self>);
    fn unclaimed(work: &Work<Self>) -> Verdict;
    /// Makes a frame the answer to itself, and sends it back. `why` is [`tc::REJECT`] or what follows it.
    ///
    /// The packet is the one under way on this CPU: nobody need keep where it is.
    fn answer(frame: &Skb, why: i32) -> i32;
    fn lost_reply(work: &mut Work<Self>) -> Verdict;
    fn tend(work: &Work<Self>);
    /// Rewrites a packet that the kernel sends.
    fn restore(frame: &Skb, work: &Work<Self>) -> i32;
    /// See [`icmp::read`].
    fn read_error(frame: &Skb, errand: *mut Errand<Self>, scope: Scope) -> bool;
    /// See [`icmp::understand`].
    fn understand_error(errand: *mut Errand<Self>, scope: Scope) -> bool;
    /// See [`icmp::send`].
    fn send_error(frame: &Skb, errand: *const Errand<Self>, scope: Scope) -> i32;
    /// See [`ping::read`].
    fn read_ping(frame: &Skb, work: *mut Work<Self>, scope: Scope) -> bool;
    /// See [`ping::look_up`].
    fn look_up_ping(work: *mut Work<Self>) -> Known;
    /// See [`ping::send`].
    fn send_ping(frame: &Skb, work: *const Work<Self>) -> i32;
    /// See [`tunnel::wrap_error`].
    fn wrap_error(frame: &Skb, errand: *const Errand<Self>) -> i32;
    /// See [`relay::read`].
    fn read_relayed(frame: &Skb) -> bool;
    /// See [`relay::send`].
    fn relay(frame: &Skb) -> i32;
    /// See [`tunnel::read`].
    fn read_wrapped(frame: &Skb, scope: Scope) -> Wrapped;
    /// See [`tunnel::unwrap`].
    fn unwrap(frame: &Skb, found: Wrapped) -> i32;
    /// See [`tunnel::claim`].
    fn claim(work: &mut Work<Self>, address: Addr) -> Known;
    /// See [`tunnel::leads_on`].
    fn leads_on(frame: &Skb) -> bool;
    /// See [`balance::backend_at`].
    fn backend_at(work: &Work<Self>, address: Addr) -> At;
    /// See [`balance::adopt`].
    fn adopt(work: &mut Work<Self>, at: At) -> Verdict;
}

/// Those that need the frame, for each hook and family.
pub(crate) trait Hook<A>: Frame + Reach<A> + Join<A> {
    fn place(&self, work: &mut Work<A>, selection: Selection) -> Verdict;
    /// What becomes of a packet that is neither TCP nor UDP.
    fn stray(&self) -> Verdict;
    /// See [`pipeline::lost`].
    fn lost(&self, work: &Work<A>) -> Verdict;
    /// Rewrites a packet and sends it on. At TC the result may say that it is too long.
    fn dispatch(&self, work: &Work<A>) -> i32;
    /// The same, wrapping it.
    fn wrap(&self, work: &Work<A>) -> i32;
}

/// What TC alone does: with fragments, and with what the node sends.
pub(crate) trait Join<A> {
    /// See [`fragment::join`].
    fn join(&self, work: &mut Work<A>) -> Verdict;
    /// See [`pipeline::masquerade`].
    fn masquerade(&self, work: &mut Work<A>) -> Verdict;
}

macro_rules! join {
    ($family:ty, $join:ident, $masquerade:ident) => {
        subprogram! {
            fn $join(skb: *mut __sk_buff, work: *mut Work<$family>) -> u32 {
                let Some(work) = given_mut(work) else { return Verdict::Drop as u32 };
                fragment::join(&Skb::new(skb), work) as u32
            }

            fn $masquerade(skb: *mut __sk_buff, work: *mut Work<$family>) -> u32 {
                let Some(work) = given_mut(work) else { return Verdict::Drop as u32 };
                pipeline::masquerade(&Skb::new(skb), work) as u32
            }
        }

        impl Join<$family> for Skb {
            #[inline(always)]
            fn join(&self, work: &mut Work<$family>) -> Verdict {
                verdict($join(self.skb(), work))
            }

            #[inline(always)]
            fn masquerade(&self, work: &mut Work<$family>) -> Verdict {
                verdict($masquerade(self.skb(), work))
            }
        }
    };
}

join!(Ipv4Be, join_v4, masquerade_v4);
join!(Ipv6Be, join_v6, masquerade_v6);

/// They are TC's.
impl<A> Join<A> for Xdp {
    #[inline(always)]
    fn join(&self, _: &mut Work<A>) -> Verdict {
        Verdict::Pass
    }

    #[inline(always)]
    fn masquerade(&self, _: &mut Work<A>) -> Verdict {
        Verdict::Pass
    }
}

macro_rules! parts {
    ($family:ty, $select:ident, $remember:ident, $unclaimed:ident, $answer:ident, $echo:ident, $lost_reply:ident, $tend:ident, $restore:ident, $read_error:ident, $understand_error:ident, $send_error:ident, $read_ping:ident, $look_up_ping:ident, $send_ping:ident, $wrap_error:ident, $read_relayed:ident, $relay:ident, $read_wrapped:ident, $unwrap:ident, $claim:ident, $leads_on:ident, $backend_at:ident, $adopt:ident) => {
        subprogram! {
            fn $select(work: *const Work<$family>, interface: u32) -> u64 {
                let Some(work) = given(work) else { return Selection::NONE.0 };
                let is_outside = || pipeline::is_from_outside(interface, work.packet.tuple.source);
                balance::select(Kernel, &work.packet, &work.lookup, is_outside).0
            }

            fn $remember(work: *const Work<$family>) -> u32 {
                let Some(work) = given(work) else { return 0 };
                if work.translation.is_new {
                    balance::remember(Kernel, &work.packet, &work.lookup, work.translation.service);
                }
                0
            }

            fn $unclaimed(work: *const Work<$family>) -> u32 {
                given(work).map_or(Verdict::Pass, |work| pipeline::unclaimed(&work.packet)) as u32
            }

            fn $answer(skb: *mut __sk_buff, why: i32) -> i32 {
                if why == tc::ECHO {
                    return $echo(skb);
                }
                let Some(work) = maps::work::<$family>() else { return Skb::DROP };
                // SAFETY: within this CPU's place, and written where `why` comes from.
                answer::answer(&Skb::new(skb), unsafe { &(*work).packet }, (why - tc::REJECT) as u32)
            }

            fn $echo(skb: *mut __sk_buff) -> i32 {
                answer::echo::<$family>(&Skb::new(skb))
            }

            fn $lost_reply(work: *mut Work<$family>) -> u32 {
                let Some(work) = given_mut(work) else { return Verdict::Drop as u32 };
                balance::lost_reply(Kernel, &work.packet, &work.lookup, &mut work.translation) as u32
            }

            fn $tend(work: *const Work<$family>) -> u32 {
                let Some(work) = given(work) else { return 0 };
                balance::tend(Kernel, &work.packet, &work.lookup, &work.translation);
                0
            }

            fn $restore(skb: *mut __sk_buff, work: *const Work<$family>) -> i32 {
                given(work).map_or(Skb::DROP, |work| tc::restore(&Skb::new(skb), work))
            }

            fn $read_error(skb: *mut __sk_buff, errand: *mut Errand<$family>, scope: u32) -> u32 {
                given_mut(errand).is_some_and(|errand| icmp::read(&Skb::new(skb), errand, self::scope(scope))) as u32
            }

            fn $understand_error(errand: *mut Errand<$family>, scope: u32) -> u32 {
                given_mut(errand).is_some_and(|errand| icmp::understand(errand, self::scope(scope))) as u32
            }

            fn $send_error(skb: *mut __sk_buff, errand: *const Errand<$family>, scope: u32) -> i32 {
                given(errand).map_or(Skb::PASS, |errand| icmp::send(&Skb::new(skb), errand, self::scope(scope)))
            }

            fn $read_ping(skb: *mut __sk_buff, work: *mut Work<$family>, scope: u32) -> u32 {
                given_mut(work).is_some_and(|work| ping::read(&Skb::new(skb), work, self::scope(scope))) as u32
            }

            fn $look_up_ping(work: *mut Work<$family>) -> u32 {
                given_mut(work).map_or(Known::Elsewhere, ping::look_up) as u32
            }

            fn $send_ping(skb: *mut __sk_buff, work: *const Work<$family>) -> i32 {
                given(work).map_or(Skb::DROP, |work| ping::send(&Skb::new(skb), work))
            }

            fn $wrap_error(skb: *mut __sk_buff, errand: *const Errand<$family>) -> i32 {
                given(errand).map_or(Skb::PASS, |errand| tunnel::wrap_error(&Skb::new(skb), errand))
            }

            fn $read_relayed(skb: *mut __sk_buff) -> u32 {
                relay::read::<$family>(&Skb::new(skb)) as u32
            }

            fn $relay(skb: *mut __sk_buff) -> i32 {
                relay::send::<$family>(&Skb::new(skb))
            }

            fn $read_wrapped(skb: *mut __sk_buff, scope: u32) -> u64 {
                tunnel::read::<$family>(&Skb::new(skb), self::scope(scope)).0
            }

            fn $unwrap(skb: *mut __sk_buff, found: u64) -> i32 {
                tunnel::unwrap::<$family>(&Skb::new(skb), Wrapped(found))
            }

            fn $claim(work: *mut Work<$family>, a: u64, b: u64) -> u32 {
                given_mut(work).map_or(Known::Elsewhere, |work| tunnel::claim(work, Addr([a, b]))) as u32
            }

            fn $leads_on(skb: *mut __sk_buff) -> u32 {
                tunnel::leads_on::<$family>(&Skb::new(skb)) as u32
            }

            fn $backend_at(work: *const Work<$family>, a: u64, b: u64) -> u64 {
                let Some(work) = given(work) else { return At::NO_SERVICE.0 };
                balance::backend_at(Kernel, &work.packet, |config, member| dsr_member_at(config, member, a, b)).0
            }

            fn $adopt(work: *mut Work<$family>, at: u64) -> u32 {
                let Some(work) = given_mut(work) else { return Verdict::Drop as u32 };
                balance::adopt(Kernel, &work.packet, &work.lookup, At(at), &mut work.translation) as u32
            }
        }

        impl Parts for $family {
            #[inline(always)]
            fn select(work: &Work<Self>, interface: u32) -> Selection {
                Selection($select(work, interface))
            }

            #[inline(always)]
            fn remember(work: &Work<Self>) {
                $remember(work);
            }

            #[inline(always)]
            fn unclaimed(work: &Work<Self>) -> Verdict {
                verdict($unclaimed(work))
            }

            #[inline(always)]
            fn answer(frame: &Skb, why: i32) -> i32 {
                $answer(frame.skb(), why)
            }

            #[inline(always)]
            fn lost_reply(work: &mut Work<Self>) -> Verdict {
                verdict($lost_reply(work))
            }

            #[inline(always)]
            fn tend(work: &Work<Self>) {
                $tend(work);
            }

            #[inline(always)]
            fn restore(frame: &Skb, work: &Work<Self>) -> i32 {
                $restore(frame.skb(), work)
            }

            #[inline(always)]
            fn read_error(frame: &Skb, errand: *mut Errand<Self>, scope: Scope) -> bool {
                $read_error(frame.skb(), errand, scope as u32) != 0
            }

            #[inline(always)]
            fn understand_error(errand: *mut Errand<Self>, scope: Scope) -> bool {
                $understand_error(errand, scope as u32) != 0
            }

            #[inline(always)]
            fn send_error(frame: &Skb, errand: *const Errand<Self>, scope: Scope) -> i32 {
                $send_error(frame.skb(), errand, scope as u32)
            }

            #[inline(always)]
            fn read_ping(frame: &Skb, work: *mut Work<Self>, scope: Scope) -> bool {
                $read_ping(frame.skb(), work, scope as u32) != 0
            }

            #[inline(always)]
            fn look_up_ping(work: *mut Work<Self>) -> Known {
                known($look_up_ping(work))
            }

            #[inline(always)]
            fn send_ping(frame: &Skb, work: *const Work<Self>) -> i32 {
                $send_ping(frame.skb(), work)
            }

            #[inline(always)]
            fn wrap_error(frame: &Skb, errand: *const Errand<Self>) -> i32 {
                $wrap_error(frame.skb(), errand)
            }

            #[inline(always)]
            fn read_relayed(frame: &Skb) -> bool {
                $read_relayed(frame.skb()) != 0
            }

            #[inline(always)]
            fn relay(frame: &Skb) -> i32 {
                $relay(frame.skb())
            }

            #[inline(always)]
            fn read_wrapped(frame: &Skb, scope: Scope) -> Wrapped {
                Wrapped($read_wrapped(frame.skb(), scope as u32))
            }

            #[inline(always)]
            fn unwrap(frame: &Skb, found: Wrapped) -> i32 {
                $unwrap(frame.skb(), found.0)
            }

            #[inline(always)]
            fn claim(work: &mut Work<Self>, Addr([a, b]): Addr) -> Known {
                known($claim(work, a, b))
            }

            #[inline(always)]
            fn leads_on(frame: &Skb) -> bool {
                $leads_on(frame.skb()) != 0
            }

            #[inline(always)]
            fn backend_at(work: &Work<Self>, Addr([a, b]): Addr) -> At {
                At($backend_at(work, a, b))
            }

            #[inline(always)]
            fn adopt(work: &mut Work<Self>, at: At) -> Verdict {
                verdict($adopt(work, at.0))
            }
        }
    };
}

parts!(
    Ipv4Be,
    select_v4,
    remember_v4,
    unclaimed_v4,
    answer_v4,
    echo_v4,
    lost_reply_v4,
    tend_v4,
    restore_v4,
    read_error_v4,
    understand_error_v4,
    send_error_v4,
    read_ping_v4,
    look_up_ping_v4,
    send_ping_v4,
    wrap_error_v4,
    read_relayed_v4,
    relay_v4,
    read_wrapped_v4,
    unwrap_v4,
    claim_v4,
    leads_on_v4,
    backend_at_v4,
    adopt_v4
);
parts!(
    Ipv6Be,
    select_v6,
    remember_v6,
    unclaimed_v6,
    answer_v6,
    echo_v6,
    lost_reply_v6,
    tend_v6,
    restore_v6,
    read_error_v6,
    understand_error_v6,
    send_error_v6,
    read_ping_v6,
    look_up_ping_v6,
    send_ping_v6,
    wrap_error_v6,
    read_relayed_v6,
    relay_v6,
    read_wrapped_v6,
    unwrap_v6,
    claim_v6,
    leads_on_v6,
    backend_at_v6,
    adopt_v6
);

macro_rules! hook {
    ($frame:ident, $hook:ident, $context:ty, $as_context:ident, $family:ty, $place:ident, $stray:ident, $lost:ident, $needs_snat:ident, $address:ident, $reserve:ident, $attempt:ident, $source:ident, $dispatch:ident, $wrap:ident) => {
        subprogram! {
            fn $place(context: *mut $context, work: *mut Work<$family>, selection: u64) -> u32 {
                let Some(work) = given_mut(work) else { return Verdict::Drop as u32 };
                pipeline::place(&$frame::new(context), work, Selection(selection)) as u32
            }

            fn $stray(context: *mut $context) -> u32 {
                pipeline::stray::<$family>(&$frame::new(context)) as u32
            }

            fn $lost(context: *mut $context, work: *const Work<$family>) -> u32 {
                given(work).map_or(Verdict::Drop, |work| pipeline::lost(&$frame::new(context), &work.packet)) as u32
            }

            fn $needs_snat(context: *mut $context, packet: *const Parsed<$family>, now: u32, backend: u32, flags: u32) -> u32 {
                let (Some(packet), Some(backend)) = (given(packet), Kernel.backend(backend)) else { return 0 };
                pipeline::needs_snat(&$frame::new(context), packet, Ticks(now), backend, flags)
            }

            fn $source(context: *mut $context, packet: *const Parsed<$family>, lookup: *const Lookup, backend: u32, needs: u32) -> u32 {
                let Some(now) = given(lookup).map(|lookup| lookup.now.0) else { return Snat::NO_ADDRESS.0 };
                let addresses = maps::pool_len::<$family>().max(1);
                let mut snat = Snat::NO_ADDRESS;
                for n in 0..Pool::MAX as u32 {
                    snat = match $address(context, packet, now, backend, n) {
                        0 => break,
                        pipeline::IS_NODE => Snat::NONE,
                        index if needs == pipeline::NEEDS_WRAP => Snat::outer(index),
                        index => Snat($reserve(context, packet, lookup, backend, index << 16 | addresses)),
                    };
                    if snat != Snat::NO_PORT {
                        break;
                    }
                }
                snat.0
            }

            fn $address(context: *mut $context, packet: *const Parsed<$family>, now: u32, backend: u32, n: u32) -> u32 {
                let Some(packet) = given(packet) else { return 0 };
                pipeline::address(&$frame::new(context), packet, Ticks(now), backend, n)
            }

            // An address's index in the upper half, and in the lower one how many there are.
            fn $reserve(context: *mut $context, packet: *const Parsed<$family>, lookup: *const Lookup, backend: u32, address: u32) -> u32 {
                let (index, addresses) = (address >> 16 << 16, address & 0xffff);
                balance::reserve(addresses, |n| Snat($attempt(context, packet, lookup, backend, index | n))).0
            }

            fn $attempt(context: *mut $context, packet: *const Parsed<$family>, lookup: *const Lookup, backend: u32, number: u32) -> u32 {
                let (Some(packet), Some(lookup)) = (given(packet), given(lookup)) else { return 0 };
                pipeline::attempt(&$frame::new(context), packet, lookup, backend, number).0
            }

            fn $dispatch(context: *mut $context, work: *const Work<$family>) -> i32 {
                given(work).map_or($frame::DROP, |work| $hook::dispatch(&$frame::new(context), work))
            }

            fn $wrap(context: *mut $context, work: *const Work<$family>) -> i32 {
                given(work).map_or($frame::DROP, |work| tunnel::$hook::wrap(&$frame::new(context), work))
            }
        }

        impl Reach<$family> for $frame {
            #[inline(always)]
            fn source(&self, packet: &Parsed<$family>, lookup: &Lookup, backend: u32, flags: u32) -> Snat {
                let context = self.$as_context();
                // What is masqueraded has no backend.
                let needs = if backend == 0 { pipeline::NEEDS_SNAT } else { $needs_snat(context, packet, lookup.now.0, backend, flags) };
                // Most need none, which costs no second call.
                if needs == 0 { Snat::NONE } else { Snat($source(context, packet, lookup, backend, needs)) }
            }

            #[inline(always)]
            fn hop(&self, address: $family, now: Ticks) -> u16 {
                maps::lead(address, self.interface(), now)
            }
        }

        impl Hook<$family> for $frame {
            #[inline(always)]
            fn place(&self, work: &mut Work<$family>, selection: Selection) -> Verdict {
                verdict($place(self.$as_context(), work, selection.0))
            }

            #[inline(always)]
            fn stray(&self) -> Verdict {
                verdict($stray(self.$as_context()))
            }

            #[inline(always)]
            fn lost(&self, work: &Work<$family>) -> Verdict {
                verdict($lost(self.$as_context(), work))
            }

            #[inline(always)]
            fn dispatch(&self, work: &Work<$family>) -> i32 {
                $dispatch(self.$as_context(), work)
            }

            #[inline(always)]
            fn wrap(&self, work: &Work<$family>) -> i32 {
                $wrap(self.$as_context(), work)
            }
        }
    };
}

hook!(
    Skb,
    tc,
    __sk_buff,
    skb,
    Ipv4Be,
    place_v4,
    stray_v4,
    lost_v4,
    needs_snat_v4,
    address_v4,
    reserve_v4,
    attempt_v4,
    source_v4,
    dispatch_v4,
    wrap_v4
);
hook!(
    Skb,
    tc,
    __sk_buff,
    skb,
    Ipv6Be,
    place_v6,
    stray_v6,
    lost_v6,
    needs_snat_v6,
    address_v6,
    reserve_v6,
    attempt_v6,
    source_v6,
    dispatch_v6,
    wrap_v6
);
hook!(
    Xdp,
    xdp,
    xdp_md,
    md,
    Ipv4Be,
    xdp_place_v4,
    xdp_stray_v4,
    xdp_lost_v4,
    xdp_needs_snat_v4,
    xdp_address_v4,
    xdp_reserve_v4,
    xdp_attempt_v4,
    xdp_source_v4,
    xdp_dispatch_v4,
    xdp_wrap_v4
);
hook!(
    Xdp,
    xdp,
    xdp_md,
    md,
    Ipv6Be,
    xdp_place_v6,
    xdp_stray_v6,
    xdp_lost_v6,
    xdp_needs_snat_v6,
    xdp_address_v6,
    xdp_reserve_v6,
    xdp_attempt_v6,
    xdp_source_v6,
    xdp_dispatch_v6,
    xdp_wrap_v6
);

/// A verdict from the number a subprogram returned.
#[inline(always)]
const fn verdict(number: u32) -> Verdict {
    const PASS: u32 = Verdict::Pass as u32;
    const TRANSLATE: u32 = Verdict::Translate as u32;
    const WRAP: u32 = Verdict::Wrap as u32;
    const REJECT: u32 = Verdict::Reject as u32;
    const EXHAUSTED: u32 = Verdict::Exhausted as u32;
    const CONFLICT: u32 = Verdict::Conflict as u32;
    const ECHO: u32 = Verdict::Echo as u32;
    const LOST: u32 = Verdict::Lost as u32;
    match number {
        PASS => Verdict::Pass,
        TRANSLATE => Verdict::Translate,
        WRAP => Verdict::Wrap,
        REJECT => Verdict::Reject,
        EXHAUSTED => Verdict::Exhausted,
        CONFLICT => Verdict::Conflict,
        ECHO => Verdict::Echo,
        LOST => Verdict::Lost,
        _ => Verdict::Drop,
    }
}

/// What the flow table says, from the number a subprogram returned.
#[inline(always)]
const fn known(number: u32) -> Known {
    const TRANSLATE: u32 = Known::Translate as u32;
    const TEND: u32 = Known::Tend as u32;
    const NO: u32 = Known::No as u32;
    match number {
        TRANSLATE => Known::Translate,
        TEND => Known::Tend,
        NO => Known::No,
        _ => Known::Elsewhere,
    }
}

/// A scope from its number.
#[inline(always)]
const fn scope(number: u32) -> Scope {
    const BOTH: u32 = Scope::Both as u32;
    const FORWARD: u32 = Scope::Forward as u32;
    match number {
        BOTH => Scope::Both,
        FORWARD => Scope::Forward,
        _ => Scope::Replies,
    }
}

impl Operations for Kernel {
    #[cfg(feature = "lru")]
    #[inline(always)]
    fn look_up(&self, fingerprint: Fingerprint, now: Ticks) -> Option<table::Found<'_>> {
        self.find(fingerprint, now)
    }

    #[inline(always)]
    fn locate(&self, fingerprint: Fingerprint, now: Ticks) -> Option<Place> {
        match flow_locate(fingerprint.0, now.0) {
            NOWHERE => None,
            place => Some(Place(place as u32)),
        }
    }

    #[inline(always)]
    fn scan(self, index: u32, new: &New) -> Scan {
        Scan(flow_scan(index, new))
    }

    #[inline(always)]
    fn insert(self, new: New) -> Inserted {
        maps::stage(new).map_or(Inserted::FULL, |new| Inserted(flow_insert(new)))
    }

    #[inline(always)]
    fn recount(self, place: Place, old: Data, new: &New) {
        flow_recount(place.0, old.0, new);
    }

    #[inline(always)]
    fn settle(self, new: &New, mine: Place) -> Data {
        Data(flow_settle(new, mine.0))
    }

    #[inline(always)]
    fn probe(self, fingerprint: Fingerprint, now: Ticks) -> Data {
        Data(flow_probe(fingerprint.0, now.0))
    }

    #[inline(always)]
    fn snat(self, fingerprint: Fingerprint, now: Ticks) -> Snat {
        Snat(flow_snat(fingerprint.0, now.0))
    }

    #[inline(always)]
    fn claimant(self, fingerprint: Fingerprint, now: Ticks) -> Option<Fingerprint> {
        match flow_claimant(fingerprint.0, now.0) {
            0 => None,
            claimant => Some(Fingerprint(claimant)),
        }
    }

    #[inline(always)]
    fn follow(self, fingerprint: Fingerprint, state: State, now: Ticks) -> bool {
        flow_follow(fingerprint.0, state.0 as u32, now.0) != 0
    }

    #[inline(always)]
    fn leave_by(self, fingerprint: Fingerprint, hop: u16, now: Ticks) {
        flow_leave_by(fingerprint.0, hop as u32, now.0);
    }

    #[inline(always)]
    fn remove(self, fingerprint: Fingerprint, now: Ticks) -> bool {
        flow_remove(fingerprint.0, now.0) != 0
    }
}
