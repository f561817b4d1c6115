//! The thread behind [`Control`](super::Control).

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{mpsc, oneshot};

use super::{ControlError, OutOfSync, Request, Size, Start};
use crate::{
    dataplane::{ApplyError, ApplyReport, Dataplane, Desired, FlowFilter},
    desired::{Change, ChangeError, Conflict, DesiredState, Done, Edit},
    model::Service,
    rfc3339::format_time,
    store::Store,
    view::{
        API_VERSION, ConflictView, CounterView, InterfaceView, MapView, OutOfSync as OutOfSyncView, ReloadView,
        ServiceView, SocketsView, StatusView,
    },
};

/// Changes programmed in one go, at most: an answer should not wait for a thousand others.
const BATCH: usize = 256;

/// What cannot be programmed is tried again after this long.
const RETRY: Duration = Duration::from_secs(30);

/// What came of reading the configuration file.
#[derive(Clone, Debug)]
pub struct Reload {
    pub file: String,
    pub time: SystemTime,
    /// The services of the file, or what is wrong with it.
    pub services: Result<Vec<Service>, String>,
    /// Things the operator should know of, such as a change that needs a restart.
    pub warnings: Vec<String>,
}

/// Owns everything that changes. See the [module](super).
pub struct Worker {
    dataplane: Box<dyn Dataplane>,
    desired: DesiredState,
    store: Store,
    /// By the clock on the wall, and by the one that nobody sets.
    started: (SystemTime, Instant),
    reload: ReloadView,
    reload_warnings: Vec<String>,
    /// Those that were logged.
    conflicts: Vec<Conflict>,
    out_of_sync: OutOfSync,
    retry_at: Option<Instant>,
}

/// A change that waits for its answer.
struct Waiting {
    change: Box<Change>,
    reply: oneshot::Sender<Result<Done, ControlError>>,
}

/// A change whose edits are in the desired state.
struct Tried {
    waiting: Waiting,
    edited: Vec<String>,
    undo: Vec<Edit>,
    done: Done,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("desired", &self.desired).finish_non_exhaustive()
    }
}

impl Worker {
    pub(super) fn new(Start { dataplane, mut desired, store, reload }: Start) -> Self {
        let view = reload_view(&reload);
        if let Ok(services) = reload.services {
            desired.set_file(services);
        }
        Self {
            dataplane,
            desired,
            store,
            started: (SystemTime::now(), Instant::now()),
            reload_warnings: reload.warnings,
            reload: view,
            conflicts: Vec::new(),
            out_of_sync: OutOfSync::new(),
            retry_at: None,
        }
    }

    pub(super) fn run(&mut self, mut requests: mpsc::Receiver<Request>) {
        let mut next = requests.blocking_recv();
        while let Some(request) = next.take() {
            match request {
                Request::Stop => return,
                Request::Work(work) => work(self),
                Request::Change { change, dry_run: true, reply } => {
                    let planned = self.desired.plan(&change).map(|(_, done)| done);
                    drop(reply.send(planned.map_err(ControlError::from)));
                }
                Request::Change { change, reply, .. } => {
                    let mut batch = vec![Waiting { change, reply }];
                    // Changes that wait already go along; anything else is next, in its order.
                    while batch.len() < BATCH && next.is_none() {
                        match requests.try_recv() {
                            Ok(Request::Change { change, dry_run: false, reply }) => {
                                batch.push(Waiting { change, reply })
                            }
                            Ok(other) => next = Some(other),
                            Err(_) => break,
                        }
                    }
                    self.change(batch);
                }
            }
            if next.is_none() {
                next = requests.blocking_recv();
            }
        }
    }

    fn change(&mut self, batch: Vec<Waiting>) {
        let mut tried = Vec::with_capacity(batch.len());
        for waiting in batch {
            let mut planned = self.desired.plan(&waiting.change);
            if planned.is_err() && !tried.is_empty() {
                // Refused as things stand with the changes before it, which may yet fail: those first.
                self.carry_out(std::mem::take(&mut tried));
                planned = self.desired.plan(&waiting.change);
            }
            match planned {
                Ok((edits, done)) => {
                    let edited = edits.iter().map(|edit| edit.name().to_owned()).collect();
                    let undo = edits.into_iter().map(|edit| self.desired.edit(edit)).collect();
                    tried.push(Tried { waiting, edited, undo, done });
                }
                Err(error) => drop(waiting.reply.send(Err(error.into()))),
            }
        }
        if !tried.is_empty() {
            self.carry_out(tried);
        }
    }

