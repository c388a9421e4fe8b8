//! A slow and simple model of the machine, and random entries that both must answer alike.
//!
//! The model keeps a whole map of pairs for each revision and finds everything by looking at all of
//! it.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::types::Revision;

pub type Pairs = BTreeMap<Bytes, Record>;

struct ModelLease {
    ttl_seconds: i64,
    deadline: u64,
    renewed_at_index: u64,
}

struct Model {
    /// The pairs at each revision, from 0 on.
    states: Vec<Pairs>,
    compacted: i64,
    now: u64,
    index: u64,
    leases: BTreeMap<i64, ModelLease>,
    labels: BTreeMap<Bytes, Label>,
    forced: Vec<ForcedRelease>,
    alarms: BTreeSet<Alarm>,
    history: Vec<Event>,
}

/// The entry at work.
struct Work {
    pairs: Pairs,
    revision: i64,
    events: Vec<Event>,
    effects: Vec<Effect>,
    left: Vec<Effect>,
    first_before: BTreeMap<Bytes, Record>,
    labels: BTreeMap<Bytes, Label>,
    forced: Vec<ForcedRelease>,
}

fn queue_name(key: &[u8]) -> Option<(Bytes, i64)> {
    let text = std::str::from_utf8(key).ok()?;
    let (name, hex) = text.rsplit_once('/')?;
    let id = i64::from_str_radix(hex, 16).ok()?;
    (id != 0 && LeaseId(id).to_hex() == hex).then(|| (self::key(name), id))
}

fn head(pairs: &Pairs, name: &Bytes) -> Option<Record> {
    let queue = pairs
        .values()
        .filter(|record| queue_name(record.key()).is_some_and(|(its_name, _)| its_name == name));
    queue
        .min_by_key(|record| (record.create_revision(), Bytes::copy_from_slice(record.key())))
        .cloned()
}

impl Work {
    fn header(&self) -> i64 {
        self.revision + i64::from(!self.events.is_empty())
    }

    fn mod_revision(&self) -> Revision {
        Revision::new(self.revision + 1, self.events.len() as u32)
    }

    fn put(&mut self, put: &Put) -> PutReply {
        let prev = self.pairs.get(&put.key).cloned();
        let mod_revision = self.mod_revision();
        let value = match &put.value {
            Some(value) => value,
            None => prev.as_ref().map_or(&[][..], Record::value),
        };
        let record = Record::new(Parts {
            key: &put.key,
            value,
            create_revision: prev.as_ref().map_or(mod_revision.main, Record::create_revision),
            mod_revision,
            version: prev.as_ref().map_or(0, Record::version) + 1,
            lease: put.lease.unwrap_or_else(|| prev.as_ref().map_or(LeaseId::NONE, Record::lease)),
        });
        self.pairs.insert(put.key.clone(), record.clone());
        self.events.push(Event { record, prev: prev.clone() });
        PutReply { prev: prev.filter(|_| put.prev_kv) }
    }

    fn delete(&mut self, key: &Bytes) {
        if let Some((name, _)) = queue_name(key) {
            let first = head(&self.pairs, &name).unwrap();
            self.first_before.entry(name).or_insert(first);
            let create_revision = self.pairs[key].create_revision();
            self.left.push(Effect::QueueLeft { key: key.clone(), create_revision });
            self.labels.remove(key);
        }
        let record = Record::tombstone(key, self.mod_revision());
        let prev = self.pairs.remove(key);
        assert!(prev.is_some());
        self.events.push(Event { record, prev });
    }

    fn delete_range(&mut self, delete: &DeleteRange) -> DeleteReply {
        let found = self.pairs.values().filter(|record| delete.range.contains(record.key()));
        let found: Vec<_> = found.cloned().collect();
        for record in &found {
            self.delete(&Bytes::copy_from_slice(record.key()));
        }
        let deleted = found.len() as i64;
        DeleteReply { deleted, prev: if delete.prev_kv { found } else { vec![] } }
    }
}

