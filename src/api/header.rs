//! The header of an answer: who answered, in which term, at which revision.

use crate::node::Node;
use crate::pb::etcdserverpb::ResponseHeader;

/// The header of an answer that is true at the current revision.
pub fn current(node: &Node) -> ResponseHeader {
    let header = node.header();
    ResponseHeader {
        cluster_id: header.cluster_id.0,
        member_id: header.member_id.0,
        revision: header.revision,
        raft_term: header.raft_term,
    }
}

/// The header of an answer that belongs to `revision`: the one a write made, or a view was read at.
pub fn at(node: &Node, revision: i64) -> ResponseHeader {
    ResponseHeader { revision, ..current(node) }
}

/// The header of answers about the cluster's members, which show no revision.
pub fn without_revision(node: &Node) -> ResponseHeader {
    at(node, 0)
}

/// The header of one answer inside a transaction, which shows nothing but the revision.
pub fn inside_txn(revision: i64) -> ResponseHeader {
    ResponseHeader { revision, ..ResponseHeader::default() }
}
