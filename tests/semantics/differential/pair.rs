//! Holdfast and etcd side by side, from the same state, asked the same things.

use std::time::Duration;

use holdfast::pb::etcdserverpb as pb;
use holdfast::pb::etcdserverpb::watch_request::RequestUnion;

use super::answer::Answer;
use super::duplicates::only_etcd_takes;
use super::generate::STREAMS;
use super::operation::{Now, Operation, Request};
use super::side::{Interrupted, Side};
use super::watches::{Different, Streams, Trouble};
use crate::cluster::Program;

/// Holdfast's. Revisions do not depend on how many members etcd has, and one starts faster.
const MEMBERS: usize = 3;

/// Written where a revision of its own is needed. Watches see it as any other key.
const MARKER: &[u8] = b"~";

/// From one zero byte to one zero byte is everything.
const EVERYTHING: &[u8] = b"\0";

/// Leases granted for less are revoked at once: they would end in the midst of the operations.
const SHORT_TTL_SECONDS: i64 = 60;

/// How many revisions one cluster may be behind the other, after they differed, and be brought up.
const MOST_REVISIONS_APART: i64 = 10_000;

pub struct Pair {
    etcd: Side,
    holdfast: Side,
    streams: Streams,
    now: Now,
}

/// How a sequence of operations ended before its end.
#[derive(Debug)]
pub struct Stopped {
    /// What was done, with all revisions settled. The last of it, or what was compared after it, is
    /// what the trouble was with.
    pub operations: Vec<String>,
    pub trouble: Trouble,
}

impl Pair {
    pub async fn start() -> Pair {
        let (etcd, holdfast) =
            tokio::join!(Side::start(Program::Etcd, 1), Side::start(Program::Holdfast, MEMBERS));
        // Both are at the revision of an empty store.
        let now = Now { current: 1, compacted: 0 };
        Pair { etcd, holdfast, streams: Streams::closed(STREAMS), now }
    }

    /// Waits only so long for what a stream says from now on.
    pub fn set_patience(&mut self, patience: Duration) {
        self.streams.patience = patience;
    }

    /// Does the operations on both clusters, and then compares all that is left of them.
    pub async fn run(&mut self, operations: &[Operation]) -> Result<(), Stopped> {
        let mut done = Vec::new();
        for operation in operations {
            let settled = operation.settle(self.now);
            done.push(settled.to_string());
            if let Err(trouble) = self.step(&settled).await {
                return Err(Stopped { operations: done, trouble });
            }
        }
        let compared = self.compare_everything().await;
        compared.map_err(|trouble| Stopped { operations: done, trouble })
    }

    async fn step(&mut self, Operation { member, request }: &Operation) -> Result<(), Trouble> {
        match request {
            Request::Watch { stream, request } => {
                if let Some(RequestUnion::CancelRequest(_)) = &request.request_union {
                    self.fence(*stream..*stream + 1).await?;
                }
                let sides = (&mut self.etcd, &mut self.holdfast);
                self.streams.ask(sides, *member, *stream, request, self.now).await
            }
            Request::CloseStream { stream } => {
                self.fence(*stream..*stream + 1).await?;
                self.streams.close(*stream);
                Ok(())
            }
            Request::Compact(compact) => {
                self.fence(0..STREAMS).await?;
                if let Answer::Compact(_) = self.ask(*member, request).await? {
                    self.now.compacted = compact.revision;
                }
                Ok(())
            }
            Request::Grant(_) => {
                if let Answer::Grant(granted) = self.ask(*member, request).await?
                    && granted.ttl < SHORT_TTL_SECONDS
                {
                    // It may have ended by itself on a machine that was held up, and has no keys.
                    let revoke = Request::Revoke(pb::LeaseRevokeRequest { id: granted.id });
                    self.etcd.ask(0, &revoke).await?;
                    self.holdfast.ask(*member, &revoke).await?;
                }
                Ok(())
            }
            // See there: etcd might die of it.
            Request::Txn(txn) if only_etcd_takes(txn) => Ok(()),
            _ => self.ask(*member, request).await.map(|_| ()),
        }
    }

    /// Asks both clusters, and gives the answer when they agree.
    async fn ask(&mut self, member: usize, request: &Request) -> Result<Answer, Trouble> {
        let (etcd, holdfast) =
            tokio::join!(self.etcd.ask(member, request), self.holdfast.ask(member, request));
        let (etcd, holdfast) = (etcd?, holdfast?);
        if let Some(header) = etcd.header() {
            self.now.current = self.now.current.max(header.revision);
        }
        same(|| request.to_string(), etcd, holdfast)
    }

    /// Compares what the open ones of these streams have said up to now.
    async fn fence(&mut self, streams: std::ops::Range<usize>) -> Result<(), Trouble> {
        if !streams.clone().any(|stream| self.streams.is_open(stream)) {
            return Ok(());
        }
        for stream in streams.clone() {
            let sides = (&mut self.etcd, &mut self.holdfast);
            self.streams.cancel_never_starting(sides, stream, self.now).await?;
        }
        let newest = streams.clone().map(|stream| self.streams.newest_start(stream)).max();
        self.mark().await?;
        while Some(self.now.current) < newest {
            self.mark().await?;
        }
        for stream in streams {
            let sides = (&self.etcd, &self.holdfast);
            self.streams.fence(sides, stream, self.now).await?;
        }
        Ok(())
    }

    async fn mark(&mut self) -> Result<(), Trouble> {
        let key = MARKER.into();
        let put = Request::Put(pb::PutRequest { key, ..pb::PutRequest::default() });
        self.ask(0, &put).await.map(|_| ())
    }