/// Answers a range step by step as etcd does it.
pub fn naive_range(pairs: &Pairs, query: &Range) -> RangeReply {
    let mut records: Vec<_> =
        pairs.values().filter(|record| query.range.contains(record.key())).cloned().collect();
    let count = records.len() as i64;
    if query.count_only {
        return RangeReply { count, ..RangeReply::default() };
    }
    let filtered = query.min_mod_revision != 0
        || query.max_mod_revision != 0
        || query.min_create_revision != 0
        || query.max_create_revision != 0;
    let limit = query.limit.max(0) as usize;
    if limit > 0 && query.order == SortOrder::None && !filtered {
        records.truncate(limit + 1);
    }
    if query.max_mod_revision != 0 {
        records.retain(|it| it.mod_revision().main <= query.max_mod_revision);
    }
    if query.min_mod_revision != 0 {
        records.retain(|it| it.mod_revision().main >= query.min_mod_revision);
    }
    if query.max_create_revision != 0 {
        records.retain(|it| it.create_revision() <= query.max_create_revision);
    }
    if query.min_create_revision != 0 {
        records.retain(|it| it.create_revision() >= query.min_create_revision);
    }
    let sign = if query.order == SortOrder::Descend { -1 } else { 1 };
    match query.target {
        SortTarget::Key if sign < 0 => records.reverse(),
        SortTarget::Key => {}
        SortTarget::Version => records.sort_by_key(|it| sign * it.version()),
        SortTarget::Create => records.sort_by_key(|it| sign * it.create_revision()),
        SortTarget::Mod => records.sort_by_key(|it| sign * it.mod_revision().main),
        SortTarget::Value if sign < 0 => {
            records.sort_by_key(|it| std::cmp::Reverse(it.value().to_vec()));
        }
        SortTarget::Value => records.sort_by_key(|it| it.value().to_vec()),
    }
    let more = limit > 0 && records.len() > limit;
    if more {
        records.truncate(limit);
    }
    RangeReply { records, more, count, keys_only: query.keys_only }
}

impl Model {
    fn new() -> Model {
        Model {
            states: vec![Pairs::new(); 2],
            compacted: -1,
            now: 0,
            index: 0,
            leases: BTreeMap::new(),
            labels: BTreeMap::new(),
            forced: vec![],
            alarms: BTreeSet::new(),
            history: vec![],
        }
    }

    fn revision(&self) -> i64 {
        self.states.len() as i64 - 1
    }

    fn present(&self) -> &Pairs {
        self.states.last().unwrap()
    }

    fn readable(&self, revision: i64) -> Result<(), Rejection> {
        if revision > self.revision() {
            let current = self.revision();
            return Err(Rejection::FutureRevision { requested: revision, current });
        }
        if revision > 0 && revision < self.compacted {
            return Err(Rejection::Compacted { requested: revision, oldest: self.compacted });
        }
        Ok(())
    }

    fn lease_exists(&self, lease: Option<LeaseId>) -> Result<(), Rejection> {
        match lease {
            Some(id) if id.0 != 0 && !self.leases.contains_key(&id.0) => {
                Err(Rejection::LeaseNotFound(id))
            }
            _ => Ok(()),
        }
    }

    fn keeps_something_present(&self, put: &Put) -> Result<(), Rejection> {
        let keeps = put.value.is_none() || put.lease.is_none();
        match keeps && !self.present().contains_key(&put.key) {
            true => Err(Rejection::KeyNotFound),
            false => Ok(()),
        }
    }

    fn compare(&self, compare: &Compare) -> bool {
        let in_range = self.present().values().filter(|it| compare.range.contains(it.key()));
        let mut records: Vec<Option<&Record>> = in_range.map(Some).collect();
        if records.is_empty() {
            records.push(None);
        }
        records.into_iter().all(|record| {
            let (version, create, modified, lease) = record.map_or((0, 0, 0, 0), |it| {
                (it.version(), it.create_revision(), it.mod_revision().main, it.lease().0)
            });
            let order = match &compare.target {
                CompareTarget::Version(than) => version - than,
                CompareTarget::Create(than) => create - than,
                CompareTarget::Mod(than) => modified - than,
                CompareTarget::Lease(than) => lease - than,
                CompareTarget::Value(than) => match record {
                    Some(record) => record.value().cmp(than) as i64,
                    None => return false,
                },
                CompareTarget::Unknown => 0,
            };
            match compare.result {
                CompareResult::Equal => order == 0,
                CompareResult::NotEqual => order != 0,
                CompareResult::Greater => order > 0,
                CompareResult::Less => order < 0,
                CompareResult::Unknown => true,
            }
        })
    }

