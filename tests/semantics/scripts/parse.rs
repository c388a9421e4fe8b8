//! Steps of a script as requests.

use std::time::Duration;

use bytes::Bytes;
use holdfast::pb::etcdserverpb::alarm_request::AlarmAction;
use holdfast::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use holdfast::pb::etcdserverpb::range_request::{SortOrder, SortTarget};
use holdfast::pb::etcdserverpb::request_op::Request;
use holdfast::pb::etcdserverpb::watch_create_request::FilterType;
use holdfast::pb::etcdserverpb::{
    AlarmRequest, AlarmType, CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest,
};

use super::words::{Names, parse_bytes, parse_range, split, split_once};

/// What a script does next.
#[derive(Debug, PartialEq)]
pub enum Step {
    Put(PutRequest),
    Get(RangeRequest),
    Delete(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    Grant {
        request: LeaseGrantRequest,
        name: Option<String>,
    },
    Revoke(i64),
    /// Asks for all of them on one stream and then closes it.
    KeepAlive(Vec<i64>),
    TimeToLive {
        id: i64,
        keys: bool,
    },
    Leases,
    /// Waits until the lease has ended because its time ran out.
    Expire(i64),
    /// Lets time go by.
    Pass(Duration),
    Watch {
        stream: String,
        request: WatchCreateRequest,
    },
    Cancel {
        stream: String,
        id: i64,
        answered: bool,
    },
    Progress {
        stream: String,
        answered: bool,
    },
    /// A watch request with nothing set.
    Empty {
        stream: String,
    },
    /// Ends the requests of a watch stream.
    Close {
        stream: String,
    },
    /// Reads this many events, or the end of the watch.
    Receive {
        stream: String,
        id: i64,
        events: usize,
    },
    HashKv(i64),
    Alarm(AlarmRequest),
    Status,
    Members {
        linearizable: bool,
    },
    AuthStatus,
    Authenticate {
        name: String,
        password: String,
    },
    /// A unary call of these bytes.
    Call {
        path: String,
        message: Bytes,
    },
    Health {
        service: String,
    },
}

/// A step, and how it is sent.
#[derive(Debug, PartialEq)]
pub struct Sent {
    pub step: Step,
    pub metadata: Vec<(String, String)>,
    pub gzip: bool,
}

/// Reads one step: its line, and the lines below it that are indented.
pub fn parse(lines: &[&str], names: &Names) -> Result<Sent, String> {
    let (line, body) = lines.split_first().ok_or("there is no step")?;
    let mut words = Words::new(line, names)?;
    let (mut metadata, mut gzip) = (Vec::new(), false);
    let mut verb = words.next()?;
    while verb == "with" {
        let word = words.next()?;
        match split_once(word, "=")? {
            Some((name, value)) => metadata.push((name.to_owned(), value.to_owned())),
            None if word == "gzip" => gzip = true,
            None => return Err(format!("with {word}")),
        }
        verb = words.next()?;
    }
    let step = match verb {
        "txn" => Step::Txn(txn(body, names)?),
        verb => step(verb, &mut words)?,
    };
    words.end()?;
    if !body.is_empty() && verb != "txn" {
        return Err(format!("{verb} has no lines below it"));
    }
    Ok(Sent { step, metadata, gzip })
}

fn step(verb: &str, words: &mut Words<'_>) -> Result<Step, String> {
    Ok(match verb {
        "put" => Step::Put(put(words)?),
        "get" => Step::Get(get(words)?),
        "delete" => Step::Delete(delete(words)?),
        "compact" => {
            let revision = words.number()?;
            let mut request = CompactionRequest { revision, ..CompactionRequest::default() };
            words.options(|name, _, _| match name {
                "physical" => set(&mut request.physical),
                _ => unknown(name),
            })?;
            Step::Compact(request)
        }
        "grant" => {
            let mut request = LeaseGrantRequest { id: words.number()?, ..Default::default() };
            let mut lease_name = None;
            words.options(|name, value, names| match name {
                "ttl" => assign(&mut request.ttl, names.parse_number(value)),
                "as" => assign(&mut lease_name, Ok(Some(value.to_owned()))),
                _ => unknown(name),
            })?;
            Step::Grant { request, name: lease_name }
        }
        "revoke" => Step::Revoke(words.lease()?),
        "keepalive" => {
            let mut ids = vec![words.lease()?];
            while !words.is_empty() {
                ids.push(words.lease()?);
            }
            Step::KeepAlive(ids)
        }
        "ttl" => {
            let (id, mut keys) = (words.lease()?, false);
            words.options(|name, _, _| match name {
                "keys" => set(&mut keys),
                _ => unknown(name),
            })?;
            Step::TimeToLive { id, keys }
        }
        "leases" => Step::Leases,
        "expire" => Step::Expire(words.lease()?),
        "pass" => {
            let text = words.next()?;
            let ms = text.strip_suffix("ms").and_then(|ms| ms.parse().ok());
            Step::Pass(Duration::from_millis(ms.ok_or("how many ms?")?))
        }
        "watch" => watch(words)?,
        "cancel" => {
            let (stream, id) = (words.owned()?, words.number()?);
            Step::Cancel { stream, id, answered: words.answered()? }
        }
        "progress" => Step::Progress { stream: words.owned()?, answered: words.answered()? },
        "empty" => Step::Empty { stream: words.owned()? },
        "close" => Step::Close { stream: words.owned()? },
        "recv" => {
            let watch = words.next()?;
            let (stream, id) = watch.split_once('.').ok_or("recv STREAM.ID EVENTS")?;
            let (stream, id) = (stream.to_owned(), words.names.parse_number(id)?);
            let events = words.number()? as usize;
            Step::Receive { stream, id, events }
        }
        "hashkv" => {
            let mut revision = 0;
            words.options(|name, value, names| match name {
                "rev" => assign(&mut revision, names.parse_number(value)),
                _ => unknown(name),
            })?;
            Step::HashKv(revision)
        }
        "alarm" => {
            let action = words.next()?;
            let action =
                enumeration(action, |name| AlarmAction::from_str_name(name).map(Into::into))?;
            let alarm = words.next()?;
            let alarm = enumeration(alarm, |name| AlarmType::from_str_name(name).map(Into::into))?;
            let mut request = AlarmRequest { action, alarm, ..AlarmRequest::default() };
            words.options(|name, value, names| match name {
                "member" => {
                    let number = names.parse_number(value).map(|number| number as u64);
                    assign(&mut request.member_id, number)
                }
                _ => unknown(name),
            })?;
            Step::Alarm(request)
        }
        "status" => Step::Status,
        "members" => {
            let mut linearizable = false;
            words.options(|name, _, _| match name {
                "linearizable" => set(&mut linearizable),
                _ => unknown(name),
            })?;
            Step::Members { linearizable }
        }
        "auth-status" => Step::AuthStatus,
        "authenticate" => Step::Authenticate { name: words.owned()?, password: words.owned()? },
        "call" => Step::Call { path: words.owned()?, message: parse_bytes(words.next()?)? },
        "health" => {
            let service = if words.is_empty() { String::new() } else { words.owned()? };
            Step::Health { service }
        }
        other => return Err(format!("{other:?} is no step")),
    })
}

fn put(words: &mut Words<'_>) -> Result<PutRequest, String> {
    let (key, value) = split_once(words.next()?, "=")?.ok_or("put KEY=VALUE")?;
    let value = if value.is_empty() { Bytes::new() } else { parse_bytes(value)? };
    let mut put = PutRequest { key: parse_bytes(key)?, value, ..PutRequest::default() };
    words.options(|name, value, names| match name {
        "lease" => assign(&mut put.lease, names.parse_lease(value)),
        "prev" => set(&mut put.prev_kv),
        "ignore_value" => set(&mut put.ignore_value),
        "ignore_lease" => set(&mut put.ignore_lease),
        _ => unknown(name),
    })?;
    Ok(put)
}

fn get(words: &mut Words<'_>) -> Result<RangeRequest, String> {
    let (key, range_end) = parse_range(words.next()?)?;
    let mut get = RangeRequest { key, range_end, ..RangeRequest::default() };
    words.options(|name, value, names| {
        let number = || names.parse_number(value);
        match name {
            "rev" => assign(&mut get.revision, number()),
            "limit" => assign(&mut get.limit, number()),
            "order" => assign(
                &mut get.sort_order,
                enumeration(value, |name| SortOrder::from_str_name(name).map(Into::into)),
            ),
            "by" => assign(
                &mut get.sort_target,
                enumeration(value, |name| SortTarget::from_str_name(name).map(Into::into)),
            ),
            "serializable" => set(&mut get.serializable),
            "keys_only" => set(&mut get.keys_only),
            "count_only" => set(&mut get.count_only),
            "min_mod" => assign(&mut get.min_mod_revision, number()),
            "max_mod" => assign(&mut get.max_mod_revision, number()),
            "min_create" => assign(&mut get.min_create_revision, number()),
            "max_create" => assign(&mut get.max_create_revision, number()),
            _ => unknown(name),
        }
    })?;
    Ok(get)
}

fn delete(words: &mut Words<'_>) -> Result<DeleteRangeRequest, String> {
    let (key, range_end) = parse_range(words.next()?)?;
    let mut delete = DeleteRangeRequest { key, range_end, ..DeleteRangeRequest::default() };
    words.options(|name, _, _| match name {
        "prev" => set(&mut delete.prev_kv),
        _ => unknown(name),
    })?;
    Ok(delete)
}

fn watch(words: &mut Words<'_>) -> Result<Step, String> {
    let stream = words.owned()?;
    let text = words.next()?;
    let (key, range_end) = parse_range(text)?;
    let mut request = WatchCreateRequest { key, range_end, ..WatchCreateRequest::default() };
    words.options(|name, value, names| match name {
        "start" => assign(&mut request.start_revision, names.parse_number(value)),
        "id" => assign(&mut request.watch_id, names.parse_number(value)),
        "prev" => set(&mut request.prev_kv),
        "fragment" => set(&mut request.fragment),
        "progress_notify" => set(&mut request.progress_notify),
        "filter" => {
            let filter =
                enumeration(value, |name| FilterType::from_str_name(name).map(Into::into))?;
            request.filters.push(filter);
            Ok(())
        }
        _ => unknown(name),
    })?;
    Ok(Step::Watch { stream, request })
}

/// The lines below `txn`, of which those of the nested transactions are indented further.
fn txn(lines: &[&str], names: &Names) -> Result<TxnRequest, String> {
    let mut txn = TxnRequest::default();
    let Some(first) = lines.first() else { return Ok(txn) };
    let indent = |line: &str| line.len() - line.trim_start().len();
    let own = indent(first);
    let mut rest = lines;
    while let Some((line, below)) = rest.split_first() {
        if indent(line) != own {
            return Err(format!("{line:?} is not indented as {first:?}"));
        }
        let nested = below.iter().take_while(|line| indent(line) > own).count();
        let (body, next) = below.split_at(nested);
        rest = next;
        let words = split(line)?;
        let (times, words) = match words.as_slice() {
            [list, "repeat", times, words @ ..] => {
                let times: usize = times.parse().map_err(|_| format!("{times:?} times"))?;
                (Some(times), [&[*list], words].concat())
            }
            words => (None, words.to_vec()),
        };
        for turn in 0..times.unwrap_or(1) {
            let mut line = words.join(" ");
            if times.is_some() {
                line = line.replace('#', &turn.to_string());
            }
            let mut words = Words::new(&line, names)?;
            match words.next()? {
                "if" => txn.compare.push(compare(&mut words)?),
                "then" => txn.success.push(operation(&mut words, body)?),
                "else" => txn.failure.push(operation(&mut words, body)?),
                other => return Err(format!("{other:?} in a txn")),
            }
            words.end()?;
        }
    }
    Ok(txn)
}

fn operation(words: &mut Words<'_>, body: &[&str]) -> Result<RequestOp, String> {
    let verb = words.next()?;
    if verb != "txn" && !body.is_empty() {
        return Err(format!("{verb} has no lines below it"));
    }
    let request = match verb {
        "get" => Some(Request::RequestRange(get(words)?)),
        "put" => Some(Request::RequestPut(put(words)?)),
        "delete" => Some(Request::RequestDeleteRange(delete(words)?)),
        "txn" => Some(Request::RequestTxn(txn(body, words.names)?)),
        "nothing" => None,
        other => return Err(format!("{other:?} is no operation")),
    };
    Ok(RequestOp { request })
}

/// `TARGET(RANGE) OPERATOR VALUE`, as in `version(k) > 0`. A value that belongs to another target is
/// written `TARGET:VALUE`, and one that is not set is left out.
fn compare(words: &mut Words<'_>) -> Result<Compare, String> {
    let left = words.next()?;
    let (target, range) = left
        .strip_suffix(')')
        .and_then(|left| left.split_once('('))
        .ok_or_else(|| format!("{left:?} is not TARGET(RANGE)"))?;
    let (key, range_end) = parse_range(range)?;
    let result = match words.next()? {
        "=" => CompareResult::Equal.into(),
        ">" => CompareResult::Greater.into(),
        "<" => CompareResult::Less.into(),
        "!=" => CompareResult::NotEqual.into(),
        other => {
            let number = other.strip_prefix("op:").and_then(|number| number.parse().ok());
            number.ok_or_else(|| format!("{other:?} is no operator"))?
        }
    };
    let target_union = if words.is_empty() {
        None
    } else {
        let value = words.next()?;
        let (kind, value) = split_once(value, ":")?.unwrap_or((target, value));
        let number = || words.names.parse_number(value);
        Some(match kind {
            "version" => TargetUnion::Version(number()?),
            "create" => TargetUnion::CreateRevision(number()?),
            "mod" => TargetUnion::ModRevision(number()?),
            "value" => TargetUnion::Value(parse_bytes(value)?),
            "lease" => TargetUnion::Lease(words.names.parse_lease(value)?),
            other => return Err(format!("a value for {other:?}")),
        })
    };
    let target = enumeration(target, |name| CompareTarget::from_str_name(name).map(Into::into))?;
    Ok(Compare { result, target, key, range_end, target_union })
}

/// A name of the enum in lower case, or any number.
fn enumeration(text: &str, known: impl Fn(&str) -> Option<i32>) -> Result<i32, String> {
    let named = known(&text.to_uppercase());
    named.or_else(|| text.parse().ok()).ok_or_else(|| format!("{text:?} is none of its names"))
}

fn assign<T>(place: &mut T, value: Result<T, String>) -> Result<(), String> {
    *place = value?;
    Ok(())
}

fn set(flag: &mut bool) -> Result<(), String> {
    *flag = true;
    Ok(())
}

fn unknown(option: &str) -> Result<(), String> {
    Err(format!("option {option:?} is not known here"))
}

struct Words<'a> {
    words: std::vec::IntoIter<&'a str>,
    names: &'a Names,
}

