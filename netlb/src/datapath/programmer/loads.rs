//! How many flows backends have, for services that go by it: `Backend::base`.
//!
//! The programs count flows that begin. Which of them ended is seen in the flow table, every other second. So nothing is done for it when
//! a packet of a flow comes, and a flow that begins counts at once.

use netlb_common::{conntrack::State as FlowState, maps::algorithm, table::Data, time::ticks_from_seconds};

use super::{flows::is_forward, *};

/// Seconds between two passes.
const PAUSE: u64 = 2;
/// A pass takes no more than one in so many parts of the time.
const SHARE: u64 = 20;

/// When the flows were counted.
#[derive(Debug, Default)]
pub(super) struct Loads {
    counted: Option<Ticks>,
    /// Ticks until the next time.
    pause: u32,
    /// Services that go by them, and how many entries of `SERVICES` say so.
    services: HashMap<u32, u32>,
}

impl Loads {
    /// Takes note of what is in force now, or no more.
    pub(super) fn note(&mut self, config: &Config, is_served: bool) {
        if config.algorithm != algorithm::LEAST_CONN {
            return;
        }
        let count = self.services.entry(config.service).or_default();
        *count = if is_served { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            self.services.remove(&config.service);
        }
    }
}

impl<M: Maps> Programmer<M> {
    /// A service is to go by the flows that its backends have. Until they are counted, which is soon, it begins with none.
    pub(super) fn begin_load(&mut self, service: u32) {
        let Some(entry) = self.services.get(service) else { return };
        if self.loads.services.contains_key(&service) {
            return;
        }
        for id in entry.backends.values() {
            self.maps.set_backend_base(*id, self.maps.backend_flows(*id).wrapping_neg());
        }
        self.loads.counted = None;
    }

    /// Counts the flows of the backends of services that go by them, unless that was done just before.
    pub(super) fn count_loads(&mut self) {
        let now = (self.clock)();
        if self.loads.counted.is_some_and(|counted| now.0.wrapping_sub(counted.0) < self.loads.pause) {
            return;
        }
        let start = Instant::now();
        let entries = self.loads.services.keys().filter_map(|index| self.services.get(*index));
        let ids: Vec<_> = entries.flat_map(|entry| entry.backends.values().copied()).collect();
        self.loads.counted = Some(now);
        self.loads.pause = ticks_from_seconds(PAUSE) as u32;
        if ids.is_empty() {
            return;
        }
        // Before the table is looked at: what begins meanwhile counts twice at worst, until the next time.
        let created: Vec<_> = ids.iter().map(|id| self.maps.backend_flows(*id)).collect();
        let mut by_load = vec![false; self.sizes.backends as usize];
        ids.iter().for_each(|id| by_load[*id as usize] = true);
        let mut counts = vec![0_u64; by_load.len()];
        let is_by_load = |data: Data| matches!(by_load.get(data.id() as usize), Some(true));
        for (_, _, data) in self.live(|data| is_forward(data) && !is_over(data) && is_by_load(data)) {
            counts[data.id() as usize] += 1;
        }
        for (id, created) in ids.into_iter().zip(created) {
            self.maps.set_backend_base(id, counts[id as usize].wrapping_sub(created));
        }
        let rest = start.elapsed().as_millis() as u64 * SHARE / 1000;
        self.loads.pause = self.loads.pause.max(ticks_from_seconds(rest) as u32);
    }
}

/// Whether a flow has ended, and only waits for what comes late.
fn is_over(data: Data) -> bool {
    matches!(data.state(), FlowState::CLOSING | FlowState::RESET_FORWARD | FlowState::RESET_REPLY)
}
