//! A 64-bit word that several CPUs and user space share.
//!
//! The BPF target's `core` has no atomic types, but LLVM gives its instructions (`cmpxchg_64`, `xchg_64`) for the intrinsics behind
//! them. Everywhere else this is `AtomicU64`, so that Miri and threads in tests check the protocol that BPF runs. Compare-and-swap and
//! swap are sequentially consistent on both; a plain load or store is one 64-bit access.

use core::cell::UnsafeCell;

#[derive(Debug)]
#[repr(transparent)]
pub struct Word(UnsafeCell<u64>);

// SAFETY: every access goes through the atomic operations below.
unsafe impl Sync for Word {}

impl Word {
    #[must_use]
    pub const fn new(value: u64) -> Self {
        Self(UnsafeCell::new(value))
    }
}

#[cfg(target_arch = "bpf")]
impl Word {
    #[inline(always)]
    pub fn load(&self) -> u64 {
        // SAFETY: the cell is aligned and lives in a map; a 64-bit load is one instruction.
        unsafe { core::ptr::read_volatile(self.0.get()) }
    }

    /// Stores `new` if the word is `old`, and says whether it did.
    #[inline(always)]
    pub fn replace(&self, old: u64, new: u64) -> bool {
        use core::intrinsics::{AtomicOrdering::SeqCst, atomic_cxchg};
        // SAFETY: the cell is aligned and lives in a map.
        unsafe { atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(self.0.get(), old, new).0 == old }
    }

    #[inline(always)]
    pub fn swap(&self, new: u64) -> u64 {
        use core::intrinsics::{AtomicOrdering::SeqCst, atomic_xchg};
        // SAFETY: the cell is aligned and lives in a map.
        unsafe { atomic_xchg::<u64, { SeqCst }>(self.0.get(), new) }
    }

    #[inline(always)]
    pub fn store(&self, value: u64) {
        // SAFETY: the cell is aligned and lives in a map; a 64-bit store is one instruction.
        unsafe { core::ptr::write_volatile(self.0.get(), value) };
    }

    /// Adds, and returns what was there before.
    #[inline(always)]
    pub fn add(&self, value: u64) -> u64 {
        use core::intrinsics::{AtomicOrdering::SeqCst, atomic_xadd};
        // SAFETY: the cell is aligned and lives in a map.
        unsafe { atomic_xadd::<u64, u64, { SeqCst }>(self.0.get(), value) }
    }
}

#[cfg(not(target_arch = "bpf"))]
impl Word {
    #[inline(always)]
    const fn atomic(&self) -> &core::sync::atomic::AtomicU64 {
        // SAFETY: AtomicU64 has the size and alignment of u64 on every host netlb runs on, and all access is atomic.
        unsafe { core::sync::atomic::AtomicU64::from_ptr(self.0.get()) }
    }

    #[inline(always)]
    pub fn load(&self) -> u64 {
        self.atomic().load(core::sync::atomic::Ordering::SeqCst)
    }

    /// Stores `new` if the word is `old`, and says whether it did.
    #[inline(always)]
    pub fn replace(&self, old: u64, new: u64) -> bool {
        use core::sync::atomic::Ordering::SeqCst;
        self.atomic().compare_exchange(old, new, SeqCst, SeqCst).is_ok()
    }

    #[inline(always)]
    pub fn swap(&self, new: u64) -> u64 {
        self.atomic().swap(new, core::sync::atomic::Ordering::SeqCst)
    }

    #[inline(always)]
    pub fn store(&self, value: u64) {
        self.atomic().store(value, core::sync::atomic::Ordering::SeqCst);
    }

    /// Adds, and returns what was there before.
    #[inline(always)]
    pub fn add(&self, value: u64) -> u64 {
        self.atomic().fetch_add(value, core::sync::atomic::Ordering::SeqCst)
    }
}
