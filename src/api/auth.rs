//! The service Auth: users, roles, and logging in.
//!
//! What changes users and roles is proposed like any write, and so is their check of who may do it.
//! A password is hashed before, by the member that was asked. What only reads is answered from this
//! member's tables, once they are known to be recent enough.

use std::sync::Arc;

use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::machine::{AuthChange, AuthRefusal, Command, Permission, PermissionKind, Rejection};
use crate::node::{Caller, Node};
use crate::pb::authpb;
use crate::pb::etcdserverpb::auth_server::Auth;
use crate::pb::etcdserverpb::{
    AuthDisableRequest, AuthDisableResponse, AuthEnableRequest, AuthEnableResponse,
    AuthRoleAddRequest, AuthRoleAddResponse, AuthRoleDeleteRequest, AuthRoleDeleteResponse,
    AuthRoleGetRequest, AuthRoleGetResponse, AuthRoleGrantPermissionRequest,
    AuthRoleGrantPermissionResponse, AuthRoleListRequest, AuthRoleListResponse,
    AuthRoleRevokePermissionRequest, AuthRoleRevokePermissionResponse, AuthStatusRequest,
    AuthStatusResponse, AuthUserAddRequest, AuthUserAddResponse, AuthUserChangePasswordRequest,
    AuthUserChangePasswordResponse, AuthUserDeleteRequest, AuthUserDeleteResponse,
    AuthUserGetRequest, AuthUserGetResponse, AuthUserGrantRoleRequest, AuthUserGrantRoleResponse,
    AuthUserListRequest, AuthUserListResponse, AuthUserRevokeRoleRequest,
    AuthUserRevokeRoleResponse, AuthenticateRequest, AuthenticateResponse, ResponseHeader,
};
use crate::types::KeyRange;

use super::status::Refusal;
use super::{callers, header};

pub struct AuthService {
    node: Arc<Node>,
}

impl AuthService {
    pub fn new(node: Arc<Node>) -> AuthService {
        AuthService { node }
    }

    async fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        Ok(callers::caller(&self.node, metadata).await?)
    }

    /// Changes users or roles in the name of who sent `metadata`.
    async fn change(
        &self,
        metadata: &MetadataMap,
        change: AuthChange,
    ) -> Result<Option<ResponseHeader>, Status> {
        let caller = self.caller(metadata).await?;
        let applied = self.node.propose_for(caller, Command::Auth(change)).await?;
        Ok(Some(header::at(&self.node, applied.revision)))
    }

    /// The tables as they are now, and who wants to see them.
    async fn tables(
        &self,
        metadata: &MetadataMap,
    ) -> Result<(Arc<crate::machine::Auth>, Caller), Status> {
        self.node.read_barrier().await?;
        Ok((self.node.auth(), self.caller(metadata).await?))
    }

    /// The tables for one who may see all of them.
    async fn tables_for_admin(
        &self,
        metadata: &MetadataMap,
    ) -> Result<Arc<crate::machine::Auth>, Status> {
        let (tables, caller) = self.tables(metadata).await?;
        caller.check_admin()?;
        Ok(tables)
    }

    fn header(&self) -> Option<ResponseHeader> {
        Some(header::current(&self.node))
    }
}

fn refused(refusal: AuthRefusal) -> Status {
    Rejection::from(refusal).into()
}

/// etcd looks at the permission before it looks for the role.
fn permission(permission: Option<authpb::Permission>) -> Result<Permission, Status> {
    let permission = permission.ok_or(Refusal::PermissionNotGiven)?;
    let kind = kind(permission.perm_type);
    let range = owned_range(&permission.key, &permission.range_end);
    if range.start().is_empty() || range.is_empty() {
        return Err(refused(AuthRefusal::InvalidManagement));
    }
    Ok(Permission { range, kind })
}

/// In buffers of its own: it lives as long as the role.
fn owned_range(key: &[u8], range_end: &[u8]) -> KeyRange {
    KeyRange::from_wire(key.to_vec().into(), range_end.to_vec().into())
}

fn kind(number: i32) -> PermissionKind {
    use authpb::permission::Type;
    match Type::try_from(number) {
        Ok(Type::Read) => PermissionKind::Read,
        Ok(Type::Write) => PermissionKind::Write,
        Ok(Type::Readwrite) => PermissionKind::ReadWrite,
        Err(_) => PermissionKind::Unknown(number),
    }
}

