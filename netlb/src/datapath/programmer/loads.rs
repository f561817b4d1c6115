//! How many flows backends have, for services that go by it: `Backend::base`.
//!
//! The programs count flows that begin. Which of them ended is seen in the flow table, every other second. So nothing is done for it when
//! a packet of a flow comes, and a flow that begins counts at once.

use netlb_common::{
    conntrack::{Direction, State as FlowState},
    maps::algorithm,
    table::{Data, is_live},
    time::ticks_from_seconds,
};

use super::{flows::slots, *};

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
}

impl<M: Maps> Programmer<M> {
    /// A service is to go by the flows that its backends have. Until they are counted, which is soon, it begins with none.
    pub(super) fn begin_load(&mut self, service: u32) {
        let Some(entry) = self.services.get(service) else { return };
        let goes_by_load = |key| {
            self.served.get(key).is_some_and(|served| {
                served.config.service == service && served.config.algorithm == algorithm::LEAST_CONN
            })
        };
        if entry.frontends.keys().any(goes_by_load) {
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
        let by_load = self.served.values().filter(|served| served.config.algorithm == algorithm::LEAST_CONN);
        let services: HashSet<_> = by_load.map(|served| served.config.service).collect();
        let entries = services.iter().filter_map(|index| self.services.get(*index));
        let ids: Vec<_> = entries.flat_map(|entry| entry.backends.values().copied()).collect();
        self.loads.counted = Some(now);
        self.loads.pause = ticks_from_seconds(PAUSE) as u32;
        if ids.is_empty() {
            return;
        }
        // Before the table is looked at: what begins meanwhile counts twice at worst, until the next time.
        let created: Vec<_> = ids.iter().map(|id| self.maps.backend_flows(*id)).collect();
        let mut counts: Vec<Option<u64>> = vec![None; self.sizes.backends as usize];
        ids.iter().for_each(|id| counts[*id as usize] = Some(0));
        let storage = self.maps.flows();
        for (_, slot) in slots(storage) {
            let data = Data(slot.data.load());
            if has_begun(data)
                && let Some(Some(count)) = counts.get_mut(data.id() as usize)
                // The clock is read after the slot: by one from before, a flow that was heard of since would look very old.
                && is_live(storage, data, (self.clock)())
            {
                *count += 1;
            }
        }
        for (id, created) in ids.into_iter().zip(created) {
            let live = counts[id as usize].unwrap_or_default();
            self.maps.set_backend_base(id, live.wrapping_sub(created));
        }
        let rest = start.elapsed().as_millis() as u64 * SHARE / 1000;
        self.loads.pause = self.loads.pause.max(ticks_from_seconds(rest) as u32);
    }
}

/// Whether a slot is that of a flow, in the direction from its client, which is not over.
fn has_begun(data: Data) -> bool {
    let is_over = matches!(
        data.state(),
        FlowState::FREE | FlowState::CLAIMING | FlowState::CLOSING | FlowState::RESET_FORWARD | FlowState::RESET_REPLY
    );
    !is_over && data.direction() == Direction::Forward
}
