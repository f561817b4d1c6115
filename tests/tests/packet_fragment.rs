//! Fragments: what one piece of a datagram gets, all get, in whatever order they come.

use std::net::SocketAddr;

use netlb::datapath::kernel::testing::Program;
use netlb::model::Protocol;
use netlb_common::counters::Counter;
use netlb_common::fragment::Region;
use netlb_integration::frames::{ACK, ETHERNET, Packet, SYN_ACK, fragments, patch};
use netlb_integration::lab::{
    BACKENDS, BACKENDS_MAC, CASES, CLIENTS, CLIENTS_MAC, Case, DROP, Lab, Outcome, PASS, REDIRECT, XDP_PASS, mac,
};
use netlb_integration::raw::Tap;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

const ID: u32 = 0x9abc_def0;
/// Bytes in a fragment: four of them make a datagram here.
const SIZE: usize = 512;

fn payload() -> Vec<u8> {
    (0..1800_u32).map(|n| (n.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect()
}

fn pieces(packet: &Packet, id: u32) -> Vec<Vec<u8>> {
    fragments(&packet.frame(), id, SIZE)
}

/// A client's datagram to the virtual address.
fn request(case: Case) -> Packet {
    case.packet(case.client(40000), case.vip(80)).payload(payload()).may_fragment()
}

/// The same as a backend gets it.
fn at_backend(case: Case) -> Packet {
    let backend = case.backend(3);
    request(case).to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC)
}

/// A number that no other case has: the number of a datagram of IPv6 is not of a protocol.
fn number(case: Case) -> u32 {
    CASES.iter().position(|other| *other == case).unwrap_or_default() as u32 + 1
}

#[test]
fn requests_reach_the_backend_in_order() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let expected = pieces(&at_backend(case), ID);
        for (frame, expected) in pieces(&request(case), ID).into_iter().zip(expected) {
            assert_eq!(lab.from_clients(frame), Outcome { verdict: REDIRECT, frame: expected }, "{case}");
        }
        assert_eq!(lab.counts(), [(Counter::ToInterface, 4), (Counter::FlowsCreated, 1)], "{case}");
    }
    Ok(())
}

#[test]
fn requests_reach_the_backend_by_the_stack() -> TestResult {
    let mut lab = Lab::stack()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let expected = pieces(&request(case).to(case.backend(3)), ID);
        for (frame, expected) in pieces(&request(case), ID).into_iter().zip(expected) {
            assert_eq!(lab.from_clients(frame), Outcome { verdict: PASS, frame: expected }, "{case}");
        }
        assert_eq!(lab.counts(), [(Counter::ToStack, 4), (Counter::FlowsCreated, 1)], "{case}");
    }
    Ok(())
}

#[test]
fn replies_come_from_the_virtual_address() -> TestResult {
    for (mut lab, fast) in [(Lab::fast()?, true), (Lab::stack()?, false)] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let (client, vip) = (case.client(40000), case.vip(80));
            lab.backend_of(&case.packet(client, vip));
            lab.counts();
            let reply = case.segment(case.backend(3), client, SYN_ACK).payload(payload()).may_fragment();
            let translated = match fast {
                true => reply.clone().from(vip).ttl(60).macs(mac(client.ip()), CLIENTS_MAC),
                false => reply.clone().from(vip),
            };
            let verdict = if fast { REDIRECT } else { PASS };
            for (frame, expected) in pieces(&reply, ID).into_iter().zip(pieces(&translated, ID)) {
                let at_ingress = lab.from_backends(&frame);
                let out = if fast { at_ingress } else { lab.to_clients(&frame) };
                assert_eq!(out, Outcome { verdict, frame: expected }, "{case}");
            }
            assert_eq!(lab.count(Counter::Fragment), 0, "{case}");
        }
    }
    Ok(())
}

#[test]
fn a_datagram_without_checksum_stays_without() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case { family, protocol: Protocol::Udp };
        lab.begin([case.service(&[3])]);
        let expected = pieces(&at_backend(case).without_checksum(), ID);
        for (frame, expected) in pieces(&request(case).without_checksum(), ID).into_iter().zip(expected) {
            assert_eq!(lab.from_clients(frame), Outcome { verdict: REDIRECT, frame: expected }, "{family}");
        }
    }
    Ok(())
}

