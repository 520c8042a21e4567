//! What decodes encodes back to the same bytes; no length is over its type's limit.
#![no_main]

use hauberk_core::session::{
    Continue, FrameType, Header, MAX_CONTROL, Open, Reauthenticate, Refusal,
};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some((header, body)) = bytes.split_first_chunk()
        && let Ok(header) = Header::decode(*header)
    {
        assert_eq!(header.stream, 0, "of a dedicated session");
        check(header, body);
    }
    if let Some((header, body)) = bytes.split_first_chunk()
        && let Ok(read) = Header::decode_numbered(*header)
    {
        let Header { frame_type, stream, length } = read;
        assert_eq!(Header::encode_numbered(frame_type, stream, length).as_ref(), Ok(header));
        check(read, body);
    }
});

fn check(header: Header, body: &[u8]) {
    assert!(header.frame_type == FrameType::Data || header.length <= MAX_CONTROL);
    match header.frame_type {
        FrameType::Open => {
            if let Ok(open) = Open::decode(body) {
                assert_eq!(open.encode(), body);
            }
        }
        FrameType::Refuse => {
            if let Ok(refusal) = Refusal::decode(body) {
                assert_eq!(refusal.encode(), body);
            }
        }
        FrameType::Reauthenticate => {
            if let Ok(proof) = Reauthenticate::decode(body) {
                assert_eq!(proof.encode(), body);
            }
        }
        FrameType::Continue => {
            if let Ok(stream) = Continue::decode(body) {
                assert_eq!(stream.encode().as_slice(), body);
            }
        }
        FrameType::Accept
        | FrameType::Data
        | FrameType::Fin
        | FrameType::Reset
        | FrameType::GoingAway
        | FrameType::Credit
        | FrameType::Bulk
        | FrameType::Moved => {}
    }
}
