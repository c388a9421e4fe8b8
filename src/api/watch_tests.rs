//! The stream protocol, through the generated client and server.

use std::future::Future;

use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Code;

use super::*;
use crate::pb::etcdserverpb::watch_client::WatchClient;
use crate::pb::etcdserverpb::watch_server::WatchServer;
use crate::pb::etcdserverpb::{WatchCancelRequest, WatchProgressRequest};
use crate::pb::mvccpb;
use crate::watch::testing::{Fixture, all, one};

const MAX_REQUEST_BYTES: usize = 1 << 20;

struct Server {
    fixture: Fixture,
    service: WatchService,
    leader: watch::Sender<bool>,
}

impl Server {
    fn new() -> Server {
        let fixture = Fixture::new();
        let leader = watch::Sender::new(true);
        let service = WatchService {
            hub: fixture.hub.clone(),
            store: fixture.store.clone(),
            header: Arc::new(|revision| ResponseHeader {
                cluster_id: 7,
                member_id: 8,
                revision,
                raft_term: 9,
            }),
            authorize: Arc::new(|metadata, range| {
                if metadata.get("token").is_none() && range.start() == "secret" {
                    return Err(Status::permission_denied("etcdserver: permission denied"));
                }
                Ok(())
            }),
            arrive: Arc::new(|_| Box::pin(async {})),
            has_leader: leader.subscribe(),
            max_request_bytes: MAX_REQUEST_BYTES,
            packed_events: Arc::default(),
            progress_interval: Duration::from_millis(30),
        };
        Server { fixture, service, leader }
    }

    async fn call(&self) -> Call {
        self.call_with(&[]).await.unwrap()
    }

    async fn call_with(&self, metadata: &[(&'static str, &str)]) -> Result<Call, Status> {
        let (requests, receiver) = mpsc::unbounded_channel();
        let mut request = Request::new(UnboundedReceiverStream::new(receiver));
        for (name, value) in metadata {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        let mut client = WatchClient::new(WatchServer::new(self.service.clone()));
        let responses = client.watch(request).await?.into_inner();
        Ok(Call { requests: Some(requests), responses })
    }
}

struct Call {
    requests: Option<mpsc::UnboundedSender<WatchRequest>>,
    responses: Streaming<WatchResponse>,
}

impl Call {
    fn send(&self, request_union: Option<RequestUnion>) {
        self.requests.as_ref().unwrap().send(WatchRequest { request_union }).unwrap();
    }

    fn cancel(&self, watch_id: i64) {
        self.send(Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })));
    }

    fn ask_for_progress(&self) {
        self.send(Some(RequestUnion::ProgressRequest(WatchProgressRequest {})));
    }

    async fn create(&mut self, request: WatchCreateRequest) -> WatchResponse {
        self.send(Some(RequestUnion::CreateRequest(request)));
        self.next().await
    }

    async fn next(&mut self) -> WatchResponse {
        within(self.responses.message()).await.unwrap().expect("the stream goes on")
    }

    async fn end(&mut self) -> Status {
        within(self.responses.message()).await.unwrap_err()
    }

    async fn silent(&mut self) {
        let wait = Duration::from_millis(50);
        tokio::time::timeout(wait, self.responses.message()).await.unwrap_err();
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(5), future).await.expect("an answer in time")
}

fn on(key: &str) -> WatchCreateRequest {
    WatchCreateRequest { key: key.to_owned().into(), ..WatchCreateRequest::default() }
}

fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { cluster_id: 7, member_id: 8, revision, raft_term: 9 })
}

fn created(watch_id: i64, revision: i64) -> WatchResponse {
    let header = header(revision);
    WatchResponse { header, watch_id, created: true, ..WatchResponse::default() }
}

fn refused(revision: i64, reason: &str) -> WatchResponse {
    WatchResponse {
        header: header(revision),
        watch_id: -1,
        created: true,
        canceled: true,
        cancel_reason: reason.to_owned(),
        ..WatchResponse::default()
    }
}

/// `REVISION KEY` of each event, deletes with a minus sign in front of the key.
fn events(response: &WatchResponse) -> Vec<String> {
    let show = |event: &mvccpb::Event| {
        let kv = event.kv.as_ref().unwrap();
        let sign = if event.r#type() == mvccpb::event::EventType::Delete { "-" } else { "" };
        format!("{} {sign}{}", kv.mod_revision, String::from_utf8_lossy(&kv.key))
    };
    response.events.iter().map(show).collect()
}

#[tokio::test]
async fn a_created_watch_is_acknowledged_at_the_current_revision_before_its_events() {
    let mut server = Server::new();
    server.fixture.put("a", "1");
    server.fixture.put("a", "2");
    let mut call = server.call().await;
    let answer = call.create(WatchCreateRequest { start_revision: 2, ..on("a") }).await;
    assert_eq!(answer, created(0, 3));
    let answer = call.next().await;
    assert_eq!(events(&answer), ["2 a", "3 a"]);
    assert_eq!(answer.header, header(3));
    let answer = call.create(WatchCreateRequest { start_revision: 99, ..on("a") }).await;
    assert_eq!(answer, created(1, 3));
}

