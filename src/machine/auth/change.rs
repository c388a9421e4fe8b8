//! How users and roles change.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::rights::Rights;
use super::{
    Auth, AuthRefusal, LARGEST_ROLE_BYTES, LONGEST_NAME_BYTES, MOST_ROLES, MOST_ROLES_OF_USER,
    MOST_USERS, PasswordHash, Permission, ROOT, Role, User, encode_role, encode_user, order,
};
use crate::machine::apply::Edit;
use crate::machine::{Rejection, Reply, schema};
use crate::storage::Batch;
use crate::types::KeyRange;

/// What an entry does to users and roles. The order of the variants is part of the stored format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuthChange {
    Enable,
    Disable,
    /// A token was given out. The members keep it, not the state machine, which says whether the
    /// password was checked by the tables as they are.
    Authenticate {
        user: String,
        /// Of the part of the token that nobody can guess, which is in no entry itself.
        token_sha256: [u8; 32],
        auth_revision: u64,
    },
    UserAdd {
        name: String,
        password_hash: Option<PasswordHash>,
    },
    UserDelete {
        name: String,
    },
    UserChangePassword {
        name: String,
        password_hash: PasswordHash,
    },
    UserGrantRole {
        user: String,
        role: String,
    },
    UserRevokeRole {
        user: String,
        role: String,
    },
    RoleAdd {
        name: String,
    },
    RoleDelete {
        name: String,
    },
    RoleGrantPermission {
        role: String,
        permission: Permission,
    },
    RoleRevokePermission {
        role: String,
        range: KeyRange,
    },
}

impl Edit<'_> {
    pub(in crate::machine) fn change_auth(
        &mut self,
        change: &AuthChange,
    ) -> Result<Reply, Rejection> {
        let before = (self.auth.enabled, self.auth.revision);
        let mut tables = Tables { auth: self.auth, batch: self.writer.batch() };
        tables.apply(change)?;
        if (self.auth.enabled, self.auth.revision) != before {
            let numbers = self.auth.encode_numbers();
            self.writer.batch().put(schema::AUTH_KEY, numbers);
        }
        Ok(Reply::AuthChanged { auth_revision: self.auth.revision })
    }
}

/// The tables while one entry changes them, and what of it is to be stored.
struct Tables<'t> {
    auth: &'t mut Arc<Auth>,
    batch: &'t mut Batch,
}

type Done = Result<(), AuthRefusal>;

