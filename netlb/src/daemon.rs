//! The daemon: everything wired together, in the order it has to start.
//!
//! Configuration, privileges and locks come first, so that nothing is touched when it would fail later. Then the stored services are
//! read, the data plane is loaded, and everything is programmed at once: a start never takes services away that will be back a moment
//! later. Only then does the socket open.

use std::{
    io,
    path::PathBuf,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use tokio::{runtime::Runtime, sync::watch};

use self::{
    lock::Locks,
    signals::{Signals, Wanted},
    socket::Socket,
};
use crate::{
    api,
    config::{Config, ConfigError},
    control::{Control, ControlError, Reload, Start},
    datapath::kernel::Datapath,
    dataplane::Dataplane,
    desired::DesiredState,
    store::Store,
    watch::ConfigFile,
};

pub(crate) mod lock;
mod logging;
mod memory;
pub(crate) mod preflight;
pub(crate) mod signals;
pub(crate) mod socket;
#[cfg(test)]
mod tests;

/// Where pins are kept.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf/netlb";
/// Where API services are kept.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/netlb";

/// How long requests under way may take when the daemon stops.
const GRACE: Duration = Duration::from_secs(5);

/// The daemon's command line.
#[derive(Debug)]
pub struct Options {
    pub config: PathBuf,
    /// In place of the configuration's.
    pub socket: Option<PathBuf>,
    pub state_dir: PathBuf,
    pub bpffs: PathBuf,
    /// Log at level debug, whatever the configuration says.
    pub verbose: bool,
}

/// Runs until a signal ends it.
pub fn run(options: Options) -> anyhow::Result<()> {
    let (file, config) = ConfigFile::open(&options.config)?;
    logging::start(&config.log, options.verbose);
    preflight::check_capabilities()?;
    preflight::check_bpffs(&options.bpffs)?;
    let locks = Locks::take(&options.state_dir, &options.bpffs)?;
    let socket = Socket::check(options.socket.as_ref().unwrap_or(&config.api.socket))?;
    let (store, stored) = Store::open(&options.state_dir)?;
    let runtime = Runtime::new().context("cannot start the runtime")?;
    // Loading may want to watch descriptors.
    let entered = runtime.enter();
    // Before loading, which takes seconds, and which a SIGHUP is not to end. A SIGTERM that comes meanwhile is kept as well: the daemon
    // stops at once when it is ready, and leaves nothing half done.
    let signals = Signals::new().context("cannot listen for signals")?;
    let dataplane = open_dataplane(&config, &options)?;
    drop(entered);
    let desired = DesiredState::new(Vec::new(), stored);
    let daemon = Daemon { file, config, socket, store, desired, dataplane };
    let result = runtime.block_on(daemon.serve(signals));
    runtime.shutdown_timeout(GRACE);
    drop(locks);
    result
}

/// The one place where the kind of data plane is chosen.
fn open_dataplane(config: &Config, options: &Options) -> anyhow::Result<Box<dyn Dataplane>> {
    Ok(Box::new(Datapath::open(config, &options.bpffs, &options.state_dir)?))
}

/// All that a running daemon needs.
pub(crate) struct Daemon {
    pub(crate) file: ConfigFile,
    pub(crate) config: Config,
    pub(crate) socket: Socket,
    pub(crate) store: Store,
    pub(crate) desired: DesiredState,
    pub(crate) dataplane: Box<dyn Dataplane>,
}

impl Daemon {
    /// Programs everything, opens the socket, and serves until a signal comes.
    async fn serve(self, mut signals: Signals) -> anyhow::Result<()> {
        self.serve_until(async || signals.next().await).await
    }

    pub(crate) async fn serve_until(self, mut next_signal: impl AsyncFnMut() -> Wanted) -> anyhow::Result<()> {
        let Self { mut file, mut config, socket, store, desired, dataplane } = self;
        let reload = Reload {
            file: file.name(),
            time: SystemTime::now(),
            services: Ok(std::mem::take(&mut config.services)),
            warnings: Vec::new(),
        };
        let start = Start { dataplane, desired, store, reload };
        let (control, thread) = Control::start(start).context("cannot start the control thread")?;
        // Answered once everything is programmed.
        let size = match control.size().await {
            Err(ControlError::Stopping) => return join(thread).await.and(Err(ControlError::Stopping.into())),
            size => size?,
        };

        let listener = socket.listen()?;
        let (stop, stopped) = watch::channel(false);
        let mut server = tokio::spawn(api::serve(listener, control.clone(), ended(stopped)));
        start_ticks(control.clone()).context("cannot start a thread")?;
        let mut changes = file.watch();
        memory::give_back();
        tracing::info!(
            services = size.services,
            backends = size.backends,
            socket = %socket.path().display(),
            "ready"
        );

        loop {
            tokio::select! {
                signal = next_signal() => match signal {
                    Wanted::Stop => break,
                    Wanted::Reload => reload_file(&mut file, &config, &control, When::Always).await?,
                },
                () = changes.changed() => reload_file(&mut file, &config, &control, When::IfChanged).await?,
                ended = &mut server => {
                    ended.context("the API server ended")?.context("the API server failed")?;
                    anyhow::bail!("the API server ended");
                }
            }
        }

        tracing::info!("stopping; traffic goes on with what is programmed");
        // Nobody listens where the server has ended by itself.
        let _ = stop.send(true);
        if tokio::time::timeout(GRACE, server).await.is_err() {
            tracing::warn!("some requests did not end in {GRACE:?}");
        }
        socket.remove();
        control.stop().await;
        join(thread).await
    }
}

/// What came of the control thread.
async fn join(thread: JoinHandle<anyhow::Result<()>>) -> anyhow::Result<()> {
    let joined =
        tokio::task::spawn_blocking(move || thread.join()).await.context("cannot wait for the control thread")?;
    joined.unwrap_or_else(|_| anyhow::bail!("the control thread panicked"))
}

/// When to read the file again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum When {
    Always,
    IfChanged,
}

async fn reload_file(file: &mut ConfigFile, running: &Config, control: &Control, when: When) -> anyhow::Result<()> {
    let Some(read) = (match when {
        When::Always => Some(file.read()),
        When::IfChanged => file.read_if_changed(),
    }) else {
        return Ok(());
    };
    let (services, warnings) = match read {
        Ok(new) => {
            let warnings: Vec<_> = running
                .needs_restart(&new)
                .into_iter()
                .map(|section| format!("changes in {section} of {} take effect when netlb is restarted", file.name()))
                .collect();
            for warning in &warnings {
                tracing::warn!("{warning}");
            }
            tracing::info!(services = new.services.len(), "configuration read again");
            (Ok(new.services), warnings)
        }
        Err(error) => {
            let problem = ConfigError::summary(&error);
            tracing::error!("configuration not usable, the services before it stay: {problem}");
            (Err(problem), Vec::new())
        }
    };
    let reload = Reload { file: file.name(), time: SystemTime::now(), services, warnings };
    control.reload(reload).await?;
    memory::give_back();
    Ok(())
}

/// Ticks each second until the control loop ends, in a thread of its own: a timer of the runtime takes several turns of it each time.
fn start_ticks(control: Control) -> io::Result<()> {
    let tick = move || {
        while control.tick(Instant::now()) {
            thread::sleep(Duration::from_secs(1));
        }
    };
    thread::Builder::new().name("ticks".to_owned()).spawn(tick).map(drop)
}

async fn ended(mut stopped: watch::Receiver<bool>) {
    // The other end gone is an end as well.
    drop(stopped.wait_for(|stopped| *stopped).await);
}
