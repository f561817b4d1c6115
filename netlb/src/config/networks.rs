//! Networks as the configuration names them.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use netlb_common::network::Networks;
use serde::{Deserialize, Deserializer, de};

use crate::text::deserialize_text;

/// A few networks, which the programs know as constants.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Cidrs(Vec<IpNet>);

impl Cidrs {
    #[must_use]
    pub fn networks(&self) -> &[IpNet] {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Cidrs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let networks = Vec::<Cidr>::deserialize(deserializer)?;
        if networks.len() > Networks::MAX {
            return Err(de::Error::custom(format_args!(
                "{} networks are too many; the most is {}",
                networks.len(),
                Networks::MAX
            )));
        }
        Ok(Self(networks.into_iter().map(|network| network.0).collect()))
    }
}

/// The addresses of the node that node ports are served at.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum NodePortAddresses {
    /// The first one of each family.
    #[default]
    Primary,
    All,
    /// Those in these networks.
    In(Vec<IpNet>),
}

impl NodePortAddresses {
    /// Which of a node's addresses they are, by its addresses and the first ones.
    #[must_use]
    pub fn of(&self, addresses: &[IpAddr], primary: &[IpAddr]) -> Vec<IpAddr> {
        match self {
            Self::Primary => primary.to_vec(),
            Self::All => addresses.to_vec(),
            Self::In(networks) => {
                let is_in = |address: &&IpAddr| networks.iter().any(|network| network.contains(*address));
                addresses.iter().filter(is_in).copied().collect()
            }
        }
    }
}

impl<'de> Deserialize<'de> for NodePortAddresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = NodePortAddresses;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"primary\", \"all\" or a list of networks")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<NodePortAddresses, E> {
                match text {
                    "primary" => Ok(NodePortAddresses::Primary),
                    "all" => Ok(NodePortAddresses::All),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut networks: A) -> Result<NodePortAddresses, A::Error> {
                let mut all = Vec::new();
                while let Some(Cidr(network)) = networks.next_element()? {
                    all.push(network);
                }
                Ok(NodePortAddresses::In(all))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

struct Cidr(IpNet);

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize_text(deserializer, "a network such as \"10.244.0.0/16\"", |text| {
            let network = text.parse::<IpNet>().map(|network| Self(network.trunc()));
            network.map_err(|_| format!("`{text}` is not a network such as 10.244.0.0/16 or fd00:10::/64"))
        })
    }
}
