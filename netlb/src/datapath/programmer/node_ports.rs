//! Which ports are served at addresses of the node: the map `NODE_PORTS`, and what the kernel is asked to keep free.

use netlb_common::maps::{NodePortKey, family};

use super::*;

/// The ports of frontends that are in force.
#[derive(Debug, Default)]
pub(super) struct NodePorts {
    /// How many addresses, by family.
    served: HashMap<NodePortKey, [u32; 2]>,
    /// The entries there are.
    written: HashMap<NodePortKey, u32>,
    /// May have to be written.
    touched: HashSet<NodePortKey>,
    /// Counts changes of `served`.
    changes: u64,
}

impl NodePorts {
    pub(super) fn len(&self) -> u32 {
        self.written.len() as u32
    }

    fn note(&mut self, key: &EndpointKey, config: &Config, is_served: bool) {
        // A second entry for flows from outside is of the same frontend.
        if config.flags & Config::NODE == 0 || key.scope != 0 {
            return;
        }
        let port = NodePortKey::new(key.port, key.protocol);
        let counts = self.served.entry(port).or_default();
        let count = &mut counts[usize::from(!key.addr.is_v4())];
        *count = if is_served { *count + 1 } else { count.saturating_sub(1) };
        if *counts == [0; 2] {
            self.served.remove(&port);
        }
        self.touched.insert(port);
        self.changes += 1;
    }

    fn families(&self, port: &NodePortKey) -> u32 {
        let [v4, v6] = self.served.get(port).copied().unwrap_or_default();
        (if v4 > 0 { family::V4 } else { 0 }) | (if v6 > 0 { family::V6 } else { 0 })
    }
}

impl<M: Maps> Programmer<M> {
    /// The ports that are served at addresses of the node, in order.
    pub fn node_ports(&self) -> BTreeSet<u16> {
        self.node_ports.served.keys().map(|key| key.port.get()).collect()
    }

    /// Changes whenever [`node_ports`](Self::node_ports) may have.
    pub fn node_port_changes(&self) -> u64 {
        self.node_ports.changes
    }

    /// Notes what is in force for a key, and returns what was before.
    pub(super) fn put_served(&mut self, key: EndpointKey, new: Option<Served>) -> Option<Served> {
        if let Some(new) = &new {
            self.node_ports.note(&key, &new.config, true);
            self.loads.note(&new.config, true);
            if new.config.affinity > 0 {
                self.affine += 1;
                self.empty_affinity = None;
            }
        }
        let old = match new {
            Some(new) => self.served.insert(key, new),
            None => self.served.remove(&key),
        };
        if let Some(old) = &old {
            self.node_ports.note(&key, &old.config, false);
            self.loads.note(&old.config, false);
            self.affine -= u32::from(old.config.affinity > 0);
        }
        old
    }

    /// Tells the programs what changed. Services do without: a port that is bound at its wildcard takes nothing from them.
    pub(super) fn write_node_ports(&mut self) {
        for port in std::mem::take(&mut self.node_ports.touched) {
            let wanted = self.node_ports.families(&port);
            if self.node_ports.written.get(&port).copied().unwrap_or_default() == wanted {
                continue;
            }
            let written = match wanted {
                0 => self.maps.remove_node_port(&port),
                _ => self.maps.set_node_port(&port, wanted),
            };
            match written {
                Ok(()) if wanted == 0 => {
                    self.node_ports.written.remove(&port);
                }
                Ok(()) => {
                    self.node_ports.written.insert(port, wanted);
                }
                Err(error) => {
                    let number = port.port.get();
                    tracing::warn!("map NODE_PORTS: what is said of port {number} could not be changed: {error}");
                }
            }
        }
    }

    /// Makes `NODE_PORTS` what the records say.
    pub(super) fn adopt_node_ports(&mut self) -> io::Result<()> {
        self.node_ports.written = self.maps.node_ports()?.into_iter().collect();
        self.node_ports.touched.extend(self.node_ports.written.keys().copied());
        self.write_node_ports();
        Ok(())
    }
}
