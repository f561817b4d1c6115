//! ICMP errors about translated packets become errors about the packets that were sent; all others pass as they are.

use std::net::{IpAddr, SocketAddr};

use etherparse::checksum::Sum16BitWords;
use netlb::datapath::kernel::testing::{Program, Site};
use netlb::model::Protocol;
use netlb::resolve::Node;
use netlb_common::counters::Counter;
use netlb_common::maps::{Interface, role};
use netlb_common::network::{Network, Networks};
use netlb_integration::exec::Cmd;
use netlb_integration::frames::{ACK, ETHERNET, Mac, Packet, SYN_ACK, Transport, patch};
use netlb_integration::lab::{
    BACKENDS, BACKENDS_MAC, CASES, CLIENTS, CLIENTS_MAC, Case, DROP, Lab, Outcome, PASS, REDIRECT, XDP_PASS, addr,
    destination, mac, source,
};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

const UPLINK: Interface = Interface { role: role::UPLINK, flags: 0, pad: 0, master: 0 };
const TTL: u8 = 61;

/// An ICMP error, as its sender makes it.
#[derive(Clone, Debug)]
struct Message {
    to_mac: Mac,
    from_mac: Mac,
    source: IpAddr,
    destination: IpAddr,
    ttl: u8,
    /// Type, code, and the rest of the header.
    head: [u8; 8],
    quote: Vec<u8>,
    /// Words of options, IPv4 only.
    options: Vec<u8>,
}

impl Message {
    /// About a packet, of which so many bytes past its IP headers are quoted.
    fn about(packet: &Packet, from: IpAddr, past: usize) -> Self {
        let head = match from {
            IpAddr::V4(_) => [3, 4, 0, 0, 0, 0, 5, 20],
            IpAddr::V6(_) => [2, 0, 0, 0, 0, 0, 5, 20],
        };
        Self {
            to_mac: [2, 0, 0, 0, 0, 1],
            from_mac: [2, 0, 0, 0, 0, 2],
            source: from,
            destination: packet.source.ip(),
            ttl: TTL,
            head,
            quote: quote(packet, past),
            options: Vec::new(),
        }
    }

    /// This error after its translation: about what was sent in the place of what was seen.
    fn instead(&self, sent: &Packet, from: IpAddr) -> Self {
        let whole = quote(sent, 500);
        let mut quote = whole[..self.quote.len().min(whole.len())].to_vec();
        // Half a checksum is none.
        if matches!(sent.transport, Transport::Tcp(_)) && quote.len() == self::quote(sent, 17).len() {
            quote.pop();
            quote.extend(self.quote.last());
        }
        Self { source: from, destination: sent.source.ip(), quote, ..self.clone() }
    }

    fn kind(mut self, kind: u8, code: u8) -> Self {
        self.head[..2].copy_from_slice(&[kind, code]);
        self
    }

    fn frame(&self) -> Vec<u8> {
        let mut frame = Vec::from_iter(self.to_mac.into_iter().chain(self.from_mac));
        let mut message = Vec::from_iter(self.head.into_iter().chain(self.quote.iter().copied()));
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let sum = Sum16BitWords::new().add_slice(&message).ones_complement();
                message[2..4].copy_from_slice(&sum.to_ne_bytes());
                let words = 5 + self.options.len() / 4;
                frame.extend([8, 0, 0x40 | words as u8, 0xc0]);
                frame.extend(((words * 4 + message.len()) as u16).to_be_bytes());
                frame.extend([0x12, 0x34, 0, 0, self.ttl, 1, 0, 0]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                frame.extend(&self.options);
                frame.extend(message);
                patch(&mut frame, ETHERNET, &[0x40 | words as u8]);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let len = message.len() as u16;
                let sum = Sum16BitWords::new()
                    .add_slice(&source.octets())
                    .add_slice(&destination.octets())
                    .add_slice(&len.to_be_bytes())
                    .add_slice(&[0, 58])
                    .add_slice(&message)
                    .ones_complement();
                message[2..4].copy_from_slice(&sum.to_ne_bytes());
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend(len.to_be_bytes());
                frame.extend([58, self.ttl]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                frame.extend(message);
            }
            (source, destination) => panic!("{source} and {destination} are of two families"),
        }
        frame
    }
}

