use std::{io::Write, process::Command};

use hauberk_linux::packets::{CaptureOptions, Interface, PacketCapture, PcapFile};

use crate::support::*;

#[test]
fn payload_is_seen_in_both_directions_and_written_to_a_pcap_file() {
    let network = Network::new();
    let file = std::env::temp_dir().join(format!("hauberk-{}.pcap", network.workload.inode()));
    let options = CaptureOptions {
        interface: Interface::Named("eth0".to_owned()),
        file: PcapFile::At(file.clone()),
        ..Default::default()
    };
    let capture = network.in_workload(|| PacketCapture::start(&options)).unwrap();
    for family in families() {
        let server = listen(&network.remote, family.any, 80);
        let mut client = connect(&network.workload, family.remote, 80).unwrap();
        let (mut accepted, _) = accept(&server);
        client.write_all(b"first half, ").unwrap();
        assert_joined(&mut client, &mut drained(&mut accepted, 12));
        client.write_all(&vec![b'x'; 300_000]).unwrap();
        client.write_all(b"the end").unwrap();
        drained(&mut accepted, 300_007);
    }
    let captured = capture.stop().unwrap();
    assert!(captured.is_complete(), "{} lost", captured.lost());
    assert_eq!(captured.flows().count(), 4);
    assert!(captured.contains(b"first half, ping"));
    assert!(captured.contains(b"pong"));
    assert!(captured.contains(b"xxxthe end"));
    assert!(!captured.contains(b"not sent"));
    assert_eq!(captured.handshakes(80).len(), 2);
    assert!(captured.handshakes(80).iter().all(|seen| seen.client.is_none()));

    let written = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(records(&written), captured.frames());
}

/// tcpdump gives up its groups first, which a user namespace forbids.
#[test]
fn needs_root_tcpdump_reads_the_file() {
    let network = Network::new();
    let file = std::env::temp_dir().join(format!("hauberk-{}.pcap", network.workload.inode()));
    let options = CaptureOptions { file: PcapFile::At(file.clone()), ..Default::default() };
    let capture = network.in_workload(|| PacketCapture::start(&options)).unwrap();
    let server = listen(&network.remote, families()[0].any, 80);
    let mut client = connect(&network.workload, families()[0].remote, 80).unwrap();
    assert_joined(&mut client, &mut accept(&server).0);
    let captured = capture.stop().unwrap();

    let read = Command::new("tcpdump").arg("-nr").arg(&file).output().unwrap();
    std::fs::remove_file(&file).unwrap();
    let lines = String::from_utf8(read.stdout).unwrap();
    assert!(read.status.success());
    assert_eq!(lines.lines().count() as u64, captured.frames());
    assert!(lines.contains("10.9.0.1.80: Flags [S]"));
}

/// The number of records in a pcap file, which must end with one.
fn records(file: &[u8]) -> u64 {
    assert_eq!(file[..4], 0xa1b2_c3d4_u32.to_ne_bytes());
    let mut rest = &file[24..];
    let mut count = 0;
    while !rest.is_empty() {
        let length = u32::from_ne_bytes(rest[8..12].try_into().unwrap());
        rest = &rest[16 + length as usize..];
        count += 1;
    }
    count
}

/// Reads so many bytes away.
fn drained(stream: &mut std::net::TcpStream, length: usize) -> std::net::TcpStream {
    use std::io::Read;
    stream.read_exact(&mut vec![0; length]).unwrap();
    stream.try_clone().unwrap()
}
