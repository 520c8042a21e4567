//! Makes a `docker-archive` of a Containerfile, without any program for containers:
//! `image-archive CONTAINERFILE CONTEXT NAME:TAG FILE`. For charts/image/build.

use std::{fs, path::Path, process::ExitCode};

use anyhow::{Context, bail};
use hauberk_kubernetes_tests::Image;

fn main() -> ExitCode {
    match make() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn make() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [containerfile, context, name, file] = arguments.as_slice() else {
        bail!("image-archive CONTAINERFILE CONTEXT NAME:TAG FILE");
    };
    let image = Image::from_containerfile(name, Path::new(containerfile), Path::new(context))?;
    let folder = tempfile::tempdir()?;
    let archive = image.archive(folder.path())?;
    fs::copy(&archive, file).with_context(|| format!("write {file}"))?;
    Ok(())
}
