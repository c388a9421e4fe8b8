//! The service Maintenance: what operators ask of one member.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::backup::save::Saves;
use crate::machine::{Alarm, Command, Reply};
use crate::node::{Applied, Node};
use crate::pb::etcdserverpb::downgrade_request::DowngradeAction;
use crate::pb::etcdserverpb::maintenance_server::Maintenance;
use crate::pb::etcdserverpb::{
    AlarmRequest, AlarmResponse, DefragmentRequest, DefragmentResponse, DowngradeInfo,
    DowngradeRequest, DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse,
    MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest, SnapshotResponse, StatusRequest,
    StatusResponse,
};
use crate::types::MemberId;

use super::convert::{self, AlarmAsked};
use super::status::{self, Refusal};
use super::{ETCD_VERSION, callers, header};

pub struct MaintenanceService {
    node: Arc<Node>,
    saves: Saves,
}

impl MaintenanceService {
    pub fn new(node: Arc<Node>) -> MaintenanceService {
        MaintenanceService { node, saves: Saves::default() }
    }

    /// Of the calls whose refusals etcd words otherwise.
    async fn check_admin(&self, metadata: &MetadataMap) -> Result<(), Status> {
        callers::admin(&self.node, metadata).await.map_err(status::of_maintenance)
    }
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    async fn alarm(
        &self,
        request: Request<AlarmRequest>,
    ) -> Result<Response<AlarmResponse>, Status> {
        let caller = callers::caller(&self.node, request.metadata()).await?;
        match convert::alarm(request.get_ref())? {
            AlarmAsked::List(kind) => {
                caller.check_user()?;
                self.node.read_barrier().await?;
                let header = header::current(&self.node);
                let machine = self.node.machine();
                let alarms = machine.alarms().filter(|it| kind.is_none_or(|kind| it.kind == kind));
                Ok(Response::new(convert::alarm_response(alarms, header)))
            }
            AlarmAsked::Nothing => {
                caller.check_admin()?;
                self.node.read_barrier().await?;
                let header = header::current(&self.node);
                Ok(Response::new(convert::alarm_response([], header)))
            }
            AlarmAsked::Change(action) => {
                let Applied { revision, reply: Reply::Alarm(alarm) } =
                    self.node.propose_for(caller, Command::Alarm(action)).await?
                else {
                    return Err(status::misplaced_reply());
                };
                let header = header::at(&self.node, revision);
                Ok(Response::new(convert::alarm_response(alarm, header)))
            }
        }
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        callers::admin(&self.node, request.metadata()).await?;
        let member = self.node.status();
        let leaderless = member.leader.is_none();
        let no_leader = || Status::from(Refusal::NoLeader).message().to_owned();
        let alarms: Vec<Alarm> = self.node.machine().alarms().collect();
        let alarms = alarms.into_iter().map(status::of_alarm);
        let disk = status::of_disk(self.node.disk());
        let errors = leaderless.then(no_leader).into_iter().chain(alarms).chain(disk).collect();
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
            db_size_quota: member.quota_bytes.map_or(0, size),
            is_learner: member.is_learner,
            storage_version: ETCD_VERSION.to_owned(),
            downgrade_info: Some(DowngradeInfo::default()),
        }))
    }

    /// The engine gives space back by itself. This makes what it has given back so far show in the
    /// sizes; nobody waits for it.
    async fn defragment(
        &self,
        request: Request<DefragmentRequest>,
    ) -> Result<Response<DefragmentResponse>, Status> {
        self.check_admin(request.metadata()).await?;
        self.node.flush_state().await?;
        Ok(Response::new(DefragmentResponse { header: None }))
    }

    /// etcd hashes its file, which differs from member to member. We hash the history that can be
    /// read now, which does not.
    async fn hash(&self, request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        self.check_admin(request.metadata()).await?;
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
        self.check_admin(request.metadata()).await?;
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
        request: Request<SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        self.check_admin(request.metadata()).await?;
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
        callers::admin(&self.node, request.metadata()).await?;
        self.node.move_leader(MemberId(request.into_inner().target_id)).await?;
        // As in etcd: without a header.
        Ok(Response::new(MoveLeaderResponse::default()))
    }

    async fn downgrade(
        &self,
        request: Request<DowngradeRequest>,
    ) -> Result<Response<DowngradeResponse>, Status> {
        callers::admin(&self.node, request.metadata()).await?;
        let request = request.into_inner();
        match DowngradeAction::try_from(request.action) {
            Ok(DowngradeAction::Validate) => {
                self.node.read_barrier().await?;
                check_downgrade(&request.version)?;
                let header = Some(header::current(&self.node));
                Ok(Response::new(DowngradeResponse { header, version: ETCD_VERSION.to_owned() }))
            }
            Ok(DowngradeAction::Enable) => {
                check_downgrade(&request.version)?;
                Err(status::not_implemented("Downgrade ENABLE"))
            }
            // None can be begun.
            Ok(DowngradeAction::Cancel) => Err(status::no_downgrade_job()),
            Err(_) => Err(status::unknown_downgrade_action()),
        }
    }
}

/// Refuses a `target` that is not the release before the announced one, as etcd does.
fn check_downgrade(target: &str) -> Result<(), Status> {
    let target = minor(target).ok_or_else(status::malformed_downgrade_target)?;
    let announced = minor(ETCD_VERSION).map(|(major, minor)| (major, minor.checked_sub(1)));
    if announced != Some((target.0, Some(target.1))) {
        return Err(status::invalid_downgrade_target());
    }
    Ok(())
}

/// Major and minor version of `3.4`, `3.4.0` and `3.4.0-rc.1`.
fn minor(version: &str) -> Option<(u64, u64)> {
    let number = |text: &str| {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| plain)
    };
    let (version, _metadata) = version.split_once('+').unwrap_or((version, ""));
    let (version, _candidate) = version.split_once('-').unwrap_or((version, ""));
    let mut parts = version.split('.');
    let (major, minor) = (number(parts.next()?)?, number(parts.next()?)?);
    match (parts.next().map(number), parts.next()) {
        (None | Some(Some(_)), None) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_downgrade_goes_to_the_release_before() {
        let refused = |target| check_downgrade(target).err().map(|it| it.message().to_owned());
        for target in ["3.6", "3.6.0", "3.6.9", "3.6.0-rc.1"] {
            assert_eq!(refused(target), None, "{target}");
        }
        for target in ["3.7", "3.5", "3.5.0", "2.6", "4.6", "3.8"] {
            let text = "etcdserver: invalid downgrade target version";
            assert_eq!(refused(target).as_deref(), Some(text), "{target}");
        }
        for target in ["", "3", "x", "3.x", "3.6.0.1", "+3.6", "3.6.", "3.-6"] {
            let text = "etcdserver: wrong downgrade target version format";
            assert_eq!(refused(target).as_deref(), Some(text), "{target}");
        }
    }
}
