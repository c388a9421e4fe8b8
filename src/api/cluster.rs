//! The service Cluster: who is a member.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::node::{Change, ChangeFailure, ChangeRefusal, Node};
use crate::pb::etcdserverpb::cluster_server::Cluster;
use crate::pb::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse,
    MemberPromoteRequest, MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse,
    MemberUpdateRequest, MemberUpdateResponse, ResponseHeader,
};
use crate::types::MemberId;

use super::{callers, convert, header};

pub struct ClusterService {
    node: Arc<Node>,
}

impl ClusterService {
    pub fn new(node: Arc<Node>) -> ClusterService {
        ClusterService { node }
    }

    async fn change(
        &self,
        change: Change,
    ) -> Result<(Option<ResponseHeader>, Vec<Member>), ChangeFailure> {
        let changed = self.node.change_members(change).await?;
        let header = header::without_revision(&self.node);
        Ok((Some(header), convert::members(changed.members)))
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_add(
        &self,
        request: Request<MemberAddRequest>,
    ) -> Result<Response<MemberAddResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let Some(peer_urls) = convert::peer_urls(&request.peer_ur_ls) else {
            return Err(ChangeFailure::from(ChangeRefusal::BadUrls).into());
        };
        callers::admin(&self.node, &metadata).await?;
        let change = Change::Add { peer_urls, learner: request.is_learner };
        let changed = self.node.change_members(change).await?;
        let members = convert::members(changed.members);
        Ok(Response::new(MemberAddResponse {
            header: Some(header::without_revision(&self.node)),
            member: members.iter().find(|member| member.id == changed.id.0).cloned(),
            members,
        }))
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        callers::admin(&self.node, request.metadata()).await?;
        let (header, members) =
            self.change(Change::Remove { id: MemberId(request.into_inner().id) }).await?;
        Ok(Response::new(MemberRemoveResponse { header, members }))
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        callers::admin(&self.node, request.metadata()).await?;
        let request = request.into_inner();
        // As in etcd an unknown member is complained of first, so the rules see unusable URLs, too.
        let peer_urls = convert::peer_urls(&request.peer_ur_ls).unwrap_or_default();
        let change = Change::Update { id: MemberId(request.id), peer_urls };
        let (header, members) = self.change(change).await?;
        Ok(Response::new(MemberUpdateResponse { header, members }))
    }

    /// The members this one knows of, even without a quorum, unless the caller asks for a
    /// linearizable answer.
    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        callers::caller(&self.node, request.metadata()).await?.check_user()?;
        if request.into_inner().linearizable {
            self.node.read_barrier().await?;
        }
        Ok(Response::new(MemberListResponse {
            header: Some(header::without_revision(&self.node)),
            members: convert::members(self.node.members()),
        }))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        callers::admin(&self.node, request.metadata()).await?;
        let (header, members) =
            self.change(Change::Promote { id: MemberId(request.into_inner().id) }).await?;
        Ok(Response::new(MemberPromoteResponse { header, members }))
    }
}
