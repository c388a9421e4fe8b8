//! Watch streams to both clusters, and what came over them.
//!
//! What a stream says is kept by watch id, in order: creations, events, ends. Both clusters must
//! have said the same, which can be looked at only when both have said everything: after a
//! [`Streams::fence`]. Between fences only the answers that requests wait for are compared.
//!
//! A fence also comes before everything whose effect on a watch depends on how far the watch has
//! come: a cancel, a close, and a compaction, which in etcd takes away previous values that are not
//! read yet, and the history of a watch that still reads it.
//!
//! However events are spread over answers, neither cluster may take a revision apart, go back, or
//! show an event in an answer whose header is older.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use holdfast::pb::etcdserverpb as pb;
use holdfast::pb::etcdserverpb::watch_client::WatchClient;
use holdfast::pb::etcdserverpb::watch_request::RequestUnion;
use holdfast::pb::mvccpb;

use super::answer::{comparable_event, comparable_watch};
use super::operation::Now;
use super::side::{CALL_LIMIT, Conversation, Interrupted, Side};

/// How long to wait for progress before asking again: etcd leaves a request unanswered while one of
/// the stream's watches is behind.
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// How many revisions further a watch may start for a fence to wait for it.
const FAR_REVISIONS: i64 = 40;

/// The id in answers that are for no watch.
const NO_WATCH: i64 = -1;

/// What is said about one watch, or in a refusal.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    Began(pb::WatchResponse),
    Event(mvccpb::Event),
    Ended(pb::WatchResponse),
    /// What no server may do.
    Broke(String),
}

/// Where two clusters said different things, in words, and what either said.
#[derive(Debug)]
pub struct Different {
    pub what: String,
    pub etcd: String,
    pub holdfast: String,
}

#[derive(Debug)]
pub enum Trouble {
    Different(Different),
    Interrupted(Interrupted),
}

impl From<Interrupted> for Trouble {
    fn from(interrupted: Interrupted) -> Trouble {
        Trouble::Interrupted(interrupted)
    }
}

/// The streams of both clusters, some of them open.
pub struct Streams {
    streams: Vec<Option<Stream>>,
    /// How long to wait for an answer before it counts as none.
    pub patience: Duration,
}

struct Stream {
    patience: Duration,
    /// Of Holdfast.
    member: usize,
    etcd: Half,
    holdfast: Half,
    /// The ids in use, by etcd's account, and where each watch was asked to start.
    live: BTreeMap<i64, i64>,
}

/// One cluster's end of a stream.
struct Half {
    conversation: Conversation<pb::WatchRequest, pb::WatchResponse>,
    said: BTreeMap<i64, Vec<Said>>,
    /// For each watch: the revision of its last event, and whether its answer was a fragment.
    last: BTreeMap<i64, (i64, bool)>,
    /// The lease ids picked until the stream was last looked at.
    picked: Vec<i64>,
}

impl Streams {
    pub fn closed(count: usize) -> Streams {
        let streams = (0..count).map(|_| None).collect();
        Streams { streams, patience: CALL_LIMIT }
    }

    pub fn is_open(&self, stream: usize) -> bool {
        self.streams[stream].is_some()
    }

    /// Sends a request to both clusters and compares what they answer to it. A cancel is to be made
    /// after a fence.
    pub async fn ask(
        &mut self,
        (etcd, holdfast): (&mut Side, &mut Side),
        member: usize,
        stream: usize,
        request: &pb::WatchRequest,
        now: Now,
    ) -> Result<(), Trouble> {
        let patience = self.patience;
        let slot = self.streams[stream].get_or_insert_with(|| Stream {
            patience,
            member,
            etcd: Half::open(etcd, 0),
            holdfast: Half::open(holdfast, member),
            live: BTreeMap::new(),
        });
        holdfast.catch_up(slot.member).await?;
        slot.learn_leases(etcd, holdfast);
        slot.etcd.conversation.say(request.clone()).await?;
        slot.holdfast.conversation.say(request.clone()).await?;
        match &request.request_union {
            None | Some(RequestUnion::ProgressRequest(_)) => Ok(()),
            Some(RequestUnion::CreateRequest(create)) => {
                let answer = slot.both("the creation of a watch", |answer| answer.created).await?;
                if answer.canceled {
                    return Ok(());
                }
                let id = answer.watch_id;
                slot.live.insert(id, create.start_revision);
                if (1..now.compacted).contains(&create.start_revision) {
                    let ended = |answer: &pb::WatchResponse| answer.canceled;
                    slot.both("the end of a watch whose start is compacted", ended).await?;
                    slot.live.remove(&id);
                    slot.etcd.forget_compacted(id, Instant::now() + patience).await?;
                }
                Ok(())
            }
            Some(RequestUnion::CancelRequest(cancel)) => {
                // For an id that is not in use nothing comes; what comes shows at the next answer.
                if slot.live.remove(&cancel.watch_id).is_some() {
                    slot.both("the cancel of a watch", |answer| answer.canceled).await?;
                }
                Ok(())
            }
        }
    }

