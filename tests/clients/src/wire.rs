//! etcd's messages for key-values, watches and leases, and calls that send them as they are.
//!
//! The etcd-client crate reads a watch stream on its own account and limits what it receives. The
//! tests that must not read, or that open very many streams and watches, speak through these.
//! Answers may be of any size.

use bytes::Bytes;
use prost::{Message, Oneof};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::raw;

#[derive(Clone, PartialEq, Message)]
pub struct Header {
    #[prost(uint64, tag = "2")]
    pub member_id: u64,
    #[prost(int64, tag = "3")]
    pub revision: i64,
}

#[derive(Clone, PartialEq, Eq, Hash, Message, Serialize, Deserialize)]
pub struct KeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    #[serde(with = "crate::text")]
    pub key: Bytes,
    #[prost(int64, tag = "2")]
    pub create_revision: i64,
    #[prost(int64, tag = "3")]
    pub mod_revision: i64,
    #[prost(int64, tag = "4")]
    pub version: i64,
    #[prost(bytes = "bytes", tag = "5")]
    #[serde(with = "crate::text")]
    pub value: Bytes,
    #[prost(int64, tag = "6")]
    pub lease: i64,
}

/// [`Event::kind`] of a put.
pub const PUT: i32 = 0;
/// [`Event::kind`] of a delete.
pub const DELETE: i32 = 1;

#[derive(Clone, PartialEq, Eq, Hash, Message, Serialize, Deserialize)]
pub struct Event {
    #[prost(int32, tag = "1")]
    pub kind: i32,
    #[prost(message, optional, tag = "2")]
    pub kv: Option<KeyValue>,
    #[prost(message, optional, tag = "3")]
    pub prev_kv: Option<KeyValue>,
}

impl Event {
    /// The pair that changed.
    ///
    /// # Panics
    ///
    /// If the event has none.
    pub fn pair(&self) -> &KeyValue {
        self.kv.as_ref().expect("an event has a pair")
    }