#[tokio::test]
async fn events_carry_whole_pairs_and_deletes_only_key_and_revision() {
    let mut server = Server::new();
    let mut call = server.call().await;
    call.create(WatchCreateRequest { prev_kv: true, ..on("a") }).await;
    server.fixture.put("a", "1");
    server.fixture.delete(one("a"));
    let answer = call.next().await;
    assert_eq!((answer.watch_id, answer.created, answer.canceled), (0, false, false));
    let kv = mvccpb::KeyValue {
        key: "a".into(),
        value: "1".into(),
        create_revision: 2,
        mod_revision: 2,
        version: 1,
        lease: 0,
    };
    let put = mvccpb::Event { r#type: 0, kv: Some(kv.clone()), prev_kv: None };
    let gone = mvccpb::KeyValue { key: "a".into(), mod_revision: 3, ..mvccpb::KeyValue::default() };
    let delete = mvccpb::Event { r#type: 1, kv: Some(gone), prev_kv: Some(kv) };
    assert_eq!(answer.events, [put, delete]);
}

#[tokio::test]
async fn an_empty_key_means_the_first_key_or_all_of_them() {
    let mut server = Server::new();
    let mut call = server.call().await;
    let everything = WatchCreateRequest { range_end: Bytes::from_static(&[0]), ..on("") };
    assert_eq!(call.create(everything).await, created(0, 1));
    assert_eq!(call.create(on("")).await, created(1, 1));
    server.fixture.put("a", "1");
    let answer = call.next().await;
    assert_eq!((answer.watch_id, events(&answer)), (0, vec!["2 a".to_owned()]));
    call.silent().await;
}

#[tokio::test]
async fn refused_watches_are_created_and_canceled_at_once() {
    let mut server = Server::new();
    server.fixture.put("a", "1");
    let mut call = server.call().await;
    let numbered = |watch_id| WatchCreateRequest { watch_id, ..on("a") };
    assert_eq!(call.create(numbered(5)).await, created(5, 2));
    assert_eq!(call.create(numbered(-3)).await, created(-3, 2));
    assert_eq!(
        call.create(numbered(5)).await,
        refused(2, "mvcc: duplicate watch ID provided on the WatchStream")
    );
    let empty = WatchCreateRequest { range_end: "a".into(), ..on("b") };
    assert_eq!(call.create(empty).await, refused(2, "mvcc: watcher range is empty"));
    assert_eq!(
        call.create(WatchCreateRequest { start_revision: -1, ..on("a") }).await,
        refused(2, "etcdserver: mvcc: required revision has been compacted")
    );
    assert_eq!(
        call.create(on("secret")).await,
        refused(2, "rpc error: code = PermissionDenied desc = etcdserver: permission denied")
    );
    server.fixture.put("a", "2");
    assert_eq!(events(&call.next().await), ["3 a"], "the watches before live on");
}

#[tokio::test]
async fn a_token_that_allows_it_opens_the_watch() {
    let server = Server::new();
    let mut call = server.call_with(&[("token", "root.1")]).await.unwrap();
    assert_eq!(call.create(on("secret")).await, created(0, 1));
}

#[tokio::test]
async fn a_cancel_is_answered_without_a_reason_and_an_unknown_one_not_at_all() {
    let mut server = Server::new();
    let mut call = server.call().await;
    call.create(on("a")).await;
    server.fixture.put("b", "1");
    call.cancel(3);
    call.send(None);
    call.cancel(0);
    let canceled = WatchResponse { header: header(2), canceled: true, ..WatchResponse::default() };
    assert_eq!(call.next().await, canceled);
    call.cancel(0);
    server.fixture.put("a", "1");
    call.silent().await;
}

#[tokio::test]
async fn a_compacted_start_is_created_first_and_then_ended_with_the_revision() {
    let mut server = Server::new();
    for value in ["1", "2", "3"] {
        server.fixture.put("a", value);
    }
    server.fixture.compact(3);
    let mut call = server.call().await;
    let answer = call.create(WatchCreateRequest { start_revision: 2, ..on("a") }).await;
    assert_eq!(answer, created(0, 4));
    let compacted = WatchResponse {
        header: header(0),
        canceled: true,
        compact_revision: 3,
        ..WatchResponse::default()
    };
    assert_eq!(call.next().await, compacted);
    let again = WatchCreateRequest { start_revision: 3, ..on("a") };
    assert_eq!(call.create(again).await, created(1, 4));
    assert_eq!(events(&call.next().await), ["3 a", "4 a"]);
}

#[tokio::test]
async fn unknown_filters_are_ignored() {
    let mut server = Server::new();
    let mut call = server.call().await;
    call.create(WatchCreateRequest { filters: vec![17, 1], ..on("a") }).await;
    server.fixture.put("a", "1");
    server.fixture.delete(one("a"));
    assert_eq!(events(&call.next().await), ["2 a"]);
    call.silent().await;
}

#[tokio::test]
async fn progress_of_the_stream_is_for_no_watch() {
    let mut server = Server::new();
    let mut call = server.call().await;
    call.ask_for_progress();
    call.silent().await;
    call.create(on("a")).await;
    server.fixture.put("b", "1");
    call.ask_for_progress();
    let progress = WatchResponse { header: header(2), watch_id: -1, ..WatchResponse::default() };
    assert_eq!(call.next().await, progress);
}

#[tokio::test]
async fn progress_of_a_watch_has_its_id() {
    let mut server = Server::new();
    let mut call = server.call().await;
    call.create(WatchCreateRequest { progress_notify: true, watch_id: 4, ..on("a") }).await;
    server.fixture.put("b", "1");
    let progress = WatchResponse { header: header(2), watch_id: 4, ..WatchResponse::default() };
    assert_eq!(call.next().await, progress);
    assert_eq!(call.next().await, progress);
}

#[tokio::test]
async fn events_go_on_after_the_client_half_closed() {
    let mut server = Server::new();
    let mut call = server.call().await;
    call.create(on("a")).await;
    call.requests = None;
    call.silent().await;
    server.fixture.put("a", "1");
    assert_eq!(events(&call.next().await), ["2 a"]);
}

#[tokio::test]
async fn without_a_leader_only_streams_that_ask_for_one_end() {
    let mut server = Server::new();
    let mut patient = server.call().await;
    let mut demanding = server.call_with(&[("hasleader", "true")]).await.unwrap();
    demanding.create(on("a")).await;
    patient.create(on("a")).await;
    server.leader.send_replace(false);
    let status = demanding.end().await;
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));
    let late = server.call_with(&[("hasleader", "true")]).await;
    let status = match late {
        Ok(mut call) => call.end().await,
        Err(status) => status,
    };
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));
    server.fixture.put("a", "1");
    assert_eq!(events(&patient.next().await), ["2 a"]);
    assert_eq!(patient.create(on("b")).await, created(1, 2));
}

