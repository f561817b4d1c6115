//! Flows: they stay on their backends, follow their connections' states, end in time, and survive the loss of a slot.

use std::collections::HashSet;
use std::net::SocketAddr;

use netlb::model::{Algorithm, Protocol};
use netlb_common::conntrack::Direction;
use netlb_common::counters::Counter;
use netlb_integration::frames::{ACK, FIN, RST, SYN, SYN_ACK, Segment};
use netlb_integration::lab::{CASES, Case, Lab, Outcome, PASS, REDIRECT, source};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

const PORTS: std::ops::Range<u16> = 40_000..40_050;

#[test]
fn flows_stay_on_their_backends_when_the_set_changes() -> TestResult {
    let mut lab = Lab::fast()?;
    for algorithm in [Algorithm::Maglev, Algorithm::Random, Algorithm::RoundRobin, Algorithm::LeastConn] {
        for case in CASES {
            lab.begin([case.weighted(&[(1, 1), (2, 1), (3, 1)], algorithm)]);
            let before = begin_flows(&lab, case);
            lab.serve([case.weighted(&[(1, 1), (2, 1), (3, 5), (4, 1), (5, 1), (6, 1)], algorithm)]);
            for (client, backend) in &before {
                let again = lab.backend_of(&case.segment(*client, case.vip(80), ACK));
                assert_eq!(again, *backend, "{case}, {algorithm}: {client}");
            }
            let others = (50_000..50_200).map(|port| lab.backend_of(&case.packet(case.client(port), case.vip(80))));
            let others = HashSet::<_>::from_iter(others);
            assert_eq!(others.len(), 6, "{case}, {algorithm}: new flows go to the new backends too");
        }
    }
    Ok(())
}

#[test]
fn a_draining_backend_keeps_its_flows_and_gets_no_new_ones() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[1, 2])]);
        let before = begin_flows(&lab, case);
        lab.serve([case.draining(&[1], &[2])]);
        for (client, backend) in &before {
            let again = lab.backend_of(&case.segment(*client, case.vip(80), ACK));
            assert_eq!(again, *backend, "{case}: {client}");
            // Replies come back as well.
            assert_eq!(lab.reply(case, *client, *backend, ACK).verdict, REDIRECT, "{case}: {client}");
        }
        for port in 50_000..50_050 {
            let new = lab.backend_of(&case.packet(case.client(port), case.vip(80)));
            assert_eq!(new, case.backend(1), "{case}: port {port}");
        }
        assert_eq!(lab.count(Counter::FlowsMoved), 0, "{case}");
    }
    Ok(())
}

#[test]
fn connections_stay_on_a_backend_that_was_removed() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        lab.begin([case.service(&[1, 2])]);
        let before = begin_flows(&lab, case);
        lab.serve([case.service(&[1])]);
        for (client, backend) in &before {
            let again = lab.backend_of(&case.segment(*client, case.vip(80), ACK));
            assert_eq!(again, *backend, "{family}: {client}");
            let reply = lab.reply(case, *client, *backend, ACK);
            assert_eq!(reply.verdict, REDIRECT, "{family}: {client}");
        }
        assert_eq!(lab.count(Counter::FlowsMoved), 0, "{family}");
    }
    Ok(())
}

#[test]
fn datagrams_leave_a_backend_that_was_removed_at_once() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case { family, protocol: Protocol::Udp };
        lab.begin([case.service(&[1, 2])]);
        let before = begin_flows(&lab, case);
        lab.serve([case.service(&[1])]);
        for (client, backend) in &before {
            let next = lab.backend_of(&case.packet(*client, case.vip(80)));
            assert_eq!(next, case.backend(1), "{family}: {client} was on {backend}");
            assert_eq!(lab.reply(case, *client, next, ACK).verdict, REDIRECT, "{family}: {client}");
            // The old backend's answers belong to nobody any more.
            if *backend != next {
                assert_eq!(lab.reply(case, *client, *backend, ACK).verdict, PASS, "{family}: {client}");
            }
        }
        let moved = before.iter().filter(|(_, backend)| *backend == case.backend(2)).count();
        assert_eq!(lab.count(Counter::FlowsMoved), moved as u64, "{family}");
        assert_eq!(lab.count_flows(), before.len() as u64, "{family}");
    }
    Ok(())
}

