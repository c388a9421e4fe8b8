//! The cases lock and campaign: into a queue, to its front, and out again.
//!
//! Where several clients share a name, they also measure the *hand-over*: from the sending of what
//! ends one turn (Unlock, Resign) to the answer that begins the next one. That is the time in which
//! nobody may work, whatever the number of those who wait.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use hdrhistogram::Histogram;
use tonic::Status;

use super::cases::drive;
use super::channels::Channels;
use super::connection::Connection;
use super::cpu::CpuMeter;
use super::keys::value;
use super::leases::Leases;
use super::load::{Client, Measured};
use super::tally::Tally;
use super::{BenchError, Options};
use crate::pb::v3electionpb::election_client::ElectionClient;
use crate::pb::v3electionpb::{CampaignRequest, ResignRequest};
use crate::pb::v3lockpb::lock_client::LockClient;
use crate::pb::v3lockpb::{LockRequest, UnlockRequest};

/// The lock or election that client number `number` works on.
pub fn name(options: &Options, kind: &str, number: usize) -> Bytes {
    format!("{}/{kind}/{:06}", options.prefix, number % names(options)).into()
}

fn names(options: &Options) -> usize {
    options.names.unwrap_or(options.clients).min(options.clients) as usize
}

/// When the last turn of each name ended, and how long it took to the next one.
struct HandOvers {
    opens: Instant,
    ended: Vec<Mutex<Option<Instant>>>,
    took: Mutex<Histogram<u64>>,
}

impl HandOvers {
    /// `None` where no client waits for another.
    fn new(options: &Options) -> Option<Arc<HandOvers>> {
        let names = names(options);
        (names < options.clients as usize).then(|| {
            Arc::new(HandOvers {
                opens: Instant::now() + options.warmup,
                ended: (0..names).map(|_| Mutex::default()).collect(),
                took: Mutex::new(Tally::new().latencies),
            })
        })
    }

    /// One turn of the name ends with the request that is sent next.
    fn ends(&self, number: usize) {
        *locked(&self.ended[number % self.ended.len()]) = Some(Instant::now());
    }

    /// A turn of the name has begun with the answer that came last.
    fn begins(&self, number: usize) {
        let ended = locked(&self.ended[number % self.ended.len()]).take();
        if let Some(ended) = ended.filter(|ended| *ended >= self.opens) {
            let took = u64::try_from(ended.elapsed().as_micros()).unwrap_or(u64::MAX);
            locked(&self.took).saturating_record(took);
        }
    }

    fn note(&self, measured: &mut Measured) {
        let took = locked(&self.took);
        let ms = |quantile| took.value_at_quantile(quantile) as f64 / 1_000.0;
        measured.notes.insert("hand_over_p50_ms", ms(0.5));
        measured.notes.insert("hand_over_p99_ms", ms(0.99));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Lock {
    number: usize,
    locks: LockClient<Connection>,
    request: LockRequest,
    hand_overs: Option<Arc<HandOvers>>,
}

impl Client for Lock {
    async fn operate(&mut self) -> Result<(), Status> {
        let key = self.locks.lock(self.request.clone()).await?.into_inner().key;
        if let Some(hand_overs) = &self.hand_overs {
            hand_overs.begins(self.number);
            hand_overs.ends(self.number);
        }
        self.locks.unlock(UnlockRequest { key }).await?;
        Ok(())
    }
}

pub async fn lock(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let leases = Leases::grant(channels, options.clients as usize).await?;
    let hand_overs = HandOvers::new(options);
    let mut measured = drive(options, meter, |number| Lock {
        number,
        locks: LockClient::new(channels.of(number)),
        request: LockRequest { name: name(options, "lock", number), lease: leases.of(number) },
        hand_overs: hand_overs.clone(),
    })
    .await?;
    if let Some(hand_overs) = hand_overs {
        hand_overs.note(&mut measured);
    }
    measured.tally.errors.merge(&leases.revoke(channels).await);
    Ok(measured)
}

struct Campaign {
    number: usize,
    elections: ElectionClient<Connection>,
    request: CampaignRequest,
    hand_overs: Option<Arc<HandOvers>>,
}

impl Client for Campaign {
    async fn operate(&mut self) -> Result<(), Status> {
        let answer = self.elections.campaign(self.request.clone()).await?.into_inner();
        if let Some(hand_overs) = &self.hand_overs {
            hand_overs.begins(self.number);
            hand_overs.ends(self.number);
        }
        self.elections.resign(ResignRequest { leader: answer.leader }).await?;
        Ok(())
    }
}

pub async fn campaign(
    options: &Options,
    channels: &Channels,
    meter: &CpuMeter,
) -> Result<Measured, BenchError> {
    let leases = Leases::grant(channels, options.clients as usize).await?;
    let value = value(options);
    let hand_overs = HandOvers::new(options);
    let mut measured = drive(options, meter, |number| Campaign {
        number,
        elections: ElectionClient::new(channels.of(number)),
        request: CampaignRequest {
            name: name(options, "election", number),
            lease: leases.of(number),
            value: value.clone(),
        },
        hand_overs: hand_overs.clone(),
    })
    .await?;
    if let Some(hand_overs) = hand_overs {
        hand_overs.note(&mut measured);
    }
    measured.tally.errors.merge(&leases.revoke(channels).await);
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_hand_over_is_from_the_end_of_a_turn_to_the_beginning_of_the_next_of_that_name() {
        let hand_overs = HandOvers {
            opens: Instant::now(),
            ended: (0..2).map(|_| Mutex::default()).collect(),
            took: Mutex::new(Tally::new().latencies),
        };
        hand_overs.begins(0);
        assert_eq!(locked(&hand_overs.took).len(), 0, "the first turn follows nobody's");
        *locked(&hand_overs.ended[0]) = Some(Instant::now());
        hand_overs.begins(1);
        assert_eq!(locked(&hand_overs.took).len(), 0, "it is another name");
        hand_overs.begins(2);
        assert_eq!(locked(&hand_overs.took).len(), 1);
        *locked(&hand_overs.ended[0]) = hand_overs.opens.checked_sub(Duration::from_secs(1));
        hand_overs.begins(0);
        assert_eq!(locked(&hand_overs.took).len(), 1, "that was before the window");
    }
}
