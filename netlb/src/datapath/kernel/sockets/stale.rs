//! Datagram sockets that are connected to a backend which serves no more.
//!
//! Their process names no address again, so no hook sees their datagrams. They are looked for where backends have changed, and destroyed:
//! the process's next call fails, and it connects anew, to a backend that serves. Streams are left alone, and so are sockets that named
//! the backend themselves.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use aya::maps::{Array, HashMap, Map, MapData};
use netlb_common::{
    addr::{Addr, PortBe},
    maps::{Backend, Config, Counterpart, EndpointKey, SocketKey},
    wire::udp,
};
use nix::sched::{CloneFlags, setns};

use super::{
    super::{directory::Services, load::Memory},
    diag::{Connected, Diag},
};
use crate::config::SocketScope;

/// A socket that was being connected at the change may have chosen before it, and is not listed as connected yet: a second look finds it.
const AGAIN: Duration = Duration::from_secs(1);
/// Between two looks, so that many changes do not cost more than a few.
const PAUSE: Duration = Duration::from_millis(50);
/// This thread's, in whatever namespace it is.
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// The thread that looks for such sockets.
pub(super) struct Stale {
    asks: SyncSender<()>,
    problem: Arc<Mutex<Option<String>>>,
}

impl Stale {
    pub(super) fn new(memory: &Memory, scope: SocketScope) -> anyhow::Result<Self> {
        let records = Records::new(memory).context("cannot open the maps again")?;
        // One ask that waits is as good as many.
        let (asks, asked) = sync_channel(1);
        let problem = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&problem);
        thread::Builder::new()
            .name("stale-sockets".to_owned())
            .spawn(move || watch(&asked, &records, scope, &shared))
            .context("cannot start a thread")?;
        Ok(Self { asks, problem })
    }

    /// Has the sockets looked through, soon.
    pub(super) fn check(&self) {
        let _ = self.asks.try_send(());
    }

    /// Why sockets could not be looked through.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Ends with the sender.
fn watch(asked: &Receiver<()>, records: &Records, scope: SocketScope, problem: &Mutex<Option<String>>) {
    let mut looks_again = false;
    loop {
        let wait = if looks_again { AGAIN } else { Duration::MAX };
        looks_again = match asked.recv_timeout(wait) {
            Ok(()) => true,
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let looked = look(records, scope);
        let warning = looked.err().map(|error| {
            format!("datagram sockets connected to a backend that was removed stay connected to it: {error:#}")
        });
        let mut problem = problem.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(warning) = warning.as_ref().filter(|_| *problem != warning) {
            tracing::warn!("{warning}");
        }
        *problem = warning;
        drop(problem);
        thread::sleep(PAUSE);
    }
}

fn look(records: &Records, scope: SocketScope) -> anyhow::Result<()> {
    if scope != SocketScope::All {
        return look_here(records);
    }
    let own = File::open(OWN_NAMESPACE).context("cannot open this network namespace")?;
    let (namespaces, mut looked) = namespaces();
    for namespace in namespaces {
        let entered = setns(&namespace, CloneFlags::CLONE_NEWNET)
            .context("cannot enter another network namespace (CAP_SYS_ADMIN)")
            .and_then(|()| look_here(records));
        looked = looked.and(entered);
    }
    setns(own, CloneFlags::CLONE_NEWNET).context("cannot return to this network namespace")?;
    looked
}

/// The network namespaces of all processes, those that can be opened, and whether that is all.
fn namespaces() -> (Vec<File>, anyhow::Result<()>) {
    let mut seen = HashSet::new();
    let mut namespaces = Vec::new();
    let mut all = Ok(());
    let processes = match fs::read_dir("/proc") {
        Ok(entries) => entries,
        Err(error) => return (namespaces, Err(error).context("cannot list processes")),
    };
    for path in processes.filter_map(Result::ok).map(|entry| entry.path()) {
        if path.file_name().and_then(|name| name.to_str()).is_none_or(|name| name.parse::<u32>().is_err()) {
            continue;
        }
        // Files are kept open, so that what was seen is not another's by now.
        match File::open(path.join("ns/net")).and_then(|file| file.metadata().map(|metadata| (file, metadata))) {
            Ok((namespace, metadata)) if seen.insert((metadata.dev(), metadata.ino())) => namespaces.push(namespace),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                all = Err(error).context("cannot open another process's network namespace (CAP_SYS_PTRACE)");
            }
            // Seen before; or the process has ended meanwhile.
            _ => {}
        }
    }
    (namespaces, all)
}

