//! gRPC calls, counted as Go's servers count them.
//!
//! Each method has its counters, found once when a call begins. A call counts as handled when its
//! answer ends, or when its caller goes away before.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use tonic::{Code, Status};

use crate::clock::Clock;
use crate::metrics::{CALL_BOUNDS_US, Counter, Histogram, Kind, Page};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Unary,
    ServerStream,
    BidiStream,
}

impl Shape {
    pub fn is_stream(self) -> bool {
        self != Shape::Unary
    }

    fn label(self) -> &'static str {
        match self {
            Shape::Unary => "unary",
            Shape::ServerStream => "server_stream",
            Shape::BidiStream => "bidi_stream",
        }
    }
}

/// Every method of every service on the client port; the methods of a service stand together.
const METHODS: &[(&str, &[(&str, Shape)])] = &[
    (
        "etcdserverpb.KV",
        &[
            ("Put", Shape::Unary),
            ("Range", Shape::Unary),
            ("Txn", Shape::Unary),
            ("DeleteRange", Shape::Unary),
            ("Compact", Shape::Unary),
            ("RangeStream", Shape::ServerStream),
        ],
    ),
    ("etcdserverpb.Watch", &[("Watch", Shape::BidiStream)]),
    (
        "etcdserverpb.Lease",
        &[
            ("LeaseKeepAlive", Shape::BidiStream),
            ("LeaseGrant", Shape::Unary),
            ("LeaseRevoke", Shape::Unary),
            ("LeaseTimeToLive", Shape::Unary),
            ("LeaseLeases", Shape::Unary),
        ],
    ),
    ("v3lockpb.Lock", &[("Lock", Shape::Unary), ("Unlock", Shape::Unary)]),
    (
        "v3electionpb.Election",
        &[
            ("Campaign", Shape::Unary),
            ("Proclaim", Shape::Unary),
            ("Leader", Shape::Unary),
            ("Observe", Shape::ServerStream),
            ("Resign", Shape::Unary),
        ],
    ),
    (
        "etcdserverpb.Cluster",
        &[
            ("MemberList", Shape::Unary),
            ("MemberAdd", Shape::Unary),
            ("MemberRemove", Shape::Unary),
            ("MemberUpdate", Shape::Unary),
            ("MemberPromote", Shape::Unary),
        ],
    ),
    (
        "etcdserverpb.Maintenance",
        &[
            ("Status", Shape::Unary),
            ("Alarm", Shape::Unary),
            ("HashKV", Shape::Unary),
            ("Hash", Shape::Unary),
            ("Snapshot", Shape::ServerStream),
            ("Defragment", Shape::Unary),
            ("MoveLeader", Shape::Unary),
            ("Downgrade", Shape::Unary),
        ],
    ),
    (
        "etcdserverpb.Auth",
        &[
            ("Authenticate", Shape::Unary),
            ("AuthStatus", Shape::Unary),
            ("AuthEnable", Shape::Unary),
            ("AuthDisable", Shape::Unary),
            ("UserAdd", Shape::Unary),
            ("UserGet", Shape::Unary),
            ("UserList", Shape::Unary),
            ("UserDelete", Shape::Unary),
            ("UserChangePassword", Shape::Unary),
            ("UserGrantRole", Shape::Unary),
            ("UserRevokeRole", Shape::Unary),
            ("RoleAdd", Shape::Unary),
            ("RoleGet", Shape::Unary),
            ("RoleList", Shape::Unary),
            ("RoleDelete", Shape::Unary),
            ("RoleGrantPermission", Shape::Unary),
            ("RoleRevokePermission", Shape::Unary),
        ],
    ),
    (
        "holdfast.v1.Locks",
        &[
            ("Acquire", Shape::Unary),
            ("Release", Shape::Unary),
            ("Hold", Shape::BidiStream),
            ("Check", Shape::Unary),
            ("List", Shape::Unary),
            ("Get", Shape::Unary),
            ("Watch", Shape::ServerStream),
            ("RequestRelease", Shape::Unary),
            ("ForceRelease", Shape::Unary),
        ],
    ),
    (
        "holdfast.v1.Elections",
        &[
            ("Campaign", Shape::Unary),
            ("Proclaim", Shape::Unary),
            ("Resign", Shape::Unary),
            ("Candidates", Shape::Unary),
            ("Observe", Shape::ServerStream),
        ],
    ),
    ("grpc.health.v1.Health", &[("Check", Shape::Unary), ("Watch", Shape::ServerStream)]),
];

