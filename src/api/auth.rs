//! The service Auth, as an etcd answers whose authentication was never enabled.
//!
//! There is no user and no role, so whatever names one is told that it does not exist, and the lists
//! are empty. Users and roles cannot be added yet, and those two answers say so.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::node::Node;
use crate::pb::authpb::Permission;
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
    AuthUserRevokeRoleResponse, AuthenticateRequest, AuthenticateResponse,
};
use crate::types::KeyRange;

use super::header;
use super::status::{self, Refusal};

/// The revision of an auth store that never changed.
const FIRST_AUTH_REVISION: u64 = 1;

pub struct AuthService {
    node: Arc<Node>,
}

impl AuthService {
    pub fn new(node: Arc<Node>) -> AuthService {
        AuthService { node }
    }
}

fn no_user<T>() -> Result<T, Status> {
    Err(Refusal::UserNotFound.into())
}

fn no_role<T>() -> Result<T, Status> {
    Err(Refusal::RoleNotFound.into())
}

/// etcd looks at the permission before it looks for the role.
fn check_permission(permission: Option<Permission>) -> Result<(), Status> {
    let permission = permission.ok_or(Refusal::PermissionNotGiven)?;
    let key_missing = permission.key.is_empty();
    if key_missing || KeyRange::from_wire(permission.key, permission.range_end).is_empty() {
        return Err(Refusal::InvalidAuthManagement.into());
    }
    Ok(())
}

#[tonic::async_trait]
impl Auth for AuthService {
    async fn auth_enable(
        &self,
        _request: Request<AuthEnableRequest>,
    ) -> Result<Response<AuthEnableResponse>, Status> {
        Err(Refusal::RootUserNotFound.into())
    }

    async fn auth_disable(
        &self,
        _request: Request<AuthDisableRequest>,
    ) -> Result<Response<AuthDisableResponse>, Status> {
        let header = Some(header::current(&self.node));
        Ok(Response::new(AuthDisableResponse { header }))
    }

    async fn auth_status(
        &self,
        _request: Request<AuthStatusRequest>,
    ) -> Result<Response<AuthStatusResponse>, Status> {
        Ok(Response::new(AuthStatusResponse {
            header: Some(header::current(&self.node)),
            enabled: false,
            auth_revision: FIRST_AUTH_REVISION,
        }))
    }

    async fn authenticate(
        &self,
        _request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        Err(Refusal::AuthDisabled.into())
    }

    async fn user_add(
        &self,
        request: Request<AuthUserAddRequest>,
    ) -> Result<Response<AuthUserAddResponse>, Status> {
        if request.get_ref().name.is_empty() {
            return Err(Refusal::UserEmpty.into());
        }
        Err(status::not_implemented("UserAdd"))
    }

    async fn user_get(
        &self,
        _request: Request<AuthUserGetRequest>,
    ) -> Result<Response<AuthUserGetResponse>, Status> {
        no_user()
    }

    async fn user_list(
        &self,
        _request: Request<AuthUserListRequest>,
    ) -> Result<Response<AuthUserListResponse>, Status> {
        let header = Some(header::current(&self.node));
        Ok(Response::new(AuthUserListResponse { header, users: Vec::new() }))
    }

    async fn user_delete(
        &self,
        _request: Request<AuthUserDeleteRequest>,
    ) -> Result<Response<AuthUserDeleteResponse>, Status> {
        no_user()
    }

    async fn user_change_password(
        &self,
        _request: Request<AuthUserChangePasswordRequest>,
    ) -> Result<Response<AuthUserChangePasswordResponse>, Status> {
        no_user()
    }

    async fn user_grant_role(
        &self,
        _request: Request<AuthUserGrantRoleRequest>,
    ) -> Result<Response<AuthUserGrantRoleResponse>, Status> {
        no_user()
    }

    async fn user_revoke_role(
        &self,
        _request: Request<AuthUserRevokeRoleRequest>,
    ) -> Result<Response<AuthUserRevokeRoleResponse>, Status> {
        no_user()
    }

    async fn role_add(
        &self,
        request: Request<AuthRoleAddRequest>,
    ) -> Result<Response<AuthRoleAddResponse>, Status> {
        if request.get_ref().name.is_empty() {
            return Err(Refusal::RoleEmpty.into());
        }
        Err(status::not_implemented("RoleAdd"))
    }

    async fn role_get(
        &self,
        _request: Request<AuthRoleGetRequest>,
    ) -> Result<Response<AuthRoleGetResponse>, Status> {
        no_role()
    }

    async fn role_list(
        &self,
        _request: Request<AuthRoleListRequest>,
    ) -> Result<Response<AuthRoleListResponse>, Status> {
        let header = Some(header::current(&self.node));
        Ok(Response::new(AuthRoleListResponse { header, roles: Vec::new() }))
    }

    async fn role_delete(
        &self,
        _request: Request<AuthRoleDeleteRequest>,
    ) -> Result<Response<AuthRoleDeleteResponse>, Status> {
        no_role()
    }

    async fn role_grant_permission(
        &self,
        request: Request<AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<AuthRoleGrantPermissionResponse>, Status> {
        check_permission(request.into_inner().perm)?;
        no_role()
    }

    async fn role_revoke_permission(
        &self,
        _request: Request<AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<AuthRoleRevokePermissionResponse>, Status> {
        no_role()
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn refusal(key: &'static str, range_end: &'static str) -> Option<(Code, String)> {
        let permission =
            Permission { key: key.into(), range_end: range_end.into(), ..Permission::default() };
        let status = check_permission(Some(permission)).err()?;
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
        let missing = check_permission(None).expect_err("there is none");
        assert_eq!(missing.message(), "etcdserver: permission not given");
    }
}
