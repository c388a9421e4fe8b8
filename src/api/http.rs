//! Plain HTTP on the client port: the version and the health probes.

use std::fmt::Write;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, RawQuery, State};
use axum::handler::Handler;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use bytes::Bytes;
use http::{StatusCode, header};
use serde_json::json;
use tonic::Status;
use url::form_urlencoded;

use crate::machine::Range;
use crate::node::Node;
use crate::types::KeyRange;

use super::ETCD_VERSION;

/// The key etcd's probes read. It need not exist.
const PROBED_KEY: &[u8] = b"health";

/// `GET` of `/version`, `/health`, `/livez`, `/readyz`, and `/livez/NAME`, `/readyz/NAME` for one
/// check.
pub fn routes(node: Arc<Node>) -> Router {
    Router::new()
        .route("/version", only_get(version))
        .route("/health", only_get(health))
        .route("/livez", only_get(|node, query| probe(&LIVE, node, query)))
        .route("/livez/{check}", only_get(|node, name| probe_one(&LIVE, node, name)))
        .route("/readyz", only_get(|node, query| probe(&READY, node, query)))
        .route("/readyz/{check}", only_get(|node, name| probe_one(&READY, node, name)))
        .with_state(node)
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
/// can read its own state. `exclude=ALARM` leaves an alarm out; there are none yet.
async fn health(State(node): State<Arc<Node>>, RawQuery(query): RawQuery) -> Response {
    let serializable = parameter(query.as_deref(), "serializable").is_some_and(|it| it == "true");
    let reason = if !serializable && node.leader().is_none() {
        "RAFT NO LEADER".to_owned()
    } else {
        match read(&node, serializable).await {
            Ok(()) => String::new(),
            Err(status) => format!("RANGE ERROR:{}", status.message()),
        }
    };
    let healthy = reason.is_empty();
    let body = json!({ "health": healthy.to_string(), "reason": reason }).to_string();
    let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, body).into_response()
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
            // A member that finds its state corrupt stops, so one that answers has not.
            Check::DataCorruption => Ok(()),
            Check::SerializableRead => read(true).await,
            Check::LinearizableRead => read(false).await,
            Check::NonLearner if node.status().is_learner => Err("member is a learner".to_owned()),
            Check::NonLearner => Ok(()),
        }
    }
}

async fn probe(
    checks: &'static [Check],
    State(node): State<Arc<Node>>,
    RawQuery(query): RawQuery,
) -> Response {
    let verbose = parameter(query.as_deref(), "verbose").is_some();
    run(checks, &node, verbose).await
}

async fn probe_one(
    checks: &'static [Check],
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Response {
    match checks.iter().find(|check| check.name() == name) {
        Some(check) => run(&[*check], &node, false).await,
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
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, lines).into_response(),
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

/// The value of the first `name` in a query; empty when it has none.
fn parameter(query: Option<&str>, name: &str) -> Option<String> {
    form_urlencoded::parse(query.unwrap_or_default().as_bytes())
        .find(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::parameter;

    #[test]
    fn a_query_parameter_may_come_without_a_value() {
        assert_eq!(parameter(Some("verbose"), "verbose").as_deref(), Some(""));
        assert_eq!(
            parameter(Some("a=1&serializable=true"), "serializable").as_deref(),
            Some("true")
        );
        assert_eq!(parameter(Some("a=1"), "verbose"), None);
        assert_eq!(parameter(None, "verbose"), None);
    }
}
