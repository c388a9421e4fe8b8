//! A range of any size as a stream of answers, etcd's RangeStream.
//!
//! The answers of a stream, merged as protobuf merges, are the answer of one Range. Each holds some
//! pairs, at most [`crate::machine::PAGE_BYTES`] of them or one; header, `more` and `count` stand in the
//! last.
//!
//! A page is read when HTTP/2 asks for it, which it does while the client's window is open. So a
//! client that reads slowly, or not at all, holds one page and the buffers of its connection, and
//! one that goes away takes the stream with it.

use futures::{Stream, stream};
use tonic::Status;

use crate::machine::{Pages, Range, View};
use crate::pb::etcdserverpb::{RangeStreamResponse, ResponseHeader};

use super::convert;

/// Answers `query`, which [`convert::range_stream`] has checked, from `view`. `header`: of an answer
/// that shows this revision.
pub fn answers(
    view: View,
    query: Range,
    header: impl Fn(i64) -> ResponseHeader + Send + 'static,
) -> impl Stream<Item = Result<RangeStreamResponse, Status>> + Send + 'static {
    let keys_only = query.keys_only;
    let pages = Pages::new(view, query);
    stream::try_unfold((pages, header), move |(mut pages, header)| async move {
        // One page a turn: other calls on the same thread go on between two, however fast the
        // client takes them.
        tokio::task::yield_now().await;
        let page = pages.next_page()?;
        Ok(page.map(|page| {
            let response = convert::range_stream_response(&page, keys_only, &header);
            (response, (pages, header))
        }))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use futures::StreamExt;
    use futures::stream::BoxStream;
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;
    use tonic::transport::server::TcpIncoming;
    use tonic::transport::{Endpoint, Server};
    use tonic::{Code, Request, Response, Streaming};

    use super::*;
    use crate::machine::{Command, Entry, Machine, Origin, PAGE_BYTES, Position, Put, Txn, TxnOp};
    use crate::pb::etcdserverpb::kv_client::KvClient;
    use crate::pb::etcdserverpb::kv_server::{Kv, KvServer};
    use crate::pb::etcdserverpb::{
        CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
        PutResponse, RangeRequest, RangeResponse, TxnRequest, TxnResponse,
    };
    use crate::storage::Batch;
    use crate::types::{LeaseId, Timestamp};

    /// Pages that are made and not read yet: one is being sent, one waits in the server's buffer,
    /// and one may have been read from the socket without having come to the reader.
    const MOST_IN_FLIGHT: usize = 3;

    /// What a client takes before it has to ask for more: what HTTP/2 begins with, less than a page.
    const WINDOW_BYTES: u32 = 65_535;

    /// A machine, behind a service that does nothing but stream from it.
    #[derive(Clone)]
    struct Fixture {
        machine: Arc<Mutex<(Machine, u64)>>,
        made: Arc<AtomicUsize>,
        /// Told when a stream is dropped.
        ended: mpsc::UnboundedSender<()>,
    }

    struct Ending(mpsc::UnboundedSender<()>);

    impl Drop for Ending {
        fn drop(&mut self) {
            // A test that does not ask has dropped the receiver.
            let _ = self.0.send(());
        }
    }

    impl Fixture {
        fn new() -> (Fixture, mpsc::UnboundedReceiver<()>) {
            let (ended, endings) = mpsc::unbounded_channel();
            let machine = Arc::new(Mutex::new((Machine::new(), 0)));
            (Fixture { machine, made: Arc::default(), ended }, endings)
        }

        fn apply(&self, command: Command) {
            let mut machine = self.machine.lock().unwrap();
            let (machine, index) = &mut *machine;
            *index += 1;
            let entry =
                Entry { at: Timestamp(0), origin: Origin::default(), command, principal: None };
            let position = Position { term: 1, index: *index };
            let outcome = machine.apply(position, &entry, &mut Batch::default()).unwrap();
            outcome.reply.unwrap();
        }

        fn put(&self, keys: impl Iterator<Item = usize>, value_bytes: usize) {
            let put = |number: usize| {
                TxnOp::Put(Put {
                    key: format!("key/{number:06}").into(),
                    value: Some(vec![b'v'; value_bytes].into()),
                    lease: Some(LeaseId::NONE),
                    prev_kv: false,
                })
            };
            let success = keys.map(put).collect();
            self.apply(Command::Txn(Txn { compares: vec![], success, failure: vec![] }));
        }

        /// Serves on a port of its own; returns a client with a small window.
        async fn serve(&self) -> KvClient<tonic::transport::Channel> {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = Server::builder().add_service(KvServer::new(self.clone()));
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            tokio::spawn(server.serve_with_incoming(incoming));
            let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
            let endpoint = endpoint.initial_stream_window_size(WINDOW_BYTES);
            KvClient::new(endpoint.connect().await.unwrap())
        }
    }

    #[tonic::async_trait]
    impl Kv for Fixture {
        type RangeStreamStream = BoxStream<'static, Result<RangeStreamResponse, Status>>;

        async fn range_stream(
            &self,
            request: Request<RangeRequest>,
        ) -> Result<Response<Self::RangeStreamStream>, Status> {
            let query = convert::range_stream(request.into_inner())?;
            let view = self.machine.lock().unwrap().0.store().view();
            let header = |revision| ResponseHeader { revision, ..ResponseHeader::default() };
            let (made, ending) = (self.made.clone(), Ending(self.ended.clone()));
            let answers = answers(view, query, header).inspect(move |_| {
                let _held = &ending;
                made.fetch_add(1, Ordering::SeqCst);
            });
            Ok(Response::new(answers.boxed()))
        }

        async fn range(&self, _: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }

        async fn put(&self, _: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }

        async fn delete_range(
            &self,
            _: Request<DeleteRangeRequest>,
        ) -> Result<Response<DeleteRangeResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }

        async fn txn(&self, _: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }

        async fn compact(
            &self,
            _: Request<CompactionRequest>,
        ) -> Result<Response<CompactionResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }
    }

    fn everything() -> RangeRequest {
        RangeRequest { key: "\0".into(), range_end: "\0".into(), ..RangeRequest::default() }
    }

    async fn next(stream: &mut Streaming<RangeStreamResponse>) -> Option<RangeResponse> {
        let message = stream.message().await.unwrap()?;
        Some(message.range_response.expect("every message holds a piece of the range"))
    }

    #[tokio::test]
    async fn a_slow_reader_of_many_keys_holds_few_pages_and_sees_one_revision() {
        const KEYS: usize = 200_000;
        let (fixture, _endings) = Fixture::new();
        for first in (0..KEYS).step_by(1_000) {
            fixture.put(first..first + 1_000, 100);
        }
        let revision = 1 + KEYS as i64 / 1_000;
        let mut client = fixture.serve().await;
        let mut stream = client.range_stream(everything()).await.unwrap().into_inner();
        let (mut keys, mut messages, mut most) = (0, 0, 0);
        let mut last = None;
        while let Some(part) = next(&mut stream).await {
            assert_eq!(last, None, "nothing follows the last part");
            messages += 1;
            for kv in &part.kvs {
                assert_eq!(kv.key, format!("key/{keys:06}"));
                assert!(kv.mod_revision <= revision && kv.version == 1);
                keys += 1;
            }
            if let Some(header) = part.header {
                last = Some((header.revision, part.more, part.count));
            } else {
                assert_eq!((part.more, part.count), (false, 0));
            }
            // What is written now is of a later revision. Meanwhile the server may run ahead.
            fixture.put([messages * 7, KEYS + messages].into_iter(), 10);
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            most = most.max(fixture.made.load(Ordering::SeqCst) - messages);
        }
        assert_eq!(keys, KEYS);
        assert_eq!(last, Some((revision, false, KEYS as i64)));
        assert!(messages > 50, "{messages}");
        assert!(most <= MOST_IN_FLIGHT, "{most} pages were made ahead of the reader");
    }

    #[tokio::test]
    async fn a_limit_ends_the_stream_and_the_last_part_tells_what_it_left_out() {
        let (fixture, _endings) = Fixture::new();
        fixture.put(0..25, PAGE_BYTES / 4);
        let mut client = fixture.serve().await;
        for (limit, more) in [(5, true), (24, true), (25, false), (26, false)] {
            let request = RangeRequest { limit, ..everything() };
            let mut stream = client.range_stream(request).await.unwrap().into_inner();
            let mut parts = Vec::new();
            while let Some(part) = next(&mut stream).await {
                parts.push(part);
            }
            let last = parts.last().unwrap();
            assert_eq!((last.more, last.count), (more, 25));
            assert_eq!(
                parts.iter().map(|part| part.kvs.len()).sum::<usize>() as i64,
                limit.min(25)
            );
            assert!(parts.len() as i64 > limit.min(25) / 4);
        }
    }

    #[tokio::test]
    async fn a_compaction_past_its_revision_ends_a_stream() {
        let (fixture, _endings) = Fixture::new();
        fixture.put(0..100, PAGE_BYTES);
        let mut client = fixture.serve().await;
        let mut stream = client.range_stream(everything()).await.unwrap().into_inner();
        assert_eq!(next(&mut stream).await.unwrap().kvs.len(), 1);
        fixture.put(0..1, 1);
        fixture.apply(Command::Compact { revision: 3 });
        let mut read = 1;
        let status = loop {
            match stream.message().await {
                Ok(Some(_)) => read += 1,
                Ok(None) => panic!("the stream ended well after {read} parts"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::OutOfRange);
        assert_eq!(status.message(), "etcdserver: mvcc: required revision has been compacted");
        assert!(read <= 1 + MOST_IN_FLIGHT, "{read}");
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_client() {
        let (fixture, mut endings) = Fixture::new();
        fixture.put(0..100, PAGE_BYTES);
        let mut client = fixture.serve().await;
        let mut stream = client.range_stream(everything()).await.unwrap().into_inner();
        assert!(next(&mut stream).await.is_some());
        drop(stream);
        endings.recv().await.unwrap();
        assert!(fixture.made.load(Ordering::SeqCst) <= 1 + MOST_IN_FLIGHT);
    }

    #[tokio::test]
    async fn what_takes_all_pairs_to_answer_is_refused() {
        let (fixture, _endings) = Fixture::new();
        let mut client = fixture.serve().await;
        let order = RangeRequest { sort_order: 2, ..everything() };
        let target = RangeRequest { sort_order: 1, sort_target: 1, ..everything() };
        let filters = RangeRequest { min_mod_revision: 1, ..everything() };
        for (request, what) in [
            (order, "custom sort orders"),
            (target, "custom sort orders"),
            (filters, "revision filters"),
        ] {
            let status = client.range_stream(request).await.unwrap_err();
            assert_eq!(status.code(), Code::Unimplemented);
            assert_eq!(status.message(), format!("RangeStream does not support {what}"));
        }
        let keyless = client.range_stream(RangeRequest::default()).await.unwrap_err();
        assert_eq!(keyless.message(), "etcdserver: key is not provided");
        let ascending = RangeRequest { sort_order: 1, ..everything() };
        let mut stream = client.range_stream(ascending).await.unwrap().into_inner();
        let empty = next(&mut stream).await.unwrap();
        assert_eq!((empty.header.unwrap().revision, empty.count, empty.kvs.len()), (1, 0, 0));
        assert!(next(&mut stream).await.is_none());
        let future = RangeRequest { revision: 2, ..everything() };
        let mut stream = client.range_stream(future).await.unwrap().into_inner();
        let status = stream.message().await.unwrap_err();
        assert_eq!(status.message(), "etcdserver: mvcc: required revision is a future revision");
    }
}
