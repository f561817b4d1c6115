//! The interfaces that carry service traffic, followed live.
//!
//! A thread of its own, in the network namespace of the daemon, holds the kernel's list of interfaces and hears of every change. What
//! matches the configuration's patterns is announced to the programs and gets them attached; what no longer does, or is gone, loses them.
//! An interface that matches nothing is never touched. [`Follower`] decides, and [`Hooks`] is all it knows of the data plane.

use std::{
    collections::BTreeSet,
    fmt, io,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;
use netlb_common::maps::Interface;
use tokio::{
    runtime,
    sync::oneshot,
    time::{Instant, MissedTickBehavior},
};

use self::{
    facts::Facts,
    follower::Follower,
    netlink::{Event, Netlink},
};
use crate::{config::Node, dataplane::InterfaceStatus};

pub(crate) mod facts;
mod follower;
mod link;
mod netlink;

/// What cannot be attached is tried again after this long.
const RETRY: Duration = Duration::from_secs(3);
/// Addresses that change together are listed once in this time.
const READDRESS: Duration = Duration::from_millis(50);
/// Routes and neighbours that change together have flows ask for their ways once in this time at most.
const REROUTE: Duration = Duration::from_millis(100);
/// All interfaces are listed and looked after again this often, in case somebody took our programs off.
const LIST: Duration = Duration::from_secs(60);

/// What the data plane does to an interface. Everything can be repeated.
pub(crate) trait Hooks: Send {
    /// Interfaces with something of ours, from a daemon before this one too.
    fn known(&self) -> BTreeSet<u32>;
    /// Tells the programs what an interface is.
    fn announce(&mut self, index: u32, interface: Interface) -> io::Result<()>;
    fn withdraw(&mut self, index: u32) -> io::Result<()>;
    /// Attaches the programs, or makes sure that they are.
    fn attach(&mut self, index: u32) -> io::Result<Attached>;
    /// Takes everything off an interface that may be gone.
    fn detach(&mut self, index: u32) -> io::Result<()>;
    /// Has every flow ask routing for its way again.
    fn forget_ways(&mut self);
}

/// Through what programs are attached.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Attached {
    pub(crate) hook: &'static str,
    /// What is missing, where netlb works without it.
    pub(crate) problem: Option<String>,
}

/// The interfaces that match, and what an operator should know of them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Status {
    pub(crate) interfaces: Vec<InterfaceStatus>,
    pub(crate) warnings: Vec<String>,
    /// What is known of the node's addresses.
    pub(crate) facts: Facts,
}

struct Begin {
    /// What attaches programs.
    hooks: Box<dyn Hooks>,
    /// To be dropped when everything is attached.
    begun: mpsc::Sender<()>,
}

impl fmt::Debug for Begin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Begin").finish_non_exhaustive()
    }
}

/// The thread that follows them. On drop it ends, and what is attached stays.
#[derive(Debug)]
pub(crate) struct Interfaces {
    status: Arc<Mutex<Status>>,
    /// Sent to once.
    attach: Option<oneshot::Sender<Begin>>,
    /// Dropped to end the thread.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Interfaces {
    /// Opens the connections to the kernel and asks for addresses, and does nothing more before [`attach`](Self::attach).
    pub(crate) fn open(node: &Node) -> anyhow::Result<Self> {
        let status = Arc::new(Mutex::new(Status::default()));
        let (attach, attached) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let (opened, is_open) = mpsc::channel();
        let node = node.clone();
        let shared = Arc::clone(&status);
        let run = move || {
            let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(opened.send(Err(error))),
            };
            runtime.block_on(async {
                let netlink = match Netlink::open() {
                    Ok(netlink) => netlink,
                    Err(error) => return drop(opened.send(Err(error))),
                };
                let facts = match first_facts(&node, &netlink).await {
                    Ok(facts) => facts,
                    Err(error) => return drop(opened.send(Err(error))),
                };
                publish(&shared, |status| status.facts = facts);
                // Whoever waits for it is waiting still.
                drop(opened.send(Ok(())));
                tokio::select! {
                    () = follow(node, netlink, attached, &shared) => {}
                    _ = stopped => {}
                }
            });
        };
        let thread = thread::Builder::new().name("interfaces".to_owned()).spawn(run);
        let thread = thread.context("cannot start the thread that follows interfaces")?;
        is_open
            .recv()
            .context("the thread that follows interfaces ended")?
            .context("cannot ask the kernel for its interfaces")?;
        Ok(Self { status, attach: Some(attach), stop: Some(stop), thread: Some(thread) })
    }

    /// Attaches the programs to the interfaces that are there, and to others as they come. Returns when the former is done.
    pub(crate) fn attach(&mut self, hooks: Box<dyn Hooks>) {
        let (begun, is_done) = mpsc::channel();
        if self.attach.take().is_some_and(|attach| attach.send(Begin { hooks, begun }).is_ok()) {
            // Nothing is sent: the other end is dropped when it is done.
            let _ = is_done.recv();
        }
    }

    pub(crate) fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Interfaces {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been reported.
            drop(thread.join());
        }
    }
}