impl<'a> Words<'a> {
    fn new(line: &'a str, names: &'a Names) -> Result<Words<'a>, String> {
        Ok(Words { words: split(line)?.into_iter(), names })
    }

    fn is_empty(&self) -> bool {
        self.words.as_slice().is_empty()
    }

    fn next(&mut self) -> Result<&'a str, String> {
        self.words.next().ok_or_else(|| "a word is missing".to_owned())
    }

    fn owned(&mut self) -> Result<String, String> {
        let text = self.next()?;
        Ok(if text == "\"\"" { String::new() } else { text.to_owned() })
    }

    fn number(&mut self) -> Result<i64, String> {
        self.names.parse_number(self.next()?)
    }

    fn lease(&mut self) -> Result<i64, String> {
        self.names.parse_lease(self.next()?)
    }

    fn answered(&mut self) -> Result<bool, String> {
        let mut answered = true;
        self.options(|name, _, _| match name {
            "unanswered" => assign(&mut answered, Ok(false)),
            _ => unknown(name),
        })?;
        Ok(answered)
    }

    /// Calls `take` with name and value of each word that is left.
    fn options(
        &mut self,
        mut take: impl FnMut(&str, &str, &Names) -> Result<(), String>,
    ) -> Result<(), String> {
        for word in self.words.by_ref() {
            let (name, value) = split_once(word, "=")?.unwrap_or((word, ""));
            take(name, value, self.names)?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), String> {
        match self.words.next() {
            Some(word) => Err(format!("{word:?} is too much")),
            None => Ok(()),
        }
    }
}

