//! Alarms between protobuf and the machine's types.

use tonic::Status;

use crate::api::status;
use crate::machine::{Alarm, AlarmAction, AlarmKind};
use crate::pb::etcdserverpb as pb;
use crate::pb::etcdserverpb::alarm_request::AlarmAction as Asked;
use crate::types::MemberId;

/// What an Alarm call asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlarmAsked {
    /// The alarms of one kind, or all. In etcd the request's member id makes no difference here.
    List(Option<AlarmKind>),
    Change(AlarmAction),
    /// To raise or clear what is no alarm.
    Nothing,
}

/// # Errors
///
/// Actions and alarms that etcd does not know: there they end the process.
pub fn alarm(request: &pb::AlarmRequest) -> Result<AlarmAsked, Status> {
    let kind = match pb::AlarmType::try_from(request.alarm) {
        Ok(pb::AlarmType::None) => None,
        Ok(pb::AlarmType::Nospace) => Some(AlarmKind::NoSpace),
        Ok(pb::AlarmType::Corrupt) => Some(AlarmKind::Corrupt),
        Err(_) => return Err(status::unknown_alarm(request.alarm)),
    };
    let alarm = kind.map(|kind| Alarm { member: MemberId(request.member_id), kind });
    match Asked::try_from(request.action) {
        Ok(Asked::Get) => Ok(AlarmAsked::List(kind)),
        Ok(Asked::Activate) => Ok(changed(alarm.map(AlarmAction::Raise))),
        Ok(Asked::Deactivate) => Ok(changed(alarm.map(AlarmAction::Clear))),
        Err(_) => Err(status::unknown_alarm_action(request.action)),
    }
}

fn changed(action: Option<AlarmAction>) -> AlarmAsked {
    action.map_or(AlarmAsked::Nothing, AlarmAsked::Change)
}

pub fn alarm_response(
    alarms: impl IntoIterator<Item = Alarm>,
    header: pb::ResponseHeader,
) -> pb::AlarmResponse {
    let alarms = alarms.into_iter().map(|alarm| pb::AlarmMember {
        member_id: alarm.member.0,
        alarm: match alarm.kind {
            AlarmKind::NoSpace => pb::AlarmType::Nospace,
            AlarmKind::Corrupt => pb::AlarmType::Corrupt,
        }
        .into(),
    });
    pb::AlarmResponse { header: Some(header), alarms: alarms.collect() }
}

/// What etcd calls it.
pub fn alarm_name(kind: AlarmKind) -> &'static str {
    match kind {
        AlarmKind::NoSpace => "NOSPACE",
        AlarmKind::Corrupt => "CORRUPT",
    }
}
