//! The service Election.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status};

use crate::concurrency::client::{self, EnterFailure};
use crate::concurrency::election::{self, Observer};
use crate::machine::{
    Command, Compare, CompareResult, CompareTarget, DeleteRange, Put, Reply, Txn, TxnOp,
};
use crate::node::{Failure, Node, told};
use crate::pb::v3electionpb::election_server::Election;
use crate::pb::v3electionpb::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
    ProclaimResponse, ResignRequest, ResignResponse,
};
use crate::types::{KeyRange, LeaseId};

use super::status::{Refusal, as_unknown};
use super::{convert, header, lock};

pub struct ElectionService {
    node: Arc<Node>,
}

impl ElectionService {
    pub fn new(node: Arc<Node>) -> ElectionService {
        ElectionService { node }
    }

    /// Runs `op` if `key` is still the one created at `revision`. Returns whether it was, and the
    /// store's revision.
    async fn as_leader(
        &self,
        key: &Bytes,
        revision: i64,
        op: TxnOp,
    ) -> Result<(bool, i64), Failure> {
        let compare = Compare {
            range: KeyRange::One(key.clone()),
            result: CompareResult::Equal,
            target: CompareTarget::Create(revision),
        };
        let txn = Txn { compares: vec![compare], success: vec![op], failure: Vec::new() };
        let applied = self.node.propose(Command::Txn(txn)).await?;
        match applied.reply {
            Reply::Txn(reply) => Ok((reply.succeeded, applied.revision)),
            other => unreachable!("a transaction was answered with {other:?}"),
        }
    }
}

/// The leader key a request speaks as.
fn leader_key(leader: Option<LeaderKey>) -> Result<LeaderKey, Status> {
    let leader = leader.ok_or(Refusal::LeaderMissing)?;
    if leader.key.is_empty() {
        return Err(as_unknown(Refusal::EmptyKey));
    }
    Ok(leader)
}

#[tonic::async_trait]
impl Election for ElectionService {
    async fn campaign(
        &self,
        request: Request<CampaignRequest>,
    ) -> Result<Response<CampaignResponse>, Status> {
        let request = request.into_inner();
        let enter = client::Request {
            name: request.name.clone(),
            lease: LeaseId(request.lease),
            value: request.value,
            rewrite: true,
        };
        let granted = client::enter(&self.node, enter).await.map_err(|failure| match failure {
            EnterFailure::Expired => Refusal::NotElected.into(),
            failure => lock::entering(failure),
        })?;
        let leader = LeaderKey {
            name: request.name,
            key: granted.key.clone(),
            rev: granted.create_revision,
            lease: granted.lease.0,
        };
        let header = Some(header::at(&self.node, granted.create_revision));
        let mut response = Response::new(CampaignResponse { header, leader: Some(leader) });
        lock::describe(response.metadata_mut(), &granted);
        Ok(response)
    }

    async fn proclaim(
        &self,
        request: Request<ProclaimRequest>,
    ) -> Result<Response<ProclaimResponse>, Status> {
        let request = request.into_inner();
        let leader = leader_key(request.leader)?;
        let put = TxnOp::Put(Put {
            key: leader.key.clone(),
            value: Some(request.value),
            // A key without a lease would lead for ever: without one given, it keeps its own.
            lease: (leader.lease != 0).then_some(LeaseId(leader.lease)),
            prev_kv: false,
        });
        let (leads, revision) =
            self.as_leader(&leader.key, leader.rev, put).await.map_err(as_unknown)?;
        if !leads {
            return Err(Refusal::NotElected.into());
        }
        let header = Some(header::at(&self.node, revision));
        Ok(Response::new(ProclaimResponse { header }))
    }

    async fn leader(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<LeaderResponse>, Status> {
        let name = request.into_inner().name;
        let (leader, revision) = election::leader(&self.node, &name).await.map_err(as_unknown)?;
        let record = leader.ok_or(Refusal::NobodyElected)?;
        let header = Some(header::at(&self.node, revision));
        Ok(Response::new(LeaderResponse { header, kv: Some(convert::key_value(&record)) }))
    }

    type ObserveStream = BoxStream<'static, Result<LeaderResponse, Status>>;

    async fn observe(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let name = request.into_inner().name;
        let begun = begin(&self.node, &name).await?;
        let node = self.node.clone();
        let stopping = node.stopping();
        let answers = futures::stream::unfold(begun, move |mut observer| {
            let (node, name, mut stopping) = (node.clone(), name.clone(), stopping.clone());
            async move {
                let next = async {
                    loop {
                        match observer.next().await {
                            Some(leader) => return Ok(leader),
                            // What it was about to read is compacted: the present will do.
                            None => observer = begin(&node, &name).await?,
                        }
                    }
                };
                let next = tokio::select! {
                    next = next => next,
                    () = told(&mut stopping) => Err(Failure::Stopping.into()),
                };
                let answer = next.map(|leader| LeaderResponse {
                    header: Some(header::at(&node, leader.revision)),
                    kv: Some(convert::key_value(&leader.record)),
                });
                Some((answer, observer))
            }
        });
        // The first failure is the last that is said.
        let mut failed = false;
        let answers = answers.take_while(move |answer| {
            let go_on = !failed;
            failed |= answer.is_err();
            async move { go_on }
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn resign(
        &self,
        request: Request<ResignRequest>,
    ) -> Result<Response<ResignResponse>, Status> {
        let leader = leader_key(request.into_inner().leader)?;
        let range = KeyRange::One(leader.key.clone());
        let delete = TxnOp::DeleteRange(DeleteRange { range, prev_kv: false });
        let (_, revision) =
            self.as_leader(&leader.key, leader.rev, delete).await.map_err(as_unknown)?;
        let header = Some(header::at(&self.node, revision));
        Ok(Response::new(ResignResponse { header }))
    }
}

async fn begin(node: &Node, name: &Bytes) -> Result<Observer, Status> {
    Observer::begin(node, name.clone()).await.map_err(as_unknown)
}
