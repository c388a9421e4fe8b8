//! Answers as text.
//!
//! An answer begins with the revision of its header and the name of its step; what belongs to it is
//! indented. Fields with their default value are left out.

use holdfast::pb::etcdserverpb::response_op::Response;
use holdfast::pb::etcdserverpb::{
    AlarmResponse, AlarmType, DeleteRangeResponse, HashKvResponse, LeaseTimeToLiveResponse,
    MemberListResponse, PutResponse, RangeResponse, ResponseHeader, StatusResponse, TxnResponse,
};
use holdfast::pb::mvccpb::event::EventType;
use holdfast::pb::mvccpb::{Event, KeyValue};
use tonic::{Code, Status};

use super::words::{Names, show_bytes};

/// How much of a lease's time may be gone while it still counts as full: the time between two steps.
const FULL_WITHIN_SECONDS: i64 = 15;

/// Which fields a header must have.
#[derive(Clone, Copy)]
enum Header {
    /// All of them.
    Whole,
    /// The revision, as inside a transaction.
    Revision,
    /// None, as that of a nested transaction.
    Empty,
}

/// The answer to one step, or one part of it.
pub type Lines = Vec<String>;

fn header(header: &Option<ResponseHeader>, expected: Header, names: &Names) -> String {
    let Some(header) = header else { return "(no header)".into() };
    let revision = names.revision(header.revision);
    let about = [header.cluster_id != 0, header.member_id != 0, header.raft_term != 0];
    let fits = match expected {
        Header::Whole => about == [true; 3],
        Header::Revision => about == [false; 3],
        Header::Empty => about == [false; 3] && header.revision == 0,
    };
    if fits { revision } else { format!("(odd header {header:?}) {revision}") }
}

/// The header of an answer, as it stands before the step's name.
pub fn whole(found: &Option<ResponseHeader>, names: &Names) -> String {
    header(found, Header::Whole, names)
}

pub fn refused(verb: &str, status: &Status) -> Lines {
    vec![format!("{verb} {} {:?}", code(status.code()), status.message())]
}

/// The code in capitals, as etcd's documents have it.
pub fn code(code: Code) -> String {
    let mut text = String::new();
    for character in format!("{code:?}").chars() {
        if character.is_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.extend(character.to_uppercase());
    }
    text
}

pub fn put(response: &PutResponse, names: &Names) -> Lines {
    put_in(response, Header::Whole, names)
}

fn put_in(response: &PutResponse, expected: Header, names: &Names) -> Lines {
    let mut lines = vec![format!("{} put", header(&response.header, expected, names))];
    lines.extend(response.prev_kv.iter().map(|kv| format!("  prev {}", pair(kv, names))));
    lines
}

pub fn get(response: &RangeResponse, names: &Names) -> Lines {
    get_in(response, Header::Whole, names)
}

fn get_in(response: &RangeResponse, expected: Header, names: &Names) -> Lines {
    let more = if response.more { " more" } else { "" };
    let revision = header(&response.header, expected, names);
    let mut lines = vec![format!("{revision} get count={}{more}", response.count)];
    lines.extend(response.kvs.iter().map(|kv| format!("  {}", pair(kv, names))));
    lines
}

pub fn delete(response: &DeleteRangeResponse, names: &Names) -> Lines {
    delete_in(response, Header::Whole, names)
}

fn delete_in(response: &DeleteRangeResponse, expected: Header, names: &Names) -> Lines {
    let revision = header(&response.header, expected, names);
    let mut lines = vec![format!("{revision} delete deleted={}", response.deleted)];
    lines.extend(response.prev_kvs.iter().map(|kv| format!("  prev {}", pair(kv, names))));
    lines
}

pub fn txn(response: &TxnResponse, names: &Names) -> Lines {
    txn_in(response, Header::Whole, names)
}