/// What a router quotes of a packet: its IP headers, and so many bytes past them.
fn quote(packet: &Packet, past: usize) -> Vec<u8> {
    let frame = packet.frame();
    let extensions: usize = packet.extensions.iter().map(|(_, bytes)| bytes.len()).sum();
    let headers = match packet.source {
        SocketAddr::V4(_) => 20 + packet.options.len(),
        SocketAddr::V6(_) => 40 + extensions,
    };
    frame[ETHERNET..(ETHERNET + headers + past).min(frame.len())].to_vec()
}

/// How far routers quote: as RFC 792 has it, up to and past TCP's checksum, and everything.
const PAST: [usize; 8] = [8, 9, 16, 17, 18, 20, 28, 500];

/// A router on a network, which routing does not know by name.
fn router(case: Case, network: u8) -> IpAddr {
    case.host(network, 29)
}

/// A flow as both ends see it.
struct Flow {
    case: Case,
    client: SocketAddr,
    vip: SocketAddr,
    backend: SocketAddr,
    /// The client, as the backend sees it.
    given: SocketAddr,
}

impl Flow {
    fn begin(lab: &Lab, case: Case) -> Self {
        let (client, vip) = (case.client(40000), case.vip(80));
        let out = lab.from_clients(case.packet(client, vip).frame());
        let flow = Self { case, client, vip, backend: destination(&out.frame), given: source(&out.frame) };
        assert_ne!(flow.backend, vip, "{case}: verdict {}", out.verdict);
        lab.from_backends(flow.reply(flow.backend, flow.given).frame());
        lab.from_clients(case.segment(client, vip, ACK).frame());
        lab.counts();
        flow
    }

    fn request(&self, from: SocketAddr, to: SocketAddr) -> Packet {
        self.case.segment(from, to, ACK).payload([0xa5; 77]).ttl(9)
    }

    fn reply(&self, from: SocketAddr, to: SocketAddr) -> Packet {
        self.case.segment(from, to, SYN_ACK).payload([0x5a; 78]).ttl(9)
    }
}

/// Two ways with a node between them. As a gateway both lead outside, so that clients get an address of the node.
fn lab(is_fast: bool, is_gateway: bool) -> anyhow::Result<Lab> {
    let mut lab = if is_fast { Lab::fast()? } else { Lab::stack()? };
    if is_gateway {
        for case in [CASES[0], CASES[2]] {
            for (network, device) in [(1, "clients"), (2, "backends")] {
                let address = case.host(network, 100);
                let tail: &[&str] = if address.is_ipv4() { &[] } else { &["nodad"] };
                let len = if address.is_ipv4() { 24 } else { 64 };
                let words = ["address", "add", &format!("{address}/{len}"), "dev", device].map(str::to_owned);
                Cmd::new("ip").args(words).args(tail).run()?.success()?;
            }
        }
        for index in [CLIENTS, BACKENDS] {
            lab.harness.set_interface(index, UPLINK)?;
        }
    }
    Ok(lab)
}

/// What was counted, without where packets went.
fn translated(lab: &Lab) -> u64 {
    lab.count(Counter::IcmpTranslated)
}

