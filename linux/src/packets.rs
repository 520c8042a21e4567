//! A small packet capture, to see for oneself what crosses the wire.
//!
//! [`PacketCapture`] records the calling thread's namespace into a pcap file and keeps the TCP
//! payload in memory, where [`Captured`] can be asked whether a text crossed in the clear and
//! what the TLS handshakes agreed on. It reads only; it needs `CAP_NET_RAW`.

mod flows;
mod frame;
pub mod tls;

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    net::SocketAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{LinkAddr, recvfrom, setsockopt, sockopt::RcvBufForce},
};
use socket2::{Domain, Protocol, Socket, Type};

pub use flows::{Flow, Handshake};

use crate::{
    error::{Context, Error, Result},
    links, sys,
};
use flows::Flows;

/// Loopback hands over segments of up to 64 KiB and their headers in one piece.
const LARGEST_FRAME: usize = 128 * 1024;

/// How long a quiet capture takes to notice that it is to stop.
const POLL: Duration = Duration::from_millis(50);

/// Asked of the kernel for bursts; without privileges over the whole machine it grants what `net.core.rmem_max` allows.
const RECEIVE_BUFFER: usize = 16 * 1024 * 1024;

/// What to capture.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// Which interfaces.
    pub interface: Interface,
    /// Where the frames are written as they are.
    pub file: PcapFile,
    /// How many bytes of TCP payload are kept in memory, over all flows. What comes later is
    /// still written to the file, but [`Captured::is_complete`] is false then.
    pub payload_limit: usize,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        Self { interface: Interface::All, file: PcapFile::None, payload_limit: 64 * 1024 * 1024 }
    }
}

/// The interfaces of a capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Interface {
    /// All of the namespace, loopback included. What crosses a bridge is seen more than once.
    All,
    /// One, by name.
    Named(String),
}

/// The file of a capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PcapFile {
    /// None: memory only.
    None,
    /// A file that is made anew.
    At(PathBuf),
}

/// A capture that is under way. Dropped without [`PacketCapture::stop`], it ends by itself.
#[derive(Debug)]
pub struct PacketCapture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Captured>>>,
}

impl PacketCapture {
    /// Starts to capture in the calling thread's namespace: what is sent after this returns is
    /// seen.
    pub fn start(options: &CaptureOptions) -> Result<Self> {
        let index = match &options.interface {
            Interface::All => None,
            Interface::Named(name) => Some(links::if_index(name)?),
        };
        let socket = packet_socket().context("opening a packet socket")?;
        let file = match &options.file {
            PcapFile::None => None,
            PcapFile::At(path) => Some(Pcap::create(path)?),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let recorder = Recorder {
            socket,
            index,
            file,
            stop: Arc::clone(&stop),
            flows: Flows::new(options.payload_limit),
            frames: 0,
        };
        let thread = thread::Builder::new()
            .name("packets".to_owned())
            .spawn(move || recorder.run())
            .context("starting the packet capture thread")?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Reads what is still waiting, ends the capture and hands over what was seen.
    pub fn stop(mut self) -> Result<Captured> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) | None => Err(Error::TaskPanicked { name: "packets".to_owned() }),
        }
    }
}

impl Drop for PacketCapture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What a capture saw.
#[derive(Clone, Debug)]
pub struct Captured {
    flows: Flows,
    frames: u64,
    lost: u32,
}

impl Captured {
    /// Whether `needle` is in the payload of any flow, in either direction, also across packets.
    ///
    /// A "no" means something only if [`Captured::is_complete`].
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.flows.iter().any(|flow| flow.contains(needle))
    }

    /// Whether everything was seen and kept: no frame was lost, and the payload limit held.
    pub fn is_complete(&self) -> bool {
        self.lost == 0 && !self.flows.is_truncated()
    }

    /// The number of frames recorded.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// The number of frames the kernel dropped because the capture was too slow.
    pub fn lost(&self) -> u32 {
        self.lost
    }

    /// The one-directional flows, ordered by their addresses.
    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.flows.iter()
    }

    /// The TLS handshakes of connections to `port`, whoever serves it.
    pub fn handshakes(&self, port: u16) -> Vec<Handshake> {
        self.flows.handshakes(port)
    }
}

