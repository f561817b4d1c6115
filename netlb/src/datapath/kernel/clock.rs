//! How the programs tell the time.
//!
//! They need it for every packet. The clock that user space reads, CLOCK_MONOTONIC_COARSE, is a helper's to tell them; a call of a helper
//! takes as long as a tenth of all else. The kernel's count of its ticks they read by one load, which the verifier puts in the place of
//! the call. Both clocks advance together, so that one follows from the other as long as the machine runs.

use std::{io, os::fd::AsFd as _};

use netlb_common::time::Jiffies;

use super::syscall;

/// What to make of the count of ticks, so that it is CLOCK_MONOTONIC_COARSE.
pub(super) fn jiffies() -> io::Result<Jiffies> {
    let (jiffies, nanos) = both_clocks()?;
    let length = tick_length()?;
    Ok(Jiffies { length, epoch: nanos.wrapping_sub(jiffies.wrapping_mul(length)) })
}

/// Nanoseconds of the kernel's tick: the resolution of the coarse clocks.
fn tick_length() -> io::Result<u64> {
    let mut length = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that outlives the call.
    if unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(length.tv_sec as u64 * 1_000_000_000 + length.tv_nsec as u64)
}

/// Ticks since some time before boot, and nanoseconds since boot: of the same moment, but for one tick.
fn both_clocks() -> io::Result<(u64, u64)> {
    /// An XDP program that writes both into its packet. Too little for an object of its own.
    const PROGRAM: [u64; 12] = [
        instruction(0xb7, 0, 0, 0, 1),   // r0 = XDP_DROP
        instruction(0x61, 6, 1, 0, 0),   // r6 = the packet's begin
        instruction(0x61, 7, 1, 4, 0),   // r7 = its end
        instruction(0xbf, 2, 6, 0, 0),   // r2 = r6
        instruction(0x07, 2, 0, 0, 16),  // r2 += 16
        instruction(0x2d, 2, 7, 5, 0),   // if r2 > r7 leave
        instruction(0x85, 0, 0, 0, 118), // r0 = bpf_jiffies64(), since Linux 5.6
        instruction(0x7b, 6, 0, 0, 0),   // *r6 = r0
        instruction(0x85, 0, 0, 0, 160), // r0 = bpf_ktime_get_coarse_ns(), since Linux 5.11
        instruction(0x7b, 6, 0, 8, 0),   // *(r6 + 8) = r0
        instruction(0xb7, 0, 0, 0, 2),   // r0 = XDP_PASS
        instruction(0x95, 0, 0, 0, 0),   // exit
    ];
    let program = syscall::load_xdp(&PROGRAM)?;
    let mut packet = [0; 64];
    syscall::test_run(program.as_fd(), &mut packet)?;
    let word = |index: usize| u64::from_ne_bytes(packet.as_chunks().0[index]);
    Ok((word(0), word(1)))
}

/// `struct bpf_insn`.
const fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    let registers = if cfg!(target_endian = "little") { source << 4 | destination } else { destination << 4 | source };
    let ([a, b], [c, d, e, f]) = (offset.to_ne_bytes(), immediate.to_ne_bytes());
    u64::from_ne_bytes([code, registers, a, b, c, d, e, f])
}