/// The kernel compares the device's sum, as the program carried it on, with that of the bytes.
#[test]
fn fragments_that_a_device_summed_stay_right() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            for frame in pieces(&request(case), ID) {
                lab.run_summed(Program::Ingress, frame, CLIENTS);
            }
            let reply = case.segment(case.backend(3), case.client(40000), SYN_ACK).payload(payload());
            for frame in pieces(&reply, ID) {
                lab.run_summed(Program::Ingress, &frame, BACKENDS);
                lab.run_summed(Program::Egress, &frame, CLIENTS);
            }
            assert_eq!(lab.count(Counter::Fragment), 0, "{case}");
        }
    }
    Ok(())
}

#[test]
fn options_stand_before_and_within_fragments() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let with = |packet: Packet| match case.family {
            Family::V4 => packet.options([1, 1, 1, 0]),
            // Destination options, of which only the first fragment tells what follows them.
            Family::V6 => packet.extension(60, [0, 0, 1, 4, 0, 0, 0, 0]),
        };
        let expected = pieces(&with(at_backend(case)), ID);
        for (frame, expected) in pieces(&with(request(case)), ID).into_iter().zip(expected) {
            assert_eq!(lab.from_clients(frame), Outcome { verdict: REDIRECT, frame: expected }, "{case}");
        }
    }
    Ok(())
}

#[test]
fn datagrams_of_no_service_pass_bit_for_bit() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let (client, backend) = (case.client(40000), case.backend(3));
            for (what, packet) in [
                ("to another port", case.packet(client, case.vip(81))),
                ("to another address", case.packet(client, case.backend(9))),
                ("from a backend, of no flow", case.segment(backend, client, ACK)),
            ] {
                for frame in pieces(&packet.payload(payload()), ID) {
                    for program in [Program::Ingress, Program::Egress] {
                        let out = lab.run(program, &frame, CLIENTS);
                        assert_eq!(out, Outcome { verdict: PASS, frame: frame.clone() }, "{case}: {what}");
                    }
                }
                assert_eq!(lab.counts(), [], "{case}: {what}");
            }
        }
    }
    Ok(())
}

#[test]
fn fragments_of_other_protocols_pass_bit_for_bit() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        for number in [1, 50, 58, 132] {
            let mut frame = request(case).frame();
            patch(&mut frame, if case.family == Family::V4 { ETHERNET + 9 } else { ETHERNET + 6 }, &[number]);
            for frame in fragments(&frame, ID, SIZE).into_iter().rev() {
                assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}: protocol {number}");
            }
        }
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

#[test]
fn xdp_leaves_fragments_to_tc() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        for frame in pieces(&request(case), ID) {
            assert_eq!(lab.xdp_from_clients(&frame), Outcome { verdict: XDP_PASS, frame }, "{case}");
        }
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

/// What is held comes in once more, by the interface of the first fragment, and is translated then.
#[test]
fn requests_out_of_order_wait_for_the_first_fragment() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        for (id, order) in [(1, [3, 2, 1, 0]), (2, [1, 0, 3, 2]), (3, [2, 3, 0, 1])] {
            lab.begin([case.service(&[3])]);
            let what = format!("{case}: {order:?}");
            let id = id << 8 | number(case);
            let (frames, expected) = (pieces(&request(case), id), pieces(&at_backend(case), id));
            let tap = Tap::on(CLIENTS)?;
            let first = order.iter().position(|n| *n == 0).unwrap_or_default();
            for n in &order[..first] {
                assert_eq!(lab.from_clients(&frames[*n]).verdict, DROP, "{what}");
            }
            assert_eq!(lab.counts(), [(Counter::FragmentsHeld, first as u64)], "{what}");
            assert_eq!(tap.frames()?, Vec::<Vec<u8>>::new(), "{what}");

            assert_eq!(lab.from_clients(&frames[0]).verdict, DROP, "{what}");
            let again = tap.frames()?;
            let mut wanted = vec![frames[0].clone()];
            wanted.extend(order[..first].iter().map(|n| frames[*n].clone()));
            assert_eq!(again, wanted, "{what}: the first one, and what waited for it");
            for frame in again.iter().chain(order[first + 1..].iter().map(|n| &frames[*n])) {
                let n = frames.iter().position(|sent| sent == frame).unwrap_or_default();
                assert_eq!(
                    lab.from_clients(frame),
                    Outcome { verdict: REDIRECT, frame: expected[n].clone() },
                    "{what}"
                );
            }
            assert_eq!(lab.counts(), [(Counter::ToInterface, 4), (Counter::FlowsCreated, 1)], "{what}");
            assert_eq!(tap.frames()?, Vec::<Vec<u8>>::new(), "{what}: nothing more");
        }
    }
    Ok(())
}