    /// Programs, stores and acknowledges what is in the desired state already, or takes it back.
    fn carry_out(&mut self, tried: Vec<Tried>) {
        let before = self.program_touched();
        // What another service has is no reason to refuse a change that has nothing to do with it.
        let is_old = |name: &String, error: &ApplyError| error.is_partial() && before.get(name) == Some(error);
        let problem = |name: &String| self.out_of_sync.get(name).filter(|error| !is_old(name, error));
        let failed = |tried: &Tried| tried.edited.iter().find_map(|name| Some((name.clone(), problem(name)?.clone())));
        if let Some((service, source)) = tried.iter().find_map(failed) {
            let mut waiting = self.take_back(tried);
            self.program_touched();
            if waiting.len() > 1 {
                for waiting in waiting {
                    self.change(vec![waiting]);
                }
            } else if let Some(Waiting { reply, .. }) = waiting.pop() {
                drop(reply.send(Err(ControlError::Apply { service, source })));
            }
            return;
        }
        let edited: BTreeSet<_> = tried.iter().flat_map(|tried| &tried.edited).map(String::as_str).collect();
        let edits = edited.into_iter().map(|name| (name, self.desired.api_service(name)));
        if let Err(error) = self.store.append(edits, self.desired.api_services()) {
            tracing::error!(
                "{error}: {}",
                std::error::Error::source(&error).map_or_else(String::new, ToString::to_string)
            );
            let error = Arc::new(error);
            let waiting = self.take_back(tried);
            self.program_touched();
            for Waiting { reply, .. } in waiting {
                drop(reply.send(Err(ControlError::Store(Arc::clone(&error)))));
            }
            return;
        }
        for Tried { waiting, done, .. } in tried {
            drop(waiting.reply.send(Ok(done)));
        }
    }

    fn take_back(&mut self, tried: Vec<Tried>) -> Vec<Waiting> {
        let mut waiting = Vec::with_capacity(tried.len());
        for Tried { waiting: one, undo, .. } in tried.into_iter().rev() {
            for edit in undo.into_iter().rev() {
                self.desired.edit(edit);
            }
            waiting.push(one);
        }
        waiting.reverse();
        waiting
    }

    /// Makes the data plane serve the desired state, all of it.
    pub(super) fn program(&mut self) {
        // Among the rest.
        self.desired.take_touched();
        let desired: Vec<_> = self.desired.served().collect();
        let report = self.dataplane.apply(&desired);
        let before = std::mem::take(&mut self.out_of_sync);
        self.note(report, &before);
        self.retry_at = (!self.out_of_sync.is_empty()).then(|| Instant::now() + RETRY);
    }

    /// Makes the data plane serve the desired state where edits have touched it. Returns what was wrong with those services before.
    fn program_touched(&mut self) -> OutOfSync {
        let touched = self.desired.take_touched();
        let report = self.dataplane.apply_touched(&touched);
        let before = touched.iter().filter_map(|touched| self.out_of_sync.remove_entry(&touched.name)).collect();
        self.note(report, &before);
        // What failed before may find room now. It is tried off the path of the change.
        self.retry_at = (!self.out_of_sync.is_empty()).then(Instant::now);
        before
    }

    /// Takes note of what came of an apply, and tells the operator what is new.
    fn note(&mut self, report: ApplyReport, out_of_sync_before: &OutOfSync) {
        let is_new = |(service, problem): &&(String, ApplyError)| out_of_sync_before.get(service) != Some(problem);
        log_some(report.failed.iter().filter(is_new), |(service, problem)| {
            tracing::error!("service {service} could not be programmed: {problem}");
        });
        let conflicts: Vec<_> = self.desired.conflicts().cloned().collect();
        let known: HashSet<_> = self.conflicts.iter().collect();
        log_some(conflicts.iter().filter(|conflict| !known.contains(conflict)), |conflict| {
            let Conflict { service, owner, held_by, held_by_owner, .. } = conflict;
            tracing::warn!(
                "conflict: {service} ({owner}) claims what {held_by} ({held_by_owner}) holds, which keeps it"
            );
        });
        self.conflicts = conflicts;
        if report.changed > 0 {
            tracing::debug!("{} services programmed in {:?}", report.changed, report.took);
        }
        self.out_of_sync.extend(report.failed);
    }

    pub(super) fn dataplane(&mut self) -> &mut dyn Dataplane {
        &mut *self.dataplane
    }

    pub(super) fn tick(&mut self, now: Instant) {
        let report = self.dataplane.tick();
        if report.changed > 0 || !report.failed.is_empty() {
            let before = self.out_of_sync.clone();
            self.note(report, &before);
            // What failed before may be served now, and what stays out of sync is told from it by trying all.
            self.retry_at = (!self.out_of_sync.is_empty()).then_some(now);
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.program();
        }
    }

    pub(super) fn reload(&mut self, reload: Reload) {
        self.reload = reload_view(&reload);
        // A file that cannot be used leaves the warnings of the one in use.
        if let Ok(services) = reload.services {
            self.reload_warnings = reload.warnings;
            self.desired.set_file(services);
            self.program();
        }
    }

