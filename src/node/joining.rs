//! A member that joins a cluster which is already there.
//!
//! It knows the peer URLs of all members and its own name. The others tell it the cluster's id and
//! its own, which was given when it was added. What it is told is stored before it takes part, so
//! a later start asks nobody.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tonic::Status;

use super::bootstrap::{Settings, StartError};
use super::identity::DataDir;
use super::{Identity, Member};
use crate::raft::{frame, links};
use crate::types::{ClusterId, MemberId};

/// The others get this long to say who belongs to the cluster.
const DEADLINE: Duration = Duration::from_secs(2);

/// What a member says to one who wants to join.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Introduction {
    pub cluster: ClusterId,
    /// Of the newest change of the members that is known.
    pub at: u64,
    pub members: Vec<Member>,
    /// Those that vote by the log of whoever says this, committed or not.
    pub voters: Vec<MemberId>,
}

/// Who this member is: as its data says, as the cluster says if it joins one, or as its flags say.
///
/// # Errors
///
/// When it is to join and the cluster does not expect it. Nothing is stored then.
pub(super) async fn identity(settings: &Settings) -> Result<Identity, StartError> {
    if !settings.joins {
        return Ok(settings.identity.clone());
    }
    match DataDir::identity(&settings.data_dir)? {
        // Another name is refused where the folder is opened.
        Some(stored) => Ok(Identity { name: settings.identity.name.clone(), ..stored }),
        None => introduced(settings).await,
    }
}

/// Asks the other members who this one is.
///
/// # Errors
///
/// When nobody answers, or this member is not among the members, or has been part of the cluster
/// before: then it has lost its data.
pub(super) async fn introduced(settings: &Settings) -> Result<Identity, StartError> {
    let me = &settings.identity;
    let own_urls = settings.initial_members.get(&me.member_id.0);
    let own_urls = own_urls.map(|node| node.peer_urls.clone()).unwrap_or_default();
    let others = settings.initial_members.iter().filter(|(id, _)| **id != me.member_id.0);
    let questions = others.map(|(_, node)| async {
        let asked = tokio::time::timeout(DEADLINE, ask(&node.peer_urls)).await;
        let answer = asked.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
        if let Err(status) = &answer {
            let urls = node.peer_urls.join(",");
            tracing::warn!(%urls, reason = status.message(), "no introduction");
        }
        answer.ok()
    });
    let answers: Vec<_> =
        futures::future::join_all(questions).await.into_iter().flatten().collect();
    let Some(newest) = answers.iter().max_by_key(|answer| answer.at) else {
        return Err(StartError::NobodyToJoin);
    };
    if answers.iter().any(|answer| answer.cluster != newest.cluster) {
        return Err(StartError::SeveralClusters);
    }
    let listed = settings.initial_members.values().flat_map(|node| &node.peer_urls);
    let wanted: BTreeSet<&String> = own_urls.iter().collect();
    let is_me = |member: &&Member| member.peer_urls.iter().collect::<BTreeSet<_>>() == wanted;
    let Some(found) = newest.members.iter().find(is_me) else {
        return Err(StartError::NotAdded { peer_urls: own_urls.join(",") });
    };
    let known: BTreeSet<&String> = newest.members.iter().flat_map(|it| &it.peer_urls).collect();
    if listed.clone().collect::<BTreeSet<_>>() != known {
        let text = |urls: BTreeSet<&String>| {
            urls.into_iter().map(String::as_str).collect::<Vec<_>>().join(",")
        };
        return Err(StartError::OtherMembers {
            listed: text(listed.collect()),
            members: text(known),
        });
    }
    // Any of them may have heard of it first. One that votes has had the log, though it may not have
    // told its name yet.
    let started = |answer: &Introduction| {
        answer.voters.contains(&found.id)
            || answer.members.iter().any(|member| member.id == found.id && !member.name.is_empty())
    };
    if answers.iter().any(started) {
        return Err(StartError::LostMember { data_dir: settings.data_dir.clone() });
    }
    Ok(Identity { cluster_id: newest.cluster, member_id: found.id, name: me.name.clone() })
}

async fn ask(peer_urls: &[String]) -> Result<Introduction, Status> {
    let mut client = links::introduction(peer_urls)?;
    let answer = client.introduce(frame::encode(&())?).await?;
    frame::decode(answer.get_ref())
}
