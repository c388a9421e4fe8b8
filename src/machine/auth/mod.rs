//! Users, roles, and who may do what.
//!
//! The tables are replicated state like any other: they change by entries ([`AuthChange`]) and are
//! stored pair by pair. While authentication is enabled, [`Auth::check`] is asked for every entry
//! before it is applied, with the tables as the entries before it have left them. So it does not
//! matter which member took a call, and how much of the log that one had applied.
//!
//! A table never changes in place: whoever reads holds an [`Arc`] of it, and what a user may do is
//! worked out when it changes, not when somebody asks.

mod change;
mod password;
mod rights;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use change::AuthChange;
pub use password::PasswordHash;
pub use rights::{Access, Right};

use super::{Fault, codec, schema};
use crate::types::KeyRange;
use rights::Rights;

/// The user without whom authentication cannot be enabled, and the role that may do everything.
pub const ROOT: &str = "root";

/// How many users, and how many roles, there may be: all are kept in memory, and read by each
/// change.
pub const MOST_USERS: usize = 10_000;
pub const MOST_ROLES: usize = 10_000;
/// How many roles a user may have.
pub const MOST_ROLES_OF_USER: usize = 1_000;
/// The longest name of a user or a role.
pub const LONGEST_NAME_BYTES: usize = 1_024;
/// What the permissions of one role may take, as [`Permission::bytes`] counts.
pub const LARGEST_ROLE_BYTES: usize = 1 << 20;

/// Of a store without users.
const FIRST_REVISION: u64 = 1;

/// In whose name an entry was proposed. An entry without one comes from a client that has not said
/// who it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Principal {
    /// The cluster itself, which may do everything.
    Server,
    User {
        name: String,
        /// Of the tables by which the user's token was found good.
        auth_revision: u64,
    },
}

/// Why users, roles or rights stand in the way of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuthRefusal {
    #[error("there is no user root")]
    RootUserNotFound,
    #[error("user root does not have role root")]
    RootRoleNotGranted,
    #[error("the user exists already")]
    UserExists,
    /// Also: the caller has not said who it is.
    #[error("the user has no name")]
    UserEmpty,
    #[error("there is no such user")]
    UserNotFound,
    #[error("the role exists already")]
    RoleExists,
    #[error("the role has no name")]
    RoleEmpty,
    #[error("there is no such role")]
    RoleNotFound,
    #[error("the user does not have the role")]
    RoleNotGranted,
    #[error("the role does not have the permission")]
    PermissionNotGranted,
    /// What would leave nobody to administer the cluster, and a permission for no key.
    #[error("users and roles must not be changed so")]
    InvalidManagement,
    #[error("the user may not do this")]
    PermissionDenied,
    /// The caller's token was found good by other tables than those now.
    #[error("users or roles have changed meanwhile")]
    OldRevision,
    #[error("authentication is not enabled")]
    Disabled,
    #[error("there are {MOST_USERS} users")]
    TooManyUsers,
    #[error("there are {MOST_ROLES} roles")]
    TooManyRoles,
    #[error("the user has {MOST_ROLES_OF_USER} roles")]
    TooManyRolesOfUser,
    #[error("the name is longer than {LONGEST_NAME_BYTES} bytes")]
    NameTooLong,
    #[error("the permissions of the role take more than {LARGEST_ROLE_BYTES} bytes")]
    RoleTooLarge,
}

impl AuthRefusal {
    /// For the digest, which a change of the variants' order would change.
    pub(super) fn number(self) -> i64 {
        self as i64
    }
}

/// What a permission allows. The order is part of the stored format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PermissionKind {
    Read,
    Write,
    ReadWrite,
    /// A number that is none of etcd's, which stores it: it allows nothing.
    Unknown(i32),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permission {
    pub range: KeyRange,
    pub kind: PermissionKind,
}

impl Permission {
    /// What it takes in a role.
    fn bytes(&self) -> usize {
        const NUMBERS: usize = 16;
        let end = match &self.range {
            KeyRange::Span { end, .. } => end.len(),
            KeyRange::One(_) | KeyRange::From(_) => 0,
        };
        NUMBERS + self.range.start().len() + end
    }
}