fn txn_in(response: &TxnResponse, expected: Header, names: &Names) -> Lines {
    let outcome = if response.succeeded { "succeeded" } else { "failed" };
    let mut lines = vec![format!("{} txn {outcome}", header(&response.header, expected, names))];
    for operation in &response.responses {
        let inner = match &operation.response {
            Some(Response::ResponseRange(get)) => get_in(get, Header::Revision, names),
            Some(Response::ResponsePut(put)) => put_in(put, Header::Revision, names),
            Some(Response::ResponseDeleteRange(delete)) => {
                delete_in(delete, Header::Revision, names)
            }
            Some(Response::ResponseTxn(txn)) => txn_in(txn, Header::Empty, names),
            None => vec!["(no response)".to_owned()],
        };
        lines.extend(inner.into_iter().map(|line| format!("  {line}")));
    }
    lines
}

/// `KEY=VALUE`, and the fields that are set.
fn pair(kv: &KeyValue, names: &Names) -> String {
    let mut text = format!("{}={}", show_bytes(&kv.key), show_bytes(&kv.value));
    fields(kv, names, &mut text);
    text
}

fn fields(kv: &KeyValue, names: &Names, text: &mut String) {
    for (name, revision) in [("create", kv.create_revision), ("mod", kv.mod_revision)] {
        if revision != 0 {
            text.push_str(&format!(" {name}={}", names.revision(revision)));
        }
    }
    if kv.version != 0 {
        text.push_str(&format!(" version={}", kv.version));
    }
    if kv.lease != 0 {
        text.push_str(&format!(" lease={}", names.lease(kv.lease)));
    }
}