struct Recorder {
    socket: Socket,
    index: Option<u32>,
    file: Option<Pcap>,
    stop: Arc<AtomicBool>,
    flows: Flows,
    frames: u64,
}

impl Recorder {
    fn run(mut self) -> Result<Captured> {
        let mut buffer = vec![0; LARGEST_FRAME];
        loop {
            // Read before the frame: a stop asked for while waiting still drains what came.
            let stopping = self.stop.load(Ordering::Relaxed);
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((length, from)) => {
                    let index = from.map(|address| address.ifindex());
                    let frame = buffer.get(..length).unwrap_or(&buffer);
                    self.record(frame, index)?;
                }
                Err(Errno::EAGAIN) if stopping => break,
                Err(Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN) => {}
                Err(error) => return Err(error).context("reading packets"),
            }
        }
        if let Some(file) = &mut self.file {
            file.finish()?;
        }
        Ok(Captured {
            lost: sys::packet_drops(&self.socket).context("reading the packet statistics")?,
            flows: self.flows,
            frames: self.frames,
        })
    }

    fn record(&mut self, frame: &[u8], index: Option<usize>) -> Result<()> {
        let wanted = self.index.and_then(|wanted| usize::try_from(wanted).ok());
        if wanted.is_some() && wanted != index {
            return Ok(());
        }
        self.frames += 1;
        if let Some(segment) = frame::tcp_segment(frame) {
            self.flows.add(&segment);
        }
        match &mut self.file {
            Some(file) => file.write(frame),
            None => Ok(()),
        }
    }
}

fn packet_socket() -> io::Result<Socket> {
    let every_protocol = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?;
    let protocol = Protocol::from(i32::from(every_protocol.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
    socket.set_read_timeout(Some(POLL))?;
    if setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER).is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    }
    Ok(socket)
}

/// A pcap file of the classic format, version 2.4, which every tool reads.
struct Pcap {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Pcap {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).context(format!("creating {}", path.display()))?;
        let mut pcap = Self { path: path.to_owned(), file: BufWriter::new(file) };
        pcap.put(&pcap_header())?;
        Ok(pcap)
    }

    fn write(&mut self, frame: &[u8]) -> Result<()> {
        // Seconds wrap in 2106, as the format has it.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let fields = [seconds, now.subsec_micros(), length, length];
        self.put(&fields.map(u32::to_ne_bytes).concat())?;
        self.put(frame)
    }

    fn finish(&mut self) -> Result<()> {
        let written = self.file.flush();
        written.context(format!("writing {}", self.path.display()))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all(bytes);
        written.context(format!("writing {}", self.path.display()))
    }
}

fn pcap_header() -> [u8; 24] {
    const MAGIC: u32 = 0xa1b2_c3d4;
    const VERSION: [u16; 2] = [2, 4];
    const SNAPSHOT_LENGTH: u32 = 256 * 1024;
    const ETHERNET: u32 = 1;
    let mut header = [0; 24];
    header[0..4].copy_from_slice(&MAGIC.to_ne_bytes());
    header[4..8].copy_from_slice(VERSION.map(u16::to_ne_bytes).as_flattened());
    // Bytes 8 to 16 are the time zone and accuracy, which are always zero.
    header[16..20].copy_from_slice(&SNAPSHOT_LENGTH.to_ne_bytes());
    header[20..24].copy_from_slice(&ETHERNET.to_ne_bytes());
    header
}

/// A connection's two ends, as a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ends {
    /// Who sends.
    pub source: SocketAddr,
    /// Who receives.
    pub destination: SocketAddr,
}
