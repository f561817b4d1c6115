//! A data plane in memory, and a daemon around it, for the tests of everything above the kernel.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use crate::{
    client::Client,
    daemon::{Daemon, signals::Wanted, socket::Socket},
    dataplane::{
        ApplyError, ApplyReport, BackendCounters, Counter, Dataplane, DataplaneStatus, Desired, Flow, FlowFilter,
        FlowService, InterfaceStatus, MapStatus, NodeStatus, ServiceCounters, ServiceStats, SocketsStatus, Touched,
    },
    desired::DesiredState,
    store::Store,
    watch::ConfigFile,
};

/// Keeps what it is told. Clones are the same data plane.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryDataplane(Arc<Mutex<Memory>>);

#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// What is served, by service name.
    pub(crate) served: BTreeMap<String, Desired>,
    /// Services that cannot be programmed.
    pub(crate) fails: HashMap<String, ApplyError>,
    /// Services that the next tick makes others, as new addresses of the node do.
    pub(crate) moved: Vec<String>,
    /// Those of them that could not be programmed.
    pub(crate) stale: BTreeSet<String>,
    pub(crate) flows: Vec<Flow>,
    pub(crate) applies: usize,
    pub(crate) ticks: usize,
    /// How long an apply takes.
    pub(crate) slowness: Duration,
}

impl MemoryDataplane {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.lock().served.keys().cloned().collect()
    }

    /// From now on this service finds a full map.
    pub(crate) fn fill_up(&self, service: &str) {
        let full = ApplyError::MapFull { map: "BACKENDS", size: 4, option: "limits.backends" };
        self.lock().fails.insert(service.to_owned(), full);
    }

    pub(crate) fn add_flow(&self, service: &str, client: &str, backend: &str) {
        let mut memory = self.lock();
        let frontend = memory.served[service].service.frontends()[0];
        let (client, backend) = (client.parse().unwrap(), backend.parse().unwrap());
        let service = Some(FlowService { name: service.to_owned(), frontend, backend });
        let (protocol, state) = (frontend.protocol.to_string(), "established".to_owned());
        memory.flows.push(Flow { service, client, protocol, source: None, state, idle_seconds: 3 });
    }
}

impl MemoryDataplane {
    /// A pod's flow to the world, with this source.
    pub(crate) fn add_masqueraded(&self, client: &str, source: &str) {
        let (client, source) = (client.parse().unwrap(), Some(source.parse().unwrap()));
        let (protocol, state) = ("udp".to_owned(), "udp-both-ways".to_owned());
        self.lock().flows.push(Flow { service: None, client, protocol, source, state, idle_seconds: 5 });
    }
}

fn matches(filter: &FlowFilter, flow: &Flow) -> bool {
    filter.service.is_none() || filter.service.as_deref() == flow.service_name()
}

impl Dataplane for MemoryDataplane {
    fn apply(&mut self, desired: &[Desired]) -> ApplyReport {
        let mut memory = self.lock();
        std::thread::sleep(memory.slowness);
        let mut report = ApplyReport::default();
        let before = std::mem::take(&mut memory.served);
        for desired in desired {
            let name = desired.service.name().to_owned();
            let old = before.get(&name);
            match memory.fails.get(&name).cloned() {
                Some(error) if old != Some(desired) || memory.stale.contains(&name) => {
                    report.failed.push((name.clone(), error));
                    memory.served.extend(old.map(|old| (name, old.clone())));
                }
                _ => {
                    report.changed += usize::from(old != Some(desired));
                    memory.stale.remove(&name);
                    memory.served.insert(name, desired.clone());
                }
            }
        }
        memory.applies += 1;
        report
    }

    fn apply_touched(&mut self, touched: &[Touched]) -> ApplyReport {
        let mut desired = self.lock().served.clone();
        for Touched { name, wanted } in touched {
            match wanted {
                Some(wanted) => desired.insert(name.clone(), wanted.clone()),
                None => desired.remove(name),
            };
        }
        self.apply(&desired.into_values().collect::<Vec<_>>())
    }

    fn stats(&self, services: &[&str]) -> Vec<ServiceStats> {
        let memory = self.lock();
        let stats = |name: &&str| {
            let mut active: BTreeMap<SocketAddr, BackendCounters> = BTreeMap::new();
            let flows = memory.flows.iter().filter_map(|flow| flow.service.as_ref());
            for flow in flows.filter(|service| service.name == **name) {
                let counters = active.entry(flow.backend).or_default();
                counters.active += 1;
                counters.flows += 1;
            }
            let flows = active.values().map(|counters| counters.flows).sum();
            let service = ServiceCounters {
                flows,
                packets_in: 10 * flows,
                bytes_in: 1000 * flows,
                packets_out: flows,
                bytes_out: flows,
            };
            ServiceStats { service, backends: active.into_iter().collect() }
        };
        services.iter().map(stats).collect()
    }