    /// The streams, the leases, the store at each of its revisions, and its history as a watch on
    /// each member shows it.
    async fn compare_everything(&mut self) -> Result<(), Trouble> {
        self.fence(0..STREAMS).await?;
        (0..STREAMS).for_each(|stream| self.streams.close(stream));
        for lease in self.leases().await? {
            let request = pb::LeaseTimeToLiveRequest { id: lease, keys: true };
            self.ask(0, &Request::TimeToLive(request)).await?;
        }
        self.compare_revisions().await?;
        for member in 0..self.holdfast.size() {
            let create = pb::WatchCreateRequest {
                key: EVERYTHING.into(),
                range_end: EVERYTHING.into(),
                start_revision: self.now.compacted.max(1),
                prev_kv: true,
                ..pb::WatchCreateRequest::default()
            };
            let request_union = Some(RequestUnion::CreateRequest(create));
            let request = Request::Watch { stream: 0, request: pb::WatchRequest { request_union } };
            self.step(&Operation { member, request }).await?;
            self.step(&Operation { member, request: Request::CloseStream { stream: 0 } }).await?;
        }
        Ok(())
    }

    async fn leases(&mut self) -> Result<Vec<i64>, Trouble> {
        match self.ask(0, &Request::Leases).await? {
            Answer::Leases(answer) => Ok(answer.leases.iter().map(|lease| lease.id).collect()),
            other => Err(Interrupted(format!("no list of leases: {other:?}")).into()),
        }
    }

    async fn compare_revisions(&mut self) -> Result<(), Trouble> {
        let revisions = self.now.compacted.max(1)..=self.now.current;
        let ranges: Vec<pb::RangeRequest> = revisions
            .map(|revision| pb::RangeRequest {
                key: EVERYTHING.into(),
                range_end: EVERYTHING.into(),
                revision,
                ..pb::RangeRequest::default()
            })
            .collect();
        let (etcd, holdfast) = tokio::join!(self.etcd.read(&ranges), self.holdfast.read(&ranges));
        for ((range, etcd), holdfast) in ranges.into_iter().zip(etcd?).zip(holdfast?) {
            let what = || format!("in the end: {}", Request::Range(range));
            same(what, etcd, holdfast)?;
        }
        Ok(())
    }

    /// Brings both clusters to a store with no more than the marker, without leases and history, at
    /// one revision, whatever they disagreed about. An error means that it takes fresh ones.
    pub async fn reset(&mut self) -> Result<(), Stopped> {
        (0..STREAMS).for_each(|stream| self.streams.close(stream));
        let emptied = match self.empty().await {
            Ok(()) => self.compare_everything().await,
            Err(interrupted) => Err(interrupted.into()),
        };
        emptied.map_err(|trouble| Stopped { operations: vec!["reset".to_owned()], trouble })
    }

    async fn empty(&mut self) -> Result<(), Interrupted> {
        let (etcd, holdfast) = tokio::join!(self.etcd.empty(), self.holdfast.empty());
        let (etcd, holdfast) = (etcd?, holdfast?);
        if (etcd - holdfast).abs() > MOST_REVISIONS_APART {
            return Err(Interrupted(format!("etcd is at {etcd} and Holdfast at {holdfast}")));
        }
        // Ended by a put: deletes at the compacted revision would still be told to watches.
        let revision = etcd.max(holdfast) + 1;
        self.now = Now { current: revision, compacted: revision };
        let request = pb::CompactionRequest { revision, physical: true };
        for side in [&mut self.etcd, &mut self.holdfast] {
            side.advance_to(revision, MARKER).await?;
            side.ask(0, &Request::Compact(request)).await?;
        }
        Ok(())
    }
}

impl Side {
    /// Revokes all leases and deletes all keys; gives the revision after that.
    async fn empty(&mut self) -> Result<i64, Interrupted> {
        let listed = self.ask(0, &Request::Leases).await?;
        if let Answer::Leases(listed) = listed {
            for lease in listed.leases {
                let revoke = Request::Revoke(pb::LeaseRevokeRequest { id: lease.id });
                self.ask(0, &revoke).await?;
            }
        }
        self.picked.clear();
        let delete = pb::DeleteRangeRequest {
            key: EVERYTHING.into(),
            range_end: EVERYTHING.into(),
            prev_kv: false,
        };
        let deleted = self.ask(0, &Request::DeleteRange(delete)).await?;
        let revision = deleted.header().map(|header| header.revision);
        revision.ok_or_else(|| Interrupted(format!("not deleted: {deleted:?}")))
    }

    /// Puts `key` until the store is at `revision`.
    async fn advance_to(&mut self, revision: i64, key: &'static [u8]) -> Result<(), Interrupted> {
        loop {
            let put = pb::PutRequest { key: key.into(), ..pb::PutRequest::default() };
            let put = self.ask(0, &Request::Put(put)).await?;
            match put.header() {
                Some(header) if header.revision < revision => {}
                Some(header) if header.revision == revision => return Ok(()),
                _ => return Err(Interrupted(format!("not at revision {revision}: {put:?}"))),
            }
        }
    }
}

fn same(what: impl FnOnce() -> String, etcd: Answer, holdfast: Answer) -> Result<Answer, Trouble> {
    if etcd == holdfast {
        return Ok(etcd);
    }
    let (etcd, holdfast) = (format!("{etcd:#?}"), format!("{holdfast:#?}"));
    Err(Trouble::Different(Different { what: what(), etcd, holdfast }))
}
