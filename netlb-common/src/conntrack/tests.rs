use super::{Direction::*, *};

const STATES: [State; 8] = [
    State::SYN_SENT,
    State::SYN_RECEIVED,
    State::ESTABLISHED,
    State::FIN_FORWARD,
    State::FIN_REPLY,
    State::CLOSING,
    State::RESET_FORWARD,
    State::RESET_REPLY,
];

/// Every connection state × direction × segment. A row is a state; the columns are SYN, SYN+ACK, ACK, FIN+ACK, RST from the client, then
/// the same from the backend. `.` is "stays".
const TABLE: &str = "
               | syn  synack ack  fin  rst  | syn  synack ack  fin  rst
    SYN_SENT   | .    .      .    .    RF   | .    SR     SR   BF   RR
    SYN_RECV   | .    ES     ES   CF   RF   | .    .      .    BF   RR
    ESTAB      | .    .      .    CF   RF   | .    .      .    BF   RR
    FIN_FWD    | .    .      .    .    RF   | .    .      .    CL   RR
    FIN_REPLY  | .    .      .    CL   RF   | .    .      .    .    RR
    CLOSING    | SS   .      .    .    .    | .    .      .    .    .
    RESET_FWD  | SS   SR     SR   CF   .    | .    .      .    .    RR
    RESET_REPL | SS   .      .    .    RF   | .    SR     SR   BF   .
";

#[test]
fn every_state_and_segment_gives_the_state_of_the_table() {
    let segments = [0x02, 0x12, 0x10, 0x11, 0x14].map(Segment::from_control);
    let rows = TABLE.lines().filter(|line| line.contains('|')).skip(1);
    let mut checked = 0;
    for (state, row) in STATES.into_iter().zip(rows) {
        let mut columns = row.split('|').skip(1);
        for direction in [Forward, Reply] {
            let cells = columns.next().unwrap().split_whitespace();
            for (segment, cell) in segments.into_iter().zip(cells) {
                let expected = match cell {
                    "." => state,
                    "SS" => State::SYN_SENT,
                    "SR" => State::SYN_RECEIVED,
                    "ES" => State::ESTABLISHED,
                    "CF" => State::FIN_FORWARD,
                    "BF" => State::FIN_REPLY,
                    "CL" => State::CLOSING,
                    "RF" => State::RESET_FORWARD,
                    "RR" => State::RESET_REPLY,
                    other => panic!("unknown cell {other}"),
                };
                let got = state.next(direction, segment);
                assert_eq!(got.name(), expected.name(), "{} {direction:?} {segment:?}", state.name());
                assert!(
                    !state.is_kept_by(direction, segment) || got == state,
                    "{} {direction:?} {segment:?}",
                    state.name()
                );
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 8 * 2 * 5);
}

#[test]
fn a_clients_segments_alone_never_establish_a_connection() {
    let mut state = State::first(Segment::from_control(0x02));
    for control in [0x10, 0x18, 0x12, 0x11, 0x10] {
        state = state.next(Forward, Segment::from_control(control));
        assert_ne!(state, State::ESTABLISHED);
    }
}

#[test]
fn a_datagram_flow_goes_both_ways_once_the_backend_answers() {
    let state = State::first(Segment::DATAGRAM);
    assert_eq!(state, State::UDP_ONE_WAY);
    assert_eq!(state.next(Forward, Segment::DATAGRAM), State::UDP_ONE_WAY);
    assert_eq!(state.next(Reply, Segment::DATAGRAM), State::UDP_BOTH_WAYS);
    assert_eq!(State::UDP_BOTH_WAYS.next(Forward, Segment::DATAGRAM), State::UDP_BOTH_WAYS);
}

#[test]
fn fins_that_cross_close_the_flow_in_both_slots() {
    assert_eq!(State::FIN_FORWARD.merge(State::FIN_REPLY), State::CLOSING);
    assert_eq!(State::FIN_REPLY.merge(State::FIN_FORWARD), State::CLOSING);
    for state in [State::FIN_FORWARD, State::FIN_REPLY, State::CLOSING] {
        assert_eq!(state.merge(State::ESTABLISHED), state, "a refresh that comes late takes no FIN back");
        assert_eq!(State::ESTABLISHED.merge(state), state);
        assert_eq!(state.merge(State::RESET_REPLY), State::RESET_REPLY);
    }
}

/// The same for flows of which only the client's packets are seen: SYN, ACK, FIN+ACK, RST.
const UNANSWERED: &str = "
               | syn  ack  fin  rst
    SYN_SENT   | .    ES   CF   RF
    ESTAB      | .    .    CF   RF
    FIN_FWD    | SS   .    .    RF
    RESET_FWD  | SS   ES   CF   .
";

#[test]
fn without_replies_a_state_goes_by_what_the_client_sends() {
    let states = [State::SYN_SENT, State::ESTABLISHED, State::FIN_FORWARD, State::RESET_FORWARD];
    let segments = [0x02, 0x10, 0x11, 0x14].map(Segment::from_control);
    let rows = UNANSWERED.lines().filter(|line| line.contains('|')).skip(1);
    for (state, row) in states.into_iter().zip(rows) {
        let cells = row.split('|').nth(1).unwrap().split_whitespace();
        for (segment, cell) in segments.into_iter().zip(cells) {
            let expected = match cell {
                "." => state,
                "SS" => State::SYN_SENT,
                "ES" => State::ESTABLISHED,
                "CF" => State::FIN_FORWARD,
                _ => State::RESET_FORWARD,
            };
            assert_eq!(state.next_unanswered(segment), expected, "{} {segment:?}", state.name());
        }
    }
    assert_eq!(State::UDP_ONE_WAY.next_unanswered(Segment::DATAGRAM), State::UDP_BOTH_WAYS);
}

#[test]
fn what_most_packets_are_leaves_the_state_as_it_is() {
    let ack = Segment::from_control(0x10);
    for direction in [Forward, Reply] {
        for state in [State::ESTABLISHED, State::FIN_FORWARD, State::FIN_REPLY, State::CLOSING] {
            assert!(state.is_kept_by(direction, ack), "{} {direction:?}", state.name());
        }
        for control in [0x02, 0x11, 0x14] {
            assert!(!State::ESTABLISHED.is_kept_by(direction, Segment::from_control(control)));
        }
        assert!(State::UDP_BOTH_WAYS.is_kept_by(direction, Segment::DATAGRAM));
    }
    assert!(
        State::UDP_ONE_WAY.is_kept_by(Forward, Segment::DATAGRAM)
            && !State::UDP_ONE_WAY.is_kept_by(Reply, Segment::DATAGRAM)
    );
    assert!(!State::SYN_SENT.is_kept_by(Reply, ack) && !State::SYN_RECEIVED.is_kept_by(Forward, ack));
}
