//! Errors of ICMP (RFC 792) and ICMPv6 (RFC 4443 §2.1): eight bytes, and then the packet that they are about, as far as it is quoted.

/// The header of an error.
pub const LEN: usize = 8;
/// Where the checksum stands in it.
pub const CHECK: usize = 2;
/// The least that is quoted past the IP headers (RFC 792).
pub const QUOTED: usize = 8;

pub mod v4 {
    pub const PROTOCOL: u8 = 1;

    const UNREACHABLE: u8 = 3;
    const SOURCE_QUENCH: u8 = 4;
    const TIME_EXCEEDED: u8 = 11;
    const PARAMETER_PROBLEM: u8 = 12;

    /// Redirects quote a packet as well, but they are between a host and its own router.
    #[inline(always)]
    #[must_use]
    pub const fn is_error(kind: u8) -> bool {
        matches!(kind, UNREACHABLE | SOURCE_QUENCH | TIME_EXCEEDED | PARAMETER_PROBLEM)
    }
}

pub mod v6 {
    pub const PROTOCOL: u8 = 58;

    const UNREACHABLE: u8 = 1;
    const PARAMETER_PROBLEM: u8 = 4;

    /// Unreachable, too big, time exceeded, parameter problem.
    #[inline(always)]
    #[must_use]
    pub const fn is_error(kind: u8) -> bool {
        matches!(kind, UNREACHABLE..=PARAMETER_PROBLEM)
    }
}
