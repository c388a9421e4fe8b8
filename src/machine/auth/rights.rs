//! What a user may do: with which keys, and with the cluster.

use std::cmp::Ordering;

use bytes::Bytes;

use super::{Auth, AuthChange, AuthRefusal, Permission, PermissionKind, Principal, ROOT, Role};
use super::{one, places};
use crate::machine::{
    AlarmAction, AskRelease, Command, DeleteRange, Enqueue, Entry, Fence, FencedWrite, Join,
    LeaseTable, Proclaim, Put, Rejection, Release, Txn, TxnOp, queue,
};
use crate::types::{KeyRange, LeaseId};

/// What a permission is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    Read,
    Write,
}

/// What roles add up to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Rights {
    is_root: bool,
    read: Spans,
    write: Spans,
}

impl Rights {
    pub fn of<'r>(is_root: bool, roles: impl Iterator<Item = &'r Role>) -> Rights {
        let permissions: Vec<&Permission> = roles.flat_map(|role| &role.permissions).collect();
        let spans = |kinds: [PermissionKind; 2]| {
            let granted = permissions.iter().filter(|it| kinds.contains(&it.kind));
            Spans::of(granted.map(|permission| &permission.range))
        };
        Rights {
            is_root,
            read: spans([PermissionKind::Read, PermissionKind::ReadWrite]),
            write: spans([PermissionKind::Write, PermissionKind::ReadWrite]),
        }
    }
}

/// Keys, as spans from their start up to their end, in order, with a gap between any two.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Spans(Vec<(Bytes, End)>);

/// Where a span ends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Before(Bytes),
    Never,
}

impl End {
    fn of(range: &KeyRange) -> End {
        match range {
            KeyRange::Span { start, end } if start < end => End::Before(end.clone()),
            // A range that holds no key counts as its start alone, as in etcd.
            KeyRange::One(start) | KeyRange::Span { start, .. } => {
                End::Before([start, &b"\0"[..]].concat().into())
            }
            KeyRange::From(_) => End::Never,
        }
    }

    /// Whether nothing lies between this end and a span that starts at `start`.
    fn reaches(&self, start: &Bytes) -> bool {
        match self {
            End::Before(end) => start <= end,
            End::Never => true,
        }
    }

    fn cmp(&self, other: &End) -> Ordering {
        match (self, other) {
            (End::Before(one), End::Before(other)) => one.cmp(other),
            (End::Before(_), End::Never) => Ordering::Less,
            (End::Never, End::Before(_)) => Ordering::Greater,
            (End::Never, End::Never) => Ordering::Equal,
        }
    }
}

impl Spans {
    fn of<'r>(ranges: impl Iterator<Item = &'r KeyRange>) -> Spans {
        let mut spans: Vec<_> = ranges.map(|it| (it.start().clone(), End::of(it))).collect();
        spans.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut joined: Vec<(Bytes, End)> = Vec::new();
        for (start, end) in spans {
            match joined.last_mut() {
                Some((_, last)) if last.reaches(&start) => {
                    if last.cmp(&end).is_lt() {
                        *last = end;
                    }
                }
                _ => joined.push((start, end)),
            }
        }
        Spans(joined)
    }

    fn cover(&self, range: &KeyRange) -> bool {
        let behind = self.0.partition_point(|(start, _)| start <= range.start());
        let Some((_, end)) = behind.checked_sub(1).map(|at| &self.0[at]) else { return false };
        match (range, end) {
            (_, End::Never) => true,
            (KeyRange::From(_), End::Before(_)) => false,
            (KeyRange::Span { start, end: wanted }, End::Before(end)) if start < wanted => {
                wanted <= end
            }
            (KeyRange::One(key) | KeyRange::Span { start: key, .. }, End::Before(end)) => key < end,
        }
    }
}

/// What one caller may do with keys.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a>(Option<&'a Rights>);

type Checked = Result<(), Rejection>;

