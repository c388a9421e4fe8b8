//! Changes of who is a member: one is removed and another takes its place, with nothing on its disk.
//! Sometimes the leader dies between the two changes.

use std::time::Duration;

use rand::Rng;
use tokio::time::Instant;

use super::{Injected, Nemesis, Undo};
use crate::shell::run;

/// A change is made by then: a cluster takes one once its members have been connected for five
/// seconds, and has an election to get over where the leader died.
const CHANGED: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(100);

impl Nemesis<'_> {
    pub(super) async fn replace(&mut self, leader: usize) -> Result<Injected, String> {
        let target = self.leader_or_follower(leader);
        let asked = self.a_follower(target);
        let url = self.members.peer_url(target);
        let old = self.id_of(asked, target).await.ok_or("it is no member")?;
        let deadline = Instant::now() + CHANGED;
        loop {
            let mut client = self.members.client(asked).await;
            let told = tokio::time::timeout(PATIENCE, client.member_remove(old)).await;
            // Whatever was answered, what the members know counts.
            if self.listed(asked).await.is_some_and(|list| list.iter().all(|m| m.id != old)) {
                break;
            }
            if Instant::now() > deadline {
                return Err(format!("member {target} is not removed: {told:?}"));
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.members.kill(target);
        let mut how = format!("member {target} is replaced, leader {leader}");
        if self.rounds > 0 && self.random.random_bool(0.5) {
            let everyone_else = self.others(&[target]);
            if let Some(now) = self.members.leader(&everyone_else, CHANGED).await {
                self.members.kill(now);
                self.members.start(now)?;
                how += &format!(", leader {now} killed meanwhile");
            }
        }
        loop {
            let mut client = self.members.client(asked).await;
            let told = tokio::time::timeout(PATIENCE, client.member_add([url.clone()], None)).await;
            if self.id_of(asked, target).await.is_some_and(|id| id != old) {
                break;
            }
            if Instant::now() > deadline + CHANGED {
                return Err(format!("no member in the place of {target}: {told:?}"));
            }
            tokio::time::sleep(PAUSE).await;
        }
        let data = self.members.data(target).to_string_lossy().into_owned();
        run("find", &[&data, "-mindepth", "1", "-delete"])?;
        self.members.set_flag(target, "initial-cluster-state", "existing");
        self.members.start(target)?;
        let well = self.others(&[target]);
        let should = well.len();
        let undo = Undo::Replaced(target, old);
        Ok(Injected { targets: vec![target], how, well, should, undo })
    }

    pub(super) async fn confirm_replaced(&self, target: usize, old: u64) -> Result<String, String> {
        let url = self.members.peer_url(target);
        let members = self.listed(target).await.ok_or("the new member does not tell")?;
        match members.iter().find(|m| m.url == url) {
            Some(new) if new.id != old && new.votes => {
                Ok(format!("member {target} was {old:x} and is {:x}", new.id))
            }
            found => Err(format!("in the place of member {target}, {old:x}, is {found:?}")),
        }
    }

    async fn id_of(&self, asked: usize, member: usize) -> Option<u64> {
        let url = self.members.peer_url(member);
        self.listed(asked).await?.into_iter().find(|m| m.url == url).map(|m| m.id)
    }

    /// The members as `asked` knows them for certain.
    async fn listed(&self, asked: usize) -> Option<Vec<Listed>> {
        let list = async { self.members.client(asked).await.member_list().await.ok() };
        let list = tokio::time::timeout(PATIENCE, list).await.ok()??;
        let listed = list.members().iter().map(|member| Listed {
            id: member.id(),
            url: member.peer_urls().first().cloned().unwrap_or_default(),
            votes: !member.is_learner(),
        });
        Some(listed.collect())
    }
}

#[derive(Debug)]
struct Listed {
    id: u64,
    url: String,
    votes: bool,
}
