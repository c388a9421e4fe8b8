//! Bytes that no client sends: the member goes on serving everybody else.
//!
//! After each assault the same process must answer a put and a get on a new connection. What the
//! assailant is told does not matter, except where gRPC has a word for it.

use std::time::Duration;

use bytes::Bytes;
use holdfast_client_tests::check::{SOON, report, within};
use holdfast_client_tests::raw::{RAW_CALL, RawConnection, grpc_frame};
use holdfast_client_tests::{Cluster, target_is_etcd};
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const PUT: &str = "/etcdserverpb.KV/Put";

/// HTTP/2 frame types.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

/// gRPC status codes.
const INTERNAL: i32 = 13;
const RESOURCE_EXHAUSTED: i32 = 8;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("small");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A connection that begins as it should and goes on with `rest`.
fn after_preface(rest: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    for part in rest {
        bytes.extend(part);
    }
    bytes
}

/// Sends all of it, or as much as is taken, and reads what comes for a moment.
async fn assault(port: u16, bytes: &[u8]) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("the member listens");
    let (mut reader, mut writer) = stream.split();
    let writing = async {
        // The member may well hang up before it has all.
        let _ = writer.write_all(bytes).await;
    };
    let mut answer = Vec::new();
    let reading = reader.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_millis(100), async {
        tokio::join!(writing, async {
            let _ = reading.await;
        })
    })
    .await;
}

/// The same process as before serves a put and a get.
async fn still_serves(cluster: &mut Cluster, after: &str) {
    assert!(cluster.runs(0), "the process ended after {after}");
    within(SOON, &format!("a put and a get after {after}"), async {
        let mut client = cluster.client(0).await;
        client.put("still", after, None).await.expect("a put");
        let answer = client.get("still", None).await.expect("a range");
        assert_eq!(answer.kvs()[0].value(), after.as_bytes());
    })
    .await;
}

fn hand_made() -> Vec<(&'static str, Vec<u8>)> {
    // Method POST, scheme http, path / from the static table: a request without its authority.
    let request = [0x83, 0x86, 0x84];
    let settings = |id: u16, value: u32| {
        let mut setting = id.to_be_bytes().to_vec();
        setting.extend(value.to_be_bytes());
        frame(SETTINGS, 0, 0, &setting)
    };
    let oversized = {
        let mut head = vec![0xff, 0xff, 0xff, DATA, 0];
        head.extend(1_u32.to_be_bytes());
        head.extend([0; 70_000]);
        head
    };
    vec![
        ("nothing", Vec::new()),
        ("half a preface", PREFACE[..11].to_vec()),
        ("a wrong preface", b"PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec()),
        ("half an HTTP/1 request", b"POST /v3/kv/put HTTP/1.1\r\nContent-Le".to_vec()),
        (
            "an HTTP/1 request that lies about its length",
            b"POST /v3/kv/put HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n{}"
                .to_vec(),
        ),
        ("a very long header", [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 2 << 20]].concat()),
        ("an oversized frame", after_preface(&[oversized])),
        ("DATA on stream 0", after_preface(&[frame(DATA, 0, 0, b"x")])),
        ("DATA on a stream never opened", after_preface(&[frame(DATA, 1, 7, b"x")])),
        ("HEADERS on stream 0", after_preface(&[frame(HEADERS, 4, 0, &request)])),
        ("HEADERS on an even stream", after_preface(&[frame(HEADERS, 4, 2, &request)])),
        (
            "stream ids that go down",
            after_preface(&[frame(HEADERS, 4, 9, &request), frame(HEADERS, 4, 3, &request)]),
        ),
        ("invalid HPACK", after_preface(&[frame(HEADERS, 4, 1, &[0xff; 64])])),
        ("a half-open call", after_preface(&[frame(HEADERS, 4, 1, &request)])),
        ("CONTINUATION of nothing", after_preface(&[frame(CONTINUATION, 4, 1, &request)])),
        (
            "CONTINUATION without end",
            after_preface(&[
                frame(HEADERS, 0, 1, &request),
                frame(CONTINUATION, 0, 1, &[0x83; 1_000]).repeat(2_000),
            ]),
        ),
        ("PUSH_PROMISE from a client", after_preface(&[frame(PUSH_PROMISE, 4, 1, &[0, 0, 0, 2])])),
        ("PRIORITY on itself", after_preface(&[frame(PRIORITY, 0, 1, &[0, 0, 0, 1, 0])])),
        ("RST_STREAM of an idle stream", after_preface(&[frame(RST_STREAM, 0, 1, &[0; 4])])),
        ("SETTINGS of odd length", after_preface(&[frame(SETTINGS, 0, 0, &[0; 5])])),
        ("SETTINGS with a huge window", after_preface(&[settings(4, u32::MAX)])),
        ("SETTINGS with a tiny frame size", after_preface(&[settings(5, 1)])),
        ("a flood of SETTINGS", after_preface(&[settings(4, 65_535).repeat(20_000)])),
        ("a flood of PING", after_preface(&[frame(PING, 0, 0, &[7; 8]).repeat(50_000)])),
        ("PING of odd length", after_preface(&[frame(PING, 0, 0, &[7; 3])])),
        ("WINDOW_UPDATE by 0", after_preface(&[frame(WINDOW_UPDATE, 0, 0, &[0; 4])])),
        (
            "WINDOW_UPDATE past the limit",
            after_preface(&[frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]).repeat(3)]),
        ),
        ("an unknown frame type", after_preface(&[frame(0x77, 0xff, 1, b"what")])),
        (
            "a thousand calls opened and reset",
            after_preface(
                &(0..1_000)
                    .flat_map(|n| {
                        let stream = 2 * n + 1;
                        let code = [0, 0, 0, 8];
                        [frame(HEADERS, 4, stream, &request), frame(RST_STREAM, 0, stream, &code)]
                    })
                    .collect::<Vec<_>>(),
            ),
        ),
    ]
}