fn permission_response(permission: &Permission) -> authpb::Permission {
    use authpb::permission::Type;
    let range_end = match &permission.range {
        KeyRange::One(_) => Default::default(),
        KeyRange::Span { end, .. } => end.clone(),
        KeyRange::From(_) => vec![0].into(),
    };
    let perm_type = match permission.kind {
        PermissionKind::Read => Type::Read.into(),
        PermissionKind::Write => Type::Write.into(),
        PermissionKind::ReadWrite => Type::Readwrite.into(),
        PermissionKind::Unknown(number) => number,
    };
    authpb::Permission { perm_type, key: permission.range.start().clone(), range_end }
}

#[tonic::async_trait]
impl Auth for AuthService {
    async fn auth_enable(
        &self,
        request: Request<AuthEnableRequest>,
    ) -> Result<Response<AuthEnableResponse>, Status> {
        let header = self.change(request.metadata(), AuthChange::Enable).await?;
        Ok(Response::new(AuthEnableResponse { header }))
    }

    async fn auth_disable(
        &self,
        request: Request<AuthDisableRequest>,
    ) -> Result<Response<AuthDisableResponse>, Status> {
        let header = self.change(request.metadata(), AuthChange::Disable).await?;
        Ok(Response::new(AuthDisableResponse { header }))
    }

