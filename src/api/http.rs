//! Plain HTTP: the version and the health probes, and the metrics.

use std::fmt::Write;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, RawQuery, State};
use axum::handler::Handler;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, get};
use bytes::Bytes;
use http::{StatusCode, header};
use serde_json::json;
use tonic::Status;
use url::form_urlencoded;

use crate::machine::{AlarmKind, Range};
use crate::metrics;
use crate::node::Node;
use crate::types::KeyRange;

use super::{ETCD_VERSION, convert};

/// The key etcd's probes read. It need not exist.
const PROBED_KEY: &[u8] = b"health";

/// `GET` of `/version` and of the probes.
pub fn routes(node: Arc<Node>) -> Router {
    Router::new().route("/version", only_get(version)).with_state(node.clone()).merge(probes(node))
}

/// `GET` of `/health`, `/livez`, `/readyz`, and `/livez/NAME`, `/readyz/NAME` for one check.
pub fn probes(node: Arc<Node>) -> Router {
    Router::new()
        .route("/health", only_get(health))
        .route("/livez", only_get(|node, query| probe(&LIVE, node, query)))
        .route("/livez/{check}", only_get(|node, name, query| probe_one(&LIVE, node, name, query)))
        .route("/readyz", only_get(|node, query| probe(&READY, node, query)))
        .route(
            "/readyz/{check}",
            only_get(|node, name, query| probe_one(&READY, node, name, query)),
        )
        .with_state(node)
}

/// `/metrics`, by any method as in etcd.
pub fn metrics_route(page: impl Fn() -> String + Clone + Send + Sync + 'static) -> Router {
    let content_type = [(header::CONTENT_TYPE, metrics::CONTENT_TYPE)];
    Router::new().route("/metrics", any(async move || (content_type, page())))
}

/// Answers GET with `handler` and refuses all other methods, HEAD too.
fn only_get<H, T>(handler: H) -> MethodRouter<Arc<Node>>
where
    H: Handler<T, Arc<Node>>,
    T: 'static,
{
    async fn refuse() -> Response {
        (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET")], "Method Not Allowed\n")
            .into_response()
    }
    get(handler).head(refuse).fallback(refuse)
}

async fn version() -> Response {
    // Written out to keep the fields in etcd's order.
    let body = format!("{{\"etcdserver\":\"{ETCD_VERSION}\",\"etcdcluster\":\"{ETCD_VERSION}\"}}");
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Whether this member can serve, in etcd's older form. `serializable=true` asks for less: that it
/// can read its own state. `exclude=ALARM` leaves an alarm out.
async fn health(State(node): State<Arc<Node>>, RawQuery(query): RawQuery) -> Response {
    let serializable = parameters(query.as_deref(), "serializable");
    let serializable = serializable.first().is_some_and(|it| it == "true");
    let excluded = parameters(query.as_deref(), "exclude");
    let alarm = active_alarm(&node, |name| !excluded.iter().any(|excluded| excluded == name));
    let reason = if let Some(alarm) = alarm {
        format!("ALARM {alarm}")
    } else if !serializable && node.leader().is_none() {
        "RAFT NO LEADER".to_owned()
    } else {
        match read(&node, serializable).await {
            Ok(()) => String::new(),
            Err(status) => format!("RANGE ERROR:{}", status.message()),
        }
    };
    let healthy = reason.is_empty();
    let meters = node.meters();
    let count = if healthy { &meters.health_successes } else { &meters.health_failures };
    count.increment();
    let body = json!({ "health": healthy.to_string(), "reason": reason }).to_string();
    if healthy {
        body.into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, body + "\n").into_response()
    }
}

/// One thing a probe looks at.
#[derive(Debug, Clone, Copy)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
}

/// Failing these, a member is better restarted.
const LIVE: [Check; 1] = [Check::SerializableRead];

/// Failing these, a member should get no traffic.
const READY: [Check; 4] =
    [Check::DataCorruption, Check::SerializableRead, Check::LinearizableRead, Check::NonLearner];

