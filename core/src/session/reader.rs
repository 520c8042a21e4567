//! Takes frames apart. Gathers control frames; runs of data pass through as they come.

use super::{FrameError, FrameType, Header};

/// For frames with a header of `N` bytes.
#[derive(Debug)]
pub(super) struct Reader<const N: usize> {
    header: [u8; N],
    header_read: usize,
    state: InFrame,
}

#[derive(Debug)]
enum InFrame {
    Header,
    /// This much of a data frame is still to come.
    Data {
        stream: u32,
        left: usize,
    },
    Control(Box<Gathering>),
}

#[derive(Debug)]
struct Gathering {
    header: Header,
    body: Vec<u8>,
}

/// What came next.
pub(super) enum Part<'a> {
    /// The beginning of something.
    Nothing,
    /// A frame begins whose body is still to come.
    Begin(Header),
    /// Bytes of this stream.
    Data(u32, &'a [u8]),
    /// A whole frame.
    Frame(Header, Vec<u8>),
}

/// How a header of so many bytes is read.
pub(super) trait ReadHeader {
    fn read_header(&self) -> Result<Header, FrameError>;
}

impl<const N: usize> Reader<N>
where
    [u8; N]: ReadHeader,
{
    pub(super) fn new() -> Self {
        Self { header: [0; N], header_read: 0, state: InFrame::Header }
    }

    pub(super) fn is_between_frames(&self) -> bool {
        self.header_read == 0 && matches!(self.state, InFrame::Header)
    }

    /// How many of the bytes are used up, and what they are.
    pub(super) fn read<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Part<'a>), FrameError> {
        match &mut self.state {
            InFrame::Header => {
                // Never a whole header: that is taken at once.
                let missing = &mut self.header[self.header_read..];
                let count = missing.len().min(input.len());
                missing[..count].copy_from_slice(&input[..count]);
                self.header_read += count;
                if self.header_read < N {
                    return Ok((count, Part::Nothing));
                }
                self.header_read = 0;
                let header = self.header.read_header()?;
                Ok((count, self.begin(header)))
            }
            InFrame::Data { stream, left } => {
                let stream = *stream;
                let count = input.len().min(*left);
                *left -= count;
                if *left == 0 {
                    self.state = InFrame::Header;
                }
                Ok((count, Part::Data(stream, &input[..count])))
            }
            InFrame::Control(gathering) => {
                let Gathering { header, body } = gathering.as_mut();
                let count = input.len().min(header.length - body.len());
                body.extend_from_slice(&input[..count]);
                if body.len() < header.length {
                    return Ok((count, Part::Nothing));
                }
                let part = Part::Frame(*header, std::mem::take(body));
                self.state = InFrame::Header;
                Ok((count, part))
            }
        }
    }

    fn begin(&mut self, header: Header) -> Part<'static> {
        if header.length == 0 {
            return Part::Frame(header, Vec::new());
        }
        self.state = match header.frame_type {
            FrameType::Data => InFrame::Data { stream: header.stream, left: header.length },
            FrameType::Open
            | FrameType::Accept
            | FrameType::Refuse
            | FrameType::Fin
            | FrameType::Reset
            | FrameType::Reauthenticate
            | FrameType::GoingAway
            | FrameType::Continue
            | FrameType::Credit
            | FrameType::Bulk
            | FrameType::Moved => {
                // Grows with what really comes, not with what the header says.
                InFrame::Control(Box::new(Gathering { header, body: Vec::new() }))
            }
        };
        Part::Begin(header)
    }
}