/// The first fragment becomes the one that waited for it: the kernel compares the sum with its bytes. For a frame of another length the kernel
/// gives the sum up.
#[test]
fn a_first_fragment_that_a_device_summed_brings_the_others_back() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        for n in [1, 2] {
            lab.begin([case.service(&[3])]);
            let frames = pieces(&request(case), number(case) << 8 | n as u32);
            let tap = Tap::on(CLIENTS)?;
            assert_eq!(lab.from_clients(&frames[n]).verdict, DROP, "{case}: {n}");
            let out = lab.run_summed(Program::Ingress, &frames[0], CLIENTS);
            assert_eq!(out, Outcome { verdict: DROP, frame: frames[n].clone() }, "{case}: {n}");
            assert_eq!(tap.frames()?, [frames[0].clone(), frames[n].clone()], "{case}: {n}");
        }
    }
    Ok(())
}

#[test]
fn the_longest_datagram_waits_as_a_whole() -> TestResult {
    const LONGEST: usize = 65_000;
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case { family, protocol: Protocol::Udp };
        lab.begin([case.service(&[3])]);
        let frames = fragments(&request(case).payload(vec![0x5a; LONGEST]).frame(), 4, 1440);
        let tap = Tap::on(CLIENTS)?;
        for frame in frames[1..].iter().rev() {
            assert_eq!(lab.from_clients(frame).verdict, DROP, "{family}");
        }
        assert_eq!(lab.from_clients(&frames[0]).verdict, DROP, "{family}");
        let mut again = tap.frames()?;
        again[1..].reverse();
        assert!(again == frames, "{family}: {} frames came back of {}", again.len(), frames.len());
        assert_eq!(lab.counts(), [(Counter::FragmentsHeld, frames.len() as u64 - 1)], "{family}");
    }
    Ok(())
}

/// Whose datagram it is, only the first fragment tells.
#[test]
fn what_waited_for_a_datagram_of_no_service_passes_after_that() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let frames = pieces(&request(case).to(case.vip(81)), number(case));
            let tap = Tap::on(CLIENTS)?;
            for frame in frames.iter().rev() {
                assert_eq!(lab.from_clients(frame).verdict, DROP, "{case}");
            }
            let again = tap.frames()?;
            assert_eq!(again.len(), 4, "{case}");
            for frame in again {
                assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}");
            }
            assert_eq!(lab.counts(), [(Counter::FragmentsHeld, 3)], "{case}");
        }
    }
    Ok(())
}

/// What the kernel sends is in order, and so is TCP, which nobody fragments on purpose.
#[test]
fn later_fragments_of_unknown_datagrams_from_backends_wait_where_they_may_be_replies() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let reply = case.segment(case.backend(3), case.client(40000), ACK).payload(payload());
            for frame in &pieces(&reply, 6)[1..] {
                let untouched = Outcome { verdict: PASS, frame: frame.clone() };
                let out = lab.from_backends(frame);
                match case.protocol {
                    Protocol::Udp => assert_eq!(out.verdict, DROP, "{case}: held"),
                    Protocol::Tcp => assert_eq!(out, untouched, "{case}"),
                }
                assert_eq!(lab.to_clients(frame), untouched, "{case}: at egress");
            }
            for frame in &pieces(&request(case), 6)[1..] {
                let untouched = Outcome { verdict: PASS, frame: frame.clone() };
                assert_eq!(lab.run(Program::Egress, frame, CLIENTS), untouched, "{case}: to a service, at egress");
            }
            let counted = match case.protocol {
                Protocol::Udp => vec![(Counter::Fragment, 6), (Counter::FragmentsHeld, 3)],
                Protocol::Tcp => vec![(Counter::Fragment, 9)],
            };
            assert_eq!(lab.counts(), counted, "{case}");
        }
    }
    Ok(())
}