    fn flows(&self, filter: &FlowFilter, limit: usize) -> Vec<Flow> {
        self.lock().flows.iter().filter(|flow| matches(filter, flow)).take(limit).cloned().collect()
    }

    fn count_flows(&self, filter: &FlowFilter) -> u64 {
        self.flows(filter, usize::MAX).len() as u64
    }

    fn flush_flows(&mut self, filter: &FlowFilter) -> u64 {
        let flows = &mut self.lock().flows;
        let before = flows.len();
        flows.retain(|flow| !matches(filter, flow));
        (before - flows.len()) as u64
    }

    fn status(&self) -> DataplaneStatus {
        let counter =
            |name: &str, value| Counter { name: name.to_owned(), description: format!("packets: {name}"), value };
        let interface = |name: &str, hook: &str, problem: Option<&str>| InterfaceStatus {
            name: name.to_owned(),
            index: 2,
            role: "uplink".to_owned(),
            hook: hook.to_owned(),
            problem: problem.map(str::to_owned),
        };
        DataplaneStatus {
            node: NodeStatus {
                name: "here".to_owned(),
                zone: Some("near".to_owned()),
                node_port_addresses: vec![[192, 0, 2, 1].into()],
                snat_addresses: Vec::new(),
            },
            forwarding: "fast".to_owned(),
            interfaces: vec![interface("eth0", "tcx", None), interface("eth1", "", Some("no such device"))],
            sockets: Some(SocketsStatus {
                scope: "node".to_owned(),
                cgroup: "/sys/fs/cgroup".to_owned(),
                hooks: vec!["connect4".to_owned(), "connect6".to_owned()],
            }),
            maps: vec![MapStatus { name: "flows".to_owned(), entries: 50, max_entries: 200, bytes: 12_800 }],
            counters: vec![counter("translated", 7), counter("no_backend", 0)],
            warnings: vec!["uplinks: `eth9` matches no interface".to_owned()],
            load_seconds: 0.25,
            kernel_bytes: 1_048_576,
        }
    }

    fn tick(&mut self) -> ApplyReport {
        let mut memory = self.lock();
        memory.ticks += 1;
        let mut report = ApplyReport::default();
        for name in std::mem::take(&mut memory.moved) {
            match memory.fails.get(&name).cloned() {
                Some(error) => {
                    memory.stale.insert(name.clone());
                    report.failed.push((name, error));
                }
                None => report.changed += 1,
            }
        }
        report
    }
}

/// A whole daemon but for the kernel, on a socket in a directory of its own.
pub(crate) struct TestDaemon {
    pub(crate) dataplane: MemoryDataplane,
    pub(crate) directory: tempfile::TempDir,
    signals: mpsc::UnboundedSender<Wanted>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl TestDaemon {
    /// Starts with this configuration file, and waits until it is ready.
    pub(crate) fn start(config: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), config)
    }

    pub(crate) fn start_in(directory: tempfile::TempDir, config: &str) -> Self {
        std::fs::write(directory.path().join("netlb.toml"), config).unwrap();
        let (file, config) = ConfigFile::open(&directory.path().join("netlb.toml")).unwrap();
        let (store, stored) = Store::open(&directory.path().join("state")).unwrap();
        let desired = DesiredState::new(Vec::new(), stored);
        let socket = Socket::check(&directory.path().join("netlb.sock")).unwrap();
        let dataplane = MemoryDataplane::default();
        let daemon = Daemon { file, config, socket, store, desired, dataplane: Box::new(dataplane.clone()) };
        let (signals, mut sent) = mpsc::unbounded_channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(daemon.serve_until(async || sent.recv().await.unwrap_or(Wanted::Stop)))
        });
        let daemon = Self { dataplane, directory, signals, thread: Some(thread) };
        wait_until(|| daemon.socket().exists());
        daemon
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("netlb.sock")
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(&self.socket()).unwrap()
    }

    pub(crate) fn write_config(&self, text: &str) {
        std::fs::write(self.directory.path().join("netlb.toml"), text).unwrap();
    }

    pub(crate) fn signal(&self, signal: Wanted) {
        self.signals.send(signal).unwrap();
    }

    /// Stops as SIGTERM does, and keeps the files.
    pub(crate) fn stop(mut self) -> tempfile::TempDir {
        self.signal(Wanted::Stop);
        self.thread.take().unwrap().join().unwrap().unwrap();
        std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap())
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.signals.send(Wanted::Stop).ok();
            thread.join().ok();
        }
    }
}

/// Waits for something that happens soon.
pub(crate) fn wait_until(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "it did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}
