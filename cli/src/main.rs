//! The `hauberk` command.

fn main() -> std::process::ExitCode {
    hauberk_cli::main(std::env::args_os())
}
