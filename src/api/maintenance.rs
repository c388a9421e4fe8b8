//! The service Maintenance: what operators ask of one member.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status};

use crate::backup::save::Saves;
use crate::node::Node;
use crate::pb::etcdserverpb::alarm_request::AlarmAction;
use crate::pb::etcdserverpb::maintenance_server::Maintenance;
use crate::pb::etcdserverpb::{
    AlarmRequest, AlarmResponse, DefragmentRequest, DefragmentResponse, DowngradeInfo,
    DowngradeRequest, DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse,
    MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest, SnapshotResponse, StatusRequest,
    StatusResponse,
};
use crate::types::MemberId;

use super::status::{self, Refusal};
use super::{ETCD_VERSION, header};

pub struct MaintenanceService {
    node: Arc<Node>,
    saves: Saves,
}

impl MaintenanceService {
    pub fn new(node: Arc<Node>) -> MaintenanceService {
        MaintenanceService { node, saves: Saves::default() }
    }
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    /// Alarms cannot be raised yet, so there are none to list.
    async fn alarm(
        &self,
        request: Request<AlarmRequest>,
    ) -> Result<Response<AlarmResponse>, Status> {
        let action = request.into_inner().action;
        match AlarmAction::try_from(action) {
            Ok(AlarmAction::Get) => {
                let header = Some(header::current(&self.node));
                Ok(Response::new(AlarmResponse { header, alarms: Vec::new() }))
            }
            Ok(AlarmAction::Activate) => Err(status::not_implemented("Alarm ACTIVATE")),
            Ok(AlarmAction::Deactivate) => Err(status::not_implemented("Alarm DEACTIVATE")),
            Err(_) => Err(status::unknown_alarm_action(action)),
        }
    }

    async fn status(
        &self,
        _request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let member = self.node.status();
        let errors = match member.leader {
            Some(_) => Vec::new(),
            None => vec![Status::from(Refusal::NoLeader).message().to_owned()],
        };
        let size = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        Ok(Response::new(StatusResponse {
            header: Some(header::current(&self.node)),
            version: ETCD_VERSION.to_owned(),
            db_size: size(member.db_size_bytes),
            leader: member.leader.map_or(0, |leader| leader.0),
            raft_index: member.raft_index,
            raft_term: member.raft_term,
            raft_applied_index: member.applied_index,
            errors,
            db_size_in_use: size(member.db_size_in_use_bytes),
            is_learner: member.is_learner,
            storage_version: ETCD_VERSION.to_owned(),
            downgrade_info: Some(DowngradeInfo::default()),
            ..StatusResponse::default()
        }))
    }

    async fn defragment(
        &self,
        _request: Request<DefragmentRequest>,
    ) -> Result<Response<DefragmentResponse>, Status> {
        Err(status::not_implemented("Defragment"))
    }

    /// etcd hashes its file, which differs from member to member. We hash the history that can be
    /// read now, which does not.
    async fn hash(&self, _request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        let hashed = self.node.hash_kv(0).await?;
        Ok(Response::new(HashResponse {
            header: Some(header::current(&self.node)),
            hash: hashed.hash,
        }))
    }

    async fn hash_kv(
        &self,
        request: Request<HashKvRequest>,
    ) -> Result<Response<HashKvResponse>, Status> {
        let revision = request.into_inner().revision;
        let hashed = self.node.hash_kv(revision).await?;
        Ok(Response::new(HashKvResponse {
            header: Some(header::current(&self.node)),
            hash: hashed.hash,
            compact_revision: hashed.compact_revision,
            hash_revision: hashed.hash_revision,
        }))
    }

    type SnapshotStream = BoxStream<'static, Result<SnapshotResponse, Status>>;

    /// The state applied on this member, as a file of our own. As in etcd nobody else is asked.
    async fn snapshot(
        &self,
        _request: Request<SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let pieces = self.saves.begin(&self.node)?;
        let answers = pieces.map(|piece| {
            let piece = piece?;
            Ok(SnapshotResponse {
                header: None,
                remaining_bytes: piece.remaining_bytes,
                blob: piece.bytes,
                version: ETCD_VERSION.to_owned(),
            })
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn move_leader(
        &self,
        request: Request<MoveLeaderRequest>,
    ) -> Result<Response<MoveLeaderResponse>, Status> {
        self.node.move_leader(MemberId(request.into_inner().target_id)).await?;
        // As in etcd: without a header.
        Ok(Response::new(MoveLeaderResponse::default()))
    }

    async fn downgrade(
        &self,
        _request: Request<DowngradeRequest>,
    ) -> Result<Response<DowngradeResponse>, Status> {
        Err(status::not_implemented("Downgrade"))
    }
}
