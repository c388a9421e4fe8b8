//! The `holdfast` program: a member of a cluster, or one of the client commands.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use holdfast::clock::SystemClock;
use holdfast::config::{Config, ENVIRONMENT_HELP, ServerArgs, one_line};
use holdfast::{cli, server, telemetry};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Locks, leader election and replicated configuration for etcd clients.
///
/// Without a command, runs a member of a cluster; without any flag, a cluster of one on
/// 127.0.0.1:2379.
#[derive(Parser)]
#[command(
    name = "holdfast",
    version,
    args_conflicts_with_subcommands = true,
    after_help = ENVIRONMENT_HELP
)]
struct Arguments {
    #[command(flatten)]
    server: ServerArgs,
    #[command(subcommand)]
    command: Option<cli::Command>,
}

/// `mi_option_purge_delay` of mimalloc 3: the binding names only a few options.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// How long the allocator keeps memory that nobody uses.
const KEPT: Duration = Duration::from_secs(30);

/// Lets the allocator keep freed memory for a while before it returns it.
///
/// Returning it at once, in pieces, takes the kernel's large pages apart, and every piece that is
/// needed again is zeroed first: docs/decisions/0009.
fn keep_memory() {
    let milliseconds = KEPT.as_millis().try_into().expect("it is some seconds");
    // SAFETY: sets one of the allocator's numbers; allowed at any time, from any thread.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, milliseconds) }
}

/// The allocator returns memory when it is called; a member that does little may not call it.
// No outcome depends on this thread's pace.
#[allow(clippy::disallowed_methods)]
fn return_memory() {
    let collect = || loop {
        std::thread::sleep(KEPT);
        // SAFETY: allowed at any time, from any thread.
        unsafe { libmimalloc_sys::mi_collect(false) }
    };
    let started = std::thread::Builder::new().name("memory".to_owned()).spawn(collect);
    if let Err(error) = started {
        tracing::warn!(%error, "unused memory is returned late");
    }
}

fn main() -> ExitCode {
    keep_memory();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => return refuse(one_line(&error)),
    };
    if let Some(command) = arguments.command {
        return cli::run(command);
    }
    match arguments.server.check() {
        Ok(config) => serve(config),
        Err(error) => refuse(error),
    }
}

fn refuse(reason: impl std::fmt::Display) -> ExitCode {
    eprintln!("holdfast: {reason}");
    ExitCode::from(2)
}

fn serve(config: Config) -> ExitCode {
    if let Err(error) =
        telemetry::init(config.log_level, config.log_format, Arc::new(SystemClock::new()))
    {
        return refuse(error);
    }
    tracing::info!(
        data_dir = %config.data_dir.display(),
        name = %config.name,
        version = env!("CARGO_PKG_VERSION"),
        "starting, with the data in this folder"
    );
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    return_memory();
    let runtime = if config.worker_threads == 1 {
        tokio::runtime::Builder::new_current_thread().enable_all().build()
    } else {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(config.worker_threads)
            .enable_all()
            .build()
    };
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return refuse(error),
    };
    match runtime.block_on(server::run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            refuse(error)
        }
    }
}
