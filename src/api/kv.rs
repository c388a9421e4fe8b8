//! The service KV: reads, writes and transactions on the key space.
//!
//! A read is answered from a view of this member's own state, which for a linearizable one is first
//! known to be recent enough. A write is proposed and answered once this member has applied it.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use prost::Message;
use tonic::{Request, Response, Status};

use crate::machine::{Command, Fence, FencedWrite, Reply, Right};
use crate::node::{Applied, Caller, Node};
use crate::pb::etcdserverpb::kv_server::Kv;
use crate::pb::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest, TxnResponse,
};

use super::{callers, convert, fence, header, range_stream, status};

pub struct KvService {
    node: Arc<Node>,
}

impl KvService {
    pub fn new(node: Arc<Node>) -> KvService {
        KvService { node }
    }
}

#[tonic::async_trait]
impl Kv for KvService {
    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let serializable = request.serializable;
        if !serializable && *self.node.learner().borrow() {
            return Err(status::Refusal::Learner.into());
        }
        let range = convert::range(request)?;
        if !serializable {
            self.node.read_barrier().await?;
        }
        let caller = callers::caller(&self.node, &metadata).await?;
        caller.access()?.range(Right::Read, &range.range)?;
        let view = self.node.view();
        let reply = view.range(&range)?;
        self.node.check_unchanged(&caller)?;
        let header = header::at(&self.node, view.revision());
        Ok(Response::new(convert::range_response(&reply, header)))
    }

    type RangeStreamStream = BoxStream<'static, Result<RangeStreamResponse, Status>>;

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let serializable = request.serializable;
        let range = convert::range_stream(request)?;
        if !serializable {
            self.node.read_barrier().await?;
        }
        let caller = callers::caller(&self.node, &metadata).await?;
        caller.access()?.range(Right::Read, &range.range)?;
        let view = self.node.view();
        self.node.check_unchanged(&caller)?;
        let node = self.node.clone();
        let answers =
            range_stream::answers(view, range, move |revision| header::at(&node, revision));
        Ok(Response::new(answers.boxed()))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let fences = fence::of(&metadata)?;
        let request_bytes = request.encoded_len();
        let put = convert::put(request)?;
        let caller = callers::caller(&self.node, &metadata).await?;
        let Applied { revision, reply: Reply::Put(reply) } =
            self.write(caller, fences, FencedWrite::Put(put), request_bytes).await?
        else {
            return Err(status::misplaced_reply());
        };
        Ok(Response::new(convert::put_response(&reply, header::at(&self.node, revision))))
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let fences = fence::of(&metadata)?;
        let request_bytes = request.encoded_len();
        let delete = convert::delete_range(request)?;
        let caller = callers::caller(&self.node, &metadata).await?;
        let Applied { revision, reply: Reply::DeleteRange(reply) } =
            self.write(caller, fences, FencedWrite::DeleteRange(delete), request_bytes).await?
        else {
            return Err(status::misplaced_reply());
        };
        Ok(Response::new(convert::delete_range_response(&reply, header::at(&self.node, revision))))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let fences = fence::of(&metadata)?;
        let request_bytes = request.encoded_len();
        let serializable = convert::is_serializable(&request);
        let txn = convert::txn(request, self.node.limits().max_txn_ops)?;
        // With a fence even a read goes through the log: nowhere else can it be told who holds a
        // lock at the very moment of reading.
        if txn.is_read_only() && fences.is_empty() {
            if !serializable {
                self.node.read_barrier().await?;
            }
            let caller = callers::caller(&self.node, &metadata).await?;
            caller.check_reads(&txn)?;
            let view = self.node.view();
            let reply = view.read_txn(&txn)?;
            self.node.check_unchanged(&caller)?;
            let header = header::at(&self.node, view.revision());
            return Ok(Response::new(convert::txn_response(&reply, header)));
        }
        let caller = callers::caller(&self.node, &metadata).await?;
        let Applied { revision, reply: Reply::Txn(reply) } =
            self.write(caller, fences, FencedWrite::Txn(txn), request_bytes).await?
        else {
            return Err(status::misplaced_reply());
        };
        Ok(Response::new(convert::txn_response(&reply, header::at(&self.node, revision))))
    }

    /// `physical` asks to wait until the space is free; it waits for nothing more than the
    /// compaction itself, which is when the old revisions stop being readable.
    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let caller = callers::caller(&self.node, &metadata).await?;
        let compact = Command::Compact { revision: request.revision };
        let applied = self.node.propose_for(caller, compact).await?;
        let header = header::at(&self.node, applied.revision);
        Ok(Response::new(CompactionResponse { header: Some(header) }))
    }
}

impl KvService {
    /// Proposes `write` for `caller` behind `fences`, unless the request it came from, encoded in
    /// `request_bytes`, is larger than the cluster replicates.
    async fn write(
        &self,
        caller: Caller,
        fences: Vec<Fence>,
        write: FencedWrite,
        request_bytes: usize,
    ) -> Result<Applied, Status> {
        convert::check_size(request_bytes, self.node.limits().max_request_bytes)?;
        Ok(self.node.propose_for(caller, fence::guard(fences, write)).await?)
    }
}
