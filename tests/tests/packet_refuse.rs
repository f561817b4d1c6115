//! New flows that cannot be had: they go to another backend where there is one, and are dropped and counted where there is none.

use netlb::config::{Forwarding, Limits};
use netlb::model::Protocol;
use netlb_common::counters::Counter;
use netlb_integration::frames::{ACK, RST, SYN, SYN_ACK};
use netlb_integration::lab::{CASES, Case, DROP, LIMITS, Lab, Outcome, PASS, REDIRECT, destination, source};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

#[test]
fn one_client_port_to_two_frontends_of_one_backend_is_a_conflict() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service_at(80, &[3]), case.service_at(81, &[3])]);
            let client = case.client(40000);
            lab.backend_of(&case.packet(client, case.vip(80)));
            lab.counts();
            let second = lab.from_clients(case.packet(client, case.vip(81)).frame());
            assert_eq!(second.verdict, DROP, "{case}");
            assert_eq!(lab.counts(), [(Counter::FlowConflict, 1)], "{case}");
            assert_eq!(lab.count_flows(), 1, "{case}");
            // Another port of the client is another matter, and the first flow goes on.
            lab.backend_of(&case.packet(case.client(40001), case.vip(81)));
            lab.backend_of(&case.segment(client, case.vip(80), ACK));
            assert_eq!(lab.count_flows(), 2, "{case}");
        }
    }
    Ok(())
}

#[test]
fn a_finished_flow_is_in_nobodys_way() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        lab.begin([case.service_at(80, &[3]), case.service_at(81, &[3])]);
        let (client, backend) = (case.client(40000), case.backend(3));
        lab.connect(case, client, case.vip(80));
        lab.backend_of(&case.segment(client, case.vip(80), RST));
        assert_eq!(lab.connect(case, client, case.vip(81)), backend, "{case}: through the other frontend");
        assert_eq!(source(&lab.reply(case, client, backend, ACK).frame), case.vip(81), "{case}");

        // The client's port again, for the backend's own address: that answer is not a service's.
        lab.backend_of(&case.segment(client, case.vip(81), RST));
        let answer = case.segment(backend, client, SYN_ACK).frame();
        let out = lab.from_backends(&answer);
        assert_eq!((out.verdict, out.frame.as_slice()), (PASS, answer.as_slice()), "{case}");
        assert_eq!(lab.count(Counter::FlowConflict), 0, "{case}");
    }
    Ok(())
}

#[test]
fn a_conflicting_flow_goes_to_another_backend() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service_at(80, &[3]), case.service_at(81, &[3, 4])]);
        for port in 40_000..40_050 {
            let client = case.client(port);
            assert_eq!(lab.backend_of(&case.packet(client, case.vip(80))), case.backend(3), "{case}: {client}");
            assert_eq!(lab.backend_of(&case.packet(client, case.vip(81))), case.backend(4), "{case}: {client}");
            for (host, vip) in [(3, case.vip(80)), (4, case.vip(81))] {
                let reply = lab.reply(case, client, case.backend(host), SYN_ACK);
                assert_eq!(source(&reply.frame), vip, "{case}: {client}");
            }
        }
        assert_eq!(lab.count(Counter::FlowConflict), 0, "{case}");
    }
    Ok(())
}

/// Without an address of the node to put in the client's place, the backend would answer itself.
#[test]
fn a_backend_is_not_its_own_server_on_a_node_without_an_address() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let client = (case.backend(3).ip(), 40000).into();
            let frame = case.packet(client, case.vip(80)).frame();
            assert_eq!(lab.from_backends(&frame), Outcome { verdict: PASS, frame }, "{case}");
            assert_eq!(lab.counts(), [(Counter::NeedsSnat, 1)], "{case}");
            assert_eq!(lab.count_flows(), 0, "{case}");
        }
    }
    Ok(())
}

#[test]
fn a_service_without_backends_rejects_what_is_new() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            for (what, service) in [("none", case.service(&[])), ("draining", case.draining(&[], &[1, 2]))] {
                lab.begin([service]);
                let out = lab.from_clients(case.packet(case.client(40000), case.vip(80)).frame());
                assert_eq!(out.verdict, REDIRECT, "{case}: {what}");
                assert_eq!(lab.counts(), [(Counter::NoBackend, 1), (Counter::Rejected, 1)], "{case}: {what}");
                assert_eq!(lab.count_flows(), 0, "{case}: {what}");
            }
        }
    }
    Ok(())
}

