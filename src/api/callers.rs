//! Who makes a call: its token, and what the caller may do.
//!
//! The token is in the metadata `token`, or in `authorization`. While authentication is off nobody
//! looks for one, and all of this costs one look at a flag.
//!
//! A command is proposed in the caller's name, and its rights are checked where it is applied
//! (`machine/auth/`). A read is checked here, by the tables at its moment.

use tonic::metadata::MetadataMap;

use crate::node::{Caller, Failure, Node};

fn token(metadata: &MetadataMap) -> Option<&str> {
    let value = metadata.get("token").or_else(|| metadata.get("authorization"))?;
    // What is no text is no token that was ever given out.
    Some(value.to_str().unwrap_or("?"))
}

/// Who sent `metadata`, as far as this member knows.
///
/// # Errors
///
/// [`Failure::InvalidToken`] for one that is none.
pub async fn caller(node: &Node, metadata: &MetadataMap) -> Result<Caller, Failure> {
    if !node.asks_who() {
        return Ok(Caller::default());
    }
    node.caller(token(metadata)).await
}

/// As [`caller`], with rights that are not older than the call. For what is read without a proposal;
/// [`Node::check_unchanged`] is to be asked afterwards.
pub async fn up_to_date(node: &Node, metadata: &MetadataMap) -> Result<Caller, Failure> {
    if node.asks_who() {
        node.read_barrier().await?;
    }
    caller(node, metadata).await
}

/// As [`caller`], at once: for a call that has waited by [`arrive`].
pub fn caller_now(node: &Node, metadata: &MetadataMap) -> Result<Caller, Failure> {
    node.caller_now(token(metadata))
}

/// Waits a moment for a token that this member does not know yet.
pub async fn arrive(node: &Node, metadata: &MetadataMap) {
    if node.asks_who() {
        node.await_token(token(metadata)).await;
    }
}

/// Refuses all but those that may administer the cluster.
pub async fn admin(node: &Node, metadata: &MetadataMap) -> Result<(), Failure> {
    caller(node, metadata).await?.check_admin()
}
