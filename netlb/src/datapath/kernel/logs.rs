//! Log lines of the programs.

use std::{io, os::fd::AsRawFd as _, thread};

use aya::Ebpf;
use aya_log::EbpfLogger;

/// Hands the programs' log lines to our own log, from a thread that ends with the process. It has its own so that a flood of them delays
/// nothing else.
pub(super) fn forward(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    let mut logger = match EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(aya_log::Error::MapNotFound) => {
            tracing::warn!("log.dataplane has no effect: these BPF programs log nothing");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let forward = move || {
        let mut ready = libc::pollfd { fd: logger.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        loop {
            // SAFETY: one structure, alive for the call.
            let count = unsafe { libc::poll(&raw mut ready, 1, -1) };
            if count < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return;
            }
            logger.flush();
        }
    };
    thread::Builder::new().name("packet-log".to_owned()).spawn(forward)?;
    Ok(())
}
