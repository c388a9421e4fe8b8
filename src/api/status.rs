//! Refusals as gRPC codes and texts.
//!
//! Clients of etcd compare these texts literally, so each is part of the contract. They stand here
//! and nowhere else: the other files of `api` name a [`Refusal`], pass on a [`Failure`], or call one
//! of the functions below.

use tonic::{Code, Status};

use crate::concurrency::client::EnterFailure;
use crate::concurrency::locks::WatchFailure;
use crate::machine::{Alarm, AuthRefusal, Rejection};
use crate::node::{
    ChangeFailure, ChangeRefusal, DiskState, Failure, LoginFailure, MoveFailure, PasswordFailure,
    Room,
};
use crate::types::LeaseId;

use super::convert;

/// Why a call is refused before anything was proposed or read, and the refusals that only the lock
/// and election services know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    EmptyKey,
    /// An operation of a transaction that asks for nothing.
    EmptyOperation,
    ValueProvided,
    LeaseProvided,
    TooManyOperations,
    DuplicateKey,
    /// A sort target that is none of etcd's.
    SortTarget,
    /// A stream of pairs in another order than that of the keys.
    StreamOrder,
    /// A stream of the pairs that revisions leave.
    StreamFilters,
    RequestTooLarge,
    LeaseTtlTooLarge,
    /// The caller asks to fail when there is no leader, and there is none.
    NoLeader,
    /// A learner answers little.
    Learner,
    /// A permission to be granted that is not there.
    PermissionNotGiven,
    /// A waiter's turn came, but its own key or lease is gone.
    SessionExpired,
    /// An election in which nobody is elected.
    NobodyElected,
    /// Proclaiming without being elected.
    NotElected,
    /// Proclaiming or resigning without saying as whom.
    LeaderMissing,
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Status {
        let (code, text) = match refusal {
            Refusal::EmptyKey => (Code::InvalidArgument, "etcdserver: key is not provided"),
            Refusal::EmptyOperation => (Code::InvalidArgument, "etcdserver: key not found"),
            Refusal::ValueProvided => (Code::InvalidArgument, "etcdserver: value is provided"),
            Refusal::LeaseProvided => (Code::InvalidArgument, "etcdserver: lease is provided"),
            Refusal::TooManyOperations => {
                (Code::InvalidArgument, "etcdserver: too many operations in txn request")
            }
            Refusal::DuplicateKey => {
                (Code::InvalidArgument, "etcdserver: duplicate key given in txn request")
            }
            Refusal::SortTarget => (Code::InvalidArgument, "etcdserver: invalid sort option"),
            Refusal::StreamOrder => {
                (Code::Unimplemented, "RangeStream does not support custom sort orders")
            }
            Refusal::StreamFilters => {
                (Code::Unimplemented, "RangeStream does not support revision filters")
            }
            Refusal::RequestTooLarge => (Code::InvalidArgument, "etcdserver: request is too large"),
            Refusal::LeaseTtlTooLarge => (Code::OutOfRange, "etcdserver: too large lease TTL"),
            Refusal::NoLeader => (Code::Unavailable, "etcdserver: no leader"),
            Refusal::Learner => (Code::Unavailable, "etcdserver: rpc not supported for learner"),
            Refusal::PermissionNotGiven => {
                (Code::InvalidArgument, "etcdserver: permission not given")
            }
            Refusal::SessionExpired => (Code::Unknown, "mutex: session is expired"),
            Refusal::NobodyElected => (Code::Unknown, "election: no leader"),
            Refusal::NotElected => (Code::Unknown, "election: not leader"),
            Refusal::LeaderMissing => (Code::Unknown, "\"leader\" field must be provided"),
        };
        Status::new(code, text)
    }
}