impl Access<'_> {
    /// Of a cluster that does not ask who makes a call.
    pub const UNLIMITED: Access<'static> = Access(None);

    /// # Errors
    ///
    /// [`AuthRefusal::PermissionDenied`] unless the caller has this right to every key of `range`.
    pub fn range(&self, right: Right, range: &KeyRange) -> Checked {
        let covered = self.0.is_none_or(|rights| match right {
            Right::Read => rights.read.cover(range),
            Right::Write => rights.write.cover(range),
        });
        if covered { Ok(()) } else { Err(AuthRefusal::PermissionDenied.into()) }
    }

    /// The right to every key attached to a lease, if there is one.
    pub fn lease(&self, right: Right, leases: &LeaseTable, id: LeaseId) -> Checked {
        // Root needs no look at them.
        if self.0.is_none() {
            return Ok(());
        }
        leases.keys(id).try_for_each(|key| self.range(right, &one(key)))
    }

    /// The right to look at the queue `name`, or to change who stands in it.
    pub fn queue(&self, right: Right, name: &[u8]) -> Checked {
        if self.0.is_none() { Ok(()) } else { self.range(right, &places(name)) }
    }

    /// Everything in both branches of a transaction that only reads.
    pub fn read_txn(&self, txn: &Txn) -> Checked {
        self.txn(txn, &LeaseTable::default())
    }

    fn key(&self, right: Right, key: &Bytes) -> Checked {
        if self.0.is_none() { Ok(()) } else { self.range(right, &one(key)) }
    }

    /// A key is put on a lease only by who could write all that are on it: it may end them.
    fn put(&self, put: &Put, leases: &LeaseTable) -> Checked {
        self.key(Right::Write, &put.key)?;
        self.lease(Right::Write, leases, put.lease.unwrap_or(LeaseId::NONE))?;
        if put.prev_kv { self.key(Right::Read, &put.key) } else { Ok(()) }
    }

    fn delete(&self, delete: &DeleteRange) -> Checked {
        self.range(Right::Write, &delete.range)?;
        if delete.prev_kv { self.range(Right::Read, &delete.range) } else { Ok(()) }
    }

    /// Both branches, whichever is taken: which one it is tells something, too.
    fn txn(&self, txn: &Txn, leases: &LeaseTable) -> Checked {
        if self.0.is_none() {
            return Ok(());
        }
        txn.compares.iter().try_for_each(|it| self.range(Right::Read, &it.range))?;
        txn.success.iter().chain(&txn.failure).try_for_each(|op| match op {
            TxnOp::Range(query) => self.range(Right::Read, &query.range),
            TxnOp::Put(put) => self.put(put, leases),
            TxnOp::DeleteRange(delete) => self.delete(delete),
            TxnOp::Txn(nested) => self.txn(nested, leases),
        })
    }

    fn fenced(&self, fences: &[Fence], write: &FencedWrite, leases: &LeaseTable) -> Checked {
        fences.iter().try_for_each(|fence| self.queue(Right::Read, &fence.name))?;
        match write {
            FencedWrite::Put(put) => self.put(put, leases),
            FencedWrite::DeleteRange(delete) => self.delete(delete),
            FencedWrite::Txn(txn) => self.txn(txn, leases),
        }
    }

    fn enqueue(&self, enqueue: &Enqueue, leases: &LeaseTable) -> Checked {
        let Enqueue { name, lease, .. } = enqueue;
        self.key(Right::Write, &queue::key_of(name, *lease))?;
        self.queue(Right::Read, name)?;
        self.lease(Right::Write, leases, *lease)
    }
}

impl Auth {
    /// What a caller may do with keys.
    ///
    /// # Errors
    ///
    /// A caller that has to say who it is and has not, or is nobody any more.
    pub fn access(&self, by: Option<&Principal>) -> Result<Access<'_>, Rejection> {
        let (name, auth_revision) = match by {
            _ if !self.enabled => return Ok(Access(None)),
            Some(Principal::Server) => return Ok(Access(None)),
            None => return Err(AuthRefusal::UserEmpty.into()),
            Some(Principal::User { name, auth_revision }) => (name, *auth_revision),
        };
        if auth_revision < self.revision {
            return Err(AuthRefusal::OldRevision.into());
        }
        let user = self.user(name).ok_or(AuthRefusal::PermissionDenied)?;
        Ok(Access(Some(&user.rights).filter(|rights| !rights.is_root)))
    }

    /// Refuses all but those that may administer the cluster.
    pub fn check_admin(&self, by: Option<&Principal>) -> Checked {
        self.check_user(by)?;
        match by {
            Some(Principal::User { name, .. }) if self.enabled => {
                let is_root = self.user(name).is_some_and(|user| user.roles.contains(ROOT));
                if is_root { Ok(()) } else { Err(AuthRefusal::PermissionDenied.into()) }
            }
            _ => Ok(()),
        }
    }

    /// Refuses callers that are nobody.
    pub fn check_user(&self, by: Option<&Principal>) -> Checked {
        match by {
            _ if !self.enabled => Ok(()),
            Some(Principal::Server) => Ok(()),
            None => Err(AuthRefusal::UserEmpty.into()),
            Some(Principal::User { name, .. }) if self.users.contains_key(name) => Ok(()),
            Some(Principal::User { .. }) => Err(AuthRefusal::PermissionDenied.into()),
        }
    }

    /// Why `entry` must not be applied as things are.
    pub(in crate::machine) fn refusal(
        &self,
        entry: &Entry,
        leases: &LeaseTable,
    ) -> Option<Rejection> {
        if self.enabled { self.check(entry, leases).err() } else { None }
    }

    fn check(&self, entry: &Entry, leases: &LeaseTable) -> Checked {
        let by = entry.principal.as_ref();
        let access = || self.access(by);
        match &entry.command {
            Command::Put(put) => access()?.put(put, leases),
            Command::DeleteRange(delete) => access()?.delete(delete),
            Command::Txn(txn) => access()?.txn(txn, leases),
            Command::Fenced(fenced) => access()?.fenced(&fenced.fences, &fenced.write, leases),
            Command::LeaseGrant { .. } => self.check_user(by),
            Command::LeaseRevoke { id } => access()?.lease(Right::Write, leases, *id),
            Command::Enqueue(enqueue) | Command::Join(Join { enqueue, .. }) => {
                access()?.enqueue(enqueue, leases)
            }
            Command::Leave { key, .. } | Command::Proclaim(Proclaim { key, .. }) => {
                let access = access()?;
                access.key(Right::Read, key)?;
                access.key(Right::Write, key)
            }
            Command::Unlock { key } => access()?.key(Right::Write, key),
            Command::Release(Release { name, .. })
            | Command::AskRelease(AskRelease { name, .. }) => access()?.queue(Right::Write, name),
            Command::Compact { .. }
            | Command::Alarm(AlarmAction::Raise(_) | AlarmAction::Clear(_)) => self.check_admin(by),
            // Whoever logs in has said all it can.
            Command::Auth(AuthChange::Authenticate { .. }) => Ok(()),
            Command::Auth(_) => self.check_admin(by),
            // No client can ask for these: members propose them.
            Command::LeaseRenew { .. }
            | Command::LeaseExpire { .. }
            | Command::Tick
            | Command::PublishMember { .. }
            | Command::Told { .. }
            | Command::Alarm(AlarmAction::BeginDigest) => Ok(()),
        }
    }
}