#[test]
fn what_is_no_step_is_refused() {
    let names = Names::new(10);
    for wrong in [
        "",
        "putt k=a",
        "put k",
        "put k=a lease=L",
        "get k limit=x",
        "get k rev=@0",
        "get k order=up",
        "get k k2",
        "compact",
        "watch A",
        "recv A 1",
        "leases now",
        "cancel A 1 2",
    ] {
        assert!(parse(&[wrong], &names).is_err(), "{wrong}");
    }
    for wrong in ["  if k = a", "  then", "  maybe put k=a", "  if value(k) ~ a", "  then leases"] {
        assert!(parse(&["txn", wrong], &names).is_err(), "{wrong}");
    }
    assert!(parse(&["txn", "  then put a=b", "    then put b=c"], &names).is_err());
    assert!(parse(&["get k", "  then put b=c"], &names).is_err());
}

#[test]
fn revisions_count_from_the_start_of_the_script() {
    let names = Names::new(10);
    let Step::Get(request) = parse(&["get k rev=@3 min_mod=-1"], &names).unwrap().step else {
        panic!("it is a get");
    };
    assert_eq!((request.revision, request.min_mod_revision), (12, -1));
    assert_eq!([names.revision(12), names.revision(0), names.revision(-1)], ["@3", "0", "-1"]);
}
