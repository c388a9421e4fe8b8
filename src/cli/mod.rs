//! The subcommands of the binary. Without one, the binary is a member of a cluster.
//!
//! Most are clients: they speak the public API over the network, as any other client does, and use
//! nothing of the server in this process. `snapshot`, `restore` and `import` work on files alone.

mod bench;
mod health;
mod lock;
mod locks;
mod restore;
mod session;
mod snapshot;
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
    /// See what a snapshot file holds, and whether it is whole
    Snapshot(snapshot::Options),
    /// Make a member of a new cluster from a snapshot file
    Restore(restore::RestoreOptions),
    /// Make a member of a new cluster from a file of etcd: a snapshot, or a member's db
    Import(restore::ImportOptions),
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
        Command::Snapshot(options) => snapshot::run(&options),
        Command::Restore(options) => restore::restore(options),
        Command::Import(options) => restore::import(options),
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
