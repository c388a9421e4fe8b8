//! The machine itself, without a log, a network or a process: protobuf in, converted as the API
//! does it, applied or read, and protobuf out. Time goes by only when a script says so.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::channel::mpsc;
use holdfast::api::convert::{self, AlarmAsked};
use holdfast::api::header::inside_txn;
use holdfast::api::watch::WatchService;
use holdfast::machine::{Command, Entry, ExpiredLease, Machine, Origin, Outcome, Position, Reply};
use holdfast::node::LeaseInfo;
use holdfast::pb::etcdserverpb::{
    AlarmRequest, AlarmResponse, AuthStatusResponse, CompactionRequest, CompactionResponse,
    DeleteRangeRequest, DeleteRangeResponse, HashKvResponse, LeaseGrantRequest, LeaseGrantResponse,
    LeaseKeepAliveResponse, LeaseLeasesResponse, LeaseRevokeResponse, LeaseStatus,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, MemberListResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, ResponseHeader, StatusResponse, TxnRequest, TxnResponse,
};
use holdfast::storage::Batch;
use holdfast::types::{LeaseId, Timestamp};
use holdfast::watch::Hub;
use prost::Message;
use tokio::sync::watch;
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::session::{Answer, Call, Target};

/// As the server's defaults.
const MAX_REQUEST_BYTES: usize = 1_572_864;
const MAX_TXN_OPS: usize = 128;
const MIN_LEASE_TTL_SECONDS: i64 = 2;

/// The first id given to a lease that has none of its own.
const FIRST_LEASE: i64 = 1_000_001;

/// No script here waits for this.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(600);

/// How many records one turn of the physical compaction looks at.
const SCRUB: usize = 1000;

pub struct Core {
    machine: Machine,
    watches: WatchService,
    /// Watch streams end when it is dropped.
    _leader: watch::Sender<bool>,
    index: u64,
    now: Timestamp,
    next_lease: i64,
}

impl Core {
    pub fn new() -> Core {
        let machine = Machine::new();
        let leader = watch::Sender::new(true);
        let watches = WatchService {
            hub: Hub::new(machine.store()),
            store: machine.store(),
            header: Arc::new(header),
            authorize: Arc::new(|_, _| Ok(())),
            arrive: Arc::new(|_| Box::pin(async {})),
            has_leader: leader.subscribe(),
            max_request_bytes: MAX_REQUEST_BYTES,
            packed_events: Arc::default(),
            progress_interval: PROGRESS_INTERVAL,
        };
        let (index, now, next_lease) = (0, Timestamp(0), FIRST_LEASE);
        Core { machine, watches, _leader: leader, index, now, next_lease }
    }

    fn apply(&mut self, command: Command) -> Answer<(Reply, ResponseHeader)> {
        self.index += 1;
        let position = Position { term: 2, index: self.index };
        let entry = Entry { at: self.now, origin: Origin::default(), command, principal: None };
        let mut batch = Batch::default();
        let Outcome { revision, reply, events, .. } =
            self.machine.apply(position, &entry, &mut batch).expect("all is kept in memory");
        self.watches.hub.publish(revision, &events);
        while self.machine.scrub(SCRUB, &mut batch) {}
        Ok((reply?, header(revision)))
    }

    fn current(&self) -> ResponseHeader {
        header(self.machine.store().revision())
    }

    /// What the leader does when a lease has run out.
    fn end_leases(&mut self) {
        let over = self.machine.leases().iter_by_deadline();
        let over = over.take_while(|(_, lease)| lease.deadline <= self.now);
        let leases: Vec<ExpiredLease> = over
            .map(|(id, lease)| ExpiredLease { id, renewed_at_index: lease.renewed_at_index })
            .collect();
        if !leases.is_empty() {
            let ended = self.apply(Command::LeaseExpire { term: 2, leases });
            ended.expect("the end of leases is never refused");
        }
    }
}

fn header(revision: i64) -> ResponseHeader {
    ResponseHeader { cluster_id: 1, member_id: 2, raft_term: 3, ..inside_txn(revision) }
}

fn misplaced(reply: Reply) -> ! {
    panic!("the machine answered with {reply:?}")
}

fn absent<T>() -> Answer<T> {
    Err(Status::unimplemented("the core has no such call: the script needs `without: core`"))
}

impl Target for Core {
    async fn begin(&mut self, _fresh: bool) -> i64 {
        *self = Core::new();
        self.machine.store().revision()
    }

    fn send_with(&mut self, metadata: &[(String, String)], gzip: bool) {
        assert!(metadata.is_empty() && !gzip, "nothing is sent: the script needs `without: core`");
    }

    async fn settle(&mut self) {}

    async fn put(&mut self, request: PutRequest) -> Answer<PutResponse> {
        let request_bytes = request.encoded_len();
        let put = convert::put(request)?;
        convert::check_size(request_bytes, MAX_REQUEST_BYTES)?;
        match self.apply(Command::Put(put))? {
            (Reply::Put(reply), header) => Ok(convert::put_response(&reply, header)),
            (other, _) => misplaced(other),
        }
    }

    async fn range(&mut self, request: RangeRequest) -> Answer<RangeResponse> {
        let range = convert::range(request)?;
        let view = self.machine.store().view();
        Ok(convert::range_response(&view.range(&range)?, header(view.revision())))
    }

    async fn delete_range(&mut self, request: DeleteRangeRequest) -> Answer<DeleteRangeResponse> {
        let delete = convert::delete_range(request)?;
        match self.apply(Command::DeleteRange(delete))? {
            (Reply::DeleteRange(reply), header) => {
                Ok(convert::delete_range_response(&reply, header))
            }
            (other, _) => misplaced(other),
        }
    }

