//! Lock and Campaign calls that other members forward to the leader.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status};

use super::server::{self, Call};
use crate::node::Node;
use crate::pb::peer::{Frame, queue_server};
use crate::raft::frame;

pub struct QueueService {
    pub node: Arc<Node>,
}

#[tonic::async_trait]
impl queue_server::Queue for QueueService {
    type EnterStream = BoxStream<'static, Result<Frame, Status>>;

    async fn enter(&self, request: Request<Frame>) -> Result<Response<Self::EnterStream>, Status> {
        let call: Call = frame::decode(request.get_ref())?;
        let steps = server::enter(self.node.clone(), call).map(|step| frame::encode(&step));
        Ok(Response::new(steps.boxed()))
    }
}