#[test]
fn a_client_that_begins_again_leaves_a_backend_that_was_removed_or_drains() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        for (what, service) in [("removed", case.service(&[1])), ("draining", case.draining(&[1], &[2]))] {
            // A connection that is over is not moved: another begins.
            for (how, segments, moved) in [("SYN sent again", &[][..], 1), ("after a reset", &[RST], 0)] {
                lab.begin([case.service(&[2])]);
                let (client, vip) = (case.client(40000), case.vip(80));
                let syn = case.segment(client, vip, SYN);
                assert_eq!(lab.backend_of(&syn), case.backend(2));
                for segment in segments {
                    lab.backend_of(&case.segment(client, vip, *segment));
                }
                lab.serve([service.clone()]);
                assert_eq!(lab.backend_of(&syn), case.backend(1), "{family}, {what}, {how}");
                assert_eq!(lab.count(Counter::FlowsMoved), moved, "{family}, {what}, {how}");
                assert_eq!(lab.count_flows(), 1, "{family}, {what}, {how}");
                assert_eq!(lab.states(), (vec!["syn-sent"], vec!["syn-sent"]), "{family}, {what}, {how}");
            }
        }
    }
    Ok(())
}

/// An old SYN that the network delivers late must not tear a connection from its backend.
#[test]
fn a_late_syn_leaves_an_established_connection_where_it_is() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        lab.begin([case.service(&[2])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        lab.connect(case, client, vip);
        lab.serve([case.service(&[1])]);
        assert_eq!(lab.backend_of(&case.segment(client, vip, SYN)), case.backend(2), "{family}");
        assert_eq!(lab.states(), (vec!["established"], vec!["established"]), "{family}");
    }
    Ok(())
}

/// SYNs sent again, once in a while, do not keep a flow with a backend that is gone.
#[test]
fn a_client_that_begins_anew_is_let_go_by_a_backend_that_is_gone() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        lab.begin([case.service(&[2])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        lab.connect(case, client, vip);
        lab.serve([case.service(&[1])]);
        for expected in [2, 2, 1] {
            lab.age(25);
            assert_eq!(lab.backend_of(&case.segment(client, vip, SYN)), case.backend(expected), "{family}");
        }
    }
    Ok(())
}

/// Who sends a segment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Side {
    Client,
    Backend,
}

/// What both sides say, in order.
type Talk<'a> = &'a [(Side, Segment)];

#[test]
fn states_follow_the_segments_of_both_sides() -> TestResult {
    use Side::{Backend, Client};
    const OPEN: [(Side, Segment); 3] = [(Client, SYN), (Backend, SYN_ACK), (Client, ACK)];
    let table: [(&str, Talk<'_>, &str); 17] = [
        ("a SYN", &[(Client, SYN)], "syn-sent"),
        ("a SYN sent again", &[(Client, SYN), (Client, SYN)], "syn-sent"),
        ("an answer", &OPEN[..2], "syn-received"),
        ("a handshake", &OPEN, "established"),
        ("data", &[OPEN[0], OPEN[1], OPEN[2], (Backend, ACK), (Client, ACK)], "established"),
        ("the client's end", &[OPEN[0], OPEN[1], OPEN[2], (Client, FIN)], "fin-forward"),
        ("the backend's end", &[OPEN[0], OPEN[1], OPEN[2], (Backend, FIN)], "fin-reply"),
        ("data after the client's end", &[OPEN[0], OPEN[1], OPEN[2], (Client, FIN), (Backend, ACK)], "fin-forward"),
        ("both ends", &[OPEN[0], OPEN[1], OPEN[2], (Client, FIN), (Backend, FIN)], "closing"),
        ("both ends, the backend first", &[OPEN[0], OPEN[1], OPEN[2], (Backend, FIN), (Client, FIN)], "closing"),
        ("the last ACK", &[OPEN[0], OPEN[1], OPEN[2], (Backend, FIN), (Client, FIN), (Backend, ACK)], "closing"),
        ("a refusal", &[(Client, SYN), (Backend, RST)], "reset-reply"),
        ("the client's reset", &[OPEN[0], OPEN[1], OPEN[2], (Client, RST)], "reset-forward"),
        ("the backend's reset", &[OPEN[0], OPEN[1], OPEN[2], (Backend, RST)], "reset-reply"),
        (
            "a reset that was not the client's",
            &[OPEN[0], OPEN[1], OPEN[2], (Client, RST), (Client, ACK), (Backend, ACK), (Client, ACK)],
            "established",
        ),
        (
            "a new connection after the end",
            &[OPEN[0], OPEN[1], OPEN[2], (Client, FIN), (Backend, FIN), (Client, SYN)],
            "syn-sent",
        ),
        ("a segment in mid-connection", &[(Client, ACK)], "syn-sent"),
    ];
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        for (what, segments, state) in table {
            lab.begin([case.service(&[3])]);
            let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
            for (from, segment) in segments {
                match from {
                    Client => {
                        assert_eq!(lab.backend_of(&case.segment(client, vip, *segment)), backend, "{family}: {what}")
                    }
                    Backend => {
                        assert_eq!(lab.reply(case, client, backend, *segment).verdict, REDIRECT, "{family}: {what}")
                    }
                }
            }
            assert_eq!(lab.states(), (vec![state], vec![state]), "{family}: {what}");
        }
    }
    Ok(())
}

