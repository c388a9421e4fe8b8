//! Other clients beside a test: one that asks for little, and many calls at once.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, JoinSet};
use tonic::Status;

use crate::check::{report, spread, within};
use crate::process::Cluster;
use crate::wire::Wire;

/// Calls at the same time while a test fills the store.
const AT_ONCE: usize = 64;

/// Nobody who asks for little waits longer than this, whatever others do.
pub const SERVED: Duration = Duration::from_secs(10);

/// A number that the environment may set.
///
/// # Panics
///
/// If it is set to something else.
pub fn size(name: &str, default: usize) -> usize {
    match std::env::var(name) {
        Ok(number) => number.parse().unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) => default,
    }
}

/// A client with small wishes beside whatever a test does: how long do its puts take?
#[derive(Debug)]
pub struct Others {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Vec<Duration>>,
}

impl Others {
    /// Puts all the time, until [`Others::finish`].
    pub async fn start(cluster: &Cluster, member: usize) -> Others {
        let wire = Wire::connect(&cluster.endpoint(member)).await;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut times = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                let put = wire.put("others", "v");
                within(SERVED, "a put of another client", put).await.expect("a put");
                times.push(began.elapsed());
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            times
        });
        Others { stop, task }
    }

    /// Tells how long the puts took.
    ///
    /// # Panics
    ///
    /// If one failed or was not answered within [`SERVED`].
    pub async fn finish(self, during: &str) {
        self.stop.store(true, Ordering::Relaxed);
        let times = self.task.await.expect("every put was answered in time");
        report(&format!("{during}: puts of another client {}", spread(&times)));
    }
}

/// Makes a call for each number, [`AT_ONCE`] at a time over a few connections.
///
/// # Panics
///
/// If one fails.
pub async fn many<F>(
    cluster: &Cluster,
    member: usize,
    numbers: Range<usize>,
    call: fn(Wire, usize) -> F,
) where
    F: Future<Output = Result<(), Status>> + Send + 'static,
{
    let next = Arc::new(AtomicUsize::new(numbers.start));
    let mut callers = JoinSet::new();
    for _ in 0..4 {
        let wire = Wire::connect(&cluster.endpoint(member)).await;
        for _ in 0..AT_ONCE / 4 {
            let (wire, next) = (wire.clone(), next.clone());
            callers.spawn(async move {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= numbers.end {
                        return;
                    }
                    call(wire.clone(), n).await.expect("the call succeeds");
                }
            });
        }
    }
    callers.join_all().await;
}