/// By key, then by end; the key alone first, and the range without an end last.
fn order(a: &KeyRange, b: &KeyRange) -> Ordering {
    fn end(range: &KeyRange) -> (u8, &[u8]) {
        match range {
            KeyRange::One(_) => (0, &[]),
            KeyRange::Span { end, .. } => (1, end),
            KeyRange::From(_) => (2, &[]),
        }
    }
    a.start().cmp(b.start()).then_with(|| end(a).cmp(&end(b)))
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Role {
    /// In the order of their ranges, each of which is there once.
    permissions: Vec<Permission>,
}

impl Role {
    pub fn permissions(&self) -> &[Permission] {
        &self.permissions
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// `None` for a user that has no password and cannot log in with one.
    pub password_hash: Option<PasswordHash>,
    pub roles: BTreeSet<String>,
    /// What the roles add up to.
    rights: Rights,
}

/// All users and roles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    enabled: bool,
    revision: u64,
    users: BTreeMap<String, Arc<User>>,
    roles: BTreeMap<String, Arc<Role>>,
}

impl Default for Auth {
    fn default() -> Auth {
        let (users, roles) = Default::default();
        Auth { enabled: false, revision: FIRST_REVISION, users, roles }
    }
}

impl Auth {
    /// Whether callers have to say who they are.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Grows with each change of the tables.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    pub fn user(&self, name: &str) -> Option<&User> {
        self.users.get(name).map(Arc::as_ref)
    }

    pub fn role(&self, name: &str) -> Option<&Role> {
        self.roles.get(name).map(Arc::as_ref)
    }

    /// In order of their names.
    pub fn users(&self) -> impl Iterator<Item = (&str, &User)> {
        self.users.iter().map(|(name, user)| (name.as_str(), user.as_ref()))
    }

    /// In order of their names.
    pub fn roles(&self) -> impl Iterator<Item = (&str, &Role)> {
        self.roles.iter().map(|(name, role)| (name.as_str(), role.as_ref()))
    }

    /// Works out anew what a user may do.
    fn renew_rights(&mut self, name: &str) {
        let Some(user) = self.users.get_mut(name) else { return };
        let roles = user.roles.iter().filter_map(|name| self.roles.get(name));
        let rights = Rights::of(user.roles.contains(ROOT), roles.map(Arc::as_ref));
        if rights != user.rights {
            Arc::make_mut(user).rights = rights;
        }
    }

    /// How many pairs the tables take in the engine.
    pub(super) fn rows(&self) -> usize {
        self.users.len() + self.roles.len()
    }

    /// The tables as pairs for an engine; none for tables that never changed.
    pub(super) fn pairs(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        if *self == Auth::default() {
            return Vec::new();
        }
        let numbers = (schema::AUTH_KEY.into(), self.encode_numbers());
        let users = self.users.iter();
        let users = users.map(|(name, user)| (schema::user_key(name), encode_user(user)));
        let roles = self.roles.iter();
        let roles = roles.map(|(name, role)| (schema::role_key(name), encode_role(role)));
        std::iter::once(numbers).chain(users).chain(roles).collect()
    }

    fn encode_numbers(&self) -> Vec<u8> {
        codec::encode(&StoredAuth { enabled: self.enabled, revision: self.revision }, 10)
    }
}

#[derive(Serialize, Deserialize)]
struct StoredAuth {
    enabled: bool,
    revision: u64,
}

#[derive(Serialize, Deserialize)]
struct StoredUser {
    password_hash: Option<PasswordHash>,
    roles: Vec<String>,
}

fn encode_user(user: &User) -> Vec<u8> {
    let roles = user.roles.iter().cloned().collect();
    codec::encode(&StoredUser { password_hash: user.password_hash.clone(), roles }, 96)
}

fn encode_role(role: &Role) -> Vec<u8> {
    codec::encode(&role.permissions, 32)
}

/// Tables that are read from an engine, pair by pair.
#[derive(Default)]
pub(super) struct Loading {
    auth: Auth,
}

impl Loading {
    pub fn numbers(&mut self, value: &[u8]) -> Result<(), Fault> {
        let stored: StoredAuth = decode("auth numbers", value)?;
        (self.auth.enabled, self.auth.revision) = (stored.enabled, stored.revision);
        Ok(())
    }

    pub fn user(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        let name = schema::name(key).ok_or_else(|| codec::bad_key("user", key))?;
        let StoredUser { password_hash, roles } = decode("user", value)?;
        let roles = roles.into_iter().collect();
        let user = User { password_hash, roles, rights: Rights::default() };
        self.auth.users.insert(name, Arc::new(user));
        Ok(())
    }

    pub fn role(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        let name = schema::name(key).ok_or_else(|| codec::bad_key("role", key))?;
        let permissions: Vec<Permission> = decode("role", value)?;
        if !permissions.is_sorted_by(|a, b| order(&a.range, &b.range).is_lt()) {
            return Err(codec::corrupt("role".into(), "its permissions are out of order"));
        }
        self.auth.roles.insert(name, Arc::new(Role { permissions }));
        Ok(())
    }

    pub fn finish(mut self) -> Auth {
        let names: Vec<String> = self.auth.users.keys().cloned().collect();
        for name in names {
            self.auth.renew_rights(&name);
        }
        self.auth
    }
}

fn decode<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, Fault> {
    codec::decode(bytes).map_err(|reason| codec::corrupt(what.to_owned(), reason))
}

/// All keys that stand in the queue `name`, or may.
fn places(name: &[u8]) -> KeyRange {
    KeyRange::prefix(&[name, b"/"].concat())
}

fn one(key: &Bytes) -> KeyRange {
    KeyRange::One(key.clone())
}