#[test]
fn a_client_that_begins_again_after_the_end_has_another_flow() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        for ending in [&[FIN][..], &[RST]] {
            let service = case.service(&[3]);
            lab.begin([service.clone()]);
            let (client, vip) = (case.client(40000), case.vip(80));
            let backend = lab.connect(case, client, vip);
            let before = lab.stats(&service).service.flows;
            for segment in ending {
                lab.backend_of(&case.segment(client, vip, *segment));
                lab.reply(case, client, backend, *segment);
            }
            assert_eq!(lab.connect(case, client, vip), backend, "{family}: {ending:?}");
            assert_eq!(lab.stats(&service).service.flows, before + 1, "{family}: {ending:?}");
            assert_eq!(lab.count(Counter::FlowsCreated), 2, "{family}: {ending:?}");
            assert_eq!(lab.states(), (vec!["established"], vec!["established"]), "{family}: {ending:?}");
        }
    }
    Ok(())
}

/// By the stack, each direction is seen at another hook.
#[test]
fn states_follow_at_both_hooks() -> TestResult {
    let mut lab = Lab::stack()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        lab.begin([case.service(&[3])]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        let forward = |segment| lab.backend_of(&case.segment(client, vip, segment));
        let back = |segment| {
            let reply = case.segment(backend, client, segment).frame();
            // In by the pod's interface, and out by the client's.
            let inside = lab.from_backends(&reply);
            assert_eq!(inside, Outcome { verdict: PASS, frame: reply }, "{family}");
            let out = lab.to_clients(&inside.frame);
            assert_eq!(out.frame, case.segment(backend, client, segment).from(vip).frame(), "{family}");
        };
        forward(SYN);
        back(SYN_ACK);
        assert_eq!(lab.states(), (vec!["syn-received"], vec!["syn-received"]), "{family}");
        forward(ACK);
        assert_eq!(lab.states(), (vec!["established"], vec!["established"]), "{family}");
        back(FIN);
        forward(FIN);
        assert_eq!(lab.states(), (vec!["closing"], vec!["closing"]), "{family}");
    }
    Ok(())
}

#[test]
fn dialogues_are_told_from_monologues() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case { family, protocol: Protocol::Udp };
        lab.begin([case.service(&[3])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let backend = lab.backend_of(&case.packet(client, vip));
        assert_eq!(lab.states(), (vec!["udp-one-way"], vec!["udp-one-way"]), "{family}");
        lab.reply(case, client, backend, ACK);
        assert_eq!(lab.states(), (vec!["udp-both-ways"], vec!["udp-both-ways"]), "{family}");
        lab.backend_of(&case.packet(client, vip));
        assert_eq!(lab.states(), (vec!["udp-both-ways"], vec!["udp-both-ways"]), "{family}");
    }
    Ok(())
}

