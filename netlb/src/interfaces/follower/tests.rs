use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex},
};

use netlb_common::maps::role;

use super::{
    super::link::tests::{link, node},
    *,
};

/// A kernel that does as it is told, and keeps a record.
#[derive(Clone, Debug, Default)]
struct Kernel(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    announced: BTreeMap<u32, Interface>,
    attached: BTreeSet<u32>,
    busy: BTreeSet<u32>,
    log: Vec<String>,
}

impl Kernel {
    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().log)
    }

    fn attached(&self) -> Vec<u32> {
        self.0.lock().unwrap().attached.iter().copied().collect()
    }

    fn announced(&self, index: u32) -> Option<Interface> {
        self.0.lock().unwrap().announced.get(&index).copied()
    }
}

impl Hooks for Kernel {
    fn known(&self) -> BTreeSet<u32> {
        let state = self.0.lock().unwrap();
        state.attached.iter().chain(state.announced.keys()).copied().collect()
    }

    fn announce(&mut self, index: u32, interface: Interface) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.log.push(format!("announce {index}"));
        state.announced.insert(index, interface);
        Ok(())
    }

    fn withdraw(&mut self, index: u32) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.log.push(format!("withdraw {index}"));
        state.announced.remove(&index);
        Ok(())
    }

    fn attach(&mut self, index: u32) -> io::Result<Attached> {
        let mut state = self.0.lock().unwrap();
        state.log.push(format!("attach {index}"));
        if state.busy.contains(&index) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        state.attached.insert(index);
        Ok(Attached { hook: "tcx", problem: None })
    }

    fn forget_ways(&mut self) {
        self.0.lock().unwrap().log.push("forget ways".to_owned());
    }

    fn detach(&mut self, index: u32) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.log.push(format!("detach {index}"));
        state.attached.remove(&index);
        Ok(())
    }
}

fn follower(node: Node) -> (Follower, Kernel) {
    let kernel = Kernel::default();
    (Follower::new(node, Box::new(kernel.clone())), kernel)
}

fn bridge(index: u32, name: &str) -> Link {
    Link { kind: Kind::Bridge, ..link(index, name) }
}

fn port(index: u32, name: &str, master: u32) -> Link {
    Link { master: Some(master), ..link(index, name) }
}

#[test]
fn an_interface_is_announced_before_it_is_attached_and_withdrawn_after_it_is_detached() {
    let (mut follower, kernel) = follower(node("veth*", "eth0", ""));
    follower.replace(vec![link(1, "lo"), link(2, "eth0")]);
    assert_eq!(kernel.log(), ["announce 2", "attach 2"]);
    follower.change(link(9, "veth1"));
    follower.change(link(10, "other"));
    assert_eq!(kernel.log(), ["announce 9", "attach 9"]);
    follower.remove(9);
    follower.remove(10);
    assert_eq!(kernel.log(), ["detach 9", "withdraw 9"]);
}

#[test]
fn news_that_change_nothing_do_nothing() {
    let (mut follower, kernel) = follower(node("veth*", "", ""));
    follower.change(link(9, "veth1"));
    kernel.log();
    follower.change(link(9, "veth1"));
    follower.change(Link { peer: Some(3), ..link(9, "veth1") });
    assert!(kernel.log().is_empty());
}

#[test]
fn a_rename_can_bring_an_interface_in_and_out() {
    let (mut follower, kernel) = follower(node("veth*", "up*", ""));
    follower.change(link(9, "tmp0"));
    assert!(kernel.attached().is_empty());
    follower.change(link(9, "veth0"));
    assert_eq!(kernel.attached(), [9]);
    follower.change(link(9, "up0"));
    assert_eq!(kernel.announced(9).unwrap().role, role::UPLINK);
    assert_eq!(follower.status().interfaces[0].name, "up0");
    follower.change(link(9, "tmp0"));
    assert!(kernel.attached().is_empty() && kernel.announced(9).is_none());
    assert!(follower.status().interfaces.is_empty());
}

#[test]
fn ports_come_and_go_with_their_bridge() {
    let (mut follower, kernel) = follower(node("", "", "cni0"));
    follower.replace(vec![port(3, "tap0", 5), bridge(5, "cni0"), link(4, "eth0")]);
    assert_eq!(kernel.attached(), [3, 5]);
    assert_eq!(kernel.announced(3).unwrap().master, 5);
    assert_eq!(kernel.announced(5).unwrap().role, role::BRIDGE);
    follower.change(port(4, "eth0", 5));
    assert_eq!(kernel.attached(), [3, 4, 5]);
    follower.change(link(4, "eth0"));
    assert_eq!(kernel.attached(), [3, 5]);
    follower.change(bridge(5, "br0"));
    assert!(kernel.attached().is_empty());
    follower.change(bridge(5, "cni0"));
    assert_eq!(kernel.attached(), [3, 5]);
    follower.remove(5);
    assert!(kernel.attached().is_empty());
}