/// Quadrant one: the backend or a router on the way to it cannot take a request.
#[test]
fn an_error_about_a_request_reaches_the_client_that_sent_it() -> TestResult {
    for (is_fast, is_gateway) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut lab = lab(is_fast, is_gateway)?;
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let flow = Flow::begin(&lab, case);
            assert_eq!(flow.given != flow.client, is_gateway, "{case}");
            let states = lab.states();
            for past in PAST {
                for (from, shown) in [
                    (flow.backend.ip(), flow.vip.ip()),
                    (router(case, 2), router(case, 2)),
                    (case.host(9, 9), case.host(9, 9)),
                ] {
                    let what = format!("{case}: fast {is_fast}, gateway {is_gateway}, from {from}, {past} bytes");
                    let seen = flow.request(flow.given, flow.backend);
                    let sent = flow.request(flow.client, flow.vip);
                    let mut error = Message::about(&seen, from, past);
                    (error.to_mac, error.from_mac) = (BACKENDS_MAC, mac(from));
                    let mut expected = error.instead(&sent, shown);
                    let out = if is_fast || is_gateway {
                        (expected.to_mac, expected.from_mac) = (mac(flow.client.ip()), CLIENTS_MAC);
                        expected.ttl -= 1;
                        lab.from_backends(error.frame())
                    } else {
                        // The kernel would take a source of its own for a martian.
                        let frame = error.frame();
                        assert_eq!(
                            lab.from_backends(&frame),
                            Outcome { verdict: PASS, frame: frame.clone() },
                            "{what}"
                        );
                        lab.to_clients(frame)
                    };
                    let verdict = if is_fast || is_gateway { REDIRECT } else { PASS };
                    assert_eq!(out, Outcome { verdict, frame: expected.frame() }, "{what}");
                    assert_eq!(translated(&lab), 1, "{what}");
                    lab.counts();
                }
            }
            assert_eq!(lab.states(), states, "{case}: an error is no packet of the flow");
        }
    }
    Ok(())
}

/// Quadrant two: the client or a router on the way to it cannot take a reply.
#[test]
fn an_error_about_a_reply_reaches_the_backend_that_sent_it() -> TestResult {
    for (is_fast, is_gateway) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut lab = lab(is_fast, is_gateway)?;
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let flow = Flow::begin(&lab, case);
            for past in PAST {
                for (from, shown) in [(flow.client.ip(), flow.given.ip()), (router(case, 1), router(case, 1))] {
                    let what = format!("{case}: fast {is_fast}, gateway {is_gateway}, from {from}, {past} bytes");
                    let seen = flow.reply(flow.vip, flow.client);
                    let sent = flow.reply(flow.backend, flow.given);
                    let mut error = Message::about(&seen, from, past);
                    (error.to_mac, error.from_mac) = (CLIENTS_MAC, mac(from));
                    let mut expected = error.instead(&sent, shown);
                    let mut verdict = PASS;
                    if is_fast || is_gateway {
                        (expected.to_mac, expected.from_mac) = (mac(flow.backend.ip()), BACKENDS_MAC);
                        expected.ttl -= 1;
                        verdict = REDIRECT;
                    }
                    let out = lab.from_clients(error.frame());
                    assert_eq!(out, Outcome { verdict, frame: expected.frame() }, "{what}");
                    assert_eq!(translated(&lab), 1, "{what}");
                    lab.counts();
                }
            }
        }
    }
    Ok(())
}