impl From<AuthRefusal> for Status {
    fn from(refusal: AuthRefusal) -> Status {
        let (code, text) = match refusal {
            AuthRefusal::RootUserNotFound => {
                (Code::FailedPrecondition, "etcdserver: root user does not exist")
            }
            AuthRefusal::RootRoleNotGranted => {
                (Code::FailedPrecondition, "etcdserver: root user does not have root role")
            }
            AuthRefusal::UserExists => {
                (Code::FailedPrecondition, "etcdserver: user name already exists")
            }
            AuthRefusal::UserEmpty => (Code::InvalidArgument, "etcdserver: user name is empty"),
            AuthRefusal::UserNotFound => {
                (Code::FailedPrecondition, "etcdserver: user name not found")
            }
            AuthRefusal::RoleExists => {
                (Code::FailedPrecondition, "etcdserver: role name already exists")
            }
            AuthRefusal::RoleEmpty => (Code::InvalidArgument, "etcdserver: role name is empty"),
            AuthRefusal::RoleNotFound => {
                (Code::FailedPrecondition, "etcdserver: role name not found")
            }
            AuthRefusal::RoleNotGranted => {
                (Code::FailedPrecondition, "etcdserver: role is not granted to the user")
            }
            AuthRefusal::PermissionNotGranted => {
                (Code::FailedPrecondition, "etcdserver: permission is not granted to the role")
            }
            AuthRefusal::InvalidManagement => {
                (Code::InvalidArgument, "etcdserver: invalid auth management")
            }
            AuthRefusal::PermissionDenied => {
                (Code::PermissionDenied, "etcdserver: permission denied")
            }
            AuthRefusal::OldRevision => {
                (Code::InvalidArgument, "etcdserver: revision of auth store is old")
            }
            AuthRefusal::Disabled => {
                (Code::FailedPrecondition, "etcdserver: authentication is not enabled")
            }
            AuthRefusal::TooManyUsers
            | AuthRefusal::TooManyRoles
            | AuthRefusal::TooManyRolesOfUser
            | AuthRefusal::RoleTooLarge => {
                return Status::resource_exhausted(format!("holdfast: {refusal}"));
            }
            AuthRefusal::NameTooLong => {
                return Status::invalid_argument(format!("holdfast: {refusal}"));
            }
        };
        Status::new(code, text)
    }
}

impl From<LoginFailure> for Status {
    fn from(failure: LoginFailure) -> Status {
        match failure {
            LoginFailure::Wrong => Status::invalid_argument(
                "etcdserver: authentication failed, invalid user ID or password",
            ),
            // As in etcd: the code is lost.
            LoginFailure::Passwordless => Status::unknown(
                "auth: authentication failed, password was given for no password user",
            ),
            LoginFailure::Failed(failure) => failure.into(),
        }
    }
}

impl From<PasswordFailure> for Status {
    fn from(failure: PasswordFailure) -> Status {
        match failure {
            PasswordFailure::TooLong { most_bytes } => {
                Status::unknown(format!("bcrypt: password length exceeds {most_bytes} bytes"))
            }
            PasswordFailure::Failed(failure) => failure.into(),
        }
    }
}