    /// The newest revision at which a watch is still to start, of those that
    /// [`Streams::cancel_never_starting`] leaves.
    pub fn newest_start(&self, stream: usize) -> i64 {
        let starts = self.streams[stream].iter().flat_map(|slot| slot.live.values());
        starts.max().copied().unwrap_or(0)
    }

    /// Cancels the watches that start too far in the future to be waited for: etcd tells no
    /// progress of their stream until then.
    pub async fn cancel_never_starting(
        &mut self,
        (etcd, holdfast): (&mut Side, &mut Side),
        stream: usize,
        now: Now,
    ) -> Result<(), Trouble> {
        let Some(slot) = &self.streams[stream] else { return Ok(()) };
        let too_far = now.current.saturating_add(FAR_REVISIONS);
        let never = slot.live.iter().filter(|(_, start)| **start > too_far);
        for watch_id in never.map(|(id, _)| *id).collect::<Vec<_>>() {
            let request_union =
                Some(RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id }));
            let request = pb::WatchRequest { request_union };
            self.ask((etcd, holdfast), 0, stream, &request, now).await?;
        }
        Ok(())
    }

    /// Waits until both clusters have said on an open stream all there is up to the current
    /// revision, and compares it. That revision must be newer than the last fence of the stream, so
    /// that no late answer to that one is taken for an answer to this, and not below any start of
    /// its watches.
    pub async fn fence(
        &mut self,
        (etcd, holdfast): (&Side, &Side),
        stream: usize,
        now: Now,
    ) -> Result<(), Trouble> {
        let Some(slot) = &mut self.streams[stream] else { return Ok(()) };
        slot.learn_leases(etcd, holdfast);
        if !slot.live.is_empty() {
            let deadline = Instant::now() + slot.patience;
            let (etcd, holdfast) = tokio::join!(
                slot.etcd.progress(now.current, deadline),
                slot.holdfast.progress(now.current, deadline)
            );
            slot.same("progress of a watch stream", etcd?, holdfast?)?;
        }
        slot.compare_said()
    }

    pub fn close(&mut self, stream: usize) {
        self.streams[stream] = None;
    }
}

impl Stream {
    fn learn_leases(&mut self, etcd: &Side, holdfast: &Side) {
        self.etcd.picked.clone_from(&etcd.picked);
        self.holdfast.picked.clone_from(&holdfast.picked);
    }

    /// Waits on both sides for such an answer, and gives it when it is the same.
    async fn both(
        &mut self,
        what: &str,
        is: impl Fn(&pb::WatchResponse) -> bool,
    ) -> Result<pb::WatchResponse, Trouble> {
        let deadline = Instant::now() + self.patience;
        let (etcd, holdfast) = tokio::join!(
            self.etcd.listen_until(deadline, &is),
            self.holdfast.listen_until(deadline, &is)
        );
        self.same(what, etcd?, holdfast?)
    }

    fn same(
        &self,
        what: &str,
        etcd: Option<pb::WatchResponse>,
        holdfast: Option<pb::WatchResponse>,
    ) -> Result<pb::WatchResponse, Trouble> {
        match (etcd, holdfast) {
            (None, None) => {
                let text = format!("neither cluster answered: {what}");
                Err(Interrupted(text).into())
            }
            (Some(etcd), holdfast) if holdfast.as_ref() == Some(&etcd) => Ok(etcd),
            (etcd, holdfast) => {
                let shown = |answer: Option<pb::WatchResponse>| match answer {
                    Some(answer) => format!("{answer:#?}"),
                    None => format!("no such answer in {:?}", self.patience),
                };
                let (etcd, holdfast) = (shown(etcd), shown(holdfast));
                Err(Trouble::Different(Different { what: what.to_owned(), etcd, holdfast }))
            }
        }
    }

    /// Compares everything that was said, and forgets it.
    fn compare_said(&mut self) -> Result<(), Trouble> {
        let etcd = std::mem::take(&mut self.etcd.said);
        let mut holdfast = std::mem::take(&mut self.holdfast.said);
        let ids: BTreeSet<i64> = etcd.keys().chain(holdfast.keys()).copied().collect();
        for id in ids {
            let etcd = etcd.get(&id).map_or(&[][..], Vec::as_slice);
            let holdfast = holdfast.remove(&id).unwrap_or_default();
            let is_fine =
                |(etcd, ours): &(&Said, &Said)| etcd == ours && !matches!(etcd, Said::Broke(_));
            let same = etcd.iter().zip(&holdfast).take_while(is_fine).count();
            if same < etcd.len().max(holdfast.len()) {
                let shown = |said: &[Said]| match said.get(same) {
                    Some(said) => format!("{said:#?}"),
                    None => "nothing more".to_owned(),
                };
                let (etcd, holdfast) = (shown(etcd), shown(&holdfast));
                let what = format!("watch {id} after {same} equal answers and events");
                return Err(Trouble::Different(Different { what, etcd, holdfast }));
            }
        }
        Ok(())
    }
}