#[tokio::test]
async fn streams_end_when_the_member_stops() {
    let server = Server::new();
    let mut call = server.call().await;
    call.create(on("a")).await;
    drop(server.leader);
    let status = call.end().await;
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unavailable, "etcdserver: server stopped")
    );
}

#[tokio::test]
async fn a_call_that_goes_away_takes_its_watches_along() {
    let server = Server::new();
    let mut call = server.call().await;
    call.create(on("a")).await;
    assert_eq!(server.fixture.hub.live_watchers(), 1);
    drop(call);
    assert_eq!(server.fixture.hub.live_watchers(), 0);
}

#[tokio::test]
async fn long_histories_come_in_answers_of_bounded_size_and_whole_revisions() {
    let mut server = Server::new();
    let value = "x".repeat(RESPONSE_BYTES / 5);
    for _ in 0..10 {
        server.fixture.put_all(&[("a", &value), ("b", &value)]);
    }
    let mut call = server.call().await;
    let range_end = Bytes::from_static(&[0]);
    call.create(WatchCreateRequest { range_end, start_revision: 2, ..on("a") }).await;
    let (mut next, mut answers) = (2, 0);
    while next < 12 {
        let answer = call.next().await;
        assert!(answer.encoded_len() < RESPONSE_BYTES + 1000);
        assert!(!answer.fragment);
        for pair in events(&answer).chunks(2) {
            assert_eq!(pair, [format!("{next} a"), format!("{next} b")]);
            next += 1;
        }
        assert_eq!(answer.header, header(next - 1));
        answers += 1;
    }
    assert_eq!(answers, 5);
}

#[tokio::test]
async fn only_a_watch_that_takes_fragments_gets_a_large_revision_in_pieces() {
    let mut server = Server::new();
    let mut call = server.call().await;
    let range_end = Bytes::from_static(&[0]);
    let whole = WatchCreateRequest { range_end, ..on("a") };
    call.create(whole.clone()).await;
    call.create(WatchCreateRequest { fragment: true, ..whole }).await;
    let value = "x".repeat(MAX_REQUEST_BYTES / 2);
    let pairs = ["a", "b", "c", "d", "e"].map(|key| (key, value.as_str()));
    server.fixture.put_all(&pairs);

    let mut pieces = Vec::new();
    for _ in 0..4 {
        let answer = call.next().await;
        assert_eq!(answer.header, header(2));
        pieces.push((answer.watch_id, answer.fragment, events(&answer).join(",")));
    }
    pieces.sort_by_key(|(id, ..)| *id);
    let piece = |id, fragment, events: &str| (id, fragment, events.to_owned());
    assert_eq!(pieces[0], piece(0, false, "2 a,2 b,2 c,2 d,2 e"));
    assert_eq!(pieces[1], piece(1, true, "2 a,2 b"));
    assert_eq!(pieces[2], piece(1, true, "2 c,2 d"));
    assert_eq!(pieces[3], piece(1, false, "2 e"));
    server.fixture.delete(all());
    let answer = call.next().await;
    assert!(!answer.fragment && answer.events.len() == 5);
}
