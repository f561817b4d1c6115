//! States of a flow.
//!
//! What netlb must know of a connection is how long its slots are worth keeping and who may be evicted for whom, so this is coarser than
//! RFC 9293 §3.3.2: no sequence numbers, no windows. "Established" means that the backend answered and the client went on after that;
//! a flood of SYNs, answered or not, stays embryonic.

use crate::wire::tcp;

/// The way a packet of a flow goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// From the client to the service.
    Forward = 0,
    /// From the backend to the client.
    Reply,
}

/// The control bits of a TCP segment that matter (RFC 9293 §3.1), or that it is a UDP datagram.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment(pub u8);

impl Segment {
    const FIN: u8 = 0x01;
    const SYN: u8 = 0x02;
    const RST: u8 = 0x04;
    const ACK: u8 = 0x10;
    /// ECN-Echo's place: unused here, so it can say "not TCP".
    pub const DATAGRAM: Self = Self(0x40);

    #[inline(always)]
    #[must_use]
    pub const fn from_control(bits: u8) -> Self {
        Self(bits & (Self::FIN | Self::SYN | Self::RST | Self::ACK))
    }

    #[inline(always)]
    #[must_use]
    pub const fn of_protocol(protocol: u8) -> Self {
        if protocol == tcp::PROTOCOL { Self(Self::ACK) } else { Self::DATAGRAM }
    }

    #[inline(always)]
    #[must_use]
    pub const fn is_datagram(self) -> bool {
        self.0 & Self::DATAGRAM.0 != 0
    }

    /// The first segment of a connection.
    #[inline(always)]
    #[must_use]
    pub const fn is_syn(self) -> bool {
        self.0 & (Self::SYN | Self::ACK | Self::RST) == Self::SYN
    }

    /// The answer to the first segment.
    #[inline(always)]
    #[must_use]
    pub const fn is_syn_ack(self) -> bool {
        self.0 & (Self::SYN | Self::ACK | Self::RST) == Self::SYN | Self::ACK
    }

    #[inline(always)]
    #[must_use]
    pub const fn is_reset(self) -> bool {
        self.0 & Self::RST != 0
    }

    #[inline(always)]
    #[must_use]
    pub const fn is_fin(self) -> bool {
        self.0 & Self::FIN != 0
    }

    /// Neither SYN, FIN nor RST: what most packets of a connection are.
    #[inline(always)]
    #[must_use]
    pub const fn is_plain(self) -> bool {
        self.0 & (Self::SYN | Self::FIN | Self::RST) == 0
    }
}

/// A flow's state, in the four bits it has in a slot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct State(pub u8);

impl State {
    /// No flow.
    pub const FREE: Self = Self(0);
    /// A slot being written.
    pub const CLAIMING: Self = Self(1);
    /// The client spoke, the backend has not.
    pub const SYN_SENT: Self = Self(2);
    /// The backend answered, the client has not gone on.
    pub const SYN_RECEIVED: Self = Self(3);
    pub const ESTABLISHED: Self = Self(4);
    /// The client has finished sending.
    pub const FIN_FORWARD: Self = Self(5);
    /// The backend has finished sending.
    pub const FIN_REPLY: Self = Self(6);
    /// Both have.
    pub const CLOSING: Self = Self(7);
    /// The client reset the connection.
    pub const RESET_FORWARD: Self = Self(8);
    /// The backend did.
    pub const RESET_REPLY: Self = Self(9);
    /// Datagrams from the client only.
    pub const UDP_ONE_WAY: Self = Self(10);
    pub const UDP_BOTH_WAYS: Self = Self(11);

    /// States there can be: the size of a table indexed by them.
    pub const COUNT: usize = 16;

