//! Numbers that the compiler or the verifier are to know less of.
//!
//! The compiler writes loops out whose counts it knows, and then keeps more on the stack than a BPF program has. The verifier goes every
//! way once for each constant that leads there; where a range would do as well, that multiplies what it looks at.

/// The number, of which the compiler knows nothing.
#[inline(always)]
pub(crate) fn rolled(mut number: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    // SAFETY: copies a register onto itself.
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) number, options(nomem, nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        number = core::hint::black_box(number);
    }
    number
}

/// The number, of which neither knows anything. `word` is any that the verifier does not know.
#[inline(always)]
pub(crate) fn any(mut number: u64, word: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: changes one register, twice, so that it is as before.
    unsafe {
        core::arch::asm!("{0} ^= {1}", "{0} ^= {1}", inout(reg) number, in(reg) word, options(nomem, nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = word;
        number = core::hint::black_box(number);
    }
    number
}
