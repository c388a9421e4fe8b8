//! The machine's state: where it comes from after a restart, and what others may see of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::alarm::Alarms;
use super::auth;
use super::holds::Holds;
use super::mvcc::{Hasher, History, Live, NEVER_COMPACTED, Scrubber, Space};
use super::queue::Queues;
use super::{Auth, Digest, Fault, Image, LeaseTable, Record, Store, codec, schema};
use crate::mutant;
use crate::storage::{Batch, Engine};
#[cfg(test)]
use crate::types::Revision;
use crate::types::{MemberId, Timestamp};

/// Where an entry stands in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub term: u64,
    pub index: u64,
}

/// The replicated state machine.
pub struct Machine {
    pub(super) history: Arc<History>,
    /// What readers hold: always `history`.
    store: Store,
    pub(super) live: Live,
    pub(super) leases: LeaseTable,
    pub(super) queues: Queues,
    pub(super) holds: Holds,
    pub(super) members: BTreeMap<MemberId, PublishedMember>,
    /// The members that were removed.
    pub(super) retired: BTreeSet<MemberId>,
    pub(super) alarms: Alarms,
    pub(super) auth: Arc<Auth>,
    pub(super) space: Space,
    /// Of the newest entry.
    pub(super) now: Timestamp,
    /// `None` until it can be compared with that of other members.
    pub(super) digest: Option<Digest>,
    scrubber: Scrubber,
    /// As the engine has it, or will once it has taken the batches so far.
    stored_meta: Option<Meta>,
}

/// How clients reach a member, as it said itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedMember {
    pub name: String,
    pub client_urls: Vec<String>,
}

/// The few numbers that change with nearly every entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    pub revision: i64,
    pub compacted: i64,
    pub now: Timestamp,
    pub digest: Option<Digest>,
}

impl Machine {
    /// The state before the first entry: revision 1, and nothing in it.
    pub fn new() -> Machine {
        let (compacted, now) = (NEVER_COMPACTED, Timestamp(0));
        let meta = Meta { revision: 1, compacted, now, digest: Some(Digest::BEGIN) };
        Machine::empty(meta, None)
    }

    /// The state that an engine has taken. Loads a fresh state from an engine that has none.
    ///
    /// # Errors
    ///
    /// Pairs that cannot be read or that contradict each other, and the engine's own errors.
    pub fn load(engine: &dyn Engine) -> Result<Machine, Fault> {
        let Some(meta) = engine.get(&schema::META_KEY)? else {
            return Machine::load_fresh(engine);
        };
        let meta = codec::decode_meta(&meta)?;
        let mut machine = Machine::empty(meta, Some(meta));
        scan(engine, schema::LEASE_PREFIX, |key, value| {
            let (id, lease) = codec::decode_lease(key, value)?;
            machine.leases.insert(id, lease);
            Ok(())
        })?;
        scan(engine, schema::MEMBER_PREFIX, |key, value| {
            let id = schema::member_id(key).ok_or_else(|| codec::bad_key("member", key))?;
            machine.members.insert(id, codec::decode_member(value)?);
            Ok(())
        })?;
        scan(engine, schema::RETIRED_PREFIX, |key, _| {
            let id = schema::retired_id(key).ok_or_else(|| codec::bad_key("retired", key))?;
            machine.retired.insert(id);
            Ok(())
        })?;
        scan(engine, schema::LABEL_PREFIX, |key, value| {
            let label = codec::decode_label(value)?;
            machine.holds.labels.insert(Bytes::copy_from_slice(&key[1..]), label);
            Ok(())
        })?;
        scan(engine, schema::FORCED_PREFIX, |key, value| {
            let number =
                schema::forced_number(key).ok_or_else(|| codec::bad_key("forced release", key))?;
            machine.holds.forced.push_back((number, codec::decode_forced(value)?));
            Ok(())
        })?;
        scan(engine, schema::ALARM_PREFIX, |key, _| {
            let alarm = schema::alarm(key).ok_or_else(|| codec::bad_key("alarm", key))?;
            machine.alarms.raised.insert(alarm);
            Ok(())
        })?;
        let mut tables = auth::Loading::default();
        if let Some(numbers) = engine.get(&schema::AUTH_KEY)? {
            tables.numbers(&numbers)?;
        }
        scan(engine, schema::USER_PREFIX, |key, value| tables.user(key, value))?;
        scan(engine, schema::ROLE_PREFIX, |key, value| tables.role(key, value))?;
        machine.auth = Arc::new(tables.finish());
        let mut loading = machine.history.loading(&mut machine.space);
        scan(engine, schema::RECORD_PREFIX, |key, value| {
            let revision =
                schema::record_revision(key).ok_or_else(|| codec::bad_key("record", key))?;
            if revision.main > meta.revision {
                let reason = format!("the store is at revision {}", meta.revision);
                return Err(codec::corrupt(format!("{}.{}", revision.main, revision.sub), reason));
            }
            loading.insert(codec::decode_record(revision, value)?);
            Ok(())
        })?;
        let (live, pairs) = loading.finish();
        machine.live = live;
        machine.derive_tables(&pairs)?;
        Ok(machine)
    }

