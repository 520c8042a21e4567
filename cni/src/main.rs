//! The plugin as a program: started by the container runtime for each pod.

use std::process::ExitCode;

fn main() -> ExitCode {
    let environment = |name: &str| std::env::var(name).ok();
    match hauberk_cni::run(environment, std::io::stdin(), std::io::stdout()) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