/// The codes in the order of their numbers, as Go names them.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// The counters of one method.
struct Method {
    service: &'static str,
    name: &'static str,
    shape: Shape,
    started: Counter,
    received: Counter,
    sent: Counter,
    handled: [Counter; CODES.len()],
    /// Only with the extensive metrics.
    seconds: Option<Histogram>,
}

/// The counters of all methods.
pub struct Calls {
    methods: Vec<Method>,
    /// In messages, without their frames: as etcd counts them.
    received_bytes: Counter,
    sent_bytes: Counter,
    clock: Arc<dyn Clock>,
}

impl Calls {
    /// `extensive` times the calls, too.
    pub fn new(clock: Arc<dyn Clock>, extensive: bool) -> Calls {
        let all = METHODS.iter().flat_map(|(service, methods)| {
            methods.iter().map(move |(name, shape)| (*service, *name, *shape))
        });
        let methods = all.map(|(service, name, shape)| Method {
            service,
            name,
            shape,
            started: Counter::default(),
            received: Counter::default(),
            sent: Counter::default(),
            handled: std::array::from_fn(|_| Counter::default()),
            seconds: extensive.then(|| Histogram::new(CALL_BOUNDS_US)),
        });
        let (received_bytes, sent_bytes) = Default::default();
        Calls { methods: methods.collect(), received_bytes, sent_bytes, clock }
    }

    /// Where the methods of a service stand.
    pub fn service(&self, name: &str) -> Range<usize> {
        let is_of = |method: &Method| method.service == name;
        let start = self.methods.iter().position(is_of).unwrap_or(self.methods.len());
        start..start + self.methods[start..].iter().take_while(|method| is_of(method)).count()
    }

    /// How often `method` of `service` was handled well.
    pub fn handled_well(&self, service: &str, method: &str) -> u64 {
        let methods = &self.methods[self.service(service)];
        let found = methods.iter().find(|known| known.name == method);
        found.map_or(0, |method| method.handled[0].get())
    }

    /// Begins a call of the method of `service` that `path` ends with; `None` when there is none.
    pub fn begin(
        self: &Arc<Calls>,
        service: Range<usize>,
        path: &str,
        headers: &HeaderMap,
    ) -> Option<Call> {
        let name = path.rsplit('/').next()?;
        let first = service.start;
        let at = first + self.methods[service].iter().position(|method| method.name == name)?;
        let method = &self.methods[at];
        method.started.increment();
        let patience = headers.get("grpc-timeout").and_then(|value| patience(value.as_bytes()));
        let timed = patience.is_some() || method.seconds.is_some();
        let begun = if timed { self.clock.monotonic() } else { Duration::ZERO };
        Some(Call { calls: self.clone(), method: at, begun, patience, ended: false })
    }

    pub fn write(&self, page: &mut Page) {
        let name = "etcd_network_client_grpc_received_bytes_total";
        page.counter(name, "Bytes of messages from gRPC clients.", self.received_bytes.get());
        let name = "etcd_network_client_grpc_sent_bytes_total";
        page.counter(name, "Bytes of messages to gRPC clients.", self.sent_bytes.get());
        type Count = fn(&Method) -> &Counter;
        let counts: [(&'static str, &str, Count); 3] = [
            ("grpc_server_started_total", "Calls begun.", |method| &method.started),
            ("grpc_server_msg_received_total", "Messages from clients.", |method| &method.received),
            ("grpc_server_msg_sent_total", "Messages to clients.", |method| &method.sent),
        ];
        for (name, help, count) in counts {
            let mut family = page.family(name, Kind::Counter, help);
            for method in &self.methods {
                family.sample(&method.labels(), count(method).get());
            }
        }
        let help = "Calls ended, by how.";
        let mut family = page.family("grpc_server_handled_total", Kind::Counter, help);
        for method in &self.methods {
            let [name, service, shape] = method.labels();
            for (code, handled) in CODES.iter().zip(&method.handled) {
                family.sample(&[("grpc_code", code), name, service, shape], handled.get());
            }
        }
        if self.methods.iter().any(|method| method.seconds.is_some()) {
            let help = "How long calls took.";
            let mut family = page.family("grpc_server_handling_seconds", Kind::Histogram, help);
            for method in &self.methods {
                if let Some(seconds) = &method.seconds {
                    family.histogram(&method.labels(), seconds);
                }
            }
        }
    }
}

impl Method {
    fn labels(&self) -> [(&'static str, &'static str); 3] {
        [
            ("grpc_method", self.name),
            ("grpc_service", self.service),
            ("grpc_type", self.shape.label()),
        ]
    }
}

/// One call. When it is dropped before it has ended, its caller has gone away.
pub struct Call {
    calls: Arc<Calls>,
    method: usize,
    /// Zero unless something depends on it.
    begun: Duration,
    /// How long the caller said it would wait.
    patience: Option<Duration>,
    ended: bool,
}

impl Call {
    pub fn shape(&self) -> Shape {
        self.method().shape
    }