    fn load_fresh(engine: &dyn Engine) -> Result<Machine, Fault> {
        for prefix in [
            schema::ALARM_PREFIX,
            schema::AUTH_KEY[0],
            schema::LABEL_PREFIX,
            schema::LEASE_PREFIX,
            schema::MEMBER_PREFIX,
            schema::RECORD_PREFIX,
            schema::RETIRED_PREFIX,
            schema::ROLE_PREFIX,
            schema::USER_PREFIX,
        ] {
            scan(engine, prefix, |key, _| {
                let what = format!("pair at {}", key.escape_ascii());
                Err(codec::corrupt(what, "the store has no revision"))
            })?;
        }
        Ok(Machine::new())
    }

    fn empty(meta: Meta, stored_meta: Option<Meta>) -> Machine {
        let history = Arc::new(History::new(meta.revision, meta.compacted));
        Machine {
            store: Store::new(history.clone()),
            history,
            live: Live::default(),
            leases: LeaseTable::default(),
            queues: Queues::default(),
            holds: Holds::default(),
            members: BTreeMap::new(),
            retired: BTreeSet::new(),
            alarms: Alarms::default(),
            auth: Arc::default(),
            space: Space::default(),
            now: meta.now,
            digest: meta.digest,
            scrubber: Scrubber::new(),
            stored_meta,
        }
    }

    /// Finds attachments and queues in the pairs that are there, and lets readers count them.
    fn derive_tables(&mut self, pairs: &[Record]) -> Result<(), Fault> {
        for record in pairs {
            let (key, lease) = (record.key(), record.lease());
            self.queues.add(key, record.create_revision());
            if !lease.is_none() && !self.leases.attach(lease, Bytes::copy_from_slice(key)) {
                let what = format!("key {}", key.escape_ascii());
                return Err(codec::corrupt(what, format!("its lease {lease} is missing")));
            }
        }
        self.history.publish_roster(self.history.published(), self.live.roster().clone());
        let is_there = |key: &Bytes| self.live.get(key).is_some();
        match self.holds.labels.keys().find(|key| !is_there(key)) {
            Some(key) => {
                let what = format!("label of key {}", key.escape_ascii());
                Err(codec::corrupt(what, "the key is missing"))
            }
            None => Ok(()),
        }
    }

    /// A handle for readers on other threads.
    pub fn store(&self) -> Store {
        self.store.clone()
    }

    /// Goes on as `other`, whose state was loaded from a snapshot. Handles on this machine's store
    /// see the new state from now on.
    pub fn replace(&mut self, other: Machine) {
        let store = self.store.clone();
        store.replace(other.history.clone());
        *self = Machine { store, ..other };
    }

    /// How many keys there are now.
    pub fn live_keys(&self) -> usize {
        self.live.len()
    }

    pub fn leases(&self) -> &LeaseTable {
        &self.leases
    }

    /// Cluster time: that of the newest entry.
    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// Of everything applied, for comparison with other members; `None` in a state that a release
    /// without it has left.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The first key of the queue `name`: the lock's holder, the election's leader.
    pub fn queue_head(&self, name: &[u8]) -> Option<Record> {
        let (_, key) = self.queues.first(name)?;
        self.live.get(key)
    }

    /// Users and roles, as the newest entry has left them.
    pub fn auth(&self) -> &Arc<Auth> {
        &self.auth
    }

    pub fn published_members(&self) -> &BTreeMap<MemberId, PublishedMember> {
        &self.members
    }

    /// The members that were removed. Such an id never comes back.
    pub fn retired_members(&self) -> &BTreeSet<MemberId> {
        &self.retired
    }

    /// A change of membership that removes these members was committed. What is to be stored is
    /// added to `batch`, as by [`Machine::apply`], whose order this keeps.
    pub fn retire(&mut self, ids: impl IntoIterator<Item = MemberId>, batch: &mut Batch) {
        for id in ids {
            self.retired.insert(id);
            // Present is all it has to be.
            batch.put(schema::retired_key(id), [1]);
            if self.members.remove(&id).is_some() {
                batch.remove(schema::member_key(id));
            }
        }
        self.store_meta(batch);
    }

    /// The whole state as pairs for another engine. Physical removal waits while the image exists.
    pub fn image(&self) -> Image {
        Image::new(&self.history, self.tables())
    }

    /// Removes part of what compaction left behind, looking at about `budget` records; the engine's
    /// part goes into `batch`. No reader can tell. Returns whether more remains; while an image
    /// exists nothing is removed, so a caller that repeats this should pause in between.
    pub fn scrub(&mut self, budget: usize, batch: &mut Batch) -> bool {
        self.scrubber.run(&self.history, budget, batch)
    }