/// The kernel compares the device's sum with one of what the program made.
#[test]
fn a_sum_by_the_device_stays_right() -> TestResult {
    for is_gateway in [false, true] {
        let mut lab = lab(true, is_gateway)?;
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let flow = Flow::begin(&lab, case);
            for past in PAST {
                let request = Message::about(&flow.request(flow.given, flow.backend), flow.backend.ip(), past);
                let reply = Message::about(&flow.reply(flow.vip, flow.client), flow.client.ip(), past);
                for (error, interface) in [(request, BACKENDS), (reply, CLIENTS)] {
                    let out = lab.run_summed(Program::Ingress, error.frame(), interface);
                    assert_eq!(out.verdict, REDIRECT, "{case}: {past} bytes by {interface}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_type_that_quotes_a_packet_is_translated_and_no_other() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let flow = Flow::begin(&lab, case);
        let types: &[u8] = if case.family == Family::V4 { &[3, 4, 11, 12] } else { &[1, 2, 3, 4] };
        let seen = flow.reply(flow.vip, flow.client);
        for kind in 0..=255 {
            for code in [0, 1, 3, 13] {
                let error = Message::about(&seen, router(case, 1), 20).kind(kind, code);
                let out = lab.from_clients(error.frame());
                if types.contains(&kind) {
                    assert_eq!(out.verdict, REDIRECT, "{case}: type {kind}, code {code}");
                } else {
                    assert_eq!(out, Outcome { verdict: PASS, frame: error.frame() }, "{case}: type {kind}");
                }
            }
        }
        assert_eq!(translated(&lab), 4 * types.len() as u64, "{case}");
    }
    Ok(())
}

#[test]
fn a_quotation_cut_at_any_length_does_no_harm() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let flow = Flow::begin(&lab, case);
        let seen = flow.reply(flow.vip, flow.client);
        let sent = flow.reply(flow.backend, flow.client);
        let headers = quote(&seen, 0).len();
        for len in 0..headers + 40 {
            let mut error = Message::about(&seen, router(case, 1), 500);
            error.quote.truncate(len);
            let out = lab.from_clients(error.frame());
            if len < headers + 8 {
                assert_eq!(out, Outcome { verdict: PASS, frame: error.frame() }, "{case}: {len} bytes");
                // What stands behind a packet in its frame is no part of it.
                let mut padded = error.frame();
                padded.extend(&Message::about(&seen, router(case, 1), 500).quote[len..]);
                assert_eq!(lab.from_clients(&padded), Outcome { verdict: PASS, frame: padded }, "{case}: {len} bytes");
            } else {
                let mut expected = error.instead(&sent, router(case, 1));
                (expected.to_mac, expected.from_mac) = (mac(flow.backend.ip()), BACKENDS_MAC);
                expected.ttl -= 1;
                assert_eq!(out, Outcome { verdict: REDIRECT, frame: expected.frame() }, "{case}: {len} bytes");
                let trailer = [0xee; 32];
                let (mut padded, mut frame) = (error.frame(), expected.frame());
                padded.extend(trailer);
                frame.extend(trailer);
                assert_eq!(lab.from_clients(padded), Outcome { verdict: REDIRECT, frame }, "{case}: {len} bytes");
            }
        }
    }
    Ok(())
}

/// An IPv6 destination options header, and a fragment header of a datagram that is whole (RFC 6946).
const OPTIONS: [u8; 16] = [0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const ATOMIC: [u8; 8] = [0, 0, 0, 0, 0xde, 0xad, 0xbe, 0xef];

#[test]
fn headers_of_all_kinds_are_passed_over() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let flow = Flow::begin(&lab, case);
        let shapes: Vec<Box<dyn Fn(Packet) -> Packet>> = match case.family {
            Family::V4 => {
                vec![Box::new(|packet| packet.options([1, 1, 1, 0])), Box::new(|packet| packet.options([1; 40]))]
            }
            Family::V6 => vec![
                Box::new(|packet| packet.extension(44, ATOMIC)),
                Box::new(|packet| packet.extension(0, OPTIONS).extension(60, OPTIONS).extension(44, ATOMIC)),
            ],
        };
        for shape in shapes {
            for past in [8, 18, 500] {
                for options in [vec![], vec![1, 1, 1, 1], vec![1; 40]] {
                    let make = |packet| {
                        let mut message = Message::about(&shape(packet), router(case, 1), past);
                        if case.family == Family::V4 {
                            message.options.clone_from(&options);
                        }
                        message
                    };
                    let error = make(flow.reply(flow.vip, flow.client));
                    let mut expected = make(flow.reply(flow.backend, flow.client));
                    (expected.to_mac, expected.from_mac) = (mac(flow.backend.ip()), BACKENDS_MAC);
                    expected.ttl -= 1;
                    let out = lab.from_clients(error.frame());
                    assert_eq!(out, Outcome { verdict: REDIRECT, frame: expected.frame() }, "{case}: {past} bytes");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_udp_datagram_without_a_checksum_is_quoted_without_one() -> TestResult {
    let mut lab = Lab::fast()?;
    let case = Case { family: Family::V4, protocol: Protocol::Udp };
    lab.begin([case.service(&[3])]);
    let flow = Flow::begin(&lab, case);
    let error = Message::about(&flow.request(flow.client, flow.backend).without_checksum(), flow.backend.ip(), 8);
    let mut expected = Message::about(&flow.request(flow.client, flow.vip).without_checksum(), flow.vip.ip(), 8);
    (expected.to_mac, expected.from_mac) = (mac(flow.client.ip()), CLIENTS_MAC);
    expected.ttl -= 1;
    assert_eq!(lab.from_backends(error.frame()), Outcome { verdict: REDIRECT, frame: expected.frame() });
    Ok(())
}

#[test]
fn a_first_fragment_is_quoted_with_its_ports_and_a_later_one_without() -> TestResult {
    let mut lab = Lab::fast()?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let case = Case { family: Family::V4, protocol };
        lab.begin([case.service(&[3])]);
        let flow = Flow::begin(&lab, case);
        for (flags, is_translated) in [([0x20, 0], true), ([0x20, 1], false), ([0, 9], false), ([0x1f, 0xff], false)] {
            let quoting = |packet: &Packet| {
                let mut message = Message::about(packet, router(case, 1), 20);
                let mut quoted = [&[0; 12], &[8, 0][..], &message.quote].concat();
                patch(&mut quoted, ETHERNET + 6, &flags);
                message.quote = quoted.split_off(ETHERNET);
                message
            };
            let error = quoting(&flow.reply(flow.vip, flow.client));
            let mut expected = quoting(&flow.reply(flow.backend, flow.client));
            (expected.to_mac, expected.from_mac) = (mac(flow.backend.ip()), BACKENDS_MAC);
            expected.ttl -= 1;
            let passed = Outcome { verdict: PASS, frame: error.frame() };
            let sent = Outcome { verdict: REDIRECT, frame: expected.frame() };
            assert_eq!(lab.from_clients(error.frame()), if is_translated { sent } else { passed }, "{case}: {flags:?}");
        }
    }
    Ok(())
}

/// Each of these is wrong in one thing alone.
#[test]
fn errors_about_nothing_of_ours_pass_bit_for_bit() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let flow = Flow::begin(&lab, case);
            let other = SocketAddr::new(flow.client.ip(), 41_000);
            let stranger = SocketAddr::new(case.host(1, 7), flow.client.port());
            let about = |packet: Packet| Message::about(&packet, router(case, 1), 20);
            let elsewhere = |destination| Message { destination, ..about(flow.reply(flow.vip, flow.client)) };
            let mut fragment = about(flow.reply(flow.vip, flow.client)).frame();
            match case.family {
                Family::V4 => patch(&mut fragment, ETHERNET + 6, &[0x20, 0]),
                Family::V6 => fragment[ETHERNET + 6] = 44,
            }
            let frames = [
                ("another port of the client", about(flow.reply(flow.vip, other)).frame()),
                ("another client", about(flow.reply(flow.vip, stranger)).frame()),
                ("another port of the address", about(flow.reply(case.vip(81), flow.client)).frame()),
                ("a request as it was sent", about(flow.request(flow.client, flow.vip)).frame()),
                ("a reply as it was sent", about(flow.reply(flow.backend, flow.client)).frame()),
                ("another backend", about(flow.request(flow.client, case.backend(4))).frame()),
                ("an error for somebody else", elsewhere(case.host(1, 5)).frame()),
                ("an error for the backend", elsewhere(flow.backend.ip()).frame()),
                ("an error that is a fragment", fragment),
            ];
            for (what, frame) in frames {
                for (program, interface) in
                    [(Program::Ingress, CLIENTS), (Program::Ingress, BACKENDS), (Program::Egress, CLIENTS)]
                {
                    let out = lab.run(program, &frame, interface);
                    assert_eq!(out, Outcome { verdict: PASS, frame: frame.clone() }, "{case}: {what}");
                }
            }
            assert_eq!(translated(&lab), 0, "{case}");
            assert_eq!(lab.count_flows(), 1, "{case}");
        }
    }
    Ok(())
}

#[test]
fn xdp_leaves_errors_to_tc() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let flow = Flow::begin(&lab, case);
        let frame = Message::about(&flow.reply(flow.vip, flow.client), router(case, 1), 20).frame();
        assert_eq!(lab.xdp_from_clients(&frame), Outcome { verdict: XDP_PASS, frame }, "{case}");
    }
    Ok(())
}

