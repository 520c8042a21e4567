//! What decodes encodes back to the same bytes; no length is over its type's limit.
#![no_main]

use hauberk_core::session::{FrameType, Header, MAX_CONTROL, Open, Reauthenticate, Refusal};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some((header, body)) = bytes.split_first_chunk()
        && let Ok(header) = Header::decode(*header)
    {
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
            FrameType::Accept
            | FrameType::Data
            | FrameType::Fin
            | FrameType::Reset
            | FrameType::GoingAway => {}
        }
    }
});
