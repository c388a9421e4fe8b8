//! Waiting with a deadline, and reading errors.
//!
//! A test awaits the event itself. Where there is none to await, [`eventually`] asks again and again.
//! Either way a deadline turns a hang into a failure that says what was waited for.

use std::fmt::Debug;
use std::time::{Duration, Instant};

pub use tonic::Code;

/// Enough for anything that should happen "now", on a machine busy with other tests.
pub const SOON: Duration = Duration::from_secs(10);

/// Enough for an election and whatever follows from it.
pub const AFTER_ELECTION: Duration = Duration::from_secs(20);

/// How often [`eventually`] asks.
const POLL: Duration = Duration::from_millis(20);

/// The outcome of `future`, which must come within `limit`.
///
/// # Panics
///
/// If it does not come in time; `what` says what was waited for.
pub async fn within<F: Future>(limit: Duration, what: &str, future: F) -> F::Output {
    match tokio::time::timeout(limit, future).await {
        Ok(output) => output,
        Err(_) => panic!("not within {limit:?}: {what}"),
    }
}

/// The first `Some` that `attempt` gives, asking until `limit` has passed.
///
/// An attempt may itself take time; one that hangs is cut off at the limit.
///
/// # Panics
///
/// If there is none in time; `what` says what was waited for.
pub async fn eventually<T, F>(limit: Duration, what: &str, mut attempt: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    within(limit, what, async {
        loop {
            if let Some(value) = attempt().await {
                return value;
            }
            tokio::time::sleep(POLL).await;
        }
    })
    .await
}

/// As [`eventually`], for a test that is not asynchronous.
pub fn eventually_now<T>(limit: Duration, what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(POLL);
    }
}

/// Nothing comes out of `future` for `time`: how a test shows that something waits.
///
/// # Panics
///
/// If something comes.
pub async fn silent<F: Future>(time: Duration, what: &str, future: F)
where
    F::Output: Debug,
{
    if let Ok(output) = tokio::time::timeout(time, future).await {
        panic!("expected nothing, {what}: {output:?}");
    }
}

/// The gRPC code and message of a failed call.
///
/// # Panics
///
/// If the call succeeded, or failed without a status.
pub fn status_of<T: Debug>(result: Result<T, etcd_client::Error>) -> (Code, String) {
    match result {
        Err(etcd_client::Error::GRpcStatus(status)) => (status.code(), status.message().to_owned()),
        Err(other) => panic!("expected a gRPC status, got {other:?}"),
        Ok(answer) => panic!("expected a failure, got {answer:?}"),
    }
}

/// Asserts that a call failed with exactly this code and text.
#[track_caller]
pub fn refused<T: Debug>(result: Result<T, etcd_client::Error>, code: Code, message: &str) {
    assert_eq!(status_of(result), (code, message.to_owned()));
}

/// The smallest, middle and largest of some durations, as text.
///
/// # Panics
///
/// If there are none.
pub fn spread(times: &[Duration]) -> String {
    let mut times = times.to_vec();
    times.sort_unstable();
    let middle = times[times.len() / 2];
    format!(
        "min {:.0} ms, median {:.0} ms, max {:.0} ms, of {}",
        times[0].as_secs_f64() * 1e3,
        middle.as_secs_f64() * 1e3,
        times[times.len() - 1].as_secs_f64() * 1e3,
        times.len()
    )
}

/// Says something on standard error even when the test passes: measurements, seeds.
pub fn report(text: &str) {
    use std::io::Write;
    // Printing through the macros would be kept back; failing to print is no reason to fail.
    let _ = writeln!(std::io::stderr().lock(), "    {text}");
}
