//! How many packets of its own a CPU sends: enough for every client that errs, too few to be of use to somebody who forges sources.

/// A second's worth of answers, and as many at once.
pub const ANSWERS: u64 = 1000;

const SECOND: u64 = 1_000_000_000;
const EACH: u64 = SECOND / ANSWERS;

/// When the answers so far are paid for: a token bucket in one word.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(transparent)]
pub struct Limit(pub u64);

impl Limit {
    /// Whether one more may be sent, `now` being nanoseconds since boot.
    #[inline(always)]
    #[must_use]
    pub const fn take(&mut self, now: u64) -> bool {
        let paid = if self.0 > now { self.0 } else { now };
        if paid - now > SECOND - EACH {
            return false;
        }
        self.0 = paid + EACH;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_so_many_a_second() {
        let mut limit = Limit::default();
        let start = 5 * SECOND;
        let mut burst = |now| (0..5000).filter(|_| limit.take(now)).count() as u64;
        assert_eq!(burst(start), ANSWERS);
        assert_eq!(burst(start), 0);
        assert_eq!(burst(start + SECOND / 10), ANSWERS / 10);
        assert_eq!(burst(start + 100 * SECOND), ANSWERS, "no more than a burst is saved");
        // Another CPU's clock was ahead.
        assert_eq!(burst(start + 99 * SECOND), 0);
    }
}
