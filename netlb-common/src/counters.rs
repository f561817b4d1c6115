//! The counters of the packet path: what became of packets, and events of the flow table.
//!
//! A CPU's are an element of a map; a counter's number is its index there, and its name is what people and metrics see.

/// Declares the counters in order, with the text that explains each to an operator.
macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident $name:literal $description:literal,)+) => {
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        #[repr(u32)]
        pub enum Counter {
            $($(#[$doc])* $variant,)+
        }

        impl Counter {
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// As shown in `netlb status` and in metrics.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            #[must_use]
            pub const fn description(self) -> &'static str {
                match self { $(Self::$variant => $description,)+ }
            }
        }
    };
}

counters! {
    ToPeer "to_peer" "packets handed straight into a pod's network namespace",
    ToInterface "to_interface" "packets sent out of an interface past the kernel's forwarding",
    ToStack "to_stack" "translated packets left to the kernel's routing",
    FlowsCreated "flows_created" "connections balanced",
    FlowsEvicted "flows_evicted" "connections that gave their place in the flow table to new ones",
    FlowTableFull "flow_table_full" "new connections dropped because only live ones were in their place of the flow table",
    FlowConflict "flow_conflict" "new connections dropped because every backend tried already has the same connection through another frontend, and the node has no address to tell them by",
    FlowsRepaired "flows_repaired" "flow table entries rebuilt from the other direction's",
    FlowsMoved "flows_moved" "flows moved off a backend that no longer serves",
    NoBackend "no_backend" "packets refused because their service has no backend that takes new connections",
    NeedsSnat "needs_snat" "packets passed untouched because the reply would not return through this node, which has no address to give them",
    TtlExpired "ttl_expired" "packets of services left to the kernel because they have no hop left",
    TooBig "too_big" "packets answered with an ICMP error because they do not fit the way out",
    NoRoute "no_route" "packets dropped because no route leads to their backend or client",
    Fragment "fragment" "fragments passed untouched because their datagram's first one, which has the ports, was not seen",
    Malformed "malformed" "packets passed untouched because a header is cut off or impossible",
    RewriteFailed "rewrite_failed" "packets dropped because the kernel refused a change",
    SnatExhausted "snat_exhausted" "new connections refused because every port tried of the node's address is taken at their backend",
    SnatLost "snat_lost" "replies dropped because the flow table lost whose they are",
    SentByXdp "sent_by_xdp" "packets sent out of an interface by XDP, before the kernel saw them",
    SocketsBalanced "sockets_balanced" "sockets that the socket hooks chose a backend for; a datagram socket counts for each service and choice",
    SocketsRefused "sockets_refused" "calls of processes refused because the service has no backend for them or no such port, or does not let the node in",
    FragmentsHeld "fragments_held" "fragments that came before their datagram's first one, and were kept until that came",
    FragmentsLost "fragments_lost" "kept fragments dropped: the first one did not come in time, or the kernel had no room for them",
    IcmpTranslated "icmp_translated" "ICMP errors about translated packets, made errors about the packets that were sent",
    NoLocalBackend "no_local_backend" "new connections dropped because their service has backends, but none that its policy gives to such clients",
    SourceRange "source_range" "new connections dropped because their client is in none of the service's source ranges",
    UnknownPort "unknown_port" "packets refused because the services at their destination have no such port",
    OwnedUnknown "owned_unknown" "packets dropped because their destination is of a network that is the services', and no service has it",
    Rejected "rejected" "packets answered with a TCP reset or with \"port unreachable\"",
    AnswersLimited "answers_limited" "packets dropped instead of answered because there were too many to answer",
    EchoAnswered "echo_answered" "echo requests to services answered",
    AffinityFull "affinity_full" "new connections whose client does not keep its backend because too many clients do",
    FlowsMasqueraded "flows_masqueraded" "flows of pods to the world that were given an address of the node as their source",
    BindsRefused "binds_refused" "calls of processes refused because they would have bound a node port that a service has",
    DsrWrapped "dsr_wrapped" "packets sent to a backend of another node as they came, in a packet of this node's",
    DsrUnwrapped "dsr_unwrapped" "packets taken out of the packet of another node",
    DsrTooBig "dsr_too_big" "packets dropped because they do not fit their way with one more header, and their sender lets routers fragment them",
    DsrNoBackend "dsr_no_backend" "wrapped packets dropped because their service has no backend at the address they were sent to",
    DsrCongested "dsr_congested" "wrapped packets dropped because they met congestion, which their sender does not want to be told of otherwise",
    DsrErrorLost "dsr_error_lost" "ICMP errors about wrapped packets passed untouched because they quote too little of what was wrapped, or what is of no flow",
    SnatTooBig "snat_too_big" "packets dropped because they do not fit their way, their sender lets routers fragment them, and their flow has an address of the node as its source",
}

/// Room for a CPU's counters. More than there are, so that a new counter is no reason for new maps.
pub const ROOM: usize = 64;
const _: () = assert!(Counter::ALL.len() <= ROOM && ROOM.is_power_of_two());

impl Counter {
    /// Whether it counts each packet of a flow, or each flow: what a call would cost, there it would show.
    #[inline(always)]
    #[must_use]
    pub const fn is_frequent(self) -> bool {
        matches!(
            self,
            Self::ToPeer
                | Self::ToInterface
                | Self::ToStack
                | Self::SentByXdp
                | Self::FlowsCreated
                | Self::FlowsMasqueraded
                | Self::DsrWrapped
                | Self::DsrUnwrapped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_indexes_and_names_differ() {
        let mut names = std::collections::HashSet::new();
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
            assert!(names.insert(counter.name()), "{} is there twice", counter.name());
        }
    }
}