#[test]
fn flows_outlive_the_last_backend_that_takes_new_ones() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let backend = lab.connect(case, client, vip);
        lab.serve([case.draining(&[], &[3])]);
        assert_eq!(lab.backend_of(&case.segment(client, vip, ACK)), backend, "{case}");
        assert_eq!(lab.reply(case, client, backend, ACK).verdict, REDIRECT, "{case}");
        lab.counts();
        lab.from_clients(case.packet(case.client(40001), vip).frame());
        assert_eq!(lab.counts(), [(Counter::NoBackend, 1), (Counter::Rejected, 1)], "{case}");
    }
    Ok(())
}

/// 64 buckets: room for 128 flows, if all of it were used.
const SMALL: Limits = Limits { flows: 1, ..LIMITS };
const ROOM: u64 = 128;

#[test]
fn a_table_full_of_live_connections_takes_no_new_ones() -> TestResult {
    let mut lab = Lab::new(Forwarding::Fast, &SMALL)?;
    for case in CASES {
        lab.begin([case.service(&[1, 2, 3])]);
        let vip = case.vip(80);
        let mut connected = Vec::new();
        let mut refused = 0;
        for port in 40_000..40_400 {
            let client = case.client(port);
            lab.counts();
            let first = lab.from_clients(case.packet(client, vip).frame());
            if first.verdict == DROP {
                assert_eq!(lab.counts(), [(Counter::FlowTableFull, 1)], "{case}: {client}");
                refused += 1;
                continue;
            }
            let backend = destination(&first.frame);
            assert_eq!(lab.reply(case, client, backend, SYN_ACK).verdict, REDIRECT, "{case}: {client}");
            assert_eq!(lab.backend_of(&case.segment(client, vip, ACK)), backend, "{case}: {client}");
            connected.push((client, backend));
        }
        assert!(refused > 200, "{case}: {refused} of 400 refused");
        // The 60 % that the table is made for, and more.
        assert!((ROOM * 3 / 4..=ROOM).contains(&(connected.len() as u64)), "{case}: {} connected", connected.len());
        for (client, backend) in connected {
            assert_eq!(lab.backend_of(&case.segment(client, vip, ACK)), backend, "{case}: {client}");
            assert_eq!(lab.reply(case, client, backend, ACK).verdict, REDIRECT, "{case}: {client}");
        }
    }
    Ok(())
}

#[test]
fn connections_nobody_answers_make_room_and_established_ones_do_not() -> TestResult {
    let mut lab = Lab::new(Forwarding::Fast, &SMALL)?;
    for case in CASES {
        lab.begin([case.service(&[1, 2, 3])]);
        let vip = case.vip(80);
        let clients = (40_000..40_020).map(|port| case.client(port));
        let connected = Vec::from_iter(clients.map(|client| (client, lab.connect(case, client, vip))));
        assert_eq!(lab.count(Counter::FlowsEvicted), 0, "{case}");
        for port in 50_000..52_000 {
            let out = lab.from_clients(case.packet(case.client(port), vip).frame());
            assert_eq!(out.verdict, REDIRECT, "{case}: port {port}");
        }
        assert!(lab.count(Counter::FlowsEvicted) >= 2_000 - ROOM, "{case}: {:?}", lab.counts());
        assert_eq!(lab.count(Counter::FlowTableFull), 0, "{case}");
        lab.counts();
        for (client, backend) in connected {
            assert_eq!(lab.reply(case, client, backend, ACK).verdict, REDIRECT, "{case}: {client}");
            assert_eq!(lab.backend_of(&case.segment(client, vip, ACK)), backend, "{case}: {client}");
        }
        assert_eq!(lab.count(Counter::FlowsRepaired), 0, "{case}");
        assert_eq!(lab.count(Counter::FlowsCreated), 0, "{case}");
    }
    Ok(())
}

#[test]
fn connections_idle_for_a_minute_make_room() -> TestResult {
    let mut lab = Lab::new(Forwarding::Fast, &SMALL)?;
    let case = Case { family: Family::V4, protocol: Protocol::Tcp };
    lab.begin([case.service(&[1])]);
    let vip = case.vip(80);
    for port in 40_000..40_400 {
        let (client, backend) = (case.client(port), case.backend(1));
        lab.from_clients(case.packet(client, vip).frame());
        lab.reply(case, client, backend, SYN_ACK);
        lab.from_clients(case.segment(client, vip, ACK).frame());
    }
    lab.age(90);
    lab.counts();
    for port in 50_000..50_100 {
        lab.backend_of(&case.segment(case.client(port), vip, SYN));
    }
    assert_eq!(lab.count(Counter::FlowTableFull), 0);
    assert!(lab.count(Counter::FlowsEvicted) > 0);
    Ok(())
}