    /// The name shown to people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FREE => "free",
            Self::CLAIMING => "claiming",
            Self::SYN_SENT => "syn-sent",
            Self::SYN_RECEIVED => "syn-received",
            Self::ESTABLISHED => "established",
            Self::FIN_FORWARD => "fin-forward",
            Self::FIN_REPLY => "fin-reply",
            Self::CLOSING => "closing",
            Self::RESET_FORWARD => "reset-forward",
            Self::RESET_REPLY => "reset-reply",
            Self::UDP_ONE_WAY => "udp-one-way",
            Self::UDP_BOTH_WAYS => "udp-both-ways",
            _ => "unknown",
        }
    }

    /// The state that a flow's first packet, which its client sends, gives it.
    #[inline(always)]
    #[must_use]
    pub const fn first(segment: Segment) -> Self {
        if segment.is_datagram() {
            Self::UDP_ONE_WAY
        } else if segment.is_reset() {
            Self::RESET_FORWARD
        } else {
            Self::SYN_SENT
        }
    }

    /// The state after one more packet.
    #[inline(always)]
    #[must_use]
    pub const fn next(self, direction: Direction, segment: Segment) -> Self {
        if segment.is_datagram() {
            return match direction {
                Direction::Forward => self,
                Direction::Reply => Self::UDP_BOTH_WAYS,
            };
        }
        if segment.is_reset() {
            return match (self, direction) {
                (Self::CLOSING, _) => self,
                (_, Direction::Forward) => Self::RESET_FORWARD,
                (_, Direction::Reply) => Self::RESET_REPLY,
            };
        }
        if segment.is_syn() {
            // A client that begins again on a finished flow; anywhere else a repetition, or none of a client's business.
            return match (self, direction) {
                (Self::CLOSING | Self::RESET_FORWARD | Self::RESET_REPLY, Direction::Forward) => Self::SYN_SENT,
                _ => self,
            };
        }
        // A side that goes on after "its" reset did not send that reset: somebody else did (RFC 5961 §1).
        let state = match (self, direction) {
            (Self::RESET_FORWARD, Direction::Forward) | (Self::RESET_REPLY, Direction::Reply) => Self::SYN_RECEIVED,
            (Self::SYN_SENT, Direction::Reply) => Self::SYN_RECEIVED,
            (Self::SYN_RECEIVED, Direction::Forward) => Self::ESTABLISHED,
            _ => self,
        };
        if !segment.is_fin() {
            return state;
        }
        match (state, direction) {
            (Self::SYN_RECEIVED | Self::ESTABLISHED, Direction::Forward) => Self::FIN_FORWARD,
            (Self::SYN_RECEIVED | Self::ESTABLISHED, Direction::Reply) => Self::FIN_REPLY,
            (Self::FIN_FORWARD, Direction::Reply) | (Self::FIN_REPLY, Direction::Forward) => Self::CLOSING,
            _ => state,
        }
    }

    /// The state after one more packet of the client, where those of the backend do not pass by: it answered what the client goes on after.
    #[inline(always)]
    #[must_use]
    pub const fn next_unanswered(self, segment: Segment) -> Self {
        if segment.is_datagram() {
            Self::UDP_BOTH_WAYS
        } else if segment.is_reset() {
            Self::RESET_FORWARD
        } else if segment.is_syn() {
            // Who has finished begins anew; anybody else repeats it.
            match self {
                Self::FIN_FORWARD | Self::RESET_FORWARD => Self::SYN_SENT,
                _ => self,
            }
        } else if segment.is_fin() {
            Self::FIN_FORWARD
        } else {
            // After "its" reset a client goes on only if somebody else sent that; the last acknowledgements come after the end.
            match self {
                Self::FIN_FORWARD => self,
                _ => Self::ESTABLISHED,
            }
        }
    }

    /// The state of one direction's slot, when the other direction's has come to `news`. Both may have noted a packet at the same moment, so
    /// a FIN that only one of them saw is not forgotten.
    #[inline(always)]
    #[must_use]
    pub const fn merge(self, news: Self) -> Self {
        match (self, news) {
            (Self::FIN_FORWARD, Self::FIN_REPLY)
            | (Self::FIN_REPLY, Self::FIN_FORWARD)
            | (Self::CLOSING, Self::FIN_FORWARD | Self::FIN_REPLY) => Self::CLOSING,
            (Self::FIN_FORWARD | Self::FIN_REPLY | Self::CLOSING, Self::ESTABLISHED) => self,
            _ => news,
        }
    }

    /// Whether one more packet leaves the state as it is, as [`next`](Self::next) would say at greater length: true of nearly every one.
    #[inline(always)]
    #[must_use]
    pub const fn is_kept_by(self, direction: Direction, segment: Segment) -> bool {
        const ALWAYS: u16 = 1 << State::ESTABLISHED.0
            | 1 << State::FIN_FORWARD.0
            | 1 << State::FIN_REPLY.0
            | 1 << State::CLOSING.0
            | 1 << State::UDP_BOTH_WAYS.0;
        const FORWARD: u16 = ALWAYS | 1 << State::UDP_ONE_WAY.0;
        let states = match direction {
            Direction::Forward => FORWARD,
            Direction::Reply => ALWAYS,
        };
        segment.is_plain() && states >> self.0 & 1 != 0
    }

    /// Whether a client may begin a new connection on this flow: a SYN here starts over.
    #[inline(always)]
    #[must_use]
    pub const fn is_finished(self) -> bool {
        matches!(self, Self::CLOSING | Self::RESET_FORWARD | Self::RESET_REPLY)
    }

    /// How many ticks the unit of a slot's time field has in this state, as a shift: established flows live longer than the field
    /// could tell in ticks.
    #[inline(always)]
    #[must_use]
    pub const fn unit_shift(self) -> u32 {
        match self {
            Self::ESTABLISHED => 2,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests;