    async fn auth_status(
        &self,
        request: Request<AuthStatusRequest>,
    ) -> Result<Response<AuthStatusResponse>, Status> {
        let tables = self.tables_for_admin(request.metadata()).await?;
        let (enabled, auth_revision) = (tables.is_enabled(), tables.revision());
        Ok(Response::new(AuthStatusResponse { header: self.header(), enabled, auth_revision }))
    }

    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        let AuthenticateRequest { name, password } = request.into_inner();
        let token = self.node.log_in(&name, password).await?;
        Ok(Response::new(AuthenticateResponse { header: self.header(), token }))
    }

    /// As in etcd, a hash that the client brings is not taken.
    async fn user_add(
        &self,
        request: Request<AuthUserAddRequest>,
    ) -> Result<Response<AuthUserAddResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        // Hashing is dear: who may not add users gets nothing hashed.
        self.caller(&metadata).await?.check_admin()?;
        let passwordless = request.options.is_some_and(|options| options.no_password);
        let password_hash = match passwordless {
            true => None,
            false => Some(self.node.hash_password(request.password).await?),
        };
        let add = AuthChange::UserAdd { name: request.name, password_hash };
        let header = self.change(&metadata, add).await?;
        Ok(Response::new(AuthUserAddResponse { header }))
    }

    async fn user_get(
        &self,
        request: Request<AuthUserGetRequest>,
    ) -> Result<Response<AuthUserGetResponse>, Status> {
        let (tables, caller) = self.tables(request.metadata()).await?;
        let name = request.into_inner().name;
        if caller.user() != Some(name.as_str()) {
            caller.check_admin()?;
        }
        let user = tables.user(&name).ok_or_else(|| refused(AuthRefusal::UserNotFound))?;
        let roles = user.roles.iter().cloned().collect();
        Ok(Response::new(AuthUserGetResponse { header: self.header(), roles }))
    }

    async fn user_list(
        &self,
        request: Request<AuthUserListRequest>,
    ) -> Result<Response<AuthUserListResponse>, Status> {
        let tables = self.tables_for_admin(request.metadata()).await?;
        let users = tables.users().map(|(name, _)| name.to_owned()).collect();
        Ok(Response::new(AuthUserListResponse { header: self.header(), users }))
    }

    async fn user_delete(
        &self,
        request: Request<AuthUserDeleteRequest>,
    ) -> Result<Response<AuthUserDeleteResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let delete = AuthChange::UserDelete { name: request.name };
        let header = self.change(&metadata, delete).await?;
        Ok(Response::new(AuthUserDeleteResponse { header }))
    }

    /// As in etcd, a user whose password becomes empty cannot log in with any, and a hash that the
    /// client brings is not taken.
    async fn user_change_password(
        &self,
        request: Request<AuthUserChangePasswordRequest>,
    ) -> Result<Response<AuthUserChangePasswordResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        self.caller(&metadata).await?.check_admin()?;
        let password_hash = match request.password.is_empty() {
            true => crate::machine::PasswordHash(String::new()),
            false => self.node.hash_password(request.password).await?,
        };
        let change = AuthChange::UserChangePassword { name: request.name, password_hash };
        let header = self.change(&metadata, change).await?;
        Ok(Response::new(AuthUserChangePasswordResponse { header }))
    }

    async fn user_grant_role(
        &self,
        request: Request<AuthUserGrantRoleRequest>,
    ) -> Result<Response<AuthUserGrantRoleResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let grant = AuthChange::UserGrantRole { user: request.user, role: request.role };
        let header = self.change(&metadata, grant).await?;
        Ok(Response::new(AuthUserGrantRoleResponse { header }))
    }

    async fn user_revoke_role(
        &self,
        request: Request<AuthUserRevokeRoleRequest>,
    ) -> Result<Response<AuthUserRevokeRoleResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let revoke = AuthChange::UserRevokeRole { user: request.name, role: request.role };
        let header = self.change(&metadata, revoke).await?;
        Ok(Response::new(AuthUserRevokeRoleResponse { header }))
    }

    async fn role_add(
        &self,
        request: Request<AuthRoleAddRequest>,
    ) -> Result<Response<AuthRoleAddResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let header = self.change(&metadata, AuthChange::RoleAdd { name: request.name }).await?;
        Ok(Response::new(AuthRoleAddResponse { header }))
    }

    async fn role_get(
        &self,
        request: Request<AuthRoleGetRequest>,
    ) -> Result<Response<AuthRoleGetResponse>, Status> {
        let (tables, caller) = self.tables(request.metadata()).await?;
        let name = request.into_inner().role;
        let own = caller.user().and_then(|user| tables.user(user));
        if !own.is_some_and(|user| user.roles.contains(&name)) {
            caller.check_admin()?;
        }
        let role = tables.role(&name).ok_or_else(|| refused(AuthRefusal::RoleNotFound))?;
        let perm = role.permissions().iter().map(permission_response).collect();
        Ok(Response::new(AuthRoleGetResponse { header: self.header(), perm }))
    }

    async fn role_list(
        &self,
        request: Request<AuthRoleListRequest>,
    ) -> Result<Response<AuthRoleListResponse>, Status> {
        let tables = self.tables_for_admin(request.metadata()).await?;
        let roles = tables.roles().map(|(name, _)| name.to_owned()).collect();
        Ok(Response::new(AuthRoleListResponse { header: self.header(), roles }))
    }

    async fn role_delete(
        &self,
        request: Request<AuthRoleDeleteRequest>,
    ) -> Result<Response<AuthRoleDeleteResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let header = self.change(&metadata, AuthChange::RoleDelete { name: request.role }).await?;
        Ok(Response::new(AuthRoleDeleteResponse { header }))
    }

    async fn role_grant_permission(
        &self,
        request: Request<AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<AuthRoleGrantPermissionResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        self.caller(&metadata).await?.check_admin()?;
        let permission = permission(request.perm)?;
        let grant = AuthChange::RoleGrantPermission { role: request.name, permission };
        let header = self.change(&metadata, grant).await?;
        Ok(Response::new(AuthRoleGrantPermissionResponse { header }))
    }

    async fn role_revoke_permission(
        &self,
        request: Request<AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<AuthRoleRevokePermissionResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let range = owned_range(&request.key, &request.range_end);
        let revoke = AuthChange::RoleRevokePermission { role: request.role, range };
        let header = self.change(&metadata, revoke).await?;
        Ok(Response::new(AuthRoleRevokePermissionResponse { header }))
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn asked(key: &'static str, range_end: &'static str, number: i32) -> authpb::Permission {
        authpb::Permission { key: key.into(), range_end: range_end.into(), perm_type: number }
    }

    fn refusal(key: &'static str, range_end: &'static str) -> Option<(Code, String)> {
        let status = permission(Some(asked(key, range_end, 0))).err()?;
        Some((status.code(), status.message().to_owned()))
    }

    #[test]
    fn a_permission_needs_a_key_and_a_range_that_can_hold_one() {
        let invalid = (Code::InvalidArgument, "etcdserver: invalid auth management".to_owned());
        assert_eq!(refusal("", ""), Some(invalid.clone()));
        assert_eq!(refusal("", "\0"), Some(invalid.clone()));
        assert_eq!(refusal("b", "a"), Some(invalid.clone()));
        assert_eq!(refusal("b", "b"), Some(invalid));
        assert_eq!(refusal("b", ""), None);
        assert_eq!(refusal("b", "\0"), None);
        let missing = permission(None).expect_err("there is none");
        assert_eq!(missing.message(), "etcdserver: permission not given");
    }

    #[test]
    fn a_permission_is_told_as_it_was_granted() {
        for (end, number) in [("", 0), ("c", 1), ("\0", 2), ("", 7)] {
            let granted = permission(Some(asked("b", end, number))).expect("a permission");
            assert_eq!(permission_response(&granted), asked("b", end, number));
        }
    }
}