#[test]
fn a_flow_ends_after_its_states_timeout() -> TestResult {
    use Side::{Backend, Client};
    let open = [(Client, SYN), (Backend, SYN_ACK), (Client, ACK)];
    let tcp: [(Talk<'_>, u64); 5] = [
        (&open[..1], 60),
        (&open, 2 * 3600 + 13 * 60),
        (&[open[0], open[1], open[2], (Client, FIN)], 300),
        (&[open[0], open[1], open[2], (Client, FIN), (Backend, FIN)], 10),
        (&[open[0], open[1], open[2], (Backend, RST)], 10),
    ];
    let udp: [(Talk<'_>, u64); 2] = [(&open[..1], 60), (&open[..2], 180)];
    let mut lab = Lab::fast()?;
    for case in CASES {
        let table = if case.protocol == Protocol::Tcp { &tcp[..] } else { &udp[..] };
        for (segments, timeout) in table {
            lab.begin([case.service(&[3])]);
            let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
            for (from, segment) in *segments {
                match from {
                    Client => assert_eq!(lab.backend_of(&case.segment(client, vip, *segment)), backend, "{case}"),
                    Backend => assert_eq!(lab.reply(case, client, backend, *segment).verdict, REDIRECT, "{case}"),
                }
            }
            let (forward, reply) = lab.states();
            let what = format!("{case}: {forward:?} and {reply:?}");
            // The clock's unit, and that of established flows, is rounded up.
            lab.age(timeout - 2);
            assert_eq!(lab.count_flows(), 1, "{what}: just before");
            lab.age(12);
            assert_eq!(lab.count_flows(), 0, "{what}: just after");
            assert_eq!(lab.reply(case, client, backend, ACK).verdict, PASS, "{what}: a late reply");
            lab.backend_of(&case.packet(client, vip));
            assert_eq!(lab.count(Counter::FlowsCreated), 2, "{what}: a packet begins a new flow");
            assert_eq!(lab.count_flows(), 1, "{what}: a new flow");
        }
    }
    Ok(())
}

#[test]
fn packets_keep_a_flow_alive_in_both_directions() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let backend = lab.connect(case, client, vip);
        for _ in 0..5 {
            lab.age(170);
            lab.backend_of(&case.segment(client, vip, ACK));
            lab.age(170);
            assert_eq!(lab.reply(case, client, backend, ACK).verdict, REDIRECT, "{case}");
        }
        assert_eq!(lab.flows()[0].idle_seconds, 0, "{case}");
        assert_eq!(lab.count(Counter::FlowsCreated), 1, "{case}");
        assert_eq!(lab.count(Counter::FlowsRepaired), 0, "{case}");
    }
    Ok(())
}

#[test]
fn a_lost_forward_slot_is_rebuilt_by_the_clients_next_packet() -> TestResult {
    let mut lab = Lab::fast()?;
    for algorithm in Algorithm::ALL {
        for family in Family::BOTH {
            let case = Case::tcp(family);
            lab.begin([case.weighted(&(1..=20).map(|host| (host, 1)).collect::<Vec<_>>(), algorithm)]);
            for port in PORTS {
                let (client, what) = (case.client(port), format!("{family}, {algorithm}, port {port}"));
                let backend = lab.connect(case, client, case.vip(80));
                lab.counts();
                lab.lose(Direction::Forward);
                assert_eq!(lab.count_flows(), 0, "{what}");
                assert_eq!(lab.backend_of(&case.segment(client, case.vip(80), ACK)), backend, "{what}");
                assert_eq!(lab.counts(), [(Counter::ToInterface, 1), (Counter::FlowsRepaired, 1)], "{what}");
                assert_eq!(lab.count_flows(), 1, "{what}");
                assert_eq!(lab.flows()[0].state, "established", "{what}");
                lab.harness.programmer_mut().flush_flows(&Default::default());
                lab.lose(Direction::Reply);
            }
        }
    }
    Ok(())
}

/// The flow's backend takes no new flows, but this one is not new.
#[test]
fn a_lost_forward_slot_is_rebuilt_to_a_backend_that_drains() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        lab.begin([case.service(&[2])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        lab.connect(case, client, vip);
        lab.serve([case.draining(&[1], &[2])]);
        lab.lose(Direction::Forward);
        assert_eq!(lab.backend_of(&case.segment(client, vip, ACK)), case.backend(2), "{family}");
        assert_eq!(lab.count(Counter::FlowsRepaired), 1, "{family}");
    }
    Ok(())
}

#[test]
fn a_dialogue_finds_its_backend_again_by_its_hash() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case { family, protocol: Protocol::Udp };
        lab.begin([case.service(&[1, 2, 3, 4, 5])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let backend = lab.connect(case, client, vip);
        lab.lose(Direction::Forward);
        assert_eq!(lab.backend_of(&case.packet(client, vip)), backend, "{family}");
        assert_eq!(lab.count(Counter::FlowsRepaired), 1, "{family}");
        assert_eq!(lab.states(), (vec!["udp-both-ways"], vec!["udp-both-ways"]), "{family}");
    }
    Ok(())
}

#[test]
fn a_lost_reply_slot_is_rebuilt_by_the_next_reply() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            // Several frontends lead to the backend: the flow is found among them.
            lab.begin([case.service_at(81, &[3, 4]), case.service(&[3]), case.service_at(82, &[3])]);
            let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
            lab.backend_of(&case.packet(client, vip));
            assert_eq!(lab.lose(Direction::Reply), 1, "{case}");
            let reply = case.segment(backend, client, SYN_ACK).frame();
            let by_ingress = lab.from_backends(&reply);
            let out = if by_ingress.verdict == REDIRECT { by_ingress } else { lab.to_clients(&reply) };
            assert_eq!(source(&out.frame), vip, "{case}");
            assert_eq!(lab.count(Counter::FlowsRepaired), 1, "{case}");
            let state = if case.protocol == Protocol::Tcp { "syn-received" } else { "udp-both-ways" };
            assert_eq!(lab.states(), (vec![state], vec![state]), "{case}");
        }
    }
    Ok(())
}

