//! Arrays of the kernel in our memory.
//!
//! The programs read them at any moment, so that everything goes word by word: a 64-bit word is seen as it was or as it is, and what
//! order matters for, the caller separates by fences.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering},
};

use netlb_common::{
    directory::Line,
    hop::Hop,
    maps::{Backend, Config, Frontend, ServiceStats, Tally},
    snat::Source,
    table::{Bucket, Overflow, Record},
};

/// An element that several writers share: all access to it is atomic.
///
/// # Safety
///
/// Every bit pattern is a value, and the type has no access that is not atomic.
pub(super) unsafe trait Shared {}

// SAFETY: atomic by nature.
unsafe impl Shared for AtomicU16 {}
// SAFETY: as above.
unsafe impl Shared for AtomicU32 {}
// SAFETY: as above.
unsafe impl Shared for AtomicU64 {}
// SAFETY: consists of `Word`s, whose access is atomic.
unsafe impl Shared for Bucket {}
// SAFETY: as above.
unsafe impl Shared for Record {}
// SAFETY: as above.
unsafe impl Shared for Overflow {}
// SAFETY: as above.
unsafe impl Shared for Tally {}
// SAFETY: as above.
unsafe impl Shared for Line {}
// SAFETY: as above.
unsafe impl Shared for Hop {}
// SAFETY: as above.
unsafe impl Shared for Source {}

/// An element that is copied in and out.
///
/// # Safety
///
/// Every bit pattern is a value, there is no padding, and size and alignment are those of some number of `u64`.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: `repr(C)` of integers, 64 bytes, all of them named.
unsafe impl Plain for Config {}
// SAFETY: as above.
unsafe impl Plain for Backend {}
// SAFETY: `repr(C)` of integers, 32 bytes, all of them named.
unsafe impl Plain for Frontend {}
// SAFETY: `repr(C)` of five `u64`.
unsafe impl Plain for ServiceStats {}

/// A `BPF_F_MMAPABLE` array, as a slice of elements. They may be parts of the map's: lines of numbers are mapped as the numbers.
#[derive(Debug)]
pub(super) struct Mapping<T> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: the mapping is no thread's own, and all access to it is atomic.
unsafe impl<T> Send for Mapping<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Mapping<T> {}

impl<T> Mapping<T> {
    /// Maps an array of this many elements of this type.
    pub(super) fn new(map: BorrowedFd<'_>, len: u32) -> io::Result<Self> {
        let len = len as usize;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping somewhere.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len * size_of::<T>(), protection, flags, map.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, len })
    }

    /// Where an element is. An index that is out of bounds is our mistake, as with a slice.
    fn pointer(&self, index: usize) -> *mut T {
        assert!(index < self.len, "index {index} of a map of {}", self.len);
        // SAFETY: inside of the mapping.
        unsafe { self.start.as_ptr().add(index) }
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: ours, and nothing borrows from it any more. It cannot fail for a mapping that is there.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}

impl<T: Shared> Mapping<T> {
    pub(super) fn get(&self, index: u32) -> Option<&T> {
        // SAFETY: inside of the mapping, page aligned or a multiple of the size after that, and all access is atomic.
        ((index as usize) < self.len).then(|| unsafe { &*self.pointer(index as usize) })
    }

    pub(super) fn at(&self, index: u32) -> &T {
        // SAFETY: as above.
        unsafe { &*self.pointer(index as usize) }
    }
}

impl<T: Plain> Mapping<T> {
    const WORDS: usize = {
        assert!(size_of::<T>().is_multiple_of(size_of::<u64>()) && align_of::<T>() >= align_of::<u64>());
        size_of::<T>() / size_of::<u64>()
    };

    fn words(&self, index: u32) -> impl Iterator<Item = &AtomicU64> {
        let start = self.pointer(index as usize).cast::<u64>();
        // SAFETY: the words of an element inside of the mapping, aligned, and all access is atomic.
        (0..Self::WORDS).map(move |word| unsafe { AtomicU64::from_ptr(start.add(word)) })
    }

    pub(super) fn read(&self, index: u32) -> T {
        let mut element = std::mem::MaybeUninit::<T>::uninit();
        let to = element.as_mut_ptr().cast::<u64>();
        for (number, word) in self.words(index).enumerate() {
            // SAFETY: one of the element's words.
            unsafe { to.add(number).write(word.load(Ordering::Relaxed)) };
        }
        // SAFETY: all words are written, and any are a value.
        unsafe { element.assume_init() }
    }

    pub(super) fn write(&self, index: u32, element: &T) {
        let from = std::ptr::from_ref(element).cast::<u64>();
        for (number, word) in self.words(index).enumerate() {
            // SAFETY: one of the element's words, which have no padding.
            word.store(unsafe { from.add(number).read() }, Ordering::Relaxed);
        }
    }

    /// A field of an element, for what must be written apart from the rest.
    pub(super) fn field<F>(&self, index: u32, offset: usize) -> *mut F {
        assert!(offset + size_of::<F>() <= size_of::<T>() && offset.is_multiple_of(align_of::<F>()));
        // SAFETY: inside of the element.
        unsafe { self.pointer(index as usize).byte_add(offset).cast() }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd as _};

    use super::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn what_is_written_is_read() {
        let mapping = Mapping::<Backend>::new(file(64 * 10).as_fd(), 10).unwrap();
        let backend = Backend { flags: 3, service: 7, base: 1, weight: 2, pad2: [3, 4, 5], ..Backend::default() };
        mapping.write(9, &backend);
        assert_eq!(mapping.read(9), backend);
        assert_eq!(mapping.read(8), Backend::default());
    }

    #[test]
    fn two_mappings_are_one_memory() {
        let file = file(64);
        let numbers = Mapping::<AtomicU16>::new(file.as_fd(), 32).unwrap();
        let words = Mapping::<AtomicU64>::new(file.as_fd(), 8).unwrap();
        numbers.at(4).store(0x1234, Ordering::Relaxed);
        assert_eq!(words.at(1).load(Ordering::Relaxed).to_ne_bytes()[..2], 0x1234_u16.to_ne_bytes());
        assert!(numbers.get(32).is_none());
    }
}
