//! Memory that is out of use.

/// Gives back to the kernel what reading a large file took for a moment: the allocator would keep it for ever.
pub(super) fn give_back() {
    // SAFETY: takes no pointers, and locks the allocator as any allocation does.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}
