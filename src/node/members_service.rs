//! What other members, and those who want to be, ask about the cluster's members.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::Node;
use super::joining::Introduction;
use super::membership::Change;
use crate::pb::peer::{Frame, introduction_server, membership_server};
use crate::raft::frame;

pub struct MembersService {
    pub node: Arc<Node>,
}

#[tonic::async_trait]
impl membership_server::Membership for MembersService {
    async fn ping(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        frame::decode::<()>(request.get_ref())?;
        frame::encode(&()).map(Response::new)
    }

    async fn change(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let change: Change = frame::decode(request.get_ref())?;
        let node = self.node.clone();
        // Goes on when the member that asked does not wait for it: its answer says whether it was
        // made, and a change must not stop half-way through its rules.
        let made = tokio::spawn(async move { node.change_here(&change).await });
        let verdict = made.await.map_err(|_| Status::unavailable("stopping"))?;
        frame::encode(&verdict).map(Response::new)
    }
}

/// Open to whoever reaches the peer port: it tells nothing that a call for the members would not.
pub struct IntroductionService {
    pub node: Arc<Node>,
}

#[tonic::async_trait]
impl introduction_server::Introduction for IntroductionService {
    async fn introduce(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        frame::decode::<()>(request.get_ref())?;
        let at = self.node.shared.membership.borrow().log_id().map(|log_id| log_id.index);
        let Some(at) = at else {
            return Err(Status::unavailable("this member does not know the others yet"));
        };
        let (cluster, members) = (self.node.identity.cluster_id, self.node.members());
        let voters = self.node.voters_of_the_log();
        frame::encode(&Introduction { cluster, at, members, voters }).map(Response::new)
    }
}
