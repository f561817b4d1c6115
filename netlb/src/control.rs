//! The control loop: one thread that owns the data plane, the desired state and the store, and does one thing at a time.
//!
//! Requests come over a channel. Changes that wait together are programmed and stored together: programmed first, then stored, then
//! acknowledged. If one of them fails, all are taken back and carried out one by one, so that each is answered as if it had been alone.
//! A change is all or nothing: what cannot be programmed is not stored.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use tokio::sync::{mpsc, oneshot};

pub use self::worker::{Reload, Worker};
use crate::{
    dataplane::{ApplyError, Dataplane, FlowFilter},
    desired::{Change, ChangeError, DesiredState, Done},
    store::{Store, StoreError},
    view::{FlowView, ServiceView, StatusView},
};

#[cfg(test)]
mod tests;
mod worker;

/// Requests that wait before further ones are held back.
const QUEUE: usize = 1024;

/// A handle to the control loop.
#[derive(Clone, Debug)]
pub struct Control {
    requests: mpsc::Sender<Request>,
    ready: Arc<AtomicBool>,
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// The first service that could not be programmed.
    #[error("service {service} could not be programmed and nothing was changed")]
    Apply { service: String, source: ApplyError },
    #[error("the change could not be stored and was taken back")]
    Store(#[source] Arc<StoreError>),
    #[error("netlb is stopping")]
    Stopping,
}

/// What the control loop is given at start.
pub struct Start {
    pub dataplane: Box<dyn Dataplane>,
    /// What the API wants.
    pub desired: DesiredState,
    pub store: Store,
    /// The configuration file that was read, with what it wants.
    pub reload: Reload,
}

impl std::fmt::Debug for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Start").field("reload", &self.reload).finish_non_exhaustive()
    }
}

/// How much is to be served.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Size {
    pub services: u64,
    pub backends: u64,
}

enum Request {
    Change { change: Box<Change>, dry_run: bool, reply: oneshot::Sender<Result<Done, ControlError>> },
    Work(Box<dyn FnOnce(&mut Worker) + Send>),
    Stop,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Change { .. } => "Change",
            Self::Work(_) => "Work",
            Self::Stop => "Stop",
        })
    }
}

impl Control {
    /// Programs everything once, then starts the loop. The thread ends after [`Control::stop`], or when the data plane cannot begin.
    pub fn start(start: Start) -> io::Result<(Self, JoinHandle<anyhow::Result<()>>)> {
        let (requests, receiver) = mpsc::channel(QUEUE);
        let ready = Arc::new(AtomicBool::new(false));
        let mut worker = Worker::new(start);
        let is_ready = Arc::clone(&ready);
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(move || {
            worker.program();
            worker.dataplane().begin()?;
            is_ready.store(true, Ordering::Release);
            worker.run(receiver);
            Ok(())
        })?;
        Ok((Self { requests, ready }, thread))
    }

    /// Whether everything was programmed once.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Carries out a change, and returns when it is programmed and on disk.
    pub async fn change(&self, change: Change) -> Result<Done, ControlError> {
        self.request_change(change, false).await
    }

    /// What a change would do.
    pub async fn dry_run(&self, change: Change) -> Result<Done, ControlError> {
        self.request_change(change, true).await
    }

    async fn request_change(&self, change: Change, dry_run: bool) -> Result<Done, ControlError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Change { change: Box::new(change), dry_run, reply };
        self.requests.send(request).await.map_err(|_| ControlError::Stopping)?;
        answer.await.map_err(|_| ControlError::Stopping)?
    }

    pub async fn services(&self) -> Result<Vec<ServiceView>, ControlError> {
        self.work(|worker| worker.services()).await
    }

    pub async fn service(&self, reference: &str) -> Result<ServiceView, ControlError> {
        let reference = reference.to_owned();
        Ok(self.work(move |worker| worker.service(&reference)).await??)
    }

    /// A service that was changed just now. Its flows may be counted as they were a second ago.
    pub async fn changed_service(&self, reference: &str) -> Result<ServiceView, ControlError> {
        let reference = reference.to_owned();
        Ok(self.work(move |worker| worker.changed_service(&reference)).await??)
    }

    /// Flows of one service, or of all.
    pub async fn flows(&self, service: Option<String>, limit: usize) -> Result<Vec<FlowView>, ControlError> {
        let flows = self
            .work(move |worker| {
                let filter = worker.flow_filter(service)?;
                Ok::<_, ChangeError>(worker.dataplane().flows(&filter, limit))
            })
            .await??;
        Ok(flows.into_iter().map(FlowView::from).collect())
    }

    pub async fn count_flows(&self, service: Option<String>) -> Result<u64, ControlError> {
        Ok(self
            .work(move |worker| {
                let filter = worker.flow_filter(service)?;
                Ok::<_, ChangeError>(worker.dataplane().count_flows(&filter))
            })
            .await??)
    }

    pub async fn flush_flows(&self, service: Option<String>) -> Result<u64, ControlError> {
        Ok(self
            .work(move |worker| {
                let filter: FlowFilter = worker.flow_filter(service)?;
                Ok::<_, ChangeError>(worker.dataplane().flush_flows(&filter))
            })
            .await??)
    }

    pub async fn status(&self) -> Result<StatusView, ControlError> {
        self.work(|worker| worker.status(Instant::now())).await
    }

    /// How much is to be served.
    pub async fn size(&self) -> Result<Size, ControlError> {
        self.work(|worker| worker.size()).await
    }

    /// Takes over what the configuration file says now, or notes why it cannot be used.
    pub async fn reload(&self, reload: Reload) -> Result<(), ControlError> {
        self.work(move |worker| worker.reload(reload)).await
    }

    /// Lets the data plane do what is due. A tick that finds the loop busy is left out. Says whether there is a loop still.
    pub fn tick(&self, now: Instant) -> bool {
        let tick = Request::Work(Box::new(move |worker| worker.tick(now)));
        // With no room, the next second brings another one.
        !matches!(self.requests.try_send(tick), Err(mpsc::error::TrySendError::Closed(_)))
    }

    /// Ends the loop after what was asked before.
    pub async fn stop(&self) {
        // A loop that has ended already is what was asked for.
        drop(self.requests.send(Request::Stop).await);
    }

    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Result<T, ControlError> {
        let (reply, answer) = oneshot::channel();
        // Whoever asked may have gone away; then nobody wants the answer.
        let work = Box::new(move |worker: &mut Worker| drop(reply.send(work(worker))));
        self.requests.send(Request::Work(work)).await.map_err(|_| ControlError::Stopping)?;
        answer.await.map_err(|_| ControlError::Stopping)
    }
}

/// Services the data plane does not have as they are wanted, and why.
type OutOfSync = BTreeMap<String, ApplyError>;
