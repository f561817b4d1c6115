//! Packets from backends that are no service's: whoever came to a backend past its services gets them, and nobody is to look for their flow
//! again and again.

use crate::{flow::Fingerprint, time::Ticks};

/// Packets that were found to be no service's in this tick, as far as there is room. Zeros are empty.
#[derive(Debug)]
#[repr(C)]
pub struct Strangers {
    words: [u64; Self::LEN],
}

impl Strangers {
    const LEN: usize = 512;
    /// The bits of a word that hold the tick; in the others is the fingerprint.
    const TIME: u64 = (1 << 14) - 1;

    #[inline(always)]
    const fn word(fingerprint: Fingerprint, now: Ticks) -> u64 {
        fingerprint.0 & !Self::TIME | now.0 as u64 & Self::TIME
    }

    #[inline(always)]
    const fn place(fingerprint: Fingerprint) -> usize {
        (fingerprint.0 >> 32) as usize % Self::LEN
    }

    #[inline(always)]
    #[must_use]
    pub const fn has(&self, fingerprint: Fingerprint, now: Ticks) -> bool {
        self.words[Self::place(fingerprint)] == Self::word(fingerprint, now)
    }

    #[inline(always)]
    pub const fn add(&mut self, fingerprint: Fingerprint, now: Ticks) {
        self.words[Self::place(fingerprint)] = Self::word(fingerprint, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::mix;

    #[test]
    fn strangers_are_known_for_a_tick() {
        let mut strangers = Strangers { words: [0; Strangers::LEN] };
        let (one, other) = (Fingerprint(mix(1)), Fingerprint(mix(2)));
        let now = Ticks(70_000);
        assert!(!strangers.has(one, now));
        strangers.add(one, now);
        assert!(strangers.has(one, now) && !strangers.has(other, now));
        assert!(!strangers.has(one, Ticks(now.0 + 1)));
        let same_place = Fingerprint(one.0 ^ 1 << 20);
        strangers.add(same_place, now);
        assert!(strangers.has(same_place, now) && !strangers.has(one, now));
    }
}