#[test]
fn an_error_with_no_hop_left_or_nowhere_to_go_is_not_sent_on() -> TestResult {
    let mut lab = Lab::fast()?;
    Cmd::new("ip")
        .args(["-batch", "-"])
        .input("route add blackhole 10.244.2.3/32\nroute add blackhole fd00:10:244:2::3/128\n")
        .run()?
        .success()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        lab.from_clients(case.packet(client, vip).frame());
        lab.counts();
        let mut error = Message::about(&case.segment(vip, client, SYN_ACK), router(case, 1), 20);
        assert_eq!(lab.from_clients(error.frame()).verdict, DROP, "{case}");
        assert_eq!(lab.counts(), [(Counter::NoRoute, 1)], "{case}");
        error.ttl = 1;
        let frame = error.frame();
        assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}");
        assert_eq!(lab.counts(), [(Counter::TtlExpired, 1)], "{case}");
    }
    Ok(())
}

/// What the node's own kernel says of a packet that was translated and left to it.
#[test]
fn an_error_of_the_node_itself_is_translated_as_it_leaves() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let flow = Flow::begin(&lab, case);
            let node = case.host(1, 1);
            let error = Message::about(&flow.request(flow.client, flow.backend), node, 500);
            let expected = Message::about(&flow.request(flow.client, flow.vip), node, 500);
            let out = lab.to_clients(error.frame());
            assert_eq!(out, Outcome { verdict: PASS, frame: expected.frame() }, "{case}");
            // It is not taken for another one then.
            assert_eq!(lab.to_clients(&out.frame), out, "{case}");
        }
    }
    Ok(())
}

