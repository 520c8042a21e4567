//! The checked-in code is what the protos say.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{fs, path::Path, process::Command};

#[test]
fn the_generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = std::env::temp_dir().join(format!("hauberk-proto-{}", std::process::id()));
    fs::create_dir_all(&out).unwrap();
    let status = Command::new(env!("CARGO"))
        .args(["run", "-q", "-p", "hauberk-proto-generate", "--"])
        .arg(&out)
        .current_dir(root)
        .status()
        .unwrap();
    assert!(status.success());
    let fresh = fs::read_to_string(out.join("hauberk.v1.rs")).unwrap();
    fs::remove_dir_all(&out).unwrap();
    let checked_in = fs::read_to_string(root.join("src/gen/hauberk.v1.rs")).unwrap();
    assert!(fresh == checked_in, "run `cargo run -p hauberk-proto-generate`");
}
