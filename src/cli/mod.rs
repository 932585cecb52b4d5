//! The `planish` command line: one client verb for every RPC, `serve` and `quickstart`.

/// Runs the command line.
pub fn main() -> std::process::ExitCode {
    todo!()
}
