//! A client: one call at a time, each with a deadline, none made twice.

use std::rc::Rc;
use std::time::Duration;

use holdfast::pb::etcdserverpb::ResponseHeader;
use holdfast::raft::links::Dial;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::member::{self, CLIENT_PORT, SimulatedDial};
use crate::record::{Answered, Asked, Call, Record};

/// Some clients lose their patience before the servers give a call up, and some do not.
const DEADLINES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(8)];

pub struct Client {
    pub name: String,
    pub dice: StdRng,
    pub record: Rc<Record>,
    members: usize,
    member: usize,
    channel: Option<Channel>,
    calls: u64,
}

impl Client {
    pub fn new(name: String, seed: u64, members: usize, record: Rc<Record>) -> Client {
        let mut dice = StdRng::seed_from_u64(seed);
        let member = dice.random_range(0..members);
        Client { name, dice, record, members, member, channel: None, calls: 0 }
    }

    pub fn is_over(&self) -> bool {
        self.record.enough.get()
    }

    pub fn member(&self) -> usize {
        self.member
    }

    /// The next call goes to `member`, on a new connection.
    pub fn turn_to(&mut self, member: usize) {
        self.member = member;
        self.channel = None;
    }

    pub fn turn_to_any(&mut self) {
        let member = self.dice.random_range(0..self.members);
        self.turn_to(member);
    }

    pub fn channel(&mut self) -> Channel {
        let member = self.member;
        self.channel.get_or_insert_with(|| connect(member)).clone()
    }

    /// A value that nobody else writes.
    pub fn unique(&mut self) -> String {
        self.calls += 1;
        format!("{}-{}", self.name, self.calls)
    }

    pub async fn pause(&mut self, up_to: Duration) {
        let part: f64 = self.dice.random();
        tokio::time::sleep(up_to.mul_f64(part)).await;
    }

    /// Makes the call and records it. After an error the next goes elsewhere.
    pub async fn call(
        &mut self,
        asked: Asked,
        call: impl Future<Output = Result<(Option<ResponseHeader>, Answered), Status>>,
    ) -> (Answered, i64) {
        let deadline = DEADLINES[usize::from(self.dice.random_ratio(1, 3))];
        self.call_within(deadline, asked, call).await
    }

    pub async fn call_within(
        &mut self,
        deadline: Duration,
        asked: Asked,
        call: impl Future<Output = Result<(Option<ResponseHeader>, Answered), Status>>,
    ) -> (Answered, i64) {
        let began = now();
        let (client, member) = (self.name.clone(), self.member);
        let open = Call {
            client,
            member,
            asked,
            answered: Answered::Unknown("under way at the end".to_owned()),
            revision: 0,
            began,
            ended: Duration::MAX,
        };
        let place = self.record.begin(open.clone());
        let (answered, revision) = match tokio::time::timeout(deadline, call).await {
            Ok(Ok((header, answered))) => (answered, header.map_or(0, |header| header.revision)),
            Ok(Err(status)) => (Answered::Unknown(status.message().to_owned()), 0),
            Err(_) => (Answered::Unknown("no answer".to_owned()), 0),
        };
        let answer = answered.clone();
        self.record.end(place, Call { answered, revision, ended: now(), ..open });
        if matches!(answer, Answered::Unknown(_)) {
            self.turn_to_any();
        }
        (answer, revision)
    }
}

pub fn now() -> Duration {
    turmoil::sim_elapsed().expect("clients are simulated")
}

pub fn connect(member: usize) -> Channel {
    let url = format!("http://{}:{CLIENT_PORT}", member::address(member));
    let endpoint = Endpoint::from_shared(url).expect("it is a URL");
    SimulatedDial.lazily(endpoint.connect_timeout(Duration::from_secs(1)))
}