impl From<Rejection> for Status {
    fn from(rejection: Rejection) -> Status {
        let (code, text) = match rejection {
            Rejection::Compacted { .. } => {
                (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted")
            }
            Rejection::FutureRevision { .. } => {
                (Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision")
            }
            Rejection::KeyNotFound => (Code::InvalidArgument, "etcdserver: key not found"),
            Rejection::LeaseNotFound(_) => {
                (Code::NotFound, "etcdserver: requested lease not found")
            }
            Rejection::LeaseExists(_) => {
                (Code::FailedPrecondition, "etcdserver: lease already exists")
            }
            Rejection::Detached(_) => {
                (Code::FailedPrecondition, "holdfast: the queue key is not attached to its lease")
            }
            Rejection::StaleFence { .. } => {
                (Code::FailedPrecondition, "holdfast: stale fencing token")
            }
            Rejection::NoSpace => {
                (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded")
            }
            Rejection::Corrupt => (Code::DataLoss, "etcdserver: corrupt cluster"),
            Rejection::TooManyAlarms(_) => {
                (Code::ResourceExhausted, "holdfast: too many alarms are raised")
            }
            Rejection::Auth(refusal) => return refusal.into(),
        };
        Status::new(code, text)
    }
}

/// etcd says this of a store at its quota.
const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";

/// What Status says of a disk that has little room.
pub fn of_disk(disk: DiskState) -> Option<String> {
    let what = match disk.room {
        Room::Enough => return None,
        Room::Low => "nearly full, writes are refused",
        Room::Full => "full, no entries are taken",
    };
    Some(format!("holdfast: the disk of this member is {what}: {} bytes are free", disk.free_bytes))
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Status {
        let (code, text) = match failure {
            Failure::Rejected(rejection) => return rejection.into(),
            Failure::NoLeader => return Refusal::NoLeader.into(),
            Failure::TimedOut => (Code::DeadlineExceeded, "context deadline exceeded"),
            Failure::ReadTimedOut => (Code::Unavailable, "etcdserver: request timed out"),
            Failure::Unknown => (
                Code::Unavailable,
                "etcdserver: request timed out, possibly due to previous leader failure",
            ),
            Failure::Stopping => (Code::Unavailable, "etcdserver: server stopped"),
            Failure::TooManyRequests => (Code::ResourceExhausted, "etcdserver: too many requests"),
            Failure::InvalidToken => (Code::Unauthenticated, "etcdserver: invalid auth token"),
            Failure::DiskFull => (Code::ResourceExhausted, NO_SPACE),
        };
        Status::new(code, text)
    }
}

impl From<ChangeFailure> for Status {
    fn from(failure: ChangeFailure) -> Status {
        let refusal = match failure {
            ChangeFailure::Refused(refusal) => refusal,
            ChangeFailure::Failed(failure) => return failure.into(),
        };
        let (code, text) = match refusal {
            ChangeRefusal::BadUrls => {
                (Code::InvalidArgument, "etcdserver: given member URLs are invalid")
            }
            ChangeRefusal::IdExists => {
                (Code::FailedPrecondition, "etcdserver: member ID already exist")
            }
            ChangeRefusal::UrlExists => {
                (Code::FailedPrecondition, "etcdserver: Peer URLs already exists")
            }
            ChangeRefusal::NotFound => (Code::NotFound, "etcdserver: member not found"),
            ChangeRefusal::NotLearner => {
                (Code::FailedPrecondition, "etcdserver: can only promote a learner member")
            }
            ChangeRefusal::LearnerNotReady => (
                Code::FailedPrecondition,
                "etcdserver: can only promote a learner member which is in sync with leader",
            ),
            ChangeRefusal::TooManyLearners => {
                (Code::FailedPrecondition, "etcdserver: too many learner members in cluster")
            }
            // As in etcd: the code is lost.
            ChangeRefusal::NotEnoughStarted => (
                Code::Unknown,
                "etcdserver: re-configuration failed due to not enough started members",
            ),
            ChangeRefusal::Unhealthy => (Code::Unavailable, "etcdserver: unhealthy cluster"),
        };
        Status::new(code, text)
    }
}

impl From<MoveFailure> for Status {
    fn from(failure: MoveFailure) -> Status {
        let (code, text) = match failure {
            MoveFailure::NotLeader => (Code::FailedPrecondition, "etcdserver: not leader"),
            MoveFailure::BadTransferee => {
                (Code::FailedPrecondition, "etcdserver: bad leader transferee")
            }
            MoveFailure::TooSlow => {
                (Code::Unknown, "etcdserver: request timed out, leader transfer took too long")
            }
            MoveFailure::Failed(failure) => return failure.into(),
        };
        Status::new(code, text)
    }
}

/// Why a call of our own services is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockRefusal {
    EmptyName,
    TextTooLong {
        what: &'static str,
        most: usize,
    },
    Ttl {
        most: i64,
    },
    NoToken,
    NoReason,
    /// A Hold stream that does not begin with Open.
    NotOpened,
    /// Nobody holds the lock.
    NotHeld,
    /// The lock has another holder, or none.
    StaleToken,
    /// The key or the lease of a waiter is gone.
    SessionEnded,
    LeaseNotFound,
    TooManyStreams(usize),
    TooManyLocks(usize),
    TooManyRequests,
    /// The alarm NOSPACE is raised.
    NoSpace,
    /// The alarm CORRUPT is raised.
    Corrupt,
    DiskFull,
    NoLeader,
    TimedOut,
    OutcomeUnknown,
    Stopping,
    Internal,
}

impl From<LockRefusal> for Status {
    fn from(refusal: LockRefusal) -> Status {
        let (code, text) = match refusal {
            LockRefusal::EmptyName => (Code::InvalidArgument, "the name is empty"),
            LockRefusal::TextTooLong { what, most } => {
                let text = format!("holdfast: {what} is longer than {most} bytes");
                return Status::invalid_argument(text);
            }
            LockRefusal::Ttl { most } => {
                let text = format!("holdfast: the TTL is not between 1 and {most} seconds");
                return Status::invalid_argument(text);
            }
            LockRefusal::NoToken => (Code::InvalidArgument, "a token is a positive number"),
            LockRefusal::NoReason => (Code::InvalidArgument, "a reason is required"),
            LockRefusal::NotOpened => (Code::InvalidArgument, "the first message must be open"),
            LockRefusal::NotHeld => (Code::NotFound, "nobody holds the lock"),
            LockRefusal::StaleToken => (Code::FailedPrecondition, "stale token"),
            LockRefusal::SessionEnded => (
                Code::FailedPrecondition,
                "the session ended: its key or its lease is gone, or the key is another's",
            ),
            LockRefusal::LeaseNotFound => (Code::NotFound, "lease not found"),
            LockRefusal::TooManyStreams(most) => {
                return Status::resource_exhausted(format!("holdfast: more than {most} streams"));
            }
            LockRefusal::TooManyLocks(most) => {
                let text = format!("holdfast: more than {most} locks; watch a longer prefix");
                return Status::resource_exhausted(text);
            }
            LockRefusal::TooManyRequests => (Code::ResourceExhausted, "too many requests"),
            LockRefusal::NoSpace => {
                (Code::ResourceExhausted, "the store is larger than its quota: alarm NOSPACE")
            }
            LockRefusal::Corrupt => (Code::DataLoss, "the members' states differ: alarm CORRUPT"),
            LockRefusal::DiskFull => (Code::ResourceExhausted, "the disk is nearly full"),
            LockRefusal::NoLeader => (Code::Unavailable, "no leader"),
            LockRefusal::TimedOut => (Code::DeadlineExceeded, "timed out"),
            LockRefusal::OutcomeUnknown => (Code::Unavailable, "the outcome is not known"),
            LockRefusal::Stopping => (Code::Unavailable, "the member stops"),
            LockRefusal::Internal => (Code::Internal, "unexpected refusal"),
        };
        Status::new(code, format!("holdfast: {text}"))
    }
}

/// `failure` as our own services say it.
pub fn of_own(failure: Failure) -> Status {
    Status::from(match failure {
        Failure::Rejected(Rejection::LeaseNotFound(_)) => LockRefusal::LeaseNotFound,
        Failure::Rejected(Rejection::Detached(_)) => LockRefusal::SessionEnded,
        Failure::Rejected(Rejection::NoSpace) => LockRefusal::NoSpace,
        Failure::Rejected(Rejection::Corrupt) => LockRefusal::Corrupt,
        Failure::InvalidToken | Failure::Rejected(Rejection::Auth(_)) => return own_words(failure),
        Failure::Rejected(_) => LockRefusal::Internal,
        Failure::NoLeader => LockRefusal::NoLeader,
        Failure::TimedOut | Failure::ReadTimedOut => LockRefusal::TimedOut,
        Failure::Unknown => LockRefusal::OutcomeUnknown,
        Failure::Stopping => LockRefusal::Stopping,
        Failure::TooManyRequests => LockRefusal::TooManyRequests,
        Failure::DiskFull => LockRefusal::DiskFull,
    })
}

/// A refusal in etcd's words, as our own services say it.
fn own_words(failure: Failure) -> Status {
    let status = Status::from(failure);
    let text = status.message();
    Status::new(status.code(), format!("holdfast: {}", text.trim_start_matches("etcdserver: ")))
}

/// What Defragment, Hash, HashKV and Snapshot say to who may not call them. As in etcd, the code is
/// lost.
pub fn of_maintenance(failure: Failure) -> Status {
    let refused = matches!(failure, Failure::InvalidToken | Failure::Rejected(Rejection::Auth(_)));
    let status = Status::from(failure);
    if !refused {
        return status;
    }
    Status::unknown(format!("auth: {}", status.message().trim_start_matches("etcdserver: ")))
}

/// How taking a lock failed.
pub fn of_lock(failure: EnterFailure) -> Status {
    match failure {
        EnterFailure::LeaseNotFound => LockRefusal::LeaseNotFound.into(),
        EnterFailure::Expired => LockRefusal::SessionEnded.into(),
        // Told as an answer wherever a call may be refused so.
        EnterFailure::Busy => LockRefusal::Internal.into(),
        EnterFailure::Failed(failure) => of_own(failure),
    }
}

/// How watching locks failed.
pub fn of_lock_watch(failure: WatchFailure) -> Status {
    match failure {
        WatchFailure::TooManyLocks(most) => LockRefusal::TooManyLocks(most).into(),
        WatchFailure::Failed(failure) => of_own(failure),
    }
}

/// `status` as the lock and election services say it: the same text, whatever the code.
pub fn as_unknown(status: impl Into<Status>) -> Status {
    Status::unknown(status.into().message())
}

/// A lock or a campaign on a lease that does not exist.
pub fn unknown_lease() -> Status {
    // The text leaves the id out, so any will do.
    as_unknown(Rejection::LeaseNotFound(LeaseId::NONE))
}

/// Metadata that should name a fence and does not.
pub fn malformed_fence(reason: &str) -> Status {
    Status::invalid_argument(format!("holdfast: malformed fence, NAME=TOKEN is wanted: {reason}"))
}

pub fn too_many_fences(most: usize) -> Status {
    Status::invalid_argument(format!("holdfast: more than {most} fences"))
}

/// A method of etcd's that is not built yet.
pub fn not_implemented(method: &str) -> Status {
    Status::unimplemented(format!("holdfast: {method} is not implemented yet"))
}

/// An alarm as Status lists it, with etcd's blank at the end.
pub fn of_alarm(alarm: Alarm) -> String {
    format!("memberID:{} alarm:{} ", alarm.member.0, convert::alarm_name(alarm.kind))
}

/// A downgrade to a release that is not the one before.
pub fn invalid_downgrade_target() -> Status {
    Status::invalid_argument("etcdserver: invalid downgrade target version")
}

pub fn malformed_downgrade_target() -> Status {
    Status::invalid_argument("etcdserver: wrong downgrade target version format")
}

pub fn no_downgrade_job() -> Status {
    Status::failed_precondition("etcdserver: no inflight downgrade job")
}

/// A downgrade action that is none of etcd's.
pub fn unknown_downgrade_action() -> Status {
    Status::unknown("etcdserver: unknown method")
}

/// An alarm of a kind that is none of etcd's; etcd crashes.
pub fn unknown_alarm(alarm: i32) -> Status {
    Status::invalid_argument(format!("holdfast: unknown alarm {alarm}"))
}

/// An alarm action that is none of etcd's.
pub fn unknown_alarm_action(action: i32) -> Status {
    Status::invalid_argument(format!("holdfast: unknown alarm action {action}"))
}

/// The machine gave an answer that belongs to another kind of command: a bug, and never the
/// caller's.
pub fn misplaced_reply() -> Status {
    Status::internal("holdfast: the reply does not belong to the command")
}

/// A health check for a service that is not known by name.
pub fn unknown_health_service() -> Status {
    Status::not_found("unknown service")
}

/// The refusal of a call to `path`, which no service of ours has a method for.
///
/// `served` is the service that was reached, if any: it tells an unknown method from an unknown
/// service.
pub fn unknown_path(path: &str, served: Option<&str>) -> Status {
    let name = path.strip_prefix('/').unwrap_or(path);
    let Some((service, method)) = name.rsplit_once('/') else {
        return Status::unimplemented(format!("malformed method name: {path:?}"));
    };
    if served == Some(service) {
        Status::unimplemented(format!("unknown method {method} for service {service}"))
    } else {
        Status::unimplemented(format!("unknown service {service}"))
    }
}

/// What etcd's own gRPC library would say instead of `status`, which tonic made up itself; `None`
/// where the two agree or `status` is of our own making.
pub fn instead_of_tonic(status: &Status) -> Option<Status> {
    // A message above the receive limit. Newer releases of tonic may word it otherwise, which the
    // tests of `gate` would notice.
    if status.code() != Code::OutOfRange || !status.message().contains("message length too large") {
        return None;
    }
    let mut numbers = status
        .message()
        .split(|letter: char| !letter.is_ascii_digit())
        .filter(|digits| !digits.is_empty());
    let (size, limit) = (numbers.next()?, numbers.next()?);
    Some(Status::resource_exhausted(format!(
        "grpc: received message larger than max ({size} vs. {limit})"
    )))
}

/// `status`, by which tonic ended a stream of requests, in etcd's words.
pub fn of_stream(status: Status) -> Status {
    instead_of_tonic(&status).unwrap_or(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: impl Into<Status>) -> (Code, String) {
        let status = status.into();
        (status.code(), status.message().to_owned())
    }

    #[test]
    fn a_rejection_is_told_alike_alone_and_inside_a_failure() {
        for rejection in [
            Rejection::Compacted { requested: 1, oldest: 2 },
            Rejection::FutureRevision { requested: 3, current: 2 },
            Rejection::KeyNotFound,
            Rejection::LeaseNotFound(LeaseId(7)),
            Rejection::LeaseExists(LeaseId(7)),
            Rejection::StaleFence { token: 7 },
            Rejection::NoSpace,
            Rejection::Corrupt,
        ] {
            assert_eq!(said(rejection.clone()), said(Failure::Rejected(rejection)));
        }
        assert_eq!(
            said(Failure::Rejected(Rejection::Compacted { requested: 1, oldest: 2 })),
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted".into())
        );
    }

    #[test]
    fn locks_keep_the_text_and_lose_the_code() {
        assert_eq!(
            said(as_unknown(Rejection::LeaseNotFound(LeaseId(7)))),
            (Code::Unknown, "etcdserver: requested lease not found".into())
        );
    }

    #[test]
    fn unknown_paths_are_told_apart() {
        let text = |path, served| unknown_path(path, served).message().to_owned();
        assert_eq!(text("/a.B/C", Some("a.B")), "unknown method C for service a.B");
        assert_eq!(text("/a.B/C", None), "unknown service a.B");
        assert_eq!(text("/a.B/C/D", Some("a.B")), "unknown service a.B/C");
        assert_eq!(text("/C", None), "malformed method name: \"/C\"");
    }
}
