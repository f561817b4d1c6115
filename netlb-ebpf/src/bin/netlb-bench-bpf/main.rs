//! The programs of `cargo xtask bench`.
//!
//! A program that rewrites packets must not see its own output, and `BPF_PROG_TEST_RUN` repeats with what the last repetition left. So a
//! harness runs first: it makes each packet anew, of another flow, and goes on to the program under test by a tail call. What harness and
//! tail call cost is the floor: the time with a program under test that does nothing.
#![no_std]
#![no_main]

mod plan;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    btf_maps::{Array, ProgramArray},
    helpers::bpf_xdp_adjust_head,
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};

use crate::plan::{Endpoint, FRAME_LEN, HEADER_LEN, Plan};

const MOST_BUCKETS: usize = 1 << 20;

/// One element: what the packets are.
#[btf_map]
static PLAN: Array<Plan, 1> = Array::new();
/// As large as a flow table is here at most: its buckets, of 64 bytes, and the records beside each.
#[btf_map]
static BUCKETS: Array<[u64; 8], MOST_BUCKETS> = Array::new();
#[btf_map]
static RECORDS: Array<[u64; 24], MOST_BUCKETS> = Array::new();
/// One element: the program under test. A map holds programs of one type.
#[btf_map]
static TC_TARGET: ProgramArray<1> = ProgramArray::new();
#[btf_map]
static XDP_TARGET: ProgramArray<1> = ProgramArray::new();

/// Drops what does not reach the program under test, which user space notices.
#[classifier]
pub(crate) fn tc_harness(ctx: TcContext) -> i32 {
    if make_packet(ctx.data(), ctx.data_end()).is_some() {
        // SAFETY: nothing is to be dropped.
        unsafe { TC_TARGET.tail_call(&ctx, 0) };
    }
    TC_ACT_SHOT
}

#[classifier]
pub(crate) fn tc_next(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// As [`tc_harness`].
#[xdp]
pub(crate) fn xdp_harness(ctx: XdpContext) -> u32 {
    // What was wrapped is longer.
    let more = (ctx.data_end() - ctx.data()) as i32 - FRAME_LEN as i32;
    // SAFETY: the kernel's context.
    if more > 0 && unsafe { bpf_xdp_adjust_head(ctx.ctx, more) } != 0 {
        return xdp_action::XDP_ABORTED;
    }
    if make_packet(ctx.data(), ctx.data_end()).is_some() {
        // SAFETY: as above.
        unsafe { XDP_TARGET.tail_call(&ctx, 0) };
    }
    xdp_action::XDP_ABORTED
}

#[xdp]
pub(crate) fn xdp_pass(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Sends a packet back to where it came from.
#[xdp]
pub(crate) fn xdp_tx(ctx: XdpContext) -> u32 {
    let addresses = ctx.data() as *mut [[u16; 3]; 2];
    if ctx.data() + size_of::<[[u16; 3]; 2]>() > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: within the frame. BPF reads words at any address.
    unsafe {
        let [destination, source] = *addresses;
        *addresses = [source, destination];
    }
    xdp_action::XDP_TX
}

/// Needs the memory that a flow table like netlb's needs for the packet, and does nothing with it. All is asked for at once: a program that
/// has to know a bucket before it can ask for the next waits longer.
#[xdp]
pub(crate) fn xdp_memory(_: XdpContext) -> u32 {
    let Some(plan) = PLAN.get(0) else { return xdp_action::XDP_ABORTED };
    let (flow, memory) = (plan.flow, plan.memory);
    for direction in 0..2 {
        let bucket = anywhere(flow, direction) & memory.mask;
        if direction < memory.buckets
            && let Some(bucket) = BUCKETS.get_ptr_mut(bucket)
        {
            // SAFETY: within the element; runs follow each other.
            unsafe { bucket.cast::<u64>().read_volatile() };
        }
        if direction < memory.records
            && let Some(records) = RECORDS.get_ptr_mut(bucket)
        {
            // SAFETY: as above.
            unsafe { records.cast::<u64>().write_volatile(flow as u64) };
        }
    }
    xdp_action::XDP_PASS
}

/// A flow's direction, hashed.
#[inline(always)]
fn anywhere(flow: u32, direction: u32) -> u32 {
    let hash = ((flow as u64) << 1 | direction as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((hash ^ hash >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32) as u32
}

/// Puts the headers of the next packet into the frame.
#[inline(always)]
fn make_packet(start: usize, end: usize) -> Option<()> {
    let plan = PLAN.get_ptr_mut(0)?;
    // SAFETY: runs follow each other.
    let plan = unsafe { &mut *plan };
    let flow = plan.next_flow();
    if start + HEADER_LEN > end {
        return None;
    }
    for (index, word) in plan.header.iter().enumerate() {
        // SAFETY: within the frame. BPF writes words at any address.
        unsafe { (start as *mut u64).add(index).write(*word) };
    }
    put(&plan.client, flow, start, end)?;
    put(&plan.service, plan.service_of(flow), start, end)
}

/// Puts an endpoint into the frame.
#[inline(always)]
fn put(endpoint: &Endpoint, number: u32, start: usize, end: usize) -> Option<()> {
    /// Offsets are below this, as the verifier has to know.
    const OFFSETS: usize = 64;
    let address = start + endpoint.address_at as usize % OFFSETS;
    let port = start + endpoint.port_at as usize % OFFSETS;
    if address + 8 > end || port + 2 > end {
        return None;
    }
    let word = endpoint.address_end(number);
    // SAFETY: within the frame, as above.
    unsafe {
        if endpoint.word_len == 8 {
            (address as *mut u64).write(word);
        } else {
            (address as *mut u32).write(word as u32);
        }
        (port as *mut u16).write(endpoint.port(number).to_be());
    }
    Some(())
}

/// Never reached: the verifier refuses a program that can panic.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: see above.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