    /// A hash of the complete logical state. Members that have applied the same entries agree on
    /// it, whenever they restarted and however far they have scrubbed. The digest is no part of it:
    /// it changes also where the state does not.
    pub fn hash(&self) -> u64 {
        let mut hasher = Hasher::new();
        let meta = self.meta();
        hasher.number(meta.revision as u64);
        hasher.number(meta.compacted as u64);
        hasher.number(meta.now.0);
        for (id, lease) in self.leases.iter() {
            hasher.number(id.0 as u64);
            hasher.number(lease.ttl_seconds as u64);
            hasher.number(lease.deadline.0);
            hasher.number(lease.renewed_at_index);
            hasher.number(lease.keys.len() as u64);
            lease.keys.iter().for_each(|key| hasher.bytes(key));
        }
        for (id, member) in &self.members {
            hasher.number(id.0);
            hasher.bytes(member.name.as_bytes());
            hasher.number(member.client_urls.len() as u64);
            member.client_urls.iter().for_each(|url| hasher.bytes(url.as_bytes()));
        }
        for id in &self.retired {
            hasher.number(id.0);
        }
        for (key, label) in &self.holds.labels {
            hasher.bytes(key);
            hasher.bytes(&codec::encode_label(label));
        }
        for (number, forced) in &self.holds.forced {
            hasher.number(*number);
            hasher.bytes(&codec::encode_forced(forced));
        }
        for alarm in &self.alarms.raised {
            hasher.bytes(&schema::alarm_key(*alarm));
        }
        for (key, value) in self.auth.pairs() {
            hasher.bytes(&key);
            hasher.bytes(&value);
        }
        hasher.history(&self.history, meta.revision, meta.compacted);
        hasher.finish()
    }

    /// Forgets a key without a trace, as no entry does.
    #[cfg(test)]
    pub fn lose(&mut self, key: &[u8]) {
        assert!(self.live.get(key).is_some(), "a key to lose");
        self.live.remove(key);
    }

    /// What [`Machine::used_bytes`] must be, by looking at everything.
    #[cfg(test)]
    pub fn recount_bytes(&self) -> u64 {
        let compacted = self.history.compacted();
        let last = Revision::last_of(self.history.published());
        let records = self.history.records(Revision::default(), last);
        let counted = records.filter(|record| self.history.survives(record, compacted));
        let history = counted.map(|record| super::mvcc::weight_bytes(&record)).sum::<u64>();
        history + self.rows_bytes()
    }

    pub(super) fn meta(&self) -> Meta {
        Meta {
            revision: self.history.published(),
            compacted: self.history.compacted(),
            now: self.now,
            digest: self.digest,
        }
    }

    /// Adds the meta record to `batch` unless the engine has it already.
    pub(super) fn store_meta(&mut self, batch: &mut Batch) {
        let meta = self.meta();
        if self.stored_meta != Some(meta) {
            batch.put(schema::META_KEY, codec::encode_meta(&meta));
            self.stored_meta = Some(meta);
        }
    }

    /// Everything but the history, as an engine's pairs.
    fn tables(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let meta = (schema::META_KEY.into(), codec::encode_meta(&self.meta()));
        let leases = self
            .leases
            .iter()
            .filter(|_| !mutant::is("snapshot-without-leases"))
            .map(|(id, lease)| (schema::lease_key(id).into(), codec::encode_lease(lease)));
        let members = self
            .members
            .iter()
            .map(|(id, member)| (schema::member_key(*id).into(), codec::encode_member(member)));
        let labels = self.holds.labels.iter();
        let labels = labels.filter(|_| !mutant::is("snapshot-without-labels"));
        let labels =
            labels.map(|(key, label)| (schema::label_key(key), codec::encode_label(label)));
        let forced = self.holds.forced.iter().map(|(number, forced)| {
            (schema::forced_key(*number).into(), codec::encode_forced(forced))
        });
        let retired = self.retired.iter().map(|id| (schema::retired_key(*id).into(), vec![1]));
        let alarms = self.alarms.raised.iter();
        let alarms = alarms.filter(|_| !mutant::is("snapshot-without-alarms"));
        let alarms = alarms.map(|alarm| (schema::alarm_key(*alarm).into(), Vec::new()));
        let auth = self.auth.pairs().into_iter();
        let auth = auth.filter(|_| !mutant::is("snapshot-without-auth"));
        let tables = std::iter::once(meta).chain(leases).chain(members).chain(retired);
        tables.chain(alarms).chain(labels).chain(forced).chain(auth).collect()
    }
}

impl Default for Machine {
    fn default() -> Machine {
        Machine::new()
    }
}

/// Calls `visit` with each pair of a prefix until it fails.
fn scan(
    engine: &dyn Engine,
    prefix: u8,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut result = Ok(());
    engine.scan(&[prefix], &mut |key, value| {
        result = visit(key, value);
        result.is_ok()
    })?;
    result
}
