//! Writes `src/gen` anew from `proto/`: `cargo run -p hauberk-proto-generate`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

fn main() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let out = std::env::args_os().nth(1).map_or_else(|| root.join("src/gen"), Into::into);
    let files = ["enrollment", "state", "operator"]
        .map(|name| format!("hauberk/v1/{name}.proto"))
        .into_iter()
        .chain(["cri/runtime.proto".to_owned()]);
    let descriptors = protox::compile(files, [root.join("proto")]).expect("the protos compile");
    tonic_prost_build::configure()
        .out_dir(out)
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)
        .expect("the code is written");
}