    /// A counter of the messages from the client, which may outlive the call.
    pub fn receiver(&self) -> Receiver {
        let (calls, method) = (self.calls.clone(), self.method);
        Receiver { calls, method, frames: Frames::default() }
    }

    pub fn sent(&self, passed: Passed) {
        self.method().sent.add(passed.messages);
        self.calls.sent_bytes.add(passed.bytes);
    }

    /// The call has ended; only the first time counts.
    pub fn end(&mut self, code: Code) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let method = self.method();
        method.handled[code as usize].increment();
        if let Some(seconds) = &method.seconds {
            seconds.observe(self.took());
        }
    }

    fn method(&self) -> &Method {
        &self.calls.methods[self.method]
    }

    fn took(&self) -> Duration {
        self.calls.clock.monotonic().saturating_sub(self.begun)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // The server, too, drops a call at the end of its caller's patience.
        let late = self.patience.is_some_and(|patience| self.took() >= patience);
        self.end(if late { Code::DeadlineExceeded } else { Code::Cancelled });
    }
}

/// Counts what a client sends in one call.
pub struct Receiver {
    calls: Arc<Calls>,
    method: usize,
    frames: Frames,
}

impl Receiver {
    pub fn pass(&mut self, data: &[u8]) {
        let passed = self.frames.pass(data);
        self.calls.methods[self.method].received.add(passed.messages);
        self.calls.received_bytes.add(passed.bytes);
    }
}

/// What a piece of a body held.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// Messages that began in it.
    pub messages: u64,
    /// Of messages, without their frames.
    pub bytes: u64,
}

/// Follows the messages in a body that passes in pieces: each has a byte that tells whether it is
/// compressed and four with its length in front.
#[derive(Debug, Default)]
pub struct Frames {
    /// What is known of the prefix of the next message.
    prefix: [u8; 5],
    prefix_len: usize,
    /// What is still to come of the present message.
    left: usize,
}

impl Frames {
    pub fn pass(&mut self, mut data: &[u8]) -> Passed {
        let mut passed = Passed::default();
        while !data.is_empty() {
            if self.left > 0 {
                let taken = self.left.min(data.len());
                self.left -= taken;
                passed.bytes += taken as u64;
                data = &data[taken..];
                continue;
            }
            let taken = (self.prefix.len() - self.prefix_len).min(data.len());
            self.prefix[self.prefix_len..][..taken].copy_from_slice(&data[..taken]);
            self.prefix_len += taken;
            data = &data[taken..];
            if self.prefix_len == self.prefix.len() {
                let [_, length @ ..] = self.prefix;
                self.left = u32::from_be_bytes(length) as usize;
                self.prefix_len = 0;
                passed.messages += 1;
            }
        }
        passed
    }
}

/// The code of a call in its headers or trailers.
pub fn code_of(headers: &HeaderMap) -> Option<Code> {
    headers.get(Status::GRPC_STATUS).map(|value| Code::from_bytes(value.as_bytes()))
}

