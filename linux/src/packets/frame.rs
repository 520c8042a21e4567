//! From an Ethernet frame to a TCP segment. Anything else, and anything malformed, is `None`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Ends;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const PROTOCOL_TCP: u8 = 6;
const FLAG_SYN: u8 = 0x02;

/// A TCP segment, whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment<'a> {
    pub(super) ends: Ends,
    /// The number of the first byte of `payload`.
    pub(super) sequence: u32,
    /// Whether the segment opens its direction of a connection.
    pub(super) opens: bool,
    pub(super) payload: &'a [u8],
}

pub(super) fn tcp_segment(frame: &[u8]) -> Option<Segment<'_>> {
    let (ethertype, packet) = match u16_at(frame, 12)? {
        ETHERTYPE_VLAN => (u16_at(frame, 16)?, frame.get(18..)?),
        other => (other, frame.get(14..)?),
    };
    let (source, destination, segment) = match ethertype {
        ETHERTYPE_IPV4 => ipv4(packet)?,
        ETHERTYPE_IPV6 => ipv6(packet)?,
        _ => return None,
    };
    let header_length = usize::from(segment.get(12)? >> 4) * 4;
    if header_length < 20 {
        return None;
    }
    let opens = segment.get(13)? & FLAG_SYN != 0;
    let sequence = u32_at(segment, 4)?;
    Some(Segment {
        ends: Ends {
            source: SocketAddr::new(source, u16_at(segment, 0)?),
            destination: SocketAddr::new(destination, u16_at(segment, 2)?),
        },
        // The opening itself takes up a number.
        sequence: sequence.wrapping_add(opens.into()),
        opens,
        payload: segment.get(header_length..)?,
    })
}

/// Fragments are skipped: TCP avoids them, and only the first has the ports.
fn ipv4(packet: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    const MORE_FRAGMENTS_OR_OFFSET: u16 = 0x3fff;
    let header_length = usize::from(packet.first()? & 0x0f) * 4;
    if packet.first()? >> 4 != 4
        || header_length < 20
        || *packet.get(9)? != PROTOCOL_TCP
        || u16_at(packet, 6)? & MORE_FRAGMENTS_OR_OFFSET != 0
    {
        return None;
    }
    let total = match usize::from(u16_at(packet, 2)?) {
        // Segmentation offload beyond 64 KiB leaves the length zero.
        0 => packet.len(),
        total => total,
    };
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(bytes).into())
    };
    // Short frames are padded: the header tells where the packet ends.
    let segment = packet.get(header_length..total.min(packet.len()))?;
    Some((address(12)?, address(16)?, segment))
}

/// Extension headers are not followed: TCP on our paths has none.
fn ipv6(packet: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    const HEADER: usize = 40;
    if packet.first()? >> 4 != 6 || *packet.get(6)? != PROTOCOL_TCP {
        return None;
    }
    let end = match usize::from(u16_at(packet, 4)?) {
        0 => packet.len(),
        length => HEADER + length,
    };
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
        Some(Ipv6Addr::from(bytes).into())
    };
    let segment = packet.get(HEADER..end.min(packet.len()))?;
    Some((address(8)?, address(24)?, segment))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field: [u8; 2] = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_be_bytes(field))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_be_bytes(field))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn frame() -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00]);
        frame.extend([0x45, 0, 0, 43, 0, 0, 0x40, 0, 64, 6, 0, 0]);
        frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 9, 0, 0, 0, 0]);
        frame.extend([0x50, 0x18, 0, 0, 0, 0, 0, 0]);
        frame.extend(b"abc");
        frame.extend([0; 20]); // padding of a short frame
        frame
    }

    #[test]
    fn payload_ends_where_the_packet_does() {
        let frame = frame();
        let segment = tcp_segment(&frame).unwrap();
        assert_eq!(segment.payload, b"abc");
        assert_eq!(segment.sequence, 9);
        assert_eq!(segment.ends.source, "10.0.0.1:40000".parse().unwrap());
        assert_eq!(segment.ends.destination, "10.0.0.2:80".parse().unwrap());
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_survived() {
        let frame = frame();
        for end in 0..frame.len() {
            tcp_segment(&frame[..end]);
            for value in 0..=u8::MAX {
                let mut altered = frame.clone();
                altered[end] = value;
                tcp_segment(&altered);
            }
        }
    }
}
