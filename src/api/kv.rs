//! The service KV: reads, writes and transactions on the key space.
//!
//! A read is answered from a view of this member's own state, which for a linearizable one is first
//! known to be recent enough. A write is proposed and answered once this member has applied it.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use prost::Message;
use tonic::{Request, Response, Status};

use crate::machine::{Command, Fence, FencedWrite, Reply};
use crate::node::{Applied, Node};
use crate::pb::etcdserverpb::kv_server::Kv;
use crate::pb::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest, TxnResponse,
};

use super::{convert, fence, header, range_stream, status};

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
        let request = request.into_inner();
        let serializable = request.serializable;
        if !serializable && *self.node.learner().borrow() {
            return Err(status::Refusal::Learner.into());
        }
        let range = convert::range(request)?;
        if !serializable {
            self.node.read_barrier().await?;
        }
        let view = self.node.view();
        let reply = view.range(&range)?;
        let header = header::at(&self.node, view.revision());
        Ok(Response::new(convert::range_response(&reply, header)))
    }

    type RangeStreamStream = BoxStream<'static, Result<RangeStreamResponse, Status>>;

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        let request = request.into_inner();
        let serializable = request.serializable;
        let range = convert::range_stream(request)?;
        if !serializable {
            self.node.read_barrier().await?;
        }
        let node = self.node.clone();
        let answers = range_stream::answers(self.node.view(), range, move |revision| {
            header::at(&node, revision)
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let fences = fence::of(request.metadata())?;
        let request = request.into_inner();
        let request_bytes = request.encoded_len();
        let put = convert::put(request)?;
        let Applied { revision, reply: Reply::Put(reply) } =
            self.write(fences, FencedWrite::Put(put), request_bytes).await?
        else {
            return Err(status::misplaced_reply());
        };
        Ok(Response::new(convert::put_response(&reply, header::at(&self.node, revision))))
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let fences = fence::of(request.metadata())?;
        let request = request.into_inner();
        let request_bytes = request.encoded_len();
        let delete = convert::delete_range(request)?;
        let Applied { revision, reply: Reply::DeleteRange(reply) } =
            self.write(fences, FencedWrite::DeleteRange(delete), request_bytes).await?
        else {
            return Err(status::misplaced_reply());
        };
        Ok(Response::new(convert::delete_range_response(&reply, header::at(&self.node, revision))))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let fences = fence::of(request.metadata())?;
        let request = request.into_inner();
        let request_bytes = request.encoded_len();
        let serializable = convert::is_serializable(&request);
        let txn = convert::txn(request, self.node.limits().max_txn_ops)?;
        // With a fence even a read goes through the log: nowhere else can it be told who holds a
        // lock at the very moment of reading.
        if txn.is_read_only() && fences.is_empty() {
            if !serializable {
                self.node.read_barrier().await?;
            }
            let view = self.node.view();
            let reply = view.read_txn(&txn)?;
            let header = header::at(&self.node, view.revision());
            return Ok(Response::new(convert::txn_response(&reply, header)));
        }
        let Applied { revision, reply: Reply::Txn(reply) } =
            self.write(fences, FencedWrite::Txn(txn), request_bytes).await?
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
        let revision = request.into_inner().revision;
        let applied = self.node.propose(Command::Compact { revision }).await?;
        let header = header::at(&self.node, applied.revision);
        Ok(Response::new(CompactionResponse { header: Some(header) }))
    }
}

impl KvService {
    /// Proposes `write` behind `fences`, unless the request it came from, encoded in
    /// `request_bytes`, is larger than the cluster replicates.
    async fn write(
        &self,
        fences: Vec<Fence>,
        write: FencedWrite,
        request_bytes: usize,
    ) -> Result<Applied, Status> {
        convert::check_size(request_bytes, self.node.limits().max_request_bytes)?;
        Ok(self.node.propose(fence::guard(fences, write)).await?)
    }
}
