//! The closed loop: every client begins its next operation when it has the answer to the last.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tonic::Status;

use super::BenchError;
use super::cpu::{CpuMeter, CpuTime};
use super::tally::{Tally, Window};

/// How long a client rests after an error, so that a server that refuses at once is not flooded.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(10);

/// How long a run takes, and what an operation may take.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub warmup: Duration,
    /// How long to measure, unless there is a `total`.
    pub duration: Duration,
    pub total: Option<u64>,
    /// After this an operation is given up and counts as an error.
    pub timeout: Duration,
    /// Tallies that are kept apart, so that threads do not wait for each other.
    pub shards: usize,
}

impl Plan {
    pub fn window(&self) -> Window {
        Window::new(self.warmup, self.duration, self.total)
    }
}

/// One client of the closed loop.
pub trait Client: Send + 'static {
    /// One operation, from the first request to the last answer. It is never repeated.
    fn operate(&mut self) -> impl Future<Output = Result<(), Status>> + Send;
}

/// What a run gave.
#[derive(Debug)]
pub struct Measured {
    pub tally: Tally,
    /// How long the window was open.
    pub open: Duration,
    /// CPU time used while the window was open.
    pub cpu: CpuTime,
    /// Further numbers of the case, for the report.
    pub notes: BTreeMap<&'static str, f64>,
}

/// Runs `clients` from now until `window` closes and the operations then under way have ended.
///
/// # Errors
///
/// Only if a CPU time cannot be read: a failed operation is part of what was measured.
pub async fn closed_loop<C: Client>(
    clients: Vec<C>,
    plan: &Plan,
    window: Arc<Window>,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let tallies: Vec<_> = (0..plan.shards).map(|_| Arc::new(Mutex::new(Tally::new()))).collect();
    let mut running = JoinSet::new();
    for (number, client) in clients.into_iter().enumerate() {
        let tally = Arc::clone(&tallies[number % tallies.len()]);
        running.spawn(drive(client, plan.timeout, Arc::clone(&window), tally));
    }

    tokio::time::sleep_until(window.opens.into()).await;
    let before = meter.read()?;
    let after = match window.closes() {
        Some(closes) => {
            tokio::time::sleep_until(closes.into()).await;
            let after = meter.read()?;
            join(&mut running).await;
            after
        }
        None => {
            join(&mut running).await;
            meter.read()?
        }
    };

    let mut tally = Tally::new();
    for shard in &tallies {
        tally.merge(&shard.lock().unwrap_or_else(PoisonError::into_inner));
    }
    let closed = window.closes().or(tally.last).unwrap_or(window.opens);
    let open = closed.saturating_duration_since(window.opens);
    Ok(Measured { tally, open, cpu: after.since(before), notes: BTreeMap::new() })
}

async fn join(running: &mut JoinSet<()>) {
    while let Some(ended) = running.join_next().await {
        ended.expect("a client neither panics nor is aborted");
    }
}

async fn drive<C: Client>(
    mut client: C,
    timeout: Duration,
    window: Arc<Window>,
    tally: Arc<Mutex<Tally>>,
) {
    let mut began = Instant::now();
    while window.admits(began) {
        let result = tokio::time::timeout(timeout, client.operate())
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("given up by the generator")));
        let ended = Instant::now();
        tally.lock().unwrap_or_else(PoisonError::into_inner).record(
            &window,
            began,
            ended,
            result.as_ref().copied(),
        );
        began = ended;
        if result.is_err() {
            tokio::time::sleep(PAUSE_AFTER_ERROR).await;
            began = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Fails every third time.
    struct Flaky {
        calls: Arc<AtomicU64>,
    }

    impl Client for Flaky {
        async fn operate(&mut self) -> Result<(), Status> {
            match self.calls.fetch_add(1, Ordering::Relaxed) % 3 {
                2 => Err(Status::unavailable("no leader")),
                _ => Ok(()),
            }
        }
    }

    /// Never answers.
    struct Silent;

    impl Client for Silent {
        async fn operate(&mut self) -> Result<(), Status> {
            std::future::pending().await
        }
    }

    fn plan(total: u64) -> Plan {
        Plan {
            warmup: Duration::ZERO,
            duration: Duration::ZERO,
            total: Some(total),
            timeout: Duration::from_millis(20),
            shards: 1,
        }
    }

    async fn run<C: Client>(clients: Vec<C>, total: u64) -> Measured {
        let plan = plan(total);
        let meter = CpuMeter::new(&[]).unwrap();
        closed_loop(clients, &plan, Arc::new(plan.window()), &meter).await.unwrap()
    }

    #[tokio::test]
    async fn an_error_is_counted_and_not_retried() {
        let calls = Arc::new(AtomicU64::new(0));
        let clients = (0..2).map(|_| Flaky { calls: Arc::clone(&calls) }).collect();
        let measured = run(clients, 30).await;
        assert_eq!(calls.load(Ordering::Relaxed), 30);
        assert_eq!(measured.tally.operations, 20);
        assert_eq!(measured.tally.errors.kinds["Unavailable: no leader"], 10);
    }

    #[tokio::test]
    async fn an_operation_without_an_answer_is_given_up() {
        let measured = run(vec![Silent], 1).await;
        assert_eq!(measured.tally.operations, 0);
        assert_eq!(measured.tally.errors.total(), 1);
    }
}