    fn branch<'t>(&self, txn: &'t Txn) -> (bool, &'t [TxnOp]) {
        let succeeded = txn.compares.iter().all(|compare| self.compare(compare));
        (succeeded, if succeeded { &txn.success } else { &txn.failure })
    }

    fn check(&self, txn: &Txn, puts: bool) -> Result<(), Rejection> {
        for op in self.branch(txn).1 {
            match op {
                TxnOp::Put(put) if puts => {
                    self.keeps_something_present(put)?;
                    self.lease_exists(put.lease)?;
                }
                TxnOp::Range(query) if !puts => {
                    if query.revision < 0 && query.revision < self.compacted {
                        let (requested, oldest) = (query.revision, self.compacted);
                        return Err(Rejection::Compacted { requested, oldest });
                    }
                    self.readable(query.revision)?;
                }
                TxnOp::Txn(txn) => self.check(txn, puts)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn run(&self, work: &mut Work, txn: &Txn) -> TxnReply {
        let (succeeded, ops) = self.branch(txn);
        let responses = ops.iter().map(|op| match op {
            TxnOp::Put(put) => {
                let reply = work.put(put);
                TxnOpReply::Put { revision: work.header(), reply }
            }
            TxnOp::DeleteRange(delete) => {
                let reply = work.delete_range(delete);
                TxnOpReply::DeleteRange { revision: work.header(), reply }
            }
            TxnOp::Range(query) => {
                let pairs = match query.revision > 0 {
                    true => &self.states[query.revision as usize],
                    false => &work.pairs,
                };
                TxnOpReply::Range { revision: work.header(), reply: naive_range(pairs, query) }
            }
            TxnOp::Txn(txn) => TxnOpReply::Txn(self.run(work, txn)),
        });
        TxnReply { succeeded, responses: responses.collect() }
    }

    fn end(&mut self, work: &mut Work, ids: &[i64]) {
        let mut keys = BTreeSet::new();
        for id in ids {
            self.leases.remove(id).unwrap();
            work.effects.push(Effect::LeaseEnded { id: LeaseId(*id) });
            keys.extend(
                work.pairs
                    .values()
                    .filter(|it| it.lease().0 == *id)
                    .map(|it| Bytes::copy_from_slice(it.key())),
            );
        }
        keys.iter().for_each(|key| work.delete(key));
    }

    fn renew(&mut self, work: &mut Work, id: i64) -> Option<i64> {
        let (now, index) = (self.now, self.index);
        let lease = self.leases.get_mut(&id)?;
        lease.deadline = now + lease.ttl_seconds as u64 * 1000;
        lease.renewed_at_index = index;
        work.effects.push(Effect::LeaseHeld {
            id: LeaseId(id),
            deadline: Timestamp(lease.deadline),
            renewed_at_index: index,
        });
        Some(lease.ttl_seconds)
    }

    fn allowed(&self, command: &Command) -> Result<(), Rejection> {
        let raised = |kind| self.alarms.iter().any(|alarm| alarm.kind == kind);
        let text = format!("{command:?}");
        let name = text.split(|letter: char| !letter.is_alphanumeric()).next().unwrap();
        let harmless = ["LeaseRenew", "Tick", "PublishMember", "Told", "Alarm"];
        if raised(AlarmKind::Corrupt) && !harmless.contains(&name) {
            return Err(Rejection::Corrupt);
        }
        let grows = ["LeaseGrant", "Enqueue", "Join", "Proclaim"].contains(&name);
        // A put anywhere in the command.
        if raised(AlarmKind::NoSpace) && (grows || text.contains("Put {")) {
            return Err(Rejection::NoSpace);
        }
        Ok(())
    }

    fn command(&mut self, work: &mut Work, command: &Command) -> Result<Reply, Rejection> {
        self.allowed(command)?;
        Ok(match command {
            Command::Alarm(AlarmAction::Raise(alarm)) => {
                self.alarms.insert(*alarm);
                Reply::Alarm(Some(*alarm))
            }
            Command::Alarm(AlarmAction::BeginDigest) => Reply::Done,
            Command::Auth(_) => unreachable!("the model has no users"),
            Command::Alarm(AlarmAction::Clear(alarm)) => {
                Reply::Alarm(self.alarms.remove(alarm).then_some(*alarm))
            }
            Command::Put(put) => {
                self.lease_exists(put.lease)?;
                self.keeps_something_present(put)?;
                Reply::Put(work.put(put))
            }
            Command::DeleteRange(delete) => Reply::DeleteRange(work.delete_range(delete)),
            Command::Txn(txn) => {
                self.check(txn, true)?;
                self.check(txn, false)?;
                Reply::Txn(self.run(work, txn))
            }
            Command::Compact { revision } => {
                if *revision <= self.compacted {
                    let oldest = self.compacted;
                    return Err(Rejection::Compacted { requested: *revision, oldest });
                }
                self.readable(*revision)?;
                self.compacted = *revision;
                Reply::Compacted
            }
            Command::LeaseGrant { id, ttl_seconds } => {
                if self.leases.contains_key(&id.0) {
                    return Err(Rejection::LeaseExists(*id));
                }
                let ttl_seconds = *ttl_seconds;
                self.leases
                    .insert(id.0, ModelLease { ttl_seconds, deadline: 0, renewed_at_index: 0 });
                self.renew(work, id.0);
                Reply::LeaseGranted { id: *id, ttl_seconds }
            }
            Command::LeaseRevoke { id } => {
                self.lease_exists(Some(*id))?;
                self.end(work, &[id.0]);
                Reply::LeaseRevoked
            }
            Command::LeaseRenew { ids } => {
                Reply::LeaseRenewed(ids.iter().map(|id| self.renew(work, id.0)).collect())
            }
            Command::LeaseExpire { leases, .. } => {
                let mut over = Vec::new();
                for expired in leases {
                    let valid = self.leases.get(&expired.id.0).is_some_and(|lease| {
                        lease.renewed_at_index == expired.renewed_at_index
                            && lease.deadline <= self.now
                    });
                    if valid && !over.contains(&expired.id.0) {
                        over.push(expired.id.0);
                    }
                }
                self.end(work, &over);
                Reply::LeaseExpired(over.len())
            }
            Command::Tick | Command::PublishMember { .. } => Reply::Done,
            Command::Enqueue(enqueue) => {
                if !self.leases.contains_key(&enqueue.lease.0) {
                    return Err(Rejection::LeaseNotFound(enqueue.lease));
                }
                let name = std::str::from_utf8(&enqueue.name).unwrap();
                let key = Bytes::from(format!("{name}/{}", enqueue.lease.to_hex()));
                let present = work.pairs.get(&key).cloned();
                if present.as_ref().is_some_and(|it| it.lease() != enqueue.lease) {
                    return Err(Rejection::Detached(enqueue.lease));
                }
                let differs = present.as_ref().is_some_and(|it| it.value() != enqueue.value);
                if present.is_none() || enqueue.rewrite && differs {
                    work.put(&Put {
                        key: key.clone(),
                        value: Some(enqueue.value.clone()),
                        lease: Some(enqueue.lease),
                        prev_kv: false,
                    });
                }
                Reply::Enqueued(Enqueued {
                    create_revision: work.pairs[&key].create_revision(),
                    created: present.is_none(),
                    first: head(&work.pairs, &enqueue.name).unwrap().key() == key,
                    lease_ttl_seconds: self.leases[&enqueue.lease.0].ttl_seconds,
                    key,
                })
            }
            Command::Leave { key, create_revision } => {
                let found =
                    work.pairs.get(key).is_some_and(|it| it.create_revision() == *create_revision);
                found.then(|| work.delete(key));
                Reply::Left(found)
            }
            Command::Unlock { key } => {
                let named = queue_name(key).map(|(_, id)| id);
                let found = work.pairs.get(key).is_some_and(|it| Some(it.lease().0) == named);
                found.then(|| work.delete(key));
                Reply::Left(found)
            }
            Command::Join(join) => {
                let Enqueue { name, lease, .. } = &join.enqueue;
                self.lease_exists(Some(*lease))?;
                let text = std::str::from_utf8(name).unwrap();
                let key = Bytes::from(format!("{text}/{}", lease.to_hex()));
                let first = head(&work.pairs, name);
                if join.only_if_free && first.is_some_and(|first| first.key() != key) {
                    return Ok(Reply::Busy);
                }
                let reply = self.command(work, &Command::Enqueue(join.enqueue.clone()))?;
                let Reply::Enqueued(queued) = &reply else { panic!("{reply:?}") };
                let now = Timestamp(self.now);
                let label = work.labels.entry(key.clone()).or_insert(Label {
                    owner: String::new(),
                    client: String::new(),
                    session: join.session,
                    joined_at: now,
                    granted_at: queued.first.then_some(now),
                    asked: None,
                });
                (label.owner, label.client) = (join.owner.clone(), join.client.clone());
                work.effects.push(Effect::LabelChanged { key });
                return Ok(reply);
            }
            Command::Release(Release { name, token, forced }) => {
                let attached = |it: &Record| queue_name(it.key()).unwrap().1 == it.lease().0;
                let place = work.pairs.values().find(|it| {
                    it.create_revision() == *token
                        && queue_name(it.key()).is_some_and(|(its_name, _)| its_name == name)
                });
                let place = place.filter(|it| forced.is_some() || attached(it)).cloned();
                let Some(record) = place else { return Ok(Reply::Left(false)) };
                let label = work.labels.get(record.key()).cloned();
                if let Some(Force { by, reason }) = forced {
                    work.forced.push(ForcedRelease {
                        name: name.clone(),
                        token: *token,
                        owner: label.as_ref().map_or(String::new(), |it| it.owner.clone()),
                        client: label.as_ref().map_or(String::new(), |it| it.client.clone()),
                        by: by.clone(),
                        reason: reason.clone(),
                        at: Timestamp(self.now),
                    });
                }
                if label.is_some_and(|label| label.session) && attached(&record) {
                    self.end(work, &[record.lease().0]);
                } else {
                    work.delete(&Bytes::copy_from_slice(record.key()));
                }
                Reply::Left(true)
            }
            Command::AskRelease(ask) => {
                let first = head(&work.pairs, &ask.name);
                let first = first.filter(|it| ask.token == 0 || ask.token == it.create_revision());
                if let Some(first) = &first
                    && let Some(label) = work.labels.get_mut(first.key())
                {
                    label.asked = Some(Asked {
                        by: ask.by.clone(),
                        reason: ask.reason.clone(),
                        at: Timestamp(self.now),
                        told: false,
                    });
                    work.effects
                        .push(Effect::LabelChanged { key: Bytes::copy_from_slice(first.key()) });
                }
                Reply::Asked(
                    first.map(|first| {
                        (Bytes::copy_from_slice(first.key()), first.create_revision())
                    }),
                )
            }
            Command::Told { key, create_revision } => {
                let present = work.pairs.get(key);
                if present.is_some_and(|it| it.create_revision() == *create_revision) {
                    if let Some(asked) =
                        work.labels.get_mut(key).and_then(|label| label.asked.as_mut())
                    {
                        asked.told = true;
                    }
                    work.effects.push(Effect::LabelChanged { key: key.clone() });
                }
                Reply::Done
            }
            Command::Proclaim(proclaim) => {
                let present = work.pairs.get(&proclaim.key).cloned();
                let leads = present.as_ref().is_some_and(|it| {
                    it.create_revision() == proclaim.create_revision
                        && queue_name(it.key()).is_some_and(|(name, _)| {
                            head(&work.pairs, &name).as_ref() == present.as_ref()
                        })
                });
                if !leads {
                    return Ok(Reply::Proclaimed(false));
                }
                self.lease_exists(Some(proclaim.lease).filter(|id| !id.is_none()))?;
                let (present, named) = (present.unwrap(), queue_name(&proclaim.key).unwrap().1);
                let given = proclaim.lease.is_none() || proclaim.lease == present.lease();
                let proclaimed = given && present.lease().0 == named;
                if proclaimed {
                    work.put(&Put {
                        key: proclaim.key.clone(),
                        value: Some(proclaim.value.clone()),
                        lease: None,
                        prev_kv: false,
                    });
                }
                Reply::Proclaimed(proclaimed)
            }
            Command::Fenced(Fenced { fences, write }) => {
                for Fence { name, token } in fences {
                    let owner = head(&work.pairs, name)
                        .filter(|it| queue_name(it.key()).unwrap().1 == it.lease().0);
                    if owner.is_none_or(|owner| owner.create_revision() != *token) {
                        return Err(Rejection::StaleFence { token: *token });
                    }
                }
                let command = match write.clone() {
                    FencedWrite::Put(put) => Command::Put(put),
                    FencedWrite::DeleteRange(delete) => Command::DeleteRange(delete),
                    FencedWrite::Txn(txn) => Command::Txn(txn),
                };
                return self.command(work, &command);
            }
        })
    }

    fn apply(&mut self, entry: &Entry) -> Outcome {
        self.index += 1;
        self.now = self.now.max(entry.at.0);
        let mut work = Work {
            pairs: self.present().clone(),
            revision: self.revision(),
            events: vec![],
            effects: vec![],
            left: vec![],
            first_before: BTreeMap::new(),
            labels: self.labels.clone(),
            forced: self.forced.clone(),
        };
        let reply = self.command(&mut work, &entry.command);
        let mut effects = work.effects;
        effects.extend(work.left);
        for (name, before) in work.first_before {
            let stays = work
                .pairs
                .get(before.key())
                .is_some_and(|it| it.create_revision() == before.create_revision());
            if !stays && let Some(first) = head(&work.pairs, &name) {
                if let Some(label) = work.labels.get_mut(first.key()) {
                    label.granted_at = Some(Timestamp(self.now));
                }
                effects.push(Effect::QueueHead {
                    key: Bytes::copy_from_slice(first.key()),
                    create_revision: first.create_revision(),
                    lease_alive: queue_name(first.key()).unwrap().1 == first.lease().0,
                });
            }
        }
        (self.labels, self.forced) = (work.labels, work.forced);
        if !work.events.is_empty() {
            self.states.push(work.pairs);
        }
        self.history.extend(work.events.iter().cloned());
        Outcome { revision: self.revision(), reply, events: work.events, effects }
    }

    /// The events a watch from `from` on gets.
    fn changes(&self, from: i64, range: &KeyRange) -> Vec<Event> {
        let in_range = self.history.iter().filter(|event| {
            event.record.mod_revision().main >= from && range.contains(event.record.key())
        });
        let mut events: Vec<_> = in_range.cloned().collect();
        // At the compacted revision only a key's last change is left, and nothing before it.
        let last = |event: &Event| {
            let record = &event.record;
            let mut same = self.history.iter().filter(|other| {
                other.record.mod_revision().main == self.compacted
                    && other.record.key() == record.key()
            });
            same.next_back().map(|other| other.record.mod_revision()) == Some(record.mod_revision())
        };
        events.retain(|event| event.record.mod_revision().main > self.compacted || last(event));
        for event in &mut events {
            if event.record.mod_revision().main == self.compacted {
                event.prev = None;
            }
        }
        events
    }
}

fn check_reads(seed: u64, random: &mut Random, member: &Member, model: &Model) {
    let view = member.view();
    for _ in 0..3 {
        let query = random_query(random);
        let expected = model.readable(query.revision).map(|()| {
            let at = if query.revision > 0 { query.revision } else { model.revision() };
            naive_range(&model.states[at as usize], &query)
        });
        assert_eq!(view.range(&query), expected, "seed {seed}: {query:?}");
    }
    let key = random_key(random);
    assert_eq!(view.get(&key).as_ref(), model.present().get(&key), "seed {seed}");

    let (from, range) = (random.below(60) as i64 - 1, random_range(random));
    let limit = random.below(9) as usize;
    let mut events = Vec::new();
    let mut next = from;
    let result = loop {
        match view.changes(next, &range, limit) {
            Err(rejection) => break Err(rejection),
            Ok(changes) => {
                assert!(changes.next > next || next > model.revision(), "seed {seed}");
                events.extend(changes.events);
                next = changes.next;
                if next > model.revision() {
                    break Ok(events);
                }
            }
        }
    };
    let expected = match from < model.compacted {
        true => Err(Rejection::Compacted { requested: from, oldest: model.compacted }),
        false => Ok(model.changes(from, &range)),
    };
    assert_eq!(result, expected, "seed {seed}: changes from {from} in {range:?}");

    for name in ["n", "n/x", "", "m"] {
        let first = member.machine.queue_head(name.as_bytes());
        assert_eq!(first, head(model.present(), &self::key(name)), "seed {seed}");
    }
    let mut labels = BTreeMap::new();
    for name in ["n", "n/x", "", "m"] {
        for place in member.machine.queue(name.as_bytes(), 100).0 {
            labels.extend(
                place.label.map(|label| (Bytes::copy_from_slice(place.record.key()), label)),
            );
        }
    }
    assert_eq!(labels, model.labels, "seed {seed}");
    let forced: Vec<_> = member.machine.forced_releases().cloned().collect();
    assert!(forced.iter().rev().eq(&model.forced), "seed {seed}");
    let leases = member.machine.leases();
    assert_eq!(leases.len(), model.leases.len(), "seed {seed}");
    for (id, lease) in leases.iter() {
        assert_eq!(lease.deadline.0, model.leases[&id.0].deadline, "seed {seed}");
        let attached = model.present().values().filter(|it| it.lease() == id).map(|it| it.key());
        assert!(leases.keys(id).eq(attached), "seed {seed}");
    }
}

/// Makes conditions hold now and then that random numbers hardly ever meet.
pub fn sharpen(random: &mut Random, command: &mut Command, machine: &Machine) {
    let present = |key: &Bytes| machine.store().view().get(key);
    match command {
        Command::Leave { key, create_revision } if random.one_in(2) => {
            *create_revision = present(key).map_or(0, |it| it.create_revision());
        }
        Command::Release(release) if !random.one_in(3) => {
            let (queue, _) = machine.queue(&release.name, 8);
            release.token = match queue.len() as u64 {
                0 => 0,
                length => queue[random.below(length) as usize].record.create_revision(),
            };
        }
        Command::Told { key, create_revision } if !random.one_in(3) => {
            *create_revision = present(key).map_or(0, |it| it.create_revision());
        }
        Command::Proclaim(proclaim) if random.one_in(2) => {
            proclaim.create_revision = present(&proclaim.key).map_or(0, |it| it.create_revision());
        }
        Command::Fenced(fenced) => {
            for fence in fenced.fences.iter_mut().filter(|_| !random.one_in(3)) {
                fence.token =
                    machine.queue_head(&fence.name).map_or(0, |owner| owner.create_revision());
            }
        }
        Command::LeaseExpire { leases, .. } => {
            for expired in leases.iter_mut().filter(|_| random.one_in(2)) {
                expired.renewed_at_index =
                    machine.leases().get(expired.id).map_or(0, |it| it.renewed_at_index);
            }
        }
        Command::Compact { revision } if random.one_in(3) => {
            *revision = machine.store().revision() - random.below(3) as i64;
        }
        _ => {}
    }
}

#[test]
fn random_entries_are_answered_as_the_model_answers_them() {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let (mut member, mut model) = (Member::new(), Model::new());
        let mut at = 0;
        for step in 0..150 {
            at += random.below(800);
            let mut command = random_command(&mut random);
            sharpen(&mut random, &mut command, &member.machine);
            let entry =
                Entry { at: Timestamp(at), origin: Origin::default(), command, principal: None };
            let expected = model.apply(&entry);
            let outcome = member.apply_entry(&entry);
            let context = format!("seed {seed}, step {step}: {:?}", entry.command);
            assert_eq!(outcome.reply, expected.reply, "{context}");
            assert_eq!(outcome.revision, expected.revision, "{context}");
            assert_eq!(outcome.events, expected.events, "{context}");
            assert_eq!(outcome.effects, expected.effects, "{context}");
            if random.one_in(4) {
                member.scrub(random.below(20) as usize);
            }
            if random.one_in(30) {
                member.restart();
            }
            check_reads(seed, &mut random, &member, &model);
        }
    }
}

#[test]
fn read_only_transactions_answer_alike_with_and_without_an_entry() {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let mut member = Member::new();
        for _ in 0..40 {
            let command = random_command(&mut random);
            member.apply(command);
            member.clear_alarms();
            let mut txn = random_txn(&mut random, 2);
            fn keep_reads(txn: &mut Txn) {
                for ops in [&mut txn.success, &mut txn.failure] {
                    ops.retain(|op| matches!(op, TxnOp::Range(_) | TxnOp::Txn(_)));
                    for op in ops {
                        if let TxnOp::Txn(nested) = op {
                            keep_reads(nested);
                        }
                    }
                }
            }
            keep_reads(&mut txn);
            let read = member.view().read_txn(&txn).map(Reply::Txn);
            assert_eq!(member.apply(Command::Txn(txn)).reply, read, "seed {seed}");
        }
    }
}
