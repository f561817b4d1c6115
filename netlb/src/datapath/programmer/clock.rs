//! The clock of the flow table, read in user space.

use netlb_common::time::Ticks;

/// CLOCK_MONOTONIC_COARSE, which `bpf_ktime_get_coarse_ns` reads too.
pub(super) fn now() -> Ticks {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that outlives the call. The call cannot fail: Linux has this clock since
    // 2.6.32.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    Ticks::from_nanos(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}
