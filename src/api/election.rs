//! The service Election.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::concurrency::Queues;
use crate::concurrency::client::{self, EnterFailure};
use crate::concurrency::election::{self, Observer, Seen};
use crate::machine::{Command, Proclaim, Right};
use crate::node::{Caller, Failure, Node, told};
use crate::pb::v3electionpb::election_server::Election;
use crate::pb::v3electionpb::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
    ProclaimResponse, ResignRequest, ResignResponse,
};
use crate::types::LeaseId;

use super::status::{Refusal, as_unknown};
use super::{callers, convert, header, lock};

pub struct ElectionService {
    queues: Queues,
    node: Arc<Node>,
}

impl ElectionService {
    pub fn new(queues: Queues) -> ElectionService {
        let node = queues.node.clone();
        ElectionService { queues, node }
    }

    async fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        callers::caller(&self.node, metadata).await.map_err(as_unknown)
    }

    /// A caller that may see who stands in an election.
    async fn reader(&self, metadata: &MetadataMap, name: &[u8]) -> Result<Caller, Status> {
        let caller = callers::up_to_date(&self.node, metadata).await.map_err(as_unknown)?;
        let access = caller.access().map_err(as_unknown)?;
        access.queue(Right::Read, name).map_err(as_unknown)?;
        Ok(caller)
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
        let keep_while = lock::lease0_life(self.queues.rules, &request);
        let caller = self.caller(request.metadata()).await?;
        let request = request.into_inner();
        let enter = client::Request {
            caller,
            name: request.name.clone(),
            lease: LeaseId(request.lease),
            value: request.value,
            rewrite: true,
            keep_while,
            own: None,
        };
        let granted =
            client::enter(&self.queues, enter).await.map_err(|failure| match failure {
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
        let (metadata, _, request) = request.into_parts();
        let leader = leader_key(request.leader)?;
        let caller = self.caller(&metadata).await?;
        let proclaim = Proclaim {
            key: leader.key,
            create_revision: leader.rev,
            value: request.value,
            lease: LeaseId(leader.lease),
        };
        let proclaimed = client::proclaim(&self.node, caller, proclaim).await;
        let (leads, revision) = proclaimed.map_err(as_unknown)?;
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
        let caller = self.reader(request.metadata(), &request.get_ref().name).await?;
        let name = request.into_inner().name;
        let (leader, revision) = election::leader(&self.node, &name).await.map_err(as_unknown)?;
        self.node.check_unchanged(&caller).map_err(as_unknown)?;
        let record = leader.ok_or(Refusal::NobodyElected)?;
        let header = Some(header::at(&self.node, revision));
        Ok(Response::new(LeaderResponse { header, kv: Some(convert::key_value(&record)) }))
    }

    type ObserveStream = BoxStream<'static, Result<LeaderResponse, Status>>;

    async fn observe(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        // As in etcd: who may not see the election sees nothing of it.
        let Ok(caller) = self.reader(request.metadata(), &request.get_ref().name).await else {
            return Ok(Response::new(futures::stream::empty().boxed()));
        };
        let name = request.into_inner().name;
        let begun = begin(&self.node, &name).await?;
        self.node.check_unchanged(&caller).map_err(as_unknown)?;
        let node = self.node.clone();
        let stopping = node.stopping();
        let answers = futures::stream::unfold(begun, move |mut observer| {
            let (node, name, mut stopping) = (node.clone(), name.clone(), stopping.clone());
            async move {
                let next = async {
                    loop {
                        match observer.next().await {
                            // etcd's Observe says nothing while nobody leads.
                            Some(Seen { leader: None, .. }) => {}
                            Some(Seen { leader: Some(leader), revision, .. }) => {
                                return Ok((leader, revision));
                            }
                            // What it was about to read is compacted: the present will do.
                            None => observer = begin(&node, &name).await?,
                        }
                    }
                };
                let next = tokio::select! {
                    next = next => next,
                    () = told(&mut stopping) => Err(Failure::Stopping.into()),
                };
                let answer = next.map(|(leader, revision)| LeaderResponse {
                    header: Some(header::at(&node, revision)),
                    kv: Some(convert::key_value(&leader)),
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
        let (metadata, _, request) = request.into_parts();
        let leader = leader_key(request.leader)?;
        let caller = self.caller(&metadata).await?;
        let leave = Command::Leave { key: leader.key, create_revision: leader.rev };
        let left = self.node.propose_for(caller, leave).await;
        let revision = left.map_err(as_unknown)?.revision;
        let header = Some(header::at(&self.node, revision));
        Ok(Response::new(ResignResponse { header }))
    }
}

async fn begin(node: &Node, name: &Bytes) -> Result<Observer, Status> {
    Observer::begin(node, name.clone()).await.map_err(as_unknown)
}
