//! Programs as filters of the clsact qdisc, for kernels without TCX.
//!
//! A filter belongs to its interface and stays without any process. Ours have a priority and a handle of their own, so that a new program
//! replaces the old one in place, and the programs' names tell them from others'.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage,
        NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use super::syscall::Direction;

/// Before most, since what follows should see translated packets.
const PRIORITY: u16 = 1;
/// "nl" and 1.
const HANDLE: u32 = 0x6e6c_0001;
/// `ETH_P_ALL`: packets of every protocol.
const PROTOCOL: u16 = 3_u16.to_be();
const CLSACT: &str = "clsact";

/// A connection to the kernel's traffic control, in the network namespace of the thread that made it.
pub(super) struct Clsact {
    socket: Socket,
    sequence: u32,
}

impl Clsact {
    pub(super) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Gives an interface the qdisc, if it has none.
    pub(super) fn add_qdisc(&mut self, index: u32) -> io::Result<()> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
        message.attributes.push(TcAttribute::Kind(CLSACT.to_owned()));
        let added =
            self.request(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL);
        match added {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            added => added.map(drop),
        }
    }

    /// Attaches a program, or puts it in the place of the one before it.
    pub(super) fn set_filter(
        &mut self,
        index: u32,
        direction: Direction,
        name: &str,
        program: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let mut message = filter(index, direction);
        message.header.handle = HANDLE.into();
        message.header.info = u32::from(PRIORITY) << 16 | u32::from(PROTOCOL);
        message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
        message.attributes.push(TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
            TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]));
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.request(RouteNetlinkMessage::NewTrafficFilter(message), flags).map(drop)
    }

    /// Detaches the filters with this program's name.
    pub(super) fn remove_filter(&mut self, index: u32, direction: Direction, name: &str) -> io::Result<()> {
        let dump = RouteNetlinkMessage::GetTrafficFilter(filter(index, direction));
        let filters = match self.request(dump, NLM_F_DUMP) {
            // No such interface, or no such qdisc on it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => {
                return Ok(());
            }
            filters => filters?,
        };
        for found in filters {
            let RouteNetlinkMessage::NewTrafficFilter(found) = found else { continue };
            if is_program(&found, name) {
                let mut message = filter(index, direction);
                message.header.handle = found.header.handle;
                message.header.info = found.header.info;
                self.request(RouteNetlinkMessage::DelTrafficFilter(message), NLM_F_ACK)?;
            }
        }
        Ok(())
    }

    /// Sends a request and collects what is answered.
    fn request(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let len = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?.length() as usize;
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest);
                // Messages begin at multiples of four.
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
                // Filters of kinds that cannot be read are not ours.
                let Ok(answer) = answer else { continue };
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
            }
        }
    }
}

fn filter(index: u32, direction: Direction) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    message.header.parent = TcHandle { major: u16::MAX, minor };
    message
}

fn is_program(filter: &TcMessage, name: &str) -> bool {
    filter.attributes.iter().any(|attribute| {
        let TcAttribute::Options(options) = attribute else { return false };
        options.iter().any(|option| matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgName(it)) if it == name))
    })
}