impl Tables<'_> {
    fn apply(&mut self, change: &AuthChange) -> Done {
        match change {
            AuthChange::Enable => self.enable(),
            AuthChange::Disable => {
                if self.auth.enabled {
                    self.changed().enabled = false;
                }
                Ok(())
            }
            AuthChange::Authenticate { user, token_sha256: _, auth_revision } => {
                if !self.auth.enabled {
                    return Err(AuthRefusal::Disabled);
                }
                if *auth_revision != self.auth.revision || self.auth.user(user).is_none() {
                    return Err(AuthRefusal::OldRevision);
                }
                Ok(())
            }
            AuthChange::UserAdd { name, password_hash } => self.add_user(name, password_hash),
            AuthChange::UserDelete { name } => self.delete_user(name),
            AuthChange::UserChangePassword { name, password_hash } => {
                self.change_user(name, |user| {
                    // One that has no password does not get one so, as in etcd.
                    if let Some(present) = &mut user.password_hash {
                        present.clone_from(password_hash);
                    }
                    Ok(())
                })
            }
            AuthChange::UserGrantRole { user, role } => self.grant_role(user, role),
            AuthChange::UserRevokeRole { user, role } => {
                if self.auth.enabled && user == ROOT && role == ROOT {
                    return Err(AuthRefusal::InvalidManagement);
                }
                self.change_user(user, |user| {
                    user.roles.remove(role).then_some(()).ok_or(AuthRefusal::RoleNotGranted)
                })
            }
            AuthChange::RoleAdd { name } => self.add_role(name),
            AuthChange::RoleDelete { name } => self.delete_role(name),
            AuthChange::RoleGrantPermission { role, permission } => self.grant(role, permission),
            AuthChange::RoleRevokePermission { role, range } => self.change_role(role, |role| {
                let held = role.permissions.binary_search_by(|it| order(&it.range, range));
                let at = held.map_err(|_| AuthRefusal::PermissionNotGranted)?;
                role.permissions.remove(at);
                Ok(())
            }),
        }
    }

    /// The tables, to be changed, at their next revision.
    fn changed(&mut self) -> &mut Auth {
        let auth = Arc::make_mut(self.auth);
        auth.revision += 1;
        auth
    }

    /// As in etcd, this is no change of the tables.
    fn enable(&mut self) -> Done {
        if self.auth.enabled {
            return Ok(());
        }
        let root = self.auth.user(ROOT).ok_or(AuthRefusal::RootUserNotFound)?;
        if !root.roles.contains(ROOT) {
            return Err(AuthRefusal::RootRoleNotGranted);
        }
        Arc::make_mut(self.auth).enabled = true;
        Ok(())
    }

    fn add_user(&mut self, name: &str, password_hash: &Option<PasswordHash>) -> Done {
        check_name(name, AuthRefusal::UserEmpty)?;
        if self.auth.users.contains_key(name) {
            return Err(AuthRefusal::UserExists);
        }
        if self.auth.users.len() >= MOST_USERS {
            return Err(AuthRefusal::TooManyUsers);
        }
        let password_hash = password_hash.clone();
        let user = User { password_hash, roles: Default::default(), rights: Rights::default() };
        self.batch.put(schema::user_key(name), encode_user(&user));
        self.changed().users.insert(name.to_owned(), Arc::new(user));
        Ok(())
    }

    fn delete_user(&mut self, name: &str) -> Done {
        if self.auth.enabled && name == ROOT {
            return Err(AuthRefusal::InvalidManagement);
        }
        self.auth.user(name).ok_or(AuthRefusal::UserNotFound)?;
        self.changed().users.remove(name);
        self.batch.remove(schema::user_key(name));
        Ok(())
    }

    fn grant_role(&mut self, name: &str, role: &str) -> Done {
        let user = self.auth.user(name).ok_or(AuthRefusal::UserNotFound)?;
        // Role root means what it means, there or not.
        if role != ROOT && self.auth.role(role).is_none() {
            return Err(AuthRefusal::RoleNotFound);
        }
        if user.roles.contains(role) {
            return Ok(());
        }
        if user.roles.len() >= MOST_ROLES_OF_USER {
            return Err(AuthRefusal::TooManyRolesOfUser);
        }
        self.change_user(name, |user| {
            user.roles.insert(role.to_owned());
            Ok(())
        })
    }

    fn add_role(&mut self, name: &str) -> Done {
        check_name(name, AuthRefusal::RoleEmpty)?;
        if self.auth.roles.contains_key(name) {
            return Err(AuthRefusal::RoleExists);
        }
        if self.auth.roles.len() >= MOST_ROLES {
            return Err(AuthRefusal::TooManyRoles);
        }
        self.batch.put(schema::role_key(name), encode_role(&Role::default()));
        self.changed().roles.insert(name.to_owned(), Arc::default());
        Ok(())
    }

    /// Takes the role from all users, too.
    fn delete_role(&mut self, name: &str) -> Done {
        if self.auth.enabled && name == ROOT {
            return Err(AuthRefusal::InvalidManagement);
        }
        self.auth.role(name).ok_or(AuthRefusal::RoleNotFound)?;
        let users = self.users_with(name);
        let auth = self.changed();
        auth.roles.remove(name);
        for user in &users {
            let user = auth.users.get_mut(user).expect("it was found in the table");
            Arc::make_mut(user).roles.remove(name);
        }
        self.batch.remove(schema::role_key(name));
        users.iter().for_each(|user| self.store_user(user));
        Ok(())
    }

    fn grant(&mut self, role: &str, permission: &Permission) -> Done {
        // Checked before it was proposed; a range that holds no key would confuse the others.
        if permission.range.is_empty() || permission.range.start().is_empty() {
            return Err(AuthRefusal::InvalidManagement);
        }
        self.change_role(role, |role| {
            let permissions = &mut role.permissions;
            match permissions.binary_search_by(|it| order(&it.range, &permission.range)) {
                Ok(at) => permissions[at].kind = permission.kind,
                Err(at) => permissions.insert(at, permission.clone()),
            }
            let bytes: usize = permissions.iter().map(Permission::bytes).sum();
            if bytes > LARGEST_ROLE_BYTES { Err(AuthRefusal::RoleTooLarge) } else { Ok(()) }
        })
    }

    fn change_user(&mut self, name: &str, change: impl FnOnce(&mut User) -> Done) -> Done {
        let mut user = self.auth.user(name).ok_or(AuthRefusal::UserNotFound)?.clone();
        change(&mut user)?;
        self.changed().users.insert(name.to_owned(), Arc::new(user));
        self.store_user(name);
        Ok(())
    }

    fn change_role(&mut self, name: &str, change: impl FnOnce(&mut Role) -> Done) -> Done {
        let mut role = self.auth.role(name).ok_or(AuthRefusal::RoleNotFound)?.clone();
        change(&mut role)?;
        self.batch.put(schema::role_key(name), encode_role(&role));
        let users = self.users_with(name);
        let auth = self.changed();
        auth.roles.insert(name.to_owned(), Arc::new(role));
        users.iter().for_each(|user| auth.renew_rights(user));
        Ok(())
    }

    /// Stores a user that has changed, and works out its rights.
    fn store_user(&mut self, name: &str) {
        Arc::make_mut(self.auth).renew_rights(name);
        let user = self.auth.user(name).expect("it was put into the table");
        self.batch.put(schema::user_key(name), encode_user(user));
    }

    fn users_with(&self, role: &str) -> Vec<String> {
        let users = self.auth.users().filter(|(_, user)| user.roles.contains(role));
        users.map(|(name, _)| name.to_owned()).collect()
    }
}

fn check_name(name: &str, empty: AuthRefusal) -> Done {
    match name.len() {
        0 => Err(empty),
        length if length > LONGEST_NAME_BYTES => Err(AuthRefusal::NameTooLong),
        _ => Ok(()),
    }
}
