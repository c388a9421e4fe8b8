//! A cluster of real processes, asked at another member in each step.

use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes};
use futures::channel::mpsc;
use futures::future::join_all;
use futures::{StreamExt, TryStreamExt, stream};
use holdfast::pb::etcdserverpb::alarm_request::AlarmAction;
use holdfast::pb::etcdserverpb::auth_client::AuthClient;
use holdfast::pb::etcdserverpb::cluster_client::ClusterClient;
use holdfast::pb::etcdserverpb::kv_client::KvClient;
use holdfast::pb::etcdserverpb::lease_client::LeaseClient;
use holdfast::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use holdfast::pb::etcdserverpb::request_op::Request as Operation;
use holdfast::pb::etcdserverpb::watch_client::WatchClient;
use holdfast::pb::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, AuthStatusRequest, AuthStatusResponse,
    AuthenticateRequest, CompactionRequest, CompactionResponse, DeleteRangeRequest,
    DeleteRangeResponse, HashKvRequest, HashKvResponse, LeaseGrantRequest, LeaseGrantResponse,
    LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest, LeaseLeasesResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
    MemberListRequest, MemberListResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
    RequestOp, StatusRequest, StatusResponse, TxnRequest, TxnResponse,
};
use tonic::client::Grpc;
use tonic::codec::{Codec, CompressionEncoding, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::session::{Answer, Call, Target};
use crate::cluster::Cluster;

/// How much later than it may a lease may end, on a busy machine.
const LATE: Duration = Duration::from_secs(20);

/// Between two looks at a lease that is about to end.
const LOOK: Duration = Duration::from_millis(50);

/// Written and deleted before each script: it starts at a revision of its own, never compacted.
const START_KEY: &[u8] = b"\0start";

const EVERYTHING: Bytes = Bytes::from_static(&[0]);

pub struct Live {
    cluster: Cluster,
    /// How many calls were made.
    calls: usize,
    /// Those the script was granted, whatever became of them.
    leases: Vec<i64>,
    /// Those it raised, whatever became of them.
    alarms: Vec<AlarmMember>,
    metadata: Vec<(AsciiMetadataKey, AsciiMetadataValue)>,
    gzip: bool,
}

/// A client of the next member, and with the settings of the step.
macro_rules! client {
    ($self:ident, $client:ident) => {{
        let client = $client::new($self.next_channel()).max_decoding_message_size(usize::MAX);
        if $self.gzip {
            let gzip = CompressionEncoding::Gzip;
            client.send_compressed(gzip).accept_compressed(gzip)
        } else {
            client
        }
    }};
}

impl Live {
    pub fn new(cluster: Cluster) -> Live {
        Live {
            cluster,
            calls: 0,
            leases: Vec::new(),
            alarms: Vec::new(),
            metadata: Vec::new(),
            gzip: false,
        }
    }

    fn next_channel(&mut self) -> Channel {
        self.calls += 1;
        self.cluster.channel(self.calls % self.cluster.size())
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        for (name, value) in &self.metadata {
            request.metadata_mut().insert(name.clone(), value.clone());
        }
        request
    }

    async fn revision(&mut self) -> Answer<i64> {
        let request = RangeRequest { key: START_KEY.into(), ..RangeRequest::default() };
        Ok(self.range(request).await?.header.map_or(0, |header| header.revision))
    }

    /// The revision after ending all leases and deleting everything.
    async fn empty(&mut self) -> Answer<i64> {
        for AlarmMember { member_id, alarm } in std::mem::take(&mut self.alarms) {
            let action = AlarmAction::Deactivate.into();
            self.alarm(AlarmRequest { action, member_id, alarm }).await?;
        }
        for lease in std::mem::take(&mut self.leases) {
            match self.lease_revoke(lease).await {
                Err(status) if status.code() != Code::NotFound => return Err(status),
                _ => {}
            }
        }
        let put = PutRequest { key: START_KEY.into(), ..PutRequest::default() };
        let delete = DeleteRangeRequest {
            key: EVERYTHING,
            range_end: EVERYTHING,
            ..DeleteRangeRequest::default()
        };
        let operations = [Operation::RequestPut(put), Operation::RequestDeleteRange(delete)];
        let success = operations.map(|request| RequestOp { request: Some(request) }).into();
        let emptied = self.txn(TxnRequest { success, ..TxnRequest::default() }).await?;
        Ok(emptied.header.map_or(0, |header| header.revision))
    }
}

impl Target for Live {
    async fn begin(&mut self, fresh: bool) -> i64 {
        self.send_with(&[], false);
        let revision = if fresh { self.revision().await } else { self.empty().await };
        revision.expect("a cluster that works can be written and read")
    }

    fn send_with(&mut self, metadata: &[(String, String)], gzip: bool) {
        self.gzip = gzip;
        self.metadata = metadata
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
    }

    async fn settle(&mut self) {
        let reads = (0..self.cluster.size()).map(|member| {
            let request = RangeRequest { key: START_KEY.into(), ..RangeRequest::default() };
            let mut client = KvClient::new(self.cluster.channel(member));
            async move { client.range(request).await }
        });
        for read in join_all(reads).await {
            read.expect("a cluster that works can be read");
        }
    }

    async fn put(&mut self, request: PutRequest) -> Answer<PutResponse> {
        let request = self.request(request);
        Ok(client!(self, KvClient).put(request).await?.into_inner())
    }

    async fn range(&mut self, request: RangeRequest) -> Answer<RangeResponse> {
        let request = self.request(request);
        Ok(client!(self, KvClient).range(request).await?.into_inner())
    }

    async fn delete_range(&mut self, request: DeleteRangeRequest) -> Answer<DeleteRangeResponse> {
        let request = self.request(request);
        Ok(client!(self, KvClient).delete_range(request).await?.into_inner())
    }

    async fn txn(&mut self, request: TxnRequest) -> Answer<TxnResponse> {
        let request = self.request(request);
        Ok(client!(self, KvClient).txn(request).await?.into_inner())
    }

    async fn compact(&mut self, request: CompactionRequest) -> Answer<CompactionResponse> {
        let request = self.request(request);
        Ok(client!(self, KvClient).compact(request).await?.into_inner())
    }

    async fn lease_grant(&mut self, request: LeaseGrantRequest) -> Answer<LeaseGrantResponse> {
        let request = self.request(request);
        let granted = client!(self, LeaseClient).lease_grant(request).await?.into_inner();
        self.leases.push(granted.id);
        Ok(granted)
    }

    async fn lease_revoke(&mut self, id: i64) -> Answer<LeaseRevokeResponse> {
        let request = self.request(LeaseRevokeRequest { id });
        Ok(client!(self, LeaseClient).lease_revoke(request).await?.into_inner())
    }

    async fn lease_keep_alive(&mut self, ids: &[i64]) -> Answer<Vec<LeaseKeepAliveResponse>> {
        let requests: Vec<_> = ids.iter().map(|id| LeaseKeepAliveRequest { id: *id }).collect();
        let request = self.request(stream::iter(requests));
        let answers = client!(self, LeaseClient).lease_keep_alive(request).await?;
        answers.into_inner().try_collect().await
    }

    async fn lease_time_to_live(
        &mut self,
        request: LeaseTimeToLiveRequest,
    ) -> Answer<LeaseTimeToLiveResponse> {
        let request = self.request(request);
        Ok(client!(self, LeaseClient).lease_time_to_live(request).await?.into_inner())
    }

    async fn lease_leases(&mut self) -> Answer<LeaseLeasesResponse> {
        let request = self.request(LeaseLeasesRequest {});
        Ok(client!(self, LeaseClient).lease_leases(request).await?.into_inner())
    }

    async fn expire(&mut self, id: i64) -> bool {
        let begun = Instant::now();
        loop {
            let request = LeaseTimeToLiveRequest { id, keys: false };
            let left = self.lease_time_to_live(request).await.expect("it can be asked for");
            if left.granted_ttl == 0 {
                return true;
            }
            if begun.elapsed() > Duration::from_secs(left.granted_ttl as u64) + LATE {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn pass(&mut self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// The answers are read by a task of their own: etcd accepts the call only with its first
    /// answer.
    fn watch(&mut self) -> Call {
        let (requests, receiver) = mpsc::unbounded();
        let (answers, received) = mpsc::unbounded();
        let request = self.request(receiver);
        let mut client = client!(self, WatchClient);
        tokio::spawn(async move {
            let called = stream::once(async move { client.watch(request).await });
            let mut called = called.map_ok(|answers| answers.into_inner()).try_flatten().boxed();
            while let Some(answer) = called.next().await {
                if answers.unbounded_send(answer).is_err() {
                    break;
                }
            }
        });
        Call { requests: Some(requests), answers: Box::pin(received) }
    }

    async fn hash_kv(&mut self, revision: i64) -> Answer<Vec<HashKvResponse>> {
        let mut answers = Vec::new();
        for _ in 0..self.cluster.size() {
            let request = self.request(HashKvRequest { revision });
            answers.push(client!(self, MaintenanceClient).hash_kv(request).await?.into_inner());
        }
        Ok(answers)
    }

    async fn alarm(&mut self, request: AlarmRequest) -> Answer<AlarmResponse> {
        let raises = request.action() == AlarmAction::Activate;
        let request = self.request(request);
        let answer = client!(self, MaintenanceClient).alarm(request).await?.into_inner();
        if raises {
            self.alarms.extend(&answer.alarms);
        }
        Ok(answer)
    }

    async fn status(&mut self) -> Answer<StatusResponse> {
        let request = self.request(StatusRequest {});
        Ok(client!(self, MaintenanceClient).status(request).await?.into_inner())
    }

    async fn members(&mut self, linearizable: bool) -> Answer<MemberListResponse> {
        let request = self.request(MemberListRequest { linearizable });
        Ok(client!(self, ClusterClient).member_list(request).await?.into_inner())
    }

    async fn auth_status(&mut self) -> Answer<AuthStatusResponse> {
        let request = self.request(AuthStatusRequest {});
        Ok(client!(self, AuthClient).auth_status(request).await?.into_inner())
    }

    async fn authenticate(&mut self, name: String, password: String) -> Answer<()> {
        let request = self.request(AuthenticateRequest { name, password });
        client!(self, AuthClient).authenticate(request).await.map(drop)
    }

    async fn call(&mut self, path: String, message: Bytes) -> Answer<usize> {
        let path = path.parse().map_err(|_| Status::internal("the script names no path"))?;
        let request = self.request(message);
        let mut client = Grpc::new(self.next_channel());
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(client.unary(request, path, AsIs).await?.into_inner().len())
    }

    async fn health(&mut self, service: String) -> Answer<i32> {
        let request = self.request(HealthCheckRequest { service });
        Ok(client!(self, HealthClient).check(request).await?.into_inner().status)
    }
}

/// Messages as the bytes they are.
#[derive(Default)]
struct AsIs;

impl Codec for AsIs {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = AsIs;
    type Decoder = AsIs;

    fn encoder(&mut self) -> AsIs {
        AsIs
    }

    fn decoder(&mut self) -> AsIs {
        AsIs
    }
}

impl Encoder for AsIs {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for AsIs {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