    /// The revision of the change.
    pub fn revision(&self) -> i64 {
        self.pair().mod_revision
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub range_end: Bytes,
    #[prost(int64, tag = "3")]
    pub limit: i64,
    #[prost(int64, tag = "4")]
    pub revision: i64,
    #[prost(bool, tag = "9")]
    pub count_only: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    pub header: Option<Header>,
    #[prost(message, repeated, tag = "2")]
    pub kvs: Vec<KeyValue>,
    #[prost(bool, tag = "3")]
    pub more: bool,
    #[prost(int64, tag = "4")]
    pub count: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct RangeStreamResponse {
    #[prost(message, optional, tag = "1")]
    pub range_response: Option<RangeResponse>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
    #[prost(int64, tag = "3")]
    pub lease: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct DeleteRangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub range_end: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub struct RequestOp {
    #[prost(oneof = "Op", tags = "1, 2, 3, 4")]
    pub request: Option<Op>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Op {
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    #[prost(message, tag = "2")]
    Put(PutRequest),
    #[prost(message, tag = "3")]
    Delete(DeleteRangeRequest),
    #[prost(message, tag = "4")]
    Txn(TxnRequest),
}

/// Holds when `key` has this version; 0 is that of an absent key.
#[derive(Clone, PartialEq, Message)]
pub struct CompareVersion {
    #[prost(bytes = "bytes", tag = "3")]
    pub key: Bytes,
    #[prost(int64, optional, tag = "4")]
    pub version: Option<i64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    pub compare: Vec<CompareVersion>,
    #[prost(message, repeated, tag = "2")]
    pub success: Vec<RequestOp>,
    #[prost(message, repeated, tag = "3")]
    pub failure: Vec<RequestOp>,
}

/// The answer to any write; of its content only the number of a transaction's answers is kept.
#[derive(Clone, PartialEq, Message)]
pub struct Written {
    #[prost(message, optional, tag = "1")]
    pub header: Option<Header>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TxnResponse {
    #[prost(message, optional, tag = "1")]
    pub header: Option<Header>,
    #[prost(bool, tag = "2")]
    pub succeeded: bool,
    #[prost(message, repeated, tag = "3")]
    pub responses: Vec<ResponseOp>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ResponseOp {
    #[prost(message, optional, tag = "4")]
    pub txn: Option<TxnResponse>,
}

#[derive(Clone, PartialEq, Message)]
pub struct CompactionRequest {
    #[prost(int64, tag = "1")]
    pub revision: i64,
    #[prost(bool, tag = "2")]
    pub physical: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct LeaseGrantRequest {
    #[prost(int64, tag = "1")]
    pub ttl: i64,
    #[prost(int64, tag = "2")]
    pub id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct LeaseGrantResponse {
    #[prost(int64, tag = "2")]
    pub id: i64,
    #[prost(int64, tag = "3")]
    pub ttl: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct LeaseRevokeRequest {
    #[prost(int64, tag = "1")]
    pub id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct LeaseLeasesRequest {}

#[derive(Clone, PartialEq, Message)]
pub struct LeaseStatus {
    #[prost(int64, tag = "1")]
    pub id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct LeaseLeasesResponse {
    #[prost(message, repeated, tag = "2")]
    pub leases: Vec<LeaseStatus>,
}

#[derive(Clone, PartialEq, Message)]
pub struct WatchRequest {
    #[prost(oneof = "WatchUnion", tags = "1, 2, 3")]
    pub union: Option<WatchUnion>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum WatchUnion {
    #[prost(message, tag = "1")]
    Create(WatchCreate),
    #[prost(message, tag = "2")]
    Cancel(WatchCancel),
    #[prost(message, tag = "3")]
    Progress(WatchProgress),
}

#[derive(Clone, PartialEq, Message)]
pub struct WatchCreate {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub range_end: Bytes,
    #[prost(int64, tag = "3")]
    pub start_revision: i64,
    #[prost(int32, repeated, tag = "5")]
    pub filters: Vec<i32>,
    #[prost(bool, tag = "6")]
    pub prev_kv: bool,
    #[prost(int64, tag = "7")]
    pub watch_id: i64,
    #[prost(bool, tag = "8")]
    pub fragment: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct WatchCancel {
    #[prost(int64, tag = "1")]
    pub watch_id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct WatchProgress {}

/// [`WatchCreate::filters`]: leave puts out.
pub const NO_PUT: i32 = 0;
/// [`WatchCreate::filters`]: leave deletes out.
pub const NO_DELETE: i32 = 1;

#[derive(Clone, PartialEq, Message)]
pub struct WatchResponse {
    #[prost(message, optional, tag = "1")]
    pub header: Option<Header>,
    #[prost(int64, tag = "2")]
    pub watch_id: i64,
    #[prost(bool, tag = "3")]
    pub created: bool,
    #[prost(bool, tag = "4")]
    pub canceled: bool,
    #[prost(int64, tag = "5")]
    pub compact_revision: i64,
    #[prost(string, tag = "6")]
    pub cancel_reason: String,
    #[prost(bool, tag = "7")]
    pub fragment: bool,
    #[prost(message, repeated, tag = "11")]
    pub events: Vec<Event>,
}

impl WatchResponse {
    /// The revision in its header.
    pub fn revision(&self) -> i64 {
        self.header.as_ref().map_or(0, |h| h.revision)
    }
}

/// What follows `prefix` and everything under it: the range end of a prefix.
///
/// # Panics
///
/// If there is none: the prefix is empty or all of its bytes are 0xff.
pub fn prefix_end(prefix: &[u8]) -> Bytes {
    let last = prefix.iter().rposition(|b| *b < 0xff).expect("a prefix that has an end");
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    end.into()
}

/// A put as an operation of a transaction.
pub fn put_op(key: impl Into<Bytes>, value: impl Into<Bytes>) -> RequestOp {
    let put = PutRequest { key: key.into(), value: value.into(), lease: 0 };
    RequestOp { request: Some(Op::Put(put)) }
}

/// A creation of a watch as the stream takes it.
pub fn create(create: WatchCreate) -> WatchRequest {
    WatchRequest { union: Some(WatchUnion::Create(create)) }
}

/// Calls over one connection.
#[derive(Debug, Clone)]
pub struct Wire {
    channel: Channel,
}

impl Wire {
    /// Connects to one member.
    pub async fn connect(endpoint: &str) -> Wire {
        Wire { channel: raw::channel(endpoint).await }
    }

    /// As [`Wire::connect`], for a client that takes in at most so many bytes that it does not read.
    ///
    /// # Errors
    ///
    /// If the member does not listen.
    pub async fn narrow(endpoint: &str, bytes: u32) -> Result<Wire, Status> {
        Ok(Wire { channel: raw::narrow_channel(endpoint, bytes).await? })
    }

    /// As [`Wire::connect`], made when first used: the member may be down.
    pub fn lazy(endpoint: &str) -> Wire {
        Wire { channel: raw::lazy_channel(endpoint) }
    }

    /// The connection, for other calls.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Gives the revision of the write.
    pub async fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<i64, Status> {
        self.put_leased(key, value, 0).await
    }

    /// As [`Wire::put`], attached to a lease.
    pub async fn put_leased(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        lease: i64,
    ) -> Result<i64, Status> {
        let put = PutRequest { key: key.into(), value: value.into(), lease };
        self.write("/etcdserverpb.KV/Put", put).await
    }

    /// Deletes a key, or a range when `range_end` is not empty; gives the store's revision after it.
    pub async fn delete(
        &self,
        key: impl Into<Bytes>,
        range_end: impl Into<Bytes>,
    ) -> Result<i64, Status> {
        let request = DeleteRangeRequest { key: key.into(), range_end: range_end.into() };
        self.write("/etcdserverpb.KV/DeleteRange", request).await
    }

    pub async fn txn(&self, txn: TxnRequest) -> Result<TxnResponse, Status> {
        self.call("/etcdserverpb.KV/Txn", txn).await
    }

    pub async fn range(&self, range: RangeRequest) -> Result<RangeResponse, Status> {
        self.call("/etcdserverpb.KV/Range", range).await
    }

    /// A range answered in pieces.
    pub async fn range_stream(
        &self,
        range: RangeRequest,
    ) -> Result<Streaming<RangeStreamResponse>, Status> {
        raw::server_streaming(&self.channel, "/etcdserverpb.KV/RangeStream", range).await
    }

    /// The store's revision, by a linearizable read.
    pub async fn revision(&self) -> Result<i64, Status> {
        let range = RangeRequest { key: "0".into(), count_only: true, ..RangeRequest::default() };
        let header = self.range(range).await?.header;
        Ok(header.map_or(0, |h| h.revision))
    }

    pub async fn compact(&self, revision: i64) -> Result<i64, Status> {
        let request = CompactionRequest { revision, physical: false };
        self.write("/etcdserverpb.KV/Compact", request).await
    }

    pub async fn lease_grant(&self, ttl: i64, id: i64) -> Result<LeaseGrantResponse, Status> {
        self.call("/etcdserverpb.Lease/LeaseGrant", LeaseGrantRequest { ttl, id }).await
    }

    pub async fn lease_revoke(&self, id: i64) -> Result<i64, Status> {
        self.write("/etcdserverpb.Lease/LeaseRevoke", LeaseRevokeRequest { id }).await
    }

    /// The ids of all leases.
    pub async fn leases(&self) -> Result<Vec<i64>, Status> {
        let answer: LeaseLeasesResponse =
            self.call("/etcdserverpb.Lease/LeaseLeases", LeaseLeasesRequest {}).await?;
        Ok(answer.leases.iter().map(|l| l.id).collect())
    }

    /// Opens a watch stream that begins with these requests. At least one is needed: etcd sends not
    /// even headers before its first answer.
    pub async fn watch(&self, first: Vec<WatchRequest>) -> Result<WatchCall, Status> {
        let (requests, receiver) = mpsc::unbounded_channel();
        for request in first {
            requests.send(request).expect("the other end is below");
        }
        let stream = UnboundedReceiverStream::new(receiver);
        let answers = raw::streaming(&self.channel, "/etcdserverpb.Watch/Watch", stream).await?;
        Ok(WatchCall { requests, answers })
    }

    async fn write<Q: Message + 'static>(&self, path: &str, request: Q) -> Result<i64, Status> {
        let answer: Written = self.call(path, request).await?;
        Ok(answer.header.map_or(0, |h| h.revision))
    }

    async fn call<Q, A>(&self, path: &str, request: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        Ok(raw::unary(&self.channel, path, request).await?.into_inner())
    }
}

/// An open watch stream, of which nothing is read but what [`WatchCall::next`] is asked for.
#[derive(Debug)]
pub struct WatchCall {
    requests: mpsc::UnboundedSender<WatchRequest>,
    answers: Streaming<WatchResponse>,
}

impl WatchCall {
    /// Sends a request; whether the stream is still there shows in the answers.
    pub fn ask(&self, union: WatchUnion) {
        // A stream that has ended takes nothing more.
        let _ = self.requests.send(WatchRequest { union: Some(union) });
    }

    /// The next answer.
    ///
    /// # Errors
    ///
    /// The status the stream ended with; UNAVAILABLE when it ended without one.
    pub async fn next(&mut self) -> Result<WatchResponse, Status> {
        self.answers.message().await?.ok_or_else(|| Status::unavailable("the stream ended"))
    }
}