#[test]
fn a_pod_that_joins_any_bridge_is_announced_again() {
    let (mut follower, kernel) = follower(node("veth*", "", ""));
    follower.replace(vec![link(3, "veth0"), bridge(5, "docker0")]);
    kernel.log();
    follower.change(port(3, "veth0", 5));
    assert_eq!(kernel.announced(3).unwrap().master, 5);
    assert_eq!(kernel.log(), ["announce 3", "attach 3"]);
}

#[test]
fn a_failure_is_shown_and_tried_again() {
    let (mut follower, kernel) = follower(node("veth*", "", ""));
    kernel.0.lock().unwrap().busy.insert(9);
    follower.change(link(9, "veth0"));
    let status = follower.status().interfaces.remove(0);
    assert_eq!((status.hook.as_str(), status.problem.as_deref()), ("", Some("resource busy")));
    follower.retry();
    kernel.0.lock().unwrap().busy.clear();
    kernel.log();
    follower.retry();
    assert_eq!(kernel.log(), ["announce 9", "attach 9"]);
    let status = follower.status().interfaces.remove(0);
    assert_eq!((status.hook.as_str(), status.problem), ("tcx", None));
    follower.retry();
    assert!(kernel.log().is_empty());
}

#[test]
fn what_is_not_ethernet_is_shown_and_left_alone() {
    let (mut follower, kernel) = follower(node("*", "", ""));
    follower.replace(vec![Link { is_ethernet: false, ..link(1, "lo") }]);
    follower.retry();
    follower.replace(vec![Link { is_ethernet: false, ..link(1, "lo") }]);
    assert!(kernel.log().is_empty());
    assert_eq!(follower.status().interfaces[0].problem.as_deref(), Some("not an Ethernet interface"));
}

#[test]
fn a_list_makes_good_for_lost_news() {
    let (mut follower, kernel) = follower(node("veth*", "", ""));
    follower.replace(vec![link(3, "veth0"), link(4, "veth1")]);
    kernel.log();
    // 3 was made again, 4 is gone, and 5 is of a daemon before this one.
    kernel.0.lock().unwrap().attached.extend([5]);
    follower.replace(vec![link(3, "veth7"), link(5, "eth0"), link(6, "veth2")]);
    assert_eq!(kernel.attached(), [3, 6]);
    assert_eq!(kernel.log()[..2], ["announce 3", "attach 3"]);
}

#[test]
fn the_end_of_a_pair_that_stays_is_asked_for() {
    let (mut follower, _) = follower(node("veth*", "", ""));
    let here = |index, peer| Link { kind: Kind::Pair, peer: Some(peer), ..link(index, &format!("veth{index}")) };
    let elsewhere = |index, peer| Link { peer_is_elsewhere: true, ..here(index, peer) };
    follower.replace(vec![here(3, 4), here(4, 3), elsewhere(7, 4)]);
    assert_eq!(follower.peers_of_gone(4), [3]);
    assert!(follower.peers_of_gone(9).is_empty());
    follower.remove(4);
    follower.change(elsewhere(3, 2));
    assert_eq!(follower.peers_of_changed(&here(4, 3)), [3]);
    assert!(follower.peers_of_changed(&elsewhere(4, 3)).is_empty());
}

#[test]
fn patterns_that_nothing_matches_are_told() {
    let (mut follower, _) = follower(node("veth*", "eth0 eth9", ""));
    follower.replace(vec![link(2, "eth0")]);
    assert_eq!(
        follower.status().warnings,
        ["no interface matches \"eth9\" of node.uplinks", "no interface matches \"veth*\" of node.pod_interfaces"]
    );
}

#[test]
fn the_programs_are_told_when_rules_of_routing_come_and_go() {
    let (mut follower, kernel) = follower(node("veth*", "eth0", ""));
    let is_direct = |index| kernel.announced(index).unwrap().flags & Interface::DIRECT != 0;
    follower.replace(vec![link(2, "eth0"), link(9, "veth1")]);
    assert!(!is_direct(9), "nobody has looked yet");
    let by_destination = Routing { by_destination: true, one_way: false };
    follower.set_routing(by_destination);
    assert!(is_direct(9) && !is_direct(2));
    follower.change(link(10, "veth2"));
    assert!(is_direct(10));
    kernel.log();
    follower.set_routing(by_destination);
    assert!(kernel.log().is_empty());
    follower.set_routing(Routing { one_way: true, ..by_destination });
    assert!(is_direct(9) && is_direct(2));
    follower.set_routing(Routing::default());
    assert!(!is_direct(9) && !is_direct(10));
}
