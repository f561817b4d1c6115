//! Pods that are wired by real plugins of the Container Network Interface (CNI specification 1.0.0).

use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::exec::Cmd;
use crate::netns::{Handle, Namespace};

/// Where the distribution has the plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// The interface inside of pods.
const INTERFACE: &str = "eth0";

/// A plugin that gives a pod its interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Plugin {
    /// A veth on the node's bridge [`Plugin::BRIDGE`].
    Bridge,
    /// A routed veth.
    Ptp,
    /// An interface of the pod's own on the node's uplink: there is nothing of it on the node.
    Macvlan,
}

impl Plugin {
    pub const BRIDGE: &str = "cni0";

    fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Ptp => "ptp",
            Self::Macvlan => "macvlan",
        }
    }

    /// The network configuration. Addresses are given by `static`, so that they are known.
    fn config(self, addresses: &[(IpAddr, u8, IpAddr)]) -> Value {
        let any = |ip: &IpAddr| if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        let routes: Vec<_> =
            addresses.iter().map(|(ip, _, gateway)| json!({ "dst": any(ip), "gw": gateway })).collect();
        let addresses: Vec<_> = addresses
            .iter()
            .map(|(ip, bits, gateway)| json!({ "address": format!("{ip}/{bits}"), "gateway": gateway }))
            .collect();
        let mut config = json!({
            "cniVersion": "1.0.0",
            "name": "testbed",
            "type": self.name(),
            "ipam": { "type": "static", "addresses": addresses, "routes": routes },
        });
        match self {
            Self::Bridge => {
                config["bridge"] = Self::BRIDGE.into();
                config["isGateway"] = true.into();
            }
            Self::Ptp => {}
            Self::Macvlan => config["master"] = "up0".into(),
        }
        config
    }
}

impl fmt::Display for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A pod's attachment, which the plugin takes away on drop.
#[derive(Debug)]
pub struct Attachment {
    plugin: Plugin,
    node: Handle,
    pod: String,
    config: Value,
}

impl Attachment {
    /// Has the plugin wire a pod's namespace to the node's, and returns the name of the interface on the node, if there is one.
    pub(crate) fn new(
        plugin: Plugin,
        node: &Namespace,
        pod: &Namespace,
        addresses: &[(IpAddr, u8, IpAddr)],
    ) -> Result<(Self, Option<String>)> {
        let attachment =
            Self { plugin, node: node.handle(), pod: pod.name().to_owned(), config: plugin.config(addresses) };
        let result = attachment.call("ADD")?;
        let result: Value = serde_json::from_str(&result).with_context(|| format!("no JSON: {result:?}"))?;
        let interfaces = result["interfaces"].as_array().context("the plugin names no interfaces")?;
        // Those of the node have no sandbox.
        let on_node =
            interfaces.iter().filter(|interface| interface["sandbox"].as_str().unwrap_or_default().is_empty());
        let names = on_node.filter_map(|interface| interface["name"].as_str());
        Ok((attachment, names.filter(|name| name.starts_with("veth")).map(str::to_owned).next()))
    }

    fn call(&self, command: &str) -> Result<String> {
        let program = Path::new(PLUGINS).join(self.plugin.name());
        let output = Cmd::new(program)
            .handle(&self.node)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.pod)
            .env("CNI_NETNS", format!("/run/netns/{}", self.pod))
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_PATH", PLUGINS)
            .input(self.config.to_string())
            .run()?;
        if !output.status.success() {
            bail!("CNI plugin {} failed to {command}: {output}", self.plugin);
        }
        Ok(output.stdout)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // The namespaces go in any case, and the interfaces with them.
        let _ = self.call("DEL");
    }
}