#[tokio::test]
async fn frames_by_hand_on_the_client_port() {
    let mut cluster = Cluster::start(1).await;
    for (name, bytes) in hand_made() {
        assault(cluster.client_port(0), &bytes).await;
        still_serves(&mut cluster, name).await;
    }
}

#[tokio::test]
async fn frames_by_hand_on_the_peer_port() {
    let mut cluster = Cluster::start(1).await;
    for (name, bytes) in hand_made() {
        assault(cluster.peer_port(0), &bytes).await;
        still_serves(&mut cluster, name).await;
    }
}

#[tokio::test]
async fn random_bytes_on_both_ports() {
    let seed = match std::env::var("SEED") {
        Ok(seed) => seed.parse().expect("SEED is a number"),
        Err(_) => rand::random::<u64>(),
    };
    report(&format!("random bytes: SEED={seed}"));
    let mut random = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::start(1).await;
    for round in 0..60 {
        let mut bytes = vec![0; random.random_range(1..20_000)];
        random.fill_bytes(&mut bytes);
        if round % 3 == 0 {
            bytes.splice(0..0, after_preface(&[]));
        }
        if round % 3 == 1 {
            // Well-formed frames of random kind and content.
            bytes = after_preface(&[]);
            for _ in 0..50 {
                let mut payload = vec![0; random.random_range(0..200)];
                random.fill_bytes(&mut payload);
                let (kind, flags, stream) =
                    (random.random_range(0..12), random.random(), random.random_range(0..8));
                bytes.extend(frame(kind, flags, stream, &payload));
            }
        }
        let port = if random.random() { cluster.client_port(0) } else { cluster.peer_port(0) };
        assault(port, &bytes).await;
        if round % 10 == 9 {
            still_serves(&mut cluster, &format!("random bytes, SEED={seed}, round {round}")).await;
        }
    }
}