impl Check {
    fn name(self) -> &'static str {
        match self {
            Check::DataCorruption => "data_corruption",
            Check::SerializableRead => "serializable_read",
            Check::LinearizableRead => "linearizable_read",
            Check::NonLearner => "non_learner",
        }
    }

    /// The reason when the check fails.
    async fn run(self, node: &Node) -> Result<(), String> {
        let read = async |serializable| {
            read(node, serializable).await.map_err(|status| status.message().to_owned())
        };
        match self {
            Check::DataCorruption => {
                let corrupt = convert::alarm_name(AlarmKind::Corrupt);
                match active_alarm(node, |name| name == corrupt) {
                    Some(alarm) => Err(format!("alarm activated: {alarm}")),
                    None => Ok(()),
                }
            }
            Check::SerializableRead => read(true).await,
            Check::LinearizableRead => read(false).await,
            Check::NonLearner if node.status().is_learner => {
                Err("not supported for learner".to_owned())
            }
            Check::NonLearner => Ok(()),
        }
    }
}

/// The name of an alarm that is raised and `counts`.
fn active_alarm(node: &Node, counts: impl Fn(&str) -> bool) -> Option<&'static str> {
    let machine = node.machine();
    machine.alarms().map(|alarm| convert::alarm_name(alarm.kind)).find(|name| counts(name))
}

async fn probe(
    checks: &'static [Check],
    State(node): State<Arc<Node>>,
    RawQuery(query): RawQuery,
) -> Response {
    let excluded = parameters(query.as_deref(), "exclude");
    let checks: Vec<Check> = checks
        .iter()
        .copied()
        .filter(|check| !excluded.iter().any(|name| name == check.name()))
        .collect();
    run(&checks, &node, is_verbose(query.as_deref())).await
}

async fn probe_one(
    checks: &'static [Check],
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Response {
    match checks.iter().find(|check| check.name() == name) {
        Some(check) => run(&[*check], &node, is_verbose(query.as_deref())).await,
        None => (StatusCode::NOT_FOUND, "404 page not found\n").into_response(),
    }
}

/// "ok" when all `checks` pass; a line for each when one fails, or when `verbose`.
async fn run(checks: &[Check], node: &Node, verbose: bool) -> Response {
    let mut passed = true;
    let mut lines = String::new();
    for check in checks {
        let name = check.name();
        let written = match check.run(node).await {
            Ok(()) => writeln!(lines, "[+]{name} ok"),
            Err(reason) => {
                passed = false;
                writeln!(lines, "[-]{name} failed: {reason}")
            }
        };
        written.expect("writing to a string does not fail");
    }
    match (passed, verbose) {
        (true, false) => "ok\n".into_response(),
        (true, true) => (lines + "ok\n").into_response(),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, lines + "\n").into_response(),
    }
}

/// Reads one key as a client would.
async fn read(node: &Node, serializable: bool) -> Result<(), Status> {
    if !serializable {
        node.read_barrier().await?;
    }
    node.view().range(&Range::all(KeyRange::One(Bytes::from_static(PROBED_KEY))))?;
    Ok(())
}

fn is_verbose(query: Option<&str>) -> bool {
    !parameters(query, "verbose").is_empty()
}

/// The values of all `name` in a query; empty where one has none.
fn parameters(query: Option<&str>, name: &str) -> Vec<String> {
    form_urlencoded::parse(query.unwrap_or_default().as_bytes())
        .filter(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::parameters;

    #[test]
    fn a_query_parameter_may_come_often_and_without_a_value() {
        assert_eq!(parameters(Some("verbose"), "verbose"), [""]);
        assert_eq!(parameters(Some("a=1&serializable=true"), "serializable"), ["true"]);
        assert_eq!(parameters(Some("exclude=a&b&exclude=c"), "exclude"), ["a", "c"]);
        assert!(parameters(Some("a=1"), "verbose").is_empty());
        assert!(parameters(None, "verbose").is_empty());
    }
}