pub fn event(event: &Event, names: &Names) -> String {
    let Some(kv) = &event.kv else { return "(no kv)".into() };
    let mut text = match EventType::try_from(event.r#type) {
        Ok(EventType::Put) => format!("put {}", pair(kv, names)),
        Ok(EventType::Delete) if kv.value.is_empty() => {
            let mut text = format!("delete {}", show_bytes(&kv.key));
            fields(kv, names, &mut text);
            text
        }
        _ => format!("(odd event {}) {}", event.r#type, pair(kv, names)),
    };
    if let Some(prev) = &event.prev_kv {
        text.push_str(&format!(" prev {}", pair(prev, names)));
    }
    text
}

/// What remains of a lease is told as `full` or `part`.
pub fn time_to_live(response: &LeaseTimeToLiveResponse, names: &Names) -> Lines {
    let left = match response.ttl {
        none if none <= 0 => none.to_string(),
        ttl if ttl > response.granted_ttl => format!("(more than granted: {ttl})"),
        ttl if ttl >= response.granted_ttl - FULL_WITHIN_SECONDS => "full".to_owned(),
        _ => "part".to_owned(),
    };
    let revision = whole(&response.header, names);
    let id = names.lease(response.id);
    let mut line = format!("{revision} ttl id={id} left={left} granted={}", response.granted_ttl);
    let mut keys: Vec<String> = response.keys.iter().map(|key| show_bytes(key)).collect();
    // Their order is not defined.
    keys.sort();
    if !keys.is_empty() {
        line.push_str(&format!(" keys {}", keys.join(" ")));
    }
    vec![line]
}

/// Members that answer alike are told once.
pub fn hash_kv(responses: &[HashKvResponse], names: &mut Names) -> Lines {
    let mut lines = Lines::new();
    for response in responses {
        let revision = whole(&response.header, names);
        let compacted = names.revision(response.compact_revision);
        let hash = names.hash(response.hash);
        let line = format!("{revision} hashkv hash={hash} compact={compacted}");
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines
}

/// Numbers of the one run are checked here, not told.
pub fn status(response: &StatusResponse, names: &Names) -> Lines {
    let term = response.header.map_or(0, |header| header.raft_term);
    let checks = [
        ("version", response.version.split('.').count() == 3),
        ("dbSize", response.db_size > 0),
        ("dbSizeInUse", (1..=response.db_size).contains(&response.db_size_in_use)),
        ("leader", response.leader != 0),
        ("raftTerm", response.raft_term == term && term >= 2),
        ("raftAppliedIndex", (1..=response.raft_index).contains(&response.raft_applied_index)),
    ];
    let mut line = format!("{} status", whole(&response.header, names));
    for (name, good) in checks {
        line.push_str(&format!(" {name}={}", if good { "good" } else { "bad" }));
    }
    if response.is_learner {
        line.push_str(" isLearner");
    }
    if !response.errors.is_empty() {
        line.push_str(&format!(" errors {:?}", response.errors));
    }
    vec![line]
}

/// In the order of members; in etcd in none.
pub fn alarms(response: &AlarmResponse, names: &Names) -> Lines {
    let mut alarms: Vec<(u64, AlarmType)> =
        response.alarms.iter().map(|alarm| (alarm.member_id, alarm.alarm())).collect();
    alarms.sort_unstable();
    let alarms: String = alarms
        .iter()
        .map(|(member, alarm)| format!(" {member}:{}", alarm.as_str_name().to_lowercase()))
        .collect();
    vec![format!("{} alarm{alarms}", whole(&response.header, names))]
}

/// In the order of names.
pub fn members(response: &MemberListResponse, names: &Names) -> Lines {
    let mut members: Vec<String> = response
        .members
        .iter()
        .map(|member| {
            let id = if member.id == 0 { " (no id)" } else { "" };
            let role = if member.is_learner { "learner" } else { "voter" };
            let peer_urls = member.peer_ur_ls.len();
            let client_urls = member.client_ur_ls.len();
            format!("  {}{id} {role} peerURLs={peer_urls} clientURLs={client_urls}", member.name)
        })
        .collect();
    members.sort();
    members.insert(0, format!("{} members", whole(&response.header, names)));
    members
}

/// Tells lines that repeat once, with how often. The last of them is told by itself when more belongs
/// to it.
pub fn collapse(lines: Lines) -> Lines {
    let indent = |line: &String| line.len() - line.trim_start().len();
    let mut told = Lines::new();
    let mut rest = lines.as_slice();
    while let Some(line) = rest.first() {
        let mut run = rest.iter().take_while(|next| *next == line).count();
        if run > 1 && rest.get(run).is_some_and(|next| indent(next) > indent(line)) {
            run -= 1;
        }
        told.push(if run > 1 { format!("{line} (x{run})") } else { line.clone() });
        rest = &rest[run..];
    }
    told
}

/// What is missing (`-`) and what is there instead (`+`), with what is around it.
pub fn difference(expected: &[String], found: &[String]) -> String {
    // The length of the longest common part of the rests from each pair of places.
    let mut common = vec![vec![0; found.len() + 1]; expected.len() + 1];
    for i in (0..expected.len()).rev() {
        for j in (0..found.len()).rev() {
            common[i][j] = if expected[i] == found[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut text) = (0, 0, String::new());
    let mut tell = |mark, line: &str| text.push_str(&format!("    {mark} {line}\n"));
    while i < expected.len() || j < found.len() {
        if i < expected.len() && j < found.len() && expected[i] == found[j] {
            tell(' ', &expected[i]);
            (i, j) = (i + 1, j + 1);
        } else if j == found.len() || i < expected.len() && common[i + 1][j] >= common[i][j + 1] {
            tell('-', &expected[i]);
            i += 1;
        } else {
            tell('+', &found[j]);
            j += 1;
        }
    }
    text
}

#[test]
fn a_difference_shows_what_is_missing_and_what_is_there_instead() {
    let lines = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(
        difference(&lines("a b c d"), &lines("a x c d e")),
        "      a\n    - b\n    + x\n      c\n      d\n    + e\n"
    );
}

#[test]
fn a_line_that_has_others_below_it_is_told_by_itself() {
    let lines = |text: &str| text.split('|').map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(collapse(lines("a|b|b|b|a")), lines("a|b (x3)|a"));
    assert_eq!(collapse(lines("a|a|a|  b|  b|a|a|  b")), lines("a (x2)|a|  b (x2)|a|a|  b"));
}