    /// The filter for a service given by its name or a frontend.
    pub(super) fn flow_filter(&self, service: Option<String>) -> Result<FlowFilter, ChangeError> {
        let name = |reference: String| self.find(&reference).map(|desired| desired.service.name().to_owned());
        Ok(FlowFilter { service: service.map(name).transpose()? })
    }

    pub(super) fn services(&self) -> Vec<ServiceView> {
        let mut served: Vec<_> = self.desired.served().collect();
        served.sort_by(|a, b| a.service.name().cmp(b.service.name()));
        let names: Vec<_> = served.iter().map(|desired| desired.service.name()).collect();
        let stats = self.dataplane.stats(&names);
        served.iter().zip(stats).map(|(desired, stats)| self.view(desired, stats)).collect()
    }

    pub(super) fn service(&self, reference: &str) -> Result<ServiceView, ChangeError> {
        let desired = self.find(reference)?;
        let stats = self.dataplane.stats(&[desired.service.name()]).pop().unwrap_or_default();
        Ok(self.view(&desired, stats))
    }

    /// The same, as the answer to a change.
    pub(super) fn changed_service(&mut self, reference: &str) -> Result<ServiceView, ChangeError> {
        let desired = self.find(reference)?;
        let stats = self.dataplane.recent_stats(&[desired.service.name()]).pop().unwrap_or_default();
        Ok(self.view(&desired, stats))
    }

    /// The served service with this name or frontend.
    fn find(&self, reference: &str) -> Result<Desired, ChangeError> {
        self.desired.find_served(reference).ok_or_else(|| self.desired.not_found(reference))
    }

    fn view(&self, desired: &Desired, stats: crate::dataplane::ServiceStats) -> ServiceView {
        let problem = self.out_of_sync.get(desired.service.name()).map(ToString::to_string);
        ServiceView::new(desired, stats, problem)
    }

    pub(super) fn size(&self) -> Size {
        let backends = |desired: Desired| desired.service.backends().len() as u64;
        let none = Size { services: 0, backends: 0 };
        self.desired
            .served()
            .fold(none, |sum, desired| Size { services: sum.services + 1, backends: sum.backends + backends(desired) })
    }

    pub(super) fn status(&self, now: Instant) -> StatusView {
        let Size { services, backends } = self.size();
        let status = self.dataplane.status();
        let (started, start) = self.started;
        let maps: Vec<_> = status
            .maps
            .into_iter()
            .map(|map| MapView { name: map.name, entries: map.entries, max_entries: map.max_entries, bytes: map.bytes })
            .collect();
        StatusView {
            api_version: API_VERSION.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started: format_time(started),
            uptime_seconds: now.saturating_duration_since(start).as_secs(),
            services,
            backends,
            load_seconds: status.load_seconds,
            kernel_bytes: status.kernel_bytes,
            node: status.node.into(),
            forwarding: status.forwarding,
            flow_table: maps.iter().find(|map| map.name.eq_ignore_ascii_case("flows")).cloned(),
            maps,
            interfaces: status
                .interfaces
                .into_iter()
                .map(|interface| InterfaceView {
                    name: interface.name,
                    index: interface.index,
                    role: interface.role,
                    hook: interface.hook,
                    problem: interface.problem,
                })
                .collect(),
            sockets: status.sockets.map(|sockets| SocketsView {
                scope: sockets.scope,
                cgroup: sockets.cgroup,
                hooks: sockets.hooks,
            }),
            counters: status
                .counters
                .into_iter()
                .map(|counter| CounterView {
                    name: counter.name,
                    description: counter.description,
                    value: counter.value,
                })
                .collect(),
            warnings: self.reload_warnings.iter().cloned().chain(status.warnings).collect(),
            reload: self.reload.clone(),
            out_of_sync: self
                .out_of_sync
                .iter()
                .map(|(service, problem)| OutOfSyncView { service: service.clone(), problem: problem.to_string() })
                .collect(),
            conflicts: self.desired.conflicts().map(ConflictView::from).collect(),
        }
    }
}

/// Logs the first of many alike; `netlb status` has them all.
fn log_some<T>(mut items: impl Iterator<Item = T>, log: impl Fn(T)) {
    items.by_ref().take(10).for_each(log);
    match items.count() {
        0 => {}
        more => tracing::warn!("{more} more like that, see `netlb status`"),
    }
}

fn reload_view(reload: &Reload) -> ReloadView {
    ReloadView {
        file: reload.file.clone(),
        ok: reload.services.is_ok(),
        message: reload.services.as_ref().err().cloned(),
        time: format_time(reload.time),
    }
}
