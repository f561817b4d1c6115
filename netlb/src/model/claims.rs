//! Who has what, of all that services claim.

use std::collections::HashMap;

use super::{Claim, Service};

/// Claims and their holders.
///
/// A port on all addresses of the node stands against the same port published on one of them.
#[derive(Clone, Debug)]
pub struct Claims<H> {
    holders: HashMap<Claim, H>,
    /// Ports published on one address, in order, by the claim to the port on all of them.
    on_one_address: HashMap<Claim, Vec<(Claim, H)>>,
}

/// Something that two services want and one can have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rival<H> {
    /// What was asked about.
    pub claim: Claim,
    /// What stands against it: the same, or the port on all addresses or on one.
    pub held: Claim,
    pub holder: H,
}

impl<H> Default for Claims<H> {
    fn default() -> Self {
        Self { holders: HashMap::new(), on_one_address: HashMap::new() }
    }
}

impl<H: Clone + PartialEq> Claims<H> {
    /// Notes a service's claims; what others held of them is theirs no longer.
    pub fn insert(&mut self, service: &Service, holder: &H) {
        self.holders.extend(service.claims().map(|claim| (claim, holder.clone())));
        for (claim, on_all) in service.published_on_one_address() {
            let known = self.on_one_address.entry(on_all).or_default();
            let at = known.partition_point(|(other, _)| *other < claim);
            known.insert(at, (claim, holder.clone()));
        }
    }

    /// Forgets a service's claims; what others took of them since stays theirs.
    pub fn remove(&mut self, service: &Service, holder: &H) {
        for claim in service.claims() {
            if self.holders.get(&claim) == Some(holder) {
                self.holders.remove(&claim);
            }
        }
        for (claim, on_all) in service.published_on_one_address() {
            if let Some(known) = self.on_one_address.get_mut(&on_all) {
                known.retain(|(other, its)| (other, its) != (&claim, holder));
                if known.is_empty() {
                    self.on_one_address.remove(&on_all);
                }
            }
        }
    }

    #[must_use]
    pub fn holder(&self, claim: &Claim) -> Option<&H> {
        self.holders.get(claim)
    }

    /// What stands against a service's claims; its own, if they were noted.
    pub fn rivals(&self, service: &Service) -> impl Iterator<Item = Rival<&H>> {
        let same = |claim: Claim| self.holders.get(&claim).map(|holder| Rival { claim, held: claim, holder });
        let on_one = move |claim: Claim| {
            let held = claim.address.ip().is_unspecified().then(|| self.on_one_address.get(&claim)).flatten();
            held.into_iter().flatten().map(move |(held, holder)| Rival { claim, held: *held, holder })
        };
        let on_all =
            |(claim, held): (Claim, Claim)| self.holders.get(&held).map(|holder| Rival { claim, held, holder });
        service
            .claims()
            .flat_map(move |claim| same(claim).into_iter().chain(on_one(claim)))
            .chain(service.published_on_one_address().filter_map(on_all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Definition;

    fn publishing(ports: &[&str]) -> Service {
        let publish = ports.iter().map(|port| port.parse().unwrap()).collect();
        Service::define(Definition { name: Some("s".to_owned()), publish, ..Definition::default() }).unwrap()
    }

    fn rivals(claims: &Claims<u8>, service: &Service) -> Vec<(String, u8)> {
        claims.rivals(service).map(|rival| (rival.held.to_string(), *rival.holder)).collect()
    }

    #[test]
    fn a_port_on_all_addresses_stands_against_the_same_on_one() {
        let mut claims = Claims::default();
        let (one, two) = (publishing(&["192.0.2.1:8080:80"]), publishing(&["192.0.2.2:8080:80"]));
        // In an order that is not theirs: what is told does not depend on it.
        claims.insert(&two, &2);
        claims.insert(&one, &1);
        assert_eq!(rivals(&claims, &one), [("192.0.2.1:8080/tcp".to_owned(), 1)]);
        let all = publishing(&["8080:80"]);
        let both = [("192.0.2.1:8080/tcp".to_owned(), 1), ("192.0.2.2:8080/tcp".to_owned(), 2)];
        assert_eq!(rivals(&claims, &all), both);
        for other in ["8080:80/udp", "8081:80", "[2001:db8::1]:8080:80", "192.0.2.3:8080:80"] {
            assert_eq!(rivals(&claims, &publishing(&[other])), [], "{other}");
        }
        claims.remove(&one, &1);
        assert_eq!(rivals(&claims, &all), both[1..]);
        claims.remove(&two, &2);
        claims.insert(&all, &3);
        assert_eq!(rivals(&claims, &one), [("0.0.0.0:8080/tcp".to_owned(), 3)]);
        assert_eq!(claims.holder(&"192.0.2.1:8080/tcp".parse().unwrap()), None);
    }

    #[test]
    fn what_another_took_meanwhile_stays_with_it() {
        let mut claims = Claims::default();
        let one = publishing(&["192.0.2.1:8080:80"]);
        claims.insert(&one, &1);
        claims.insert(&one, &2);
        claims.remove(&one, &1);
        assert_eq!(rivals(&claims, &one), [("192.0.2.1:8080/tcp".to_owned(), 2)]);
        assert_eq!(rivals(&claims, &publishing(&["8080:80"])), [("192.0.2.1:8080/tcp".to_owned(), 2)]);
    }
}
