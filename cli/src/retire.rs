//! `hauberk retire`.

use std::process::ExitCode;

use anyhow::Context;

use crate::{RetireArgs, say::say};

pub(crate) fn run(args: &RetireArgs) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(async {
            let client = hauberk_kubernetes::client().await.context("find the Kubernetes API")?;
            hauberk_kubernetes::retire(&client, &args.namespace, args.timeout, |progress| {
                eprintln!("{progress}");
            })
            .await?;
            say!("every agent removes its rules and the CNI plugin when it stops");
            Ok(ExitCode::SUCCESS)
        })
}