/// How long a caller waits, from the text of its header: digits and a unit.
fn patience(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    // The protocol allows eight digits.
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    let ns_a_unit: u64 = match unit {
        b'H' => 3_600_000_000_000,
        b'M' => 60_000_000_000,
        b'S' => 1_000_000_000,
        b'm' => 1_000_000,
        b'u' => 1_000,
        b'n' => 1,
        _ => return None,
    };
    Some(Duration::from_nanos(number.saturating_mul(ns_a_unit)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::clock::ManualClock;

    fn calls() -> (Arc<ManualClock>, Arc<Calls>) {
        let clock = Arc::new(ManualClock::default());
        (clock.clone(), Arc::new(Calls::new(clock, true)))
    }

    fn begin(calls: &Arc<Calls>, headers: &[(&'static str, &'static str)]) -> Call {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        let service = calls.service("etcdserverpb.KV");
        calls.begin(service, "/etcdserverpb.KV/Put", &map).expect("a method")
    }

    fn handled(calls: &Calls, code: &str) -> u64 {
        let code = CODES.iter().position(|known| *known == code).expect("a code");
        calls.methods[calls.service("etcdserverpb.KV").start].handled[code].get()
    }

    /// `rpc Range(RangeRequest) returns (stream RangeResponse);` and the like, of all files.
    #[test]
    fn every_method_of_the_protocol_is_counted_in_its_shape() {
        let mut declared = BTreeSet::new();
        let folders = ["/proto/etcd", "/proto/holdfast/v1"]
            .map(|folder| env!("CARGO_MANIFEST_DIR").to_owned() + folder);
        for file in folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap()) {
            let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
            let package = text.lines().find_map(|line| line.strip_prefix("package "));
            let package = package.unwrap().trim_end_matches(';');
            let mut service = String::new();
            for line in text.lines() {
                if let Some(name) = line.strip_prefix("service ") {
                    service = format!("{package}.{}", name.split_whitespace().next().unwrap());
                }
                let Some(method) = line.trim_start().strip_prefix("rpc ") else { continue };
                let (name, types) = method.split_once('(').unwrap();
                let shape = match types.matches("stream ").count() {
                    0 => "unary",
                    1 => "server_stream",
                    _ => "bidi_stream",
                };
                declared.insert((service.clone(), name.to_owned(), shape));
            }
        }
        let counted: BTreeSet<_> = calls()
            .1
            .methods
            .iter()
            .filter(|method| !method.service.starts_with("grpc."))
            .map(|method| (method.service.to_owned(), method.name.to_owned(), method.shape.label()))
            .collect();
        assert_eq!(counted, declared);
    }

    #[test]
    fn codes_stand_at_their_numbers() {
        for (number, name) in CODES.iter().enumerate() {
            let code = Code::from_i32(i32::try_from(number).unwrap());
            assert_eq!(code as usize, number);
            // Ours and Go's differ in two.
            let ours = format!("{code:?}").replace("Cancelled", "Canceled").replace("Ok", "OK");
            assert_eq!(ours, *name);
        }
    }

    #[test]
    fn a_call_ends_once() {
        let (_, calls) = calls();
        let mut call = begin(&calls, &[]);
        call.end(Code::NotFound);
        call.end(Code::Ok);
        drop(call);
        assert_eq!((handled(&calls, "NotFound"), handled(&calls, "OK")), (1, 0));
        assert_eq!(handled(&calls, "Canceled"), 0);
    }

    #[test]
    fn a_call_that_is_dropped_was_given_up_by_its_caller() {
        let (clock, calls) = calls();
        drop(begin(&calls, &[]));
        let early = begin(&calls, &[("grpc-timeout", "100m")]);
        clock.advance(Duration::from_millis(99));
        drop(early);
        assert_eq!(handled(&calls, "Canceled"), 2);
        let late = begin(&calls, &[("grpc-timeout", "100m")]);
        clock.advance(Duration::from_millis(100));
        drop(late);
        assert_eq!(handled(&calls, "DeadlineExceeded"), 1);
    }

    #[test]
    fn an_unknown_method_is_not_counted() {
        let (_, calls) = calls();
        let service = calls.service("etcdserverpb.KV");
        assert!(calls.begin(service, "/etcdserverpb.KV/Nope", &HeaderMap::new()).is_none());
        let none = calls.service("a.B");
        assert!(calls.begin(none, "/a.B/Put", &HeaderMap::new()).is_none());
    }

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let body = b"\0\0\0\0\x03abc\0\0\0\0\0\x01\0\0\0\x02de";
        for size in 1..=body.len() {
            let mut frames = Frames::default();
            let mut sum = Passed::default();
            for piece in body.chunks(size) {
                let passed = frames.pass(piece);
                sum.messages += passed.messages;
                sum.bytes += passed.bytes;
            }
            assert_eq!(sum, Passed { messages: 3, bytes: 5 }, "in pieces of {size}");
        }
    }

    #[test]
    fn patience_has_units() {
        assert_eq!(patience(b"5S"), Some(Duration::from_secs(5)));
        assert_eq!(patience(b"20m"), Some(Duration::from_millis(20)));
        assert_eq!(patience(b"1H"), Some(Duration::from_secs(3_600)));
        assert_eq!(patience(b"99999999H"), Some(Duration::from_nanos(u64::MAX)));
        for bad in [&b""[..], b"5", b"S", b"-1S", b"5x"] {
            assert_eq!(patience(bad), None);
        }
    }
}
