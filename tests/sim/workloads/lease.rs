//! Leases with a key each, renewed for a while and then left to end, or renewed at the last moment.

use std::time::Duration;

use futures::stream;
use holdfast::pb::etcdserverpb::kv_client::KvClient;
use holdfast::pb::etcdserverpb::lease_client::LeaseClient;
use holdfast::pb::etcdserverpb::{LeaseGrantRequest, LeaseKeepAliveRequest};
use rand::Rng;
use tonic::Status;

use super::kv::put_request;
use crate::client::{Client, now};
use crate::record::{Answered, Asked};

const BRINK_TTL_SECONDS: i64 = 2;
/// As long as an entry may take while all is well.
const BRINK: Duration = Duration::from_millis(60);

pub async fn leases(mut client: Client) {
    while !client.is_over() {
        let ttl_seconds = client.dice.random_range(2..5);
        if let Some(id) = grant(&mut client, ttl_seconds).await {
            attach(&mut client, id).await;
            for _ in 0..client.dice.random_range(0..6) {
                client.pause(Duration::from_secs(1)).await;
                keep_alive(&mut client, id).await;
            }
        }
        client.pause(Duration::from_secs(2)).await;
    }
}

/// Renews at the last moment, again and again. Often the renewal is in the log and not yet applied
/// where the leader finds that the time is over: then one of the two must come to nothing.
pub async fn brink(mut client: Client) {
    while !client.is_over() {
        let mut renewed = now();
        if let Some(id) = grant(&mut client, BRINK_TTL_SECONDS).await {
            attach(&mut client, id).await;
            let mut alive = true;
            while alive && !client.is_over() {
                let over = renewed + Duration::from_secs(BRINK_TTL_SECONDS.unsigned_abs());
                let early = BRINK.mul_f64(client.dice.random());
                tokio::time::sleep(over.saturating_sub(now() + early)).await;
                renewed = now();
                alive = keep_alive(&mut client, id).await;
            }
        }
        client.pause(BRINK).await;
    }
}

pub async fn grant(client: &mut Client, ttl_seconds: i64) -> Option<i64> {
    let mut leases = LeaseClient::new(client.channel());
    let call = async {
        let granted = leases.lease_grant(LeaseGrantRequest { ttl: ttl_seconds, id: 0 }).await?;
        let granted = granted.into_inner();
        Ok((granted.header, Answered::Lease { id: granted.id, ttl_seconds: granted.ttl }))
    };
    match client.call(Asked::Grant { ttl_seconds }, call).await.0 {
        Answered::Lease { id, .. } => Some(id),
        _ => None,
    }
}

async fn attach(client: &mut Client, lease: i64) {
    let key = format!("lease/{lease:x}");
    let value = client.unique();
    let request = put_request(&key, &value, lease);
    let mut kv = KvClient::new(client.channel());
    let call = async { Ok((kv.put(request).await?.into_inner().header, Answered::Done)) };
    client.call(Asked::Put { key, value }, call).await;
}

/// One renewal, on a stream of its own. Whether the lease lives.
pub async fn keep_alive(client: &mut Client, lease: i64) -> bool {
    let mut leases = LeaseClient::new(client.channel());
    let call = async {
        // Open until the answer is there.
        let requests = stream::iter([LeaseKeepAliveRequest { id: lease }]);
        let requests = futures::StreamExt::chain(requests, stream::pending());
        let mut answers = leases.lease_keep_alive(requests).await?.into_inner();
        let answer = answers.message().await?.ok_or(Status::unavailable("the stream ended"))?;
        Ok((answer.header, Answered::Lease { id: answer.id, ttl_seconds: answer.ttl }))
    };
    let (answered, _) = client.call(Asked::KeepAlive { lease }, call).await;
    matches!(answered, Answered::Lease { ttl_seconds: 1.., .. })
}
