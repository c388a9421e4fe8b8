//! The service Elections of `holdfast.v1`: elections for our own clients.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status};

use crate::concurrency::client;
use crate::concurrency::election::{Observer, Seen, is_attached};
use crate::concurrency::{Queues, locks};
use crate::machine::{Proclaim, QueueKey};
use crate::node::{Failure, Node, told};
use crate::pb::holdfastpb as pb;
use crate::pb::holdfastpb::elections_server::Elections;
use crate::pb::holdfastpb::observe_response;
use crate::types::{LeaseId, Timestamp};

use super::connection::Connection;
use super::locks::convert::{self, Moment, header};
use super::locks::{caller, checked_name, checked_token, own, reader, unchanged, wait_of};
use super::status::{self, LockRefusal};

pub struct ElectionsService {
    queues: Queues,
}

impl ElectionsService {
    pub fn new(queues: Queues) -> ElectionsService {
        ElectionsService { queues }
    }

    fn moment(&self) -> Moment<'_> {
        Moment { node: &self.queues.node }
    }
}

#[tonic::async_trait]
impl Elections for ElectionsService {
    async fn campaign(
        &self,
        request: Request<pb::CampaignRequest>,
    ) -> Result<Response<pb::CampaignResponse>, Status> {
        let client = Connection::of(request.extensions()).peer_text();
        let (metadata, _, request) = request.into_parts();
        let own = own(request.owner, client, request.ttl_seconds)?;
        let name = checked_name(request.name)?;
        let enter = client::Request {
            caller: reader(&self.queues.node, &metadata, &name).await?,
            name,
            lease: LeaseId(request.lease),
            value: request.value,
            rewrite: true,
            keep_while: None,
            own: Some(own),
        };
        let acquired = locks::acquire(&self.queues, enter, wait_of(request.wait_ms)).await;
        let moment = self.moment();
        Ok(Response::new(match acquired.map_err(status::of_lock)? {
            Ok(granted) => pb::CampaignResponse {
                header: header(moment.node, granted.revision),
                elected: true,
                term: granted.create_revision,
                key: granted.key,
                lease: granted.lease.0,
                ttl_seconds: granted.lease_ttl_seconds,
                leader: None,
                position: 0,
            },
            Err(not) => pb::CampaignResponse {
                header: moment.header(),
                elected: false,
                leader: not.holder.as_ref().map(|holder| moment.place(holder, 0, not.now)),
                position: convert::count(not.ahead),
                ..Default::default()
            },
        }))
    }

    async fn proclaim(
        &self,
        request: Request<pb::ProclaimRequest>,
    ) -> Result<Response<pb::ProclaimResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let (name, term) = (checked_name(request.name)?, checked_token(request.term)?);
        let node = &self.queues.node;
        let caller = reader(node, &metadata, &name).await?;
        node.read_barrier().await.map_err(status::of_own)?;
        let first = node.machine().queue(&name, 1).0.pop();
        let leader = first.filter(|first| first.record.create_revision() == term);
        let leader = leader.ok_or(LockRefusal::StaleToken)?;
        let proclaim = Proclaim {
            key: Bytes::copy_from_slice(leader.record.key()),
            create_revision: term,
            value: request.value,
            lease: LeaseId::NONE,
        };
        let proclaimed = client::proclaim(node, caller, proclaim).await;
        let (leads, revision) = proclaimed.map_err(status::of_own)?;
        if !leads {
            return Err(LockRefusal::StaleToken.into());
        }
        Ok(Response::new(pb::ProclaimResponse { header: header(node, revision) }))
    }

    async fn resign(
        &self,
        request: Request<pb::ResignRequest>,
    ) -> Result<Response<pb::ResignResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let (name, term) = (checked_name(request.name)?, checked_token(request.term)?);
        let caller = caller(&self.queues.node, &metadata).await?;
        let resigned = locks::release(&self.queues.node, caller, name, term, None).await;
        let resigned = resigned.map_err(status::of_own)?;
        Ok(Response::new(pb::ResignResponse { header: self.moment().header(), resigned }))
    }

    async fn candidates(
        &self,
        request: Request<pb::CandidatesRequest>,
    ) -> Result<Response<pb::CandidatesResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let name = checked_name(request.name)?;
        let caller = reader(&self.queues.node, &metadata, &name).await?;
        let state = locks::get(&self.queues.node, &name).await.map_err(status::of_own)?;
        unchanged(&self.queues.node, &caller)?;
        let moment = self.moment();
        let leaders = usize::from(state.holder().is_some());
        let waiting = state.queue.iter().enumerate().skip(leaders);
        Ok(Response::new(pb::CandidatesResponse {
            header: moment.header(),
            leader: state.holder().map(|leader| candidate(&moment, leader, 0, state.now)),
            waiting: waiting.map(|(n, key)| candidate(&moment, key, n, state.now)).collect(),
            count: convert::count(state.length - leaders),
        }))
    }

    type ObserveStream = BoxStream<'static, Result<pb::ObserveResponse, Status>>;

    async fn observe(
        &self,
        request: Request<pb::ObserveRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let name = checked_name(request.name)?;
        let node = self.queues.node.clone();
        let caller = reader(&node, &metadata, &name).await?;
        let observer = Observer::begin_after(&node, name.clone(), request.after_revision).await;
        let begun = Some(observer.map_err(status::of_own)?);
        unchanged(&node, &caller)?;
        let answers = futures::stream::unfold(begun, move |observer| {
            let (node, name) = (node.clone(), name.clone());
            async move {
                let mut observer = observer?;
                let mut stopping = node.stopping();
                let next = tokio::select! {
                    next = next(&node, &name, &mut observer) => next,
                    () = told(&mut stopping) => Err(Failure::Stopping),
                };
                Some(match next {
                    Ok(seen) => (Ok(response(&node, &name, seen)), Some(observer)),
                    // What has failed is the last that is said.
                    Err(failure) => (Err(status::of_own(failure)), None),
                })
            }
        });
        Ok(Response::new(answers.boxed()))
    }
}

async fn next(node: &Node, name: &Bytes, observer: &mut Observer) -> Result<Seen, Failure> {
    loop {
        match observer.next().await {
            Some(seen) => return Ok(seen),
            // What it was about to read is compacted: the present will do.
            None => *observer = Observer::begin(node, name.clone()).await?,
        }
    }
}

fn candidate(moment: &Moment<'_>, key: &QueueKey, ahead: usize, now: Timestamp) -> pb::Candidate {
    let place = Some(moment.place(key, ahead, now));
    pb::Candidate { place, value: Bytes::copy_from_slice(key.record.value()) }
}

fn response(node: &Node, name: &Bytes, seen: Seen) -> pb::ObserveResponse {
    use observe_response::Response;
    // A first key without its lease leads nobody.
    let response = match seen.leader.filter(is_attached) {
        None => Response::Vacant(observe_response::Vacant {}),
        Some(record) => {
            let machine = node.machine();
            let (key, value) = record.shared();
            let same = |now: &QueueKey| now.record.create_revision() == record.create_revision();
            let label = machine.queue(name, 1).0.pop().filter(same).and_then(|now| now.label);
            let leader = observe_response::Leader {
                key,
                value,
                term: record.create_revision(),
                lease: record.lease().0,
                owner: label.map(|label| label.owner).unwrap_or_default(),
            };
            if seen.is_new { Response::Leader(leader) } else { Response::Updated(leader) }
        }
    };
    pb::ObserveResponse { header: header(node, seen.revision), response: Some(response) }
}