    async fn txn(&mut self, request: TxnRequest) -> Answer<TxnResponse> {
        let request_bytes = request.encoded_len();
        let txn = convert::txn(request, MAX_TXN_OPS)?;
        if txn.is_read_only() {
            let view = self.machine.store().view();
            return Ok(convert::txn_response(&view.read_txn(&txn)?, header(view.revision())));
        }
        convert::check_size(request_bytes, MAX_REQUEST_BYTES)?;
        match self.apply(Command::Txn(txn))? {
            (Reply::Txn(reply), header) => Ok(convert::txn_response(&reply, header)),
            (other, _) => misplaced(other),
        }
    }

    async fn compact(&mut self, request: CompactionRequest) -> Answer<CompactionResponse> {
        let (_, header) = self.apply(Command::Compact { revision: request.revision })?;
        Ok(CompactionResponse { header: Some(header) })
    }

    async fn lease_grant(&mut self, request: LeaseGrantRequest) -> Answer<LeaseGrantResponse> {
        let ttl_seconds = convert::lease_ttl_seconds(request.ttl, MIN_LEASE_TTL_SECONDS)?;
        let id = if request.id == 0 { self.next_lease } else { request.id };
        self.next_lease += 1;
        match self.apply(Command::LeaseGrant { id: LeaseId(id), ttl_seconds })? {
            (Reply::LeaseGranted { id, ttl_seconds }, header) => Ok(LeaseGrantResponse {
                header: Some(header),
                id: id.0,
                ttl: ttl_seconds,
                error: String::new(),
            }),
            (other, _) => misplaced(other),
        }
    }

    async fn lease_revoke(&mut self, id: i64) -> Answer<LeaseRevokeResponse> {
        let (_, header) = self.apply(Command::LeaseRevoke { id: LeaseId(id) })?;
        Ok(LeaseRevokeResponse { header: Some(header) })
    }

    async fn lease_keep_alive(&mut self, ids: &[i64]) -> Answer<Vec<LeaseKeepAliveResponse>> {
        let mut answers = Vec::new();
        for id in ids {
            let header = Some(self.current());
            match self.apply(Command::LeaseRenew { ids: vec![LeaseId(*id)] })? {
                (Reply::LeaseRenewed(ttls), _) => {
                    let ttl = ttls[0].unwrap_or(0);
                    answers.push(LeaseKeepAliveResponse { header, id: *id, ttl });
                }
                (other, _) => misplaced(other),
            }
        }
        Ok(answers)
    }

    async fn lease_time_to_live(
        &mut self,
        request: LeaseTimeToLiveRequest,
    ) -> Answer<LeaseTimeToLiveResponse> {
        let info = self.machine.leases().get(LeaseId(request.id)).map(|lease| LeaseInfo {
            granted_ttl_seconds: lease.ttl_seconds,
            remaining: lease.deadline.since(self.now),
            keys: if request.keys { lease.keys.iter().cloned().collect() } else { Vec::new() },
        });
        Ok(convert::lease_time_to_live_response(request.id, info, self.current()))
    }

    async fn lease_leases(&mut self) -> Answer<LeaseLeasesResponse> {
        let leases = self.machine.leases().iter_by_deadline();
        let leases = leases.map(|(id, _)| LeaseStatus { id: id.0 }).collect();
        Ok(LeaseLeasesResponse { header: Some(self.current()), leases })
    }

    async fn expire(&mut self, id: i64) -> bool {
        let Some(lease) = self.machine.leases().get(LeaseId(id)) else { return false };
        self.now = self.now.max(lease.deadline);
        self.end_leases();
        !self.machine.leases().contains(LeaseId(id))
    }

    async fn pass(&mut self, time: Duration) {
        self.now = self.now.plus(time);
        self.end_leases();
    }

    fn watch(&mut self) -> Call {
        let (requests, receiver) = mpsc::unbounded();
        let answers = self.watches.serve(MetadataMap::new(), receiver.map(Ok));
        Call { requests: Some(requests), answers }
    }

    async fn hash_kv(&mut self, revision: i64) -> Answer<Vec<HashKvResponse>> {
        let hashed = self.machine.store().view().hash_kv(revision)?;
        Ok(vec![HashKvResponse {
            header: Some(self.current()),
            hash: hashed.hash,
            compact_revision: hashed.compact_revision,
            hash_revision: hashed.hash_revision,
        }])
    }

    async fn alarm(&mut self, request: AlarmRequest) -> Answer<AlarmResponse> {
        match convert::alarm(&request)? {
            AlarmAsked::List(kind) => {
                let alarms = self.machine.alarms();
                let alarms = alarms.filter(|alarm| kind.is_none_or(|kind| alarm.kind == kind));
                Ok(convert::alarm_response(alarms, self.current()))
            }
            AlarmAsked::Nothing => Ok(convert::alarm_response([], self.current())),
            AlarmAsked::Change(action) => match self.apply(Command::Alarm(action))? {
                (Reply::Alarm(alarm), header) => Ok(convert::alarm_response(alarm, header)),
                (other, _) => misplaced(other),
            },
        }
    }

    async fn status(&mut self) -> Answer<StatusResponse> {
        absent()
    }

    async fn members(&mut self, _linearizable: bool) -> Answer<MemberListResponse> {
        absent()
    }

    async fn auth_status(&mut self) -> Answer<AuthStatusResponse> {
        absent()
    }

    async fn authenticate(&mut self, _name: String, _password: String) -> Answer<()> {
        absent()
    }

    async fn call(&mut self, _path: String, _message: Bytes) -> Answer<usize> {
        absent()
    }

    async fn health(&mut self, _service: String) -> Answer<i32> {
        absent()
    }
}
