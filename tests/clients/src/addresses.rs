//! Where the members of a cluster answer clients, whoever runs them.

use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error, GetOptions};

use crate::check::{AFTER_ELECTION, eventually};

/// What a member says that has authentication on.
const ASKS_WHO: &str = "etcdserver: user name is empty";

/// The client URLs of the members, numbered from zero.
#[derive(Debug, Clone)]
pub struct Addresses {
    urls: Vec<String>,
}

impl Addresses {
    pub fn new(urls: Vec<String>) -> Addresses {
        Addresses { urls }
    }

    /// Another member, at `url`.
    pub fn push(&mut self, url: String) {
        self.urls.push(url);
    }

    /// These members only, numbered anew in this order.
    pub fn only(&self, members: &[usize]) -> Addresses {
        Addresses::new(members.iter().map(|member| self.urls[*member].clone()).collect())
    }

    /// How many members the cluster has, running or not.
    pub fn size(&self) -> usize {
        self.urls.len()
    }

    /// The client URL of a member.
    pub fn endpoint(&self, member: usize) -> String {
        self.urls[member].clone()
    }

    /// A client that talks to this member and no other.
    pub async fn client(&self, member: usize) -> Client {
        connect(&self.urls[member]).await
    }

    /// The members other than `member`.
    pub fn others(&self, member: usize) -> Vec<usize> {
        (0..self.size()).filter(|m| *m != member).collect()
    }

    /// Whether a member answers a linearizable read within a second, which takes a leader and a
    /// quorum.
    pub async fn serves(&self, member: usize) -> bool {
        let read = async {
            let options = GetOptions::new().with_count_only();
            match self.client(member).await.get("holdfast-test-ready", Some(options)).await {
                Ok(_) => true,
                // Who calls is asked when it could be answered.
                Err(Error::GRpcStatus(refusal)) => refusal.message() == ASKS_WHO,
                Err(_) => false,
            }
        };
        tokio::time::timeout(Duration::from_secs(1), read).await.unwrap_or(false)
    }

    /// The member that leads, once all of `among` agree on one of them.
    pub async fn leader_among(&self, among: &[usize]) -> usize {
        eventually(AFTER_ELECTION, "a leader all these members agree on", || async move {
            let (mut ids, mut leaders) = (Vec::new(), Vec::new());
            for member in among {
                let status = tokio::time::timeout(Duration::from_secs(1), async {
                    self.client(*member).await.status().await.ok()
                });
                let status = status.await.ok()??;
                ids.push((status.header()?.member_id(), *member));
                leaders.push(status.leader());
            }
            let leads = |id| leaders.iter().all(|leader| *leader == id);
            ids.into_iter().find(|(id, _)| leads(*id)).map(|(_, member)| member)
        })
        .await
    }
}

/// A client of the member at `endpoint`.
pub async fn connect(endpoint: &str) -> Client {
    let options = ConnectOptions::new().with_connect_timeout(Duration::from_secs(2));
    Client::connect([endpoint], Some(options)).await.expect("connecting is lazy")
}
