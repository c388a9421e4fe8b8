//! The waits that other members ask of the leader.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::server::{self, Place};
use crate::node::Node;
use crate::pb::peer::{Frame, queue_server};
use crate::raft::frame;

pub struct QueueService {
    pub node: Arc<Node>,
}

#[tonic::async_trait]
impl queue_server::Queue for QueueService {
    async fn wait(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let place: Place = frame::decode(request.get_ref())?;
        frame::encode(&server::wait(&self.node, &place).await).map(Response::new)
    }
}