/// Follows interfaces for ever, once told to begin.
async fn follow(node: Node, mut netlink: Netlink, begin: oneshot::Receiver<Begin>, status: &Mutex<Status>) {
    let publish = |follower: &Follower| publish(status, |status| *status = follower.status());
    let Ok(Begin { hooks, begun }) = begin.await else { return };
    let mut follower = Follower::new(node, hooks);
    list(&mut follower, &mut netlink).await;
    publish(&follower);
    drop(begun);
    let mut retry = tokio::time::interval_at(Instant::now() + RETRY, RETRY);
    let mut relist = tokio::time::interval_at(Instant::now() + LIST, LIST);
    for interval in [&mut retry, &mut relist] {
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    let mut rerouted = Instant::now();
    let mut reroute_at = None;
    let mut readdress_at = None;
    loop {
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(reroute_at.unwrap_or(rerouted)), if reroute_at.is_some() => {
                follower.forget_ways();
                (rerouted, reroute_at) = (Instant::now(), None);
                continue;
            }
            () = tokio::time::sleep_until(readdress_at.unwrap_or(rerouted)), if readdress_at.is_some() => {
                readdress_at = None;
                list_addresses(&mut follower, &netlink).await;
            }
            event = netlink.next() => match event {
                Event::Readdressed => {
                    readdress_at.get_or_insert_with(|| Instant::now() + READDRESS);
                    continue;
                }
                Event::Rerouted => {
                    reroute_at.get_or_insert(rerouted + REROUTE);
                    continue;
                }
                Event::Ruled => {
                    reroute_at.get_or_insert(rerouted + REROUTE);
                    list_rules(&mut follower, &mut netlink).await;
                }
                Event::Changed(link) => {
                    let ask = follower.peers_of_changed(&link);
                    follower.change(link);
                    refresh(&mut follower, &netlink, ask).await;
                }
                Event::Gone(index) => {
                    let ask = follower.peers_of_gone(index);
                    follower.remove(index);
                    refresh(&mut follower, &netlink, ask).await;
                }
                Event::Lost => {
                    reroute_at.get_or_insert(rerouted + REROUTE);
                    list(&mut follower, &mut netlink).await;
                }
                Event::Ended => {
                    tracing::error!("the kernel's messages about interfaces ended; asking again");
                    tokio::time::sleep(RETRY).await;
                    match Netlink::open() {
                        Ok(opened) => netlink = opened,
                        Err(error) => tracing::error!("cannot ask the kernel for its interfaces: {error}"),
                    }
                    list(&mut follower, &mut netlink).await;
                }
            },
            _ = retry.tick() => follower.retry(),
            _ = relist.tick() => list(&mut follower, &mut netlink).await,
        }
        publish(&follower);
    }
}

/// Takes the kernel's list for the truth.
async fn list(follower: &mut Follower, netlink: &mut Netlink) {
    list_rules(follower, netlink).await;
    match netlink.list().await {
        Ok(links) => follower.replace(links),
        Err(error) => tracing::error!("cannot list interfaces: {error}"),
    }
    list_addresses(follower, netlink).await;
}

async fn list_rules(follower: &mut Follower, netlink: &mut Netlink) {
    follower.set_routing(netlink.routing().await);
}

async fn list_addresses(follower: &mut Follower, netlink: &Netlink) {
    match netlink.addresses().await {
        Ok(addresses) => follower.set_addresses(addresses),
        Err(error) => tracing::error!("cannot list addresses: {error}"),
    }
}

/// What is known of the node before anything is attached.
async fn first_facts(node: &Node, netlink: &Netlink) -> io::Result<Facts> {
    let links = netlink.list().await?.into_iter().map(|link| (link.index, link)).collect();
    Ok(Facts::new(node, &links, &netlink.addresses().await?))
}

fn publish(status: &Mutex<Status>, change: impl FnOnce(&mut Status)) {
    change(&mut status.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Asks for interfaces of which the kernel does not tell by itself that they changed.
async fn refresh(follower: &mut Follower, netlink: &Netlink, indexes: Vec<u32>) {
    for index in indexes {
        // One that is gone meanwhile is reported so.
        if let Ok(Some(link)) = netlink.get(index).await {
            follower.change(link);
        }
    }
}
