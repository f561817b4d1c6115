use std::vec::Vec;

use super::*;
use crate::{addr::Addr, flow::Family};

/// An error with these first bytes, about a packet of TCP within one.
fn v4(head: [u8; 8]) -> Vec<u8> {
    let ip = |protocol, len: u8, from, to| {
        [0x45, 0, 0, len, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, from, 10, 0, 0, to]
    };
    let mut frame = [0; NETWORK].to_vec();
    frame.extend(ip(1, 76, 9, 1));
    frame.extend(head);
    frame.extend(ip(4, 48, 1, 2));
    frame.extend(ip(6, 28, 3, 4));
    frame.extend([0x12, 0x34, 0, 80, 0, 0, 0, 1]);
    frame
}

fn v6(head: [u8; 8]) -> Vec<u8> {
    let ip = |protocol: u8, len: u8, from: u8, to: u8| {
        let mut header = [0; 40];
        (header[0], header[5], header[6], header[7]) = (0x60, len, protocol, 64);
        (header[8], header[23], header[24], header[39]) = (0xfd, from, 0xfd, to);
        header
    };
    let mut frame = [0; NETWORK].to_vec();
    frame.extend(ip(58, 96, 9, 1));
    frame.extend(head);
    frame.extend(ip(41, 48, 1, 2));
    frame.extend(ip(6, 8, 3, 4));
    frame.extend([0x12, 0x34, 0, 80, 0, 0, 0, 1]);
    frame
}

fn told<A: Family>() -> Told<A> {
    let none = A::from_map(Addr::default());
    let inner =
        Tuple { source: none, destination: none, source_port: PortBe(0), destination_port: PortBe(0), protocol: 0 };
    Told { around: [none; 2], inner, takes: Takes::UNSAID }
}

fn takes<A: Relays>(frame: &[u8]) -> Takes {
    let mut told = told::<A>();
    let _ = read_around(frame, &mut told);
    told.takes
}

#[test]
fn what_fits_is_less_by_the_header_and_no_less_than_anybody_takes() {
    const SHORTER: u32 = Takes::SHORTER.0;
    for (mtu, inner) in [(1400_u16, 1380), (88, 68), (87, 68), (68, 68), (67, SHORTER), (0, SHORTER)] {
        let [a, b] = mtu.to_be_bytes();
        assert_eq!(takes::<Ipv4Be>(&v4([3, 4, 0, 0, 0, 0, a, b])), Takes(inner), "{mtu}");
    }
    for (mtu, inner) in [(1400_u32, 1360), (1320, 1280), (1300, 1280), (1279, SHORTER), (u32::MAX, SHORTER)] {
        let [a, b, c, d] = mtu.to_be_bytes();
        assert_eq!(takes::<Ipv6Be>(&v6([2, 0, 0, 0, a, b, c, d])), Takes(inner), "{mtu}");
    }
}

#[test]
fn who_cannot_be_reached_is_said_by_some_types() {
    for kind in 0..=255 {
        let said = if matches!(kind, 3 | 11) { Takes::NONE } else { Takes::UNSAID };
        assert_eq!(takes::<Ipv4Be>(&v4([kind, 1, 0, 0, 0, 0, 5, 5])), said, "{kind}");
        let said = match kind {
            1 | 3 | 4 => Takes::NONE,
            2 => Takes(1360),
            _ => Takes::UNSAID,
        };
        assert_eq!(takes::<Ipv6Be>(&v6([kind, 1, 0, 0, 0, 0, 5, 0x78])), said, "{kind}");
    }
}

#[test]
fn the_packets_around_and_within_are_read() {
    let frame = v4([3, 4, 0, 0, 0, 0, 5, 5]);
    let ip = |last: u8| Ipv4Be(u32::from_ne_bytes([10, 0, 0, last]));
    let mut four = told::<Ipv4Be>();
    let end = read_around(frame.as_slice(), &mut four).unwrap();
    assert_eq!((four.around, end), ([ip(1), ip(2)], frame.len()));
    read_inner(frame.as_slice(), end, &mut four).unwrap();
    let tuple = four.inner;
    assert_eq!((tuple.source, tuple.destination, tuple.protocol), (ip(3), ip(4), 6));
    assert_eq!((tuple.source_port.get(), tuple.destination_port.get()), (0x1234, 80));
    let frame = v6([2, 0, 0, 0, 0, 0, 5, 5]);
    let ip = |last: u64| Ipv6Be([0xfd << 56, last].map(u64::to_be));
    let mut six = told::<Ipv6Be>();
    let end = read_around(frame.as_slice(), &mut six).unwrap();
    assert_eq!((six.around, end), ([ip(1), ip(2)], frame.len()));
    read_inner(frame.as_slice(), end, &mut six).unwrap();
    assert_eq!((six.inner.source, six.inner.destination, six.inner.protocol), (ip(3), ip(4), 6));
}

#[test]
fn no_cut_off_quotation_is_read() {
    fn check<A: Relays>(frame: &[u8]) {
        let mut told = told::<A>();
        for len in 0..frame.len() {
            assert!(read_inner(&frame[..len], frame.len(), &mut told).is_err(), "{len}");
            assert!(read_inner(frame, len, &mut told).is_err(), "{len}");
            assert_eq!(read_around(&frame[..len], &mut told).is_ok(), len >= inner_at::<A>(), "{len}");
        }
    }
    check::<Ipv4Be>(&v4([3, 4, 0, 0, 0, 0, 5, 5]));
    check::<Ipv6Be>(&v6([2, 0, 0, 0, 0, 0, 5, 5]));
}

/// Each of these is wrong in one thing alone.
#[test]
fn errors_about_other_packets_are_not_read() {
    let message = NETWORK + 20;
    for (what, at, byte) in [
        ("options", NETWORK, 0x46),
        ("a fragment", NETWORK + 6, 0x20),
        ("for somebody else", NETWORK + 19, 2),
        ("about TCP", message + 8 + 9, 6),
        ("about IPv6", message + 8 + 9, 41),
        ("about a fragment", message + 8 + 6, 0x20),
        ("about options", message + 8, 0x46),
    ] {
        let mut frame = v4([3, 4, 0, 0, 0, 0, 5, 5]);
        frame[at] = byte;
        assert!(read_around(frame.as_slice(), &mut told::<Ipv4Be>()).is_err(), "{what}");
    }
}