#[test]
fn a_lost_reply_slot_is_rebuilt_whichever_of_eight_frontends_it_is_of() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        let services = || (80..88).map(|port| case.service_at(port, &[3]));
        let (client, backend) = (case.client(40000), case.backend(3));
        for port in 80..88 {
            // Then those after the first move up.
            for first in [80, 81] {
                lab.begin(services());
                lab.backend_of(&case.packet(client, case.vip(port.max(first))));
                lab.serve(services().skip(usize::from(first - 80)));
                assert_eq!(lab.lose(Direction::Reply), 1, "{case}: {port}");
                let out = lab.from_backends(case.segment(backend, client, SYN_ACK).frame());
                assert_eq!(source(&out.frame), case.vip(port.max(first)), "{case}: {port} of those from {first}");
                assert_eq!(lab.count(Counter::FlowsRepaired), 1, "{case}: {port} of those from {first}");
            }
        }
    }
    Ok(())
}

/// The packets that note the time look after the other direction.
#[test]
fn a_lost_slot_is_rebuilt_by_the_other_directions_packets() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        for lost in [Direction::Forward, Direction::Reply] {
            lab.begin([case.service(&[1, 2, 3])]);
            let (client, vip) = (case.client(40000), case.vip(80));
            let backend = lab.connect(case, client, vip);
            lab.age(30);
            assert_eq!(lab.lose(lost), 1);
            match lost {
                Direction::Forward => assert_eq!(lab.reply(case, client, backend, ACK).verdict, REDIRECT, "{case}"),
                Direction::Reply => assert_eq!(lab.backend_of(&case.segment(client, vip, ACK)), backend, "{case}"),
            }
            let state = if case.protocol == Protocol::Tcp { "established" } else { "udp-both-ways" };
            assert_eq!(lab.states(), (vec![state], vec![state]), "{case}: {lost:?}");
            assert_eq!(lab.count(Counter::FlowsRepaired), 1, "{case}: {lost:?}");
            assert_eq!(lab.backend_of(&case.segment(client, vip, ACK)), backend, "{case}: {lost:?}");
            assert_eq!(lab.reply(case, client, backend, ACK).verdict, REDIRECT, "{case}: {lost:?}");
            assert_eq!(lab.count(Counter::FlowsCreated), 1, "{case}: {lost:?}");
        }
    }
    Ok(())
}

#[test]
fn a_connection_of_which_nothing_is_known_goes_to_the_backend_of_its_hash() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[1, 2, 3, 4, 5])]);
        for (client, backend) in begin_flows(&lab, case) {
            lab.lose(Direction::Forward);
            lab.lose(Direction::Reply);
            assert_eq!(lab.backend_of(&case.segment(client, case.vip(80), ACK)), backend, "{case}: {client}");
        }
        assert_eq!(lab.count(Counter::FlowsRepaired), 0, "{case}");
    }
    Ok(())
}

#[test]
fn a_backends_answers_past_its_service_pass_and_its_clients_are_served_after_that() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let (client, backend) = (case.client(40000), case.backend(3));
        let answer = case.segment(backend, client, SYN_ACK).frame();
        for _ in 0..3 {
            let out = lab.from_backends(&answer);
            assert_eq!((out.verdict, out.frame.as_slice()), (PASS, answer.as_slice()), "{case}");
        }
        assert_eq!(lab.connect(case, client, case.vip(80)), backend, "{case}");
        assert_eq!(source(&lab.reply(case, client, backend, ACK).frame), case.vip(80), "{case}");
    }
    Ok(())
}

#[test]
fn flushed_flows_are_gone_in_both_directions() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[1, 2])]);
        let flows = begin_flows(&lab, case);
        assert_eq!(lab.harness.programmer_mut().flush_flows(&Default::default()), flows.len() as u64, "{case}");
        assert_eq!(lab.states(), (vec![], vec![]), "{case}");
        for (client, backend) in flows {
            assert_eq!(lab.reply(case, client, backend, ACK).verdict, PASS, "{case}: {client}");
        }
    }
    Ok(())
}

/// Established flows, or dialogues, on several backends.
#[track_caller]
fn begin_flows(lab: &Lab, case: Case) -> Vec<(SocketAddr, SocketAddr)> {
    let clients = PORTS.map(|port| case.client(port));
    let flows = Vec::from_iter(clients.map(|client| (client, lab.connect(case, client, case.vip(80)))));
    let backends = HashSet::<_>::from_iter(flows.iter().map(|(_, backend)| backend));
    assert!(backends.len() > 1, "{case}: all flows are on {backends:?}");
    flows
}
