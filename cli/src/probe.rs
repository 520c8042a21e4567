//! `hauberk probe`.

use std::process::ExitCode;

use anyhow::Context;

use crate::{ProbeArgs, say::say};

/// There is nothing to know the control plane by.
const EXIT_NO_ROOTS: u8 = 2;

pub(crate) fn run(args: &ProbeArgs) -> anyhow::Result<ExitCode> {
    if let Err(error) = std::fs::metadata(&args.trust_bundle) {
        eprintln!("error: read the roots in {}: {error}", args.trust_bundle.display());
        return Ok(ExitCode::from(EXIT_NO_ROOTS));
    }
    let probing =
        hauberk_agent::probe::control_plane(&args.control_plane, &args.trust_bundle, args.timeout);
    let probed = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(probing);
    if let Err(error) = probed {
        eprintln!("error: the control plane at {}: {error:#}", args.control_plane);
        return Ok(ExitCode::FAILURE);
    }
    say!("the control plane at {} answers, and its certificate is one of ours", args.control_plane);
    Ok(ExitCode::SUCCESS)
}
