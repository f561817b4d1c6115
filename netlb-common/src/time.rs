//! The clock of the flow table.
//!
//! Ticks of 2^30 ns (1.07 s) since boot: a shift instead of a division for every packet. User space reads CLOCK_MONOTONIC_COARSE, the
//! programs [`Jiffies`], or where they cannot `bpf_ktime_get_coarse_ns`: the same clock.

/// Nanoseconds per tick, as a shift.
pub const TICK_SHIFT: u32 = 30;

/// A moment, in ticks since boot.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Ticks(pub u32);

impl Ticks {
    #[inline(always)]
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self((nanos >> TICK_SHIFT) as u32)
    }
}

/// How CLOCK_MONOTONIC_COARSE follows from the kernel's own count of time, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Jiffies {
    /// Of one; 0 where the count is not to be used.
    pub length: u64,
    /// What to add.
    pub epoch: u64,
}

impl Jiffies {
    #[inline(always)]
    #[must_use]
    pub const fn nanos(self, jiffies: u64) -> u64 {
        jiffies.wrapping_mul(self.length).wrapping_add(self.epoch)
    }
}

/// A duration in ticks, rounded up.
#[must_use]
pub const fn ticks_from_seconds(seconds: u64) -> u64 {
    (seconds * 1_000_000_000).div_ceil(1 << TICK_SHIFT)
}

/// A number of ticks in whole seconds.
#[must_use]
pub const fn seconds_from_ticks(ticks: u64) -> u64 {
    (ticks << TICK_SHIFT) / 1_000_000_000
}
