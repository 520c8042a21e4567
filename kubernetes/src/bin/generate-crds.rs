//! Writes the custom resource definitions anew, as templates of `charts/hauberk-crds`:
//! `cargo run -p hauberk-kubernetes --bin generate-crds`.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let charts = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/hauberk-crds/templates");
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from(charts), PathBuf::from);
    for (name, text) in hauberk_kubernetes::crd::templates() {
        std::fs::write(folder.join(name), text)?;
    }
    Ok(())
}