fn look_here(records: &Records) -> anyhow::Result<()> {
    let mut diag = Diag::new().context("there is no netlink for sockets (CONFIG_INET_DIAG)")?;
    let connected = diag.connected().context("cannot list datagram sockets (CONFIG_INET_UDP_DIAG)")?;
    for socket in connected {
        if records.is_stale(&socket) {
            diag.destroy(&socket).context("cannot destroy a datagram socket (CONFIG_INET_DIAG_DESTROY)")?;
            tracing::debug!(cookie = socket.cookie, "destroyed a datagram socket whose backend serves no more");
        }
    }
    Ok(())
}

/// The maps that tell whose socket is connected where.
struct Records {
    sockets: HashMap<MapData, SocketKey, Counterpart>,
    backends: Array<MapData, Backend>,
    services: Services,
    configs: Array<MapData, Config>,
}

impl Records {
    fn new(memory: &Memory) -> anyhow::Result<Self> {
        Ok(Self {
            sockets: Map::LruHashMap(memory.map("SOCKETS")?).try_into()?,
            backends: Map::Array(memory.map("BACKENDS")?).try_into()?,
            services: Services::new(memory)?,
            configs: Map::Array(memory.map("CONFIGS")?).try_into()?,
        })
    }

    /// Whether a socket has its backend from a service and is to leave it.
    fn is_stale(&self, socket: &Connected) -> bool {
        let key = SocketKey::new(socket.cookie, socket.peer, socket.port, SocketKey::BACKEND);
        let Ok(shown) = self.sockets.get(&key, 0) else { return false };
        let Ok(backend) = self.backends.get(&shown.backend, 0) else { return false };
        is_to_leave((socket.peer, socket.port), &backend, self.config(&shown).as_ref())
    }

    /// The record in force for a frontend.
    fn config(&self, frontend: &Counterpart) -> Option<Config> {
        let key = EndpointKey::new(frontend.addr, frontend.port, udp::PROTOCOL);
        let reference = self.services.get(&key)?;
        let config = self.configs.get(&reference.index(), 0).ok()?;
        (config.generation == reference.generation() && config.key == key).then_some(config)
    }
}

/// Whether a socket is to leave its backend: if that serves no more, or not the service that has the frontend now; and that service is gone or
/// has others. A service with no backend at all cuts nothing.
fn is_to_leave((addr, port): (Addr, PortBe), backend: &Backend, config: Option<&Config>) -> bool {
    let is_it = backend.addr == addr && backend.port == port && backend.protocol == udp::PROTOCOL;
    let is_anothers = config.is_some_and(|config| config.service != backend.service);
    let serves = is_it && backend.flags & Backend::SERVING != 0 && !is_anothers;
    !serves && config.is_none_or(|config| config.ring_len != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_leaves_what_serves_no_more_unless_there_is_nowhere_to_go() {
        let (addr, port) = (Addr::from_v4([10, 244, 1, 2]), PortBe::new(53));
        let is_left = |backend: Backend, config: Option<u32>| {
            let config = config.map(|ring_len| Config { ring_len, service: 1, ..Config::default() });
            is_to_leave((addr, port), &backend, config.as_ref())
        };
        let serving =
            Backend { addr, port, protocol: udp::PROTOCOL, flags: Backend::SERVING, service: 1, ..Backend::default() };
        for config in [None, Some(0), Some(251)] {
            assert!(!is_left(serving, config), "it drains or takes new flows");
        }
        let of_another = Backend { service: 2, ..serving };
        assert!(is_left(of_another, Some(251)), "its frontend moved to another service");
        assert!(!is_left(of_another, None) && !is_left(of_another, Some(0)));
        let other = Backend { addr: Addr::from_v4([10, 244, 1, 3]), ..serving };
        for gone in [Backend { flags: 0, ..serving }, other] {
            assert!(is_left(gone, Some(251)), "the service has others");
            assert!(is_left(gone, None), "the service is gone");
            assert!(!is_left(gone, Some(0)), "the service has no backend at all");
        }
    }
}
