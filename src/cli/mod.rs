//! The subcommands of the binary. Without one, the binary is a member of a cluster.
//!
//! Each subcommand is a client: it speaks the public API over the network, as any other client
//! does, and uses nothing of the server in this process.

mod bench;
mod health;
mod lock;
mod locks;
mod session;
mod supervise;

use std::process::ExitCode;

use clap::Subcommand;

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure any etcd v3 endpoints under load
    Bench(bench::Options),
    /// Ask members whether they can answer
    Health(health::Options),
    /// Run a command while holding a lock
    Lock(lock::LockOptions),
    /// Run a command while leading an election
    Elect(lock::ElectOptions),
    /// See who holds locks and who waits for them, or take one away
    Locks(locks::Options),
}

/// Runs `command` to its end on a runtime of its own; the result is the exit code of the process.
///
/// Must not be called from within an async runtime.
pub fn run(command: Command) -> ExitCode {
    match command {
        Command::Bench(options) => bench::run(&options),
        Command::Health(options) => alone(health::run(options)),
        Command::Lock(options) => alone(lock::lock(options)),
        Command::Elect(options) => alone(lock::elect(options)),
        Command::Locks(options) => alone(locks::run(options)),
    }
}

/// One thread is enough for a client that mostly waits.
fn alone(command: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(command),
        Err(error) => {
            eprintln!("holdfast: {error}");
            ExitCode::FAILURE
        }
    }
}