#[tokio::test]
async fn an_undecodable_message_is_an_internal_error_and_the_connection_stays() {
    let mut cluster = Cluster::start(1).await;
    let mut connection = RawConnection::open(cluster.client_port(0)).await;
    let cases: [(&str, &[u8]); 5] = [
        ("a field that runs past the end", &[0x0a, 0x7f, b'k']),
        ("a field number 0", &[0x02, 0x01, b'k']),
        ("a wire type that does not exist", &[0x0f, 0x01]),
        (
            "a varint without end",
            &[0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ),
        ("a wrong wire type for the key", &[0x08, 0x01]),
    ];
    for path in
        [PUT, "/etcdserverpb.KV/Txn", "/etcdserverpb.Lease/LeaseGrant", "/v3lockpb.Lock/Lock"]
    {
        for (name, message) in cases {
            // The last one is a wrong type only where field 1 is not a number.
            if name.starts_with("a wrong") && path.ends_with("LeaseGrant") {
                continue;
            }
            let call = connection.call(path, grpc_frame(message));
            let status = within(RAW_CALL, name, call).await.expect("an answer");
            assert_eq!(status.code, INTERNAL, "{name} at {path}: {status:?}");
        }
    }
    let put = holdfast_client_tests::raw::PutRequest { key: b"k".to_vec(), value: b"v".to_vec() };
    let call = connection.call(PUT, grpc_frame(&put.encode_to_vec()));
    let status = within(RAW_CALL, "a good put", call).await.expect("an answer");
    assert_eq!(status.code, 0, "the connection stays: {status:?}");
    still_serves(&mut cluster, "undecodable messages").await;
}

#[tokio::test]
async fn a_message_above_the_limit_is_refused_by_its_size() {
    let mut cluster = Cluster::start(1).await;
    let value = vec![b'v'; 3 << 20];
    let put = holdfast_client_tests::raw::PutRequest { key: b"k".to_vec(), value };
    let message = put.encode_to_vec();
    let size = message.len();
    let mut connection = RawConnection::open(cluster.client_port(0)).await;
    let call = connection.call(PUT, grpc_frame(&message));
    let status = within(RAW_CALL, "a large put", call).await.expect("an answer");
    let text = format!("grpc: received message larger than max ({size} vs. 2097152)");
    assert_eq!((status.code, status.message), (RESOURCE_EXHAUSTED, text));

    // A frame that only claims to be large must not be waited for, nor room be made for it.
    let mut claims = vec![0];
    claims.extend(u32::MAX.to_be_bytes());
    claims.extend(b"little");
    let call = connection.call(PUT, Bytes::from(claims));
    let status = within(RAW_CALL, "a large claim", call).await.expect("an answer");
    assert_eq!(status.code, RESOURCE_EXHAUSTED, "{status:?}");
    still_serves(&mut cluster, "large messages").await;
}

#[tokio::test]
async fn frames_that_are_not_grpc_are_refused() {
    let mut cluster = Cluster::start(1).await;
    let mut connection = RawConnection::open(cluster.client_port(0)).await;
    let put = holdfast_client_tests::raw::PutRequest { key: b"k".to_vec(), value: b"v".to_vec() };
    let good = grpc_frame(&put.encode_to_vec());
    let mut flagged = good.to_vec();
    flagged[0] = 1;
    let mut strange = good.to_vec();
    strange[0] = 9;
    let cut = good.slice(..good.len() - 1);
    for (name, body) in [
        ("no frame", Bytes::new()),
        ("half a frame head", good.slice(..3)),
        ("a frame cut short", cut),
        ("compressed, with nothing said of how", Bytes::from(flagged)),
        ("a compression flag of 9", Bytes::from(strange)),
    ] {
        // A status or a reset stream: anything but success, and soon.
        match within(RAW_CALL, name, connection.call(PUT, body)).await {
            Ok(status) => assert_ne!(status.code, 0, "{name}: {status:?}"),
            Err(_) => connection = RawConnection::open(cluster.client_port(0)).await,
        }
        still_serves(&mut cluster, name).await;
    }
    let encoding = [("grpc-encoding", "no-such-encoding")];
    let call = connection.call_with(PUT, &encoding, good);
    let answer = within(RAW_CALL, "an unknown encoding", call).await;
    if target_is_etcd() {
        // Go's server looks at the encoding only when the message says it is compressed.
        assert!(answer.is_ok(), "{answer:?}");
    }
    still_serves(&mut cluster, "an unknown encoding").await;
}

#[tokio::test]
async fn two_hundred_half_open_connections_keep_nobody_out() {
    let mut cluster = Cluster::start(1).await;
    let mut open = Vec::new();
    for port in [cluster.client_port(0), cluster.peer_port(0)] {
        for n in 0..200 {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
            // Nothing, half a preface, or a call that is never finished.
            let begun = match n % 3 {
                0 => Vec::new(),
                1 => PREFACE[..12].to_vec(),
                _ => after_preface(&[frame(HEADERS, 4, 1, &[0x83, 0x86, 0x84])]),
            };
            stream.write_all(&begun).await.expect("the member is there");
            open.push(stream);
        }
        still_serves(&mut cluster, "opening half connections").await;
    }
    drop(open);
    still_serves(&mut cluster, "closing them").await;
}