impl Half {
    fn open(side: &Side, member: usize) -> Half {
        let channel = side.channel(member);
        let conversation = Conversation::open(|requests| async move {
            WatchClient::new(channel).watch(requests).await
        });
        Half {
            conversation,
            said: BTreeMap::new(),
            last: BTreeMap::new(),
            picked: side.picked.clone(),
        }
    }

    /// Takes what the stream says up to such an answer; `None` when there is none by the deadline.
    async fn listen_until(
        &mut self,
        deadline: Instant,
        is: impl Fn(&pb::WatchResponse) -> bool,
    ) -> Result<Option<pb::WatchResponse>, Interrupted> {
        loop {
            let Ok(answer) = timeout_at(deadline, self.conversation.hear()).await else {
                return Ok(None);
            };
            let answer = self.take(answer?);
            if is(&answer) {
                return Ok(Some(answer));
            }
        }
    }

    /// Has etcd let go of a watch that it has ended because of a compaction, which Holdfast did then:
    /// see [`super::answer`].
    async fn forget_compacted(
        &mut self,
        watch_id: i64,
        deadline: Instant,
    ) -> Result<(), Interrupted> {
        let request_union = Some(RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id }));
        self.conversation.say(pb::WatchRequest { request_union }).await?;
        let cancels = |answer: &pb::WatchResponse| answer.canceled && answer.watch_id == watch_id;
        if self.listen_until(deadline, cancels).await?.is_none() {
            return Err(Interrupted(format!(
                "etcd does not cancel the compacted watch {watch_id}"
            )));
        }
        self.said.entry(watch_id).or_default().pop();
        Ok(())
    }

    /// Asks for progress until the stream tells it up to `revision`.
    async fn progress(
        &mut self,
        revision: i64,
        deadline: Instant,
    ) -> Result<Option<pb::WatchResponse>, Interrupted> {
        let request = || pb::WatchRequest {
            request_union: Some(RequestUnion::ProgressRequest(pb::WatchProgressRequest {})),
        };
        self.conversation.say(request()).await?;
        while Instant::now() < deadline {
            match timeout(ASK_AGAIN, self.conversation.hear()).await {
                Err(_) => self.conversation.say(request()).await?,
                Ok(answer) => {
                    let answer = self.take(answer?);
                    if is_progress(&answer) && shown_revision(&answer) >= revision {
                        return Ok(Some(answer));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Notes what an answer says, and gives it back in comparable form.
    fn take(&mut self, answer: pb::WatchResponse) -> pb::WatchResponse {
        let answer = comparable_watch(answer);
        let id = answer.watch_id;
        let last = self.last.remove(&id);
        let said = self.said.entry(id).or_default();
        if answer.created {
            said.push(Said::Began(answer.clone()));
        } else if answer.canceled {
            said.push(Said::Ended(answer.clone()));
        } else if !answer.events.is_empty() {
            let revisions =
                || answer.events.iter().filter_map(|e| Some(e.kv.as_ref()?.mod_revision));
            let (first, newest) = (revisions().next(), revisions().next_back());
            let broke = match (first.zip(newest), last) {
                (None, _) => Some("an event without a pair"),
                _ if !revisions().is_sorted() => Some("events go back in an answer"),
                (Some((first, _)), Some((last, fragment)))
                    if first < last || first == last && !fragment =>
                {
                    Some("an answer goes back to the revision of the one before")
                }
                (Some((_, newest)), _) if newest > shown_revision(&answer) => {
                    Some("the header is older than an event")
                }
                _ => None,
            };
            if let Some(newest) = newest {
                self.last.insert(id, (newest, answer.fragment));
            }
            said.extend(broke.map(|how| Said::Broke(format!("{how}: {answer:?}"))));
            let events = answer.events.iter().cloned();
            said.extend(events.map(|event| Said::Event(comparable_event(event, &self.picked))));
        } else if !is_progress(&answer) {
            said.push(Said::Broke(format!("an answer that says nothing: {answer:?}")));
        }
        answer
    }
}

fn is_progress(answer: &pb::WatchResponse) -> bool {
    answer.watch_id == NO_WATCH && !answer.created && !answer.canceled && answer.events.is_empty()
}

fn shown_revision(answer: &pb::WatchResponse) -> i64 {
    answer.header.as_ref().map_or(0, |header| header.revision)
}
