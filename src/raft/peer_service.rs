//! What the other members' openraft asks of ours.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use openraft::raft::AppendEntriesRequest;
use tonic::{Request, Response, Status, Streaming};

use super::applier::Applier;
use super::frame;
use super::snapshot;
use super::types::Raft;
use crate::pb::peer::Frame;
use crate::pb::peer::raft_server;
use crate::storage::Home;

pub type RaftHandle = openraft::Raft<Raft, Applier>;

pub struct PeerService {
    pub raft: RaftHandle,
    pub home: Arc<Home>,
}

fn unavailable(error: impl std::fmt::Display) -> Status {
    Status::unavailable(error.to_string())
}

async fn next_append(
    frames: &mut Streaming<Frame>,
) -> Result<Option<AppendEntriesRequest<Raft>>, Status> {
    match frames.message().await? {
        Some(frame) => frame::decode(&frame).map(Some),
        None => Ok(None),
    }
}

#[tonic::async_trait]
impl raft_server::Raft for PeerService {
    type AppendStream = BoxStream<'static, Result<Frame, Status>>;

    async fn append(
        &self,
        request: Request<Streaming<Frame>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        // openraft's input has no room for an error. A damaged request ends the stream, and the
        // leader opens another.
        let requests = futures::stream::unfold(request.into_inner(), |mut frames| async move {
            match next_append(&mut frames).await {
                Ok(request) => request.map(|request| (request, frames)),
                Err(status) => {
                    tracing::debug!(%status, "append stream ended");
                    None
                }
            }
        });
        let answers = self.raft.stream_append(requests).map(|answer| match answer {
            Ok(answer) => frame::encode(&answer),
            Err(fatal) => Err(unavailable(fatal)),
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn vote(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let answer = self.raft.vote(frame::decode(request.get_ref())?).await;
        frame::encode(&answer.map_err(unavailable)?).map(Response::new)
    }

    async fn pre_vote(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let answer = self.raft.pre_vote(frame::decode(request.get_ref())?).await;
        frame::encode(&answer.map_err(unavailable)?).map(Response::new)
    }

    async fn transfer_leader(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let request = frame::decode(request.get_ref())?;
        let answer = self.raft.handle_transfer_leader(request).await;
        frame::encode(&answer.map_err(unavailable)?).map(Response::new)
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<Frame>>,
    ) -> Result<Response<Frame>, Status> {
        let (vote, snapshot) = snapshot::receive(request.into_inner(), self.home.clone()).await?;
        let answer = self.raft.install_full_snapshot(vote, snapshot).await;
        frame::encode(&answer.map_err(unavailable)?).map(Response::new)
    }
}