/// What pods send to the world has an address of the node as its source there, and so have errors about it.
#[test]
fn an_error_about_a_masqueraded_packet_reaches_who_sent_it() -> TestResult {
    let mut masquerade = Networks { len: 2, ..Networks::NONE };
    masquerade.all[0] = Network::new(addr(CASES[0].host(2, 0)), 96 + 24);
    masquerade.all[1] = Network::new(addr(CASES[2].host(2, 0)), 64);
    let mut lab = Lab::at(&Site { masquerade: (masquerade, Networks::NONE), ..Site::default() })?;
    let addresses = Vec::from_iter([CASES[0], CASES[2]].map(|case| case.host(1, 100)));
    for address in &addresses {
        let tail: &[&str] = if address.is_ipv4() { &[] } else { &["nodad"] };
        let len = if address.is_ipv4() { 24 } else { 64 };
        let words = ["address", "add", &format!("{address}/{len}"), "dev", "clients"].map(str::to_owned);
        Cmd::new("ip").args(words).args(tail).run()?.success()?;
    }
    lab.harness.set_interface(CLIENTS, UPLINK)?;
    lab.harness.programmer_mut().set_node(Node { addresses, ..Node::default() });
    for case in CASES {
        lab.begin([]);
        let (pod, world) = (case.backend(3), case.client(443));
        let given = source(&lab.to_clients(case.packet(pod, world).frame()).frame);
        assert_eq!(given.ip(), case.host(1, 100), "{case}");
        lab.counts();
        let segment = |from, to| case.segment(from, to, ACK).payload([0xa5; 77]).ttl(9);
        for past in PAST {
            for from in [world.ip(), router(case, 1)] {
                let what = format!("{case}: from {from}, {past} bytes");
                let mut error = Message::about(&segment(given, world), from, past);
                (error.to_mac, error.from_mac) = (CLIENTS_MAC, mac(from));
                let mut expected = error.instead(&segment(pod, world), from);
                (expected.to_mac, expected.from_mac) = (mac(pod.ip()), BACKENDS_MAC);
                expected.ttl -= 1;
                let out = lab.from_clients(error.frame());
                assert_eq!(out, Outcome { verdict: REDIRECT, frame: expected.frame() }, "{what}");
            }
            for (from, shown) in [(pod.ip(), given.ip()), (router(case, 2), router(case, 2))] {
                let what = format!("{case}: about a reply, from {from}, {past} bytes");
                let error = Message::about(&segment(world, pod), from, past);
                let expected = error.instead(&segment(world, given), shown);
                let out = lab.to_clients(error.frame());
                assert_eq!(out, Outcome { verdict: PASS, frame: expected.frame() }, "{what}");
            }
            assert_eq!(translated(&lab), 4, "{case}: {past} bytes");
            lab.counts();
        }
    }
    Ok(())
}