/// A backend's replies are translated, and what else it sends goes on as it was: nothing is kept from it.
#[test]
fn what_a_backend_sends_out_of_order_waits_for_its_first_fragment() -> TestResult {
    for (mut lab, is_fast) in [(Lab::fast()?, true), (Lab::stack()?, false)] {
        for case in [CASES[1], CASES[3]] {
            lab.begin([case.service(&[3])]);
            let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
            lab.backend_of(&case.packet(client, vip));
            lab.counts();
            let of = |source, to| case.segment(source, to, ACK).payload(payload()).may_fragment();
            let reply = of(backend, client);
            let translated = match is_fast {
                true => reply.clone().from(vip).ttl(60).macs(mac(client.ip()), CLIENTS_MAC),
                false => reply.clone().from(vip),
            };
            let own = of(backend, case.client(53));
            let unknown = of(SocketAddr::new(backend.ip(), 4000), client);
            for (id, what, packet, expected, verdict) in [
                (1, "a reply", &reply, &translated, if is_fast { REDIRECT } else { PASS }),
                (2, "of no flow", &own, &own, PASS),
                (3, "of no service", &unknown, &unknown, PASS),
            ] {
                let what = format!("{case}, fast {is_fast}: {what}");
                let id = id << 8 | number(case);
                let frames = pieces(packet, id);
                let tap = Tap::on(BACKENDS)?;
                for frame in frames.iter().rev() {
                    assert_eq!(lab.from_backends(frame).verdict, DROP, "{what}");
                }
                let again = tap.frames()?;
                let order = [0, 3, 2, 1];
                assert_eq!(again, order.map(|n| frames[n].clone()), "{what}");
                let expected = pieces(expected, id);
                for (frame, n) in again.iter().zip(order) {
                    let mut out = lab.from_backends(frame);
                    if !is_fast {
                        assert_eq!(out, Outcome { verdict: PASS, frame: frame.clone() }, "{what}");
                        out = lab.to_clients(frame);
                    }
                    assert_eq!(out, Outcome { verdict, frame: expected[n].clone() }, "{what}");
                }
                assert_eq!((lab.count(Counter::FragmentsHeld), lab.count(Counter::Fragment)), (3, 0), "{what}");
                lab.counts();
            }
        }
    }
    Ok(())
}

#[test]
fn as_many_are_held_as_there_is_room_and_others_pass() -> TestResult {
    let mut lab = Lab::fast()?;
    let case = Case { family: Family::V4, protocol: Protocol::Udp };
    lab.begin([case.service(&[3])]);
    let of_one = fragments(&request(case).payload(vec![0x5a; 10_000]).frame(), 7, 64);
    let mut held = 0;
    for frame in &of_one[1..] {
        let out = lab.from_clients(frame);
        held += u32::from(out.verdict == DROP);
        assert!(out.verdict == DROP || out == Outcome { verdict: PASS, frame: frame.clone() });
    }
    assert_eq!(held, Region::PLACES);
    for id in 1000..2000 {
        held += u32::from(lab.from_clients(&pieces(&request(case), id)[1]).verdict == DROP);
    }
    assert_eq!(held, Region::COUNT * Region::PLACES);
    let passed = of_one.len() as u64 - 1 + 1000 - u64::from(held);
    assert_eq!(lab.counts(), [(Counter::Fragment, passed), (Counter::FragmentsHeld, held.into())]);

    // After a while there is room again, and those that had it are lost.
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert_eq!(lab.from_clients(&pieces(&request(case), 3000)[1]).verdict, DROP);
    assert_eq!(lab.counts(), [(Counter::FragmentsHeld, 1), (Counter::FragmentsLost, 1)]);
    Ok(())
}

/// Numbers of datagrams come round: what counts is the first fragment that came last.
#[test]
fn a_number_that_is_used_again_is_of_the_new_datagram() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service_at(80, &[3]), case.service_at(81, &[4])]);
        for (port, host) in [(80, 3), (81, 4), (80, 3)] {
            let to = |packet: Packet, port| packet.to(case.vip(port));
            for frame in pieces(&to(request(case), port), ID) {
                let out = lab.from_clients(frame);
                let address = case.backend(host).ip();
                let octets = match address {
                    std::net::IpAddr::V4(address) => address.octets().to_vec(),
                    std::net::IpAddr::V6(address) => address.octets().to_vec(),
                };
                let at = if case.family == Family::V4 { 30 } else { 38 };
                assert_eq!(out.frame[at..at + octets.len()], octets, "{case}, port {port}");
            }
        }
    }
    Ok(())
}

#[test]
fn fragments_without_hops_left_are_the_kernels() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        for frame in pieces(&request(case).ttl(1), 8).into_iter().rev() {
            assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}");
        }
        assert_eq!(lab.counts(), [(Counter::TtlExpired, 4)], "{case}");
    }
    Ok(())
}
