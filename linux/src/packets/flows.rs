//! Payload by flow, put back in order, within a bound of memory.

use std::collections::BTreeMap;

use super::{
    Ends,
    frame::Segment,
    tls::{ClientHello, ServerHello, client_hello, server_hello},
};

/// One direction of a TCP connection.
#[derive(Clone, Debug)]
pub struct Flow {
    ends: Ends,
    /// The sequence number that offsets count from.
    base: u32,
    /// Payload by its offset, as it was captured: repeats and overlaps included.
    pieces: BTreeMap<i64, Vec<u8>>,
}

/// A TLS handshake that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// From the client to the server.
    pub ends: Ends,
    /// What the client offered, if it was TLS at all.
    pub client: Option<ClientHello>,
    /// What the server chose, if it got that far.
    pub server: Option<ServerHello>,
}

impl Flow {
    /// Who sends to whom.
    pub fn ends(&self) -> Ends {
        self.ends
    }

    /// The payload in order, in one part for each gap-free stretch.
    pub fn payload(&self) -> Vec<Vec<u8>> {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        let mut end = None;
        for (&offset, piece) in &self.pieces {
            let length = i64::try_from(piece.len()).unwrap_or(i64::MAX);
            let known = end.map(|end: i64| end - offset);
            match (known.map(usize::try_from), parts.last_mut()) {
                (Some(Ok(known)), Some(part)) => {
                    part.extend(piece.get(known..).unwrap_or_default());
                }
                _ => parts.push(piece.clone()),
            }
            end = end.max(Some(offset.saturating_add(length)));
        }
        parts
    }

    /// Whether `needle` is in the payload, also across packets.
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.payload().iter().any(|part| position(part, needle).is_some())
    }

    fn first_bytes(&self) -> Vec<u8> {
        self.payload().into_iter().next().unwrap_or_default()
    }
}

/// All flows of a capture.
#[derive(Clone, Debug)]
pub(super) struct Flows {
    /// Several where a pair of ends was used again for another connection.
    flows: BTreeMap<Ends, Vec<Flow>>,
    room: usize,
    truncated: bool,
}

impl Flows {
    pub(super) fn new(payload_limit: usize) -> Self {
        Self { flows: BTreeMap::new(), room: payload_limit, truncated: false }
    }

    pub(super) fn add(&mut self, segment: &Segment<'_>) {
        let flows = self.flows.entry(segment.ends).or_default();
        let reopened = |flow: &Flow| segment.opens && flow.base != segment.sequence;
        if flows.last().is_none_or(reopened) {
            flows.push(Flow {
                ends: segment.ends,
                base: segment.sequence,
                pieces: BTreeMap::new(),
            });
        }
        let Some(flow) = flows.last_mut() else { return };
        // A distance of up to 2 GiB either way; memory ends long before.
        let distance = segment.sequence.wrapping_sub(flow.base).cast_signed();
        let piece = flow.pieces.entry(distance.into()).or_default();
        // The same frame shows up at every interface it crosses, and in retransmissions.
        if segment.payload.len() <= piece.len() {
            return;
        }
        if segment.payload.len() > self.room {
            self.truncated = true;
            return;
        }
        self.room -= segment.payload.len() - piece.len();
        *piece = segment.payload.to_vec();
    }

    pub(super) fn is_truncated(&self) -> bool {
        self.truncated
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.flows.values().flatten()
    }

    pub(super) fn handshakes(&self, port: u16) -> Vec<Handshake> {
        let to_port = |ends: &Ends| ends.destination.port() == port;
        let mut handshakes = Vec::new();
        for (ends, requests) in self.flows.iter().filter(|(ends, _)| to_port(ends)) {
            let back = Ends { source: ends.destination, destination: ends.source };
            let answers = self.flows.get(&back).map_or(&[][..], Vec::as_slice);
            for (index, request) in requests.iter().enumerate() {
                let answer = answers.get(index).map(Flow::first_bytes);
                handshakes.push(Handshake {
                    ends: *ends,
                    client: client_hello(&request.first_bytes()),
                    server: answer.and_then(|bytes| server_hello(&bytes)),
                });
            }
        }
        handshakes
    }
}

fn position(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    haystack.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn segment(sequence: u32, opens: bool, payload: &[u8]) -> Segment<'_> {
        Segment {
            ends: Ends {
                source: "10.0.0.1:1".parse().unwrap(),
                destination: "10.0.0.2:2".parse().unwrap(),
            },
            sequence,
            opens,
            payload,
        }
    }

    fn flows(segments: &[Segment<'_>]) -> Flows {
        let mut flows = Flows::new(1000);
        segments.iter().for_each(|segment| flows.add(segment));
        flows
    }

    #[test]
    fn payload_is_put_in_order_across_a_wrap_of_the_sequence_number() {
        let flows = flows(&[
            segment(u32::MAX - 1, true, b""),
            segment(2, false, b"ef"),
            segment(u32::MAX - 1, false, b"abc"),
            segment(0, false, b"cd"),
            segment(0, false, b"cd"),
        ]);
        let flow = flows.iter().next().unwrap();
        assert_eq!(flow.payload(), [b"abcdef"]);
        assert!(flow.contains(b"cde"));
        assert!(!flow.contains(b"abd"));
    }

    #[test]
    fn a_gap_splits_the_payload() {
        let flows = flows(&[segment(1, false, b"ab"), segment(9, false, b"cd")]);
        let flow = flows.iter().next().unwrap();
        assert_eq!(flow.payload(), [b"ab", b"cd"]);
        assert!(!flow.contains(b"bc"));
    }

    #[test]
    fn ends_used_again_are_another_flow() {
        let flows = flows(&[
            segment(5, true, b""),
            segment(5, false, b"one"),
            segment(700, true, b""),
            segment(700, false, b"two"),
        ]);
        assert_eq!(flows.iter().count(), 2);
    }

    #[test]
    fn beyond_the_limit_the_capture_says_so() {
        let mut flows = Flows::new(3);
        flows.add(&segment(1, false, b"ab"));
        assert!(!flows.is_truncated());
        flows.add(&segment(3, false, b"cd"));
        assert!(flows.is_truncated());
    }
}
