//! The calls that wait for an entry of theirs to be applied here.
//!
//! A call is answered where its entry is applied, on the member that took it. That also tells when
//! an entry is lost for good: the log orders all entries of a term before those of later terms, so
//! once an entry of a later term is applied, a proposal of the earlier one that has not been seen
//! never will be. Such a proposal is made again; so is one that openraft refused outright, which it
//! does while it is unsure of its leadership. No other is, so no write is applied twice.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::Failure;
use crate::machine::{Outcome, Rejection, Reply};

/// Calls that may wait at once, and the bytes of their proposals. Beyond, callers are told that
/// there are too many requests.
const MAX_CALLS: usize = 100_000;
const MAX_BYTES: usize = 256 << 20;

/// What became of a proposal.
#[derive(Debug)]
pub struct Answer {
    pub revision: i64,
    pub reply: Result<Reply, Rejection>,
}

pub type AnswerSender = oneshot::Sender<Result<Answer, Failure>>;
pub type AnswerReceiver = oneshot::Receiver<Result<Answer, Failure>>;

/// Where a proposal was last sent: into the log of a leader, or over a stream to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    pub term: u64,
    /// Which of this member's streams it went over; zero when this member leads.
    pub stream: u64,
}

struct Call {
    answer: AnswerSender,
    /// The encoded entry, for another try.
    payload: Bytes,
    sent: Option<Sent>,
}

#[derive(Default)]
pub struct Calls {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    calls: HashMap<u64, Call>,
    bytes: usize,
}

impl Inner {
    fn remove(&mut self, id: u64) -> Option<Call> {
        let call = self.calls.remove(&id)?;
        self.bytes -= call.payload.len();
        Some(call)
    }
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens call `id`, already sent or not.
    ///
    /// # Errors
    ///
    /// [`Failure::TooManyRequests`] at either limit.
    pub fn open(
        &self,
        id: u64,
        payload: Bytes,
        sent: Option<Sent>,
    ) -> Result<AnswerReceiver, Failure> {
        let (answer, receiver) = oneshot::channel();
        let mut inner = self.lock();
        if inner.calls.len() >= MAX_CALLS || inner.bytes + payload.len() > MAX_BYTES {
            return Err(Failure::TooManyRequests);
        }
        inner.bytes += payload.len();
        inner.calls.insert(id, Call { answer, payload, sent });
        Ok(receiver)
    }

    /// How many calls wait.
    pub fn len(&self) -> usize {
        self.lock().calls.len()
    }

    /// Forgets a call whose caller has gone.
    pub fn close(&self, id: u64) {
        self.lock().remove(id);
    }

    /// Answers call `id`, if somebody still waits for it.
    pub fn answer(&self, id: u64, outcome: Outcome) {
        let call = self.lock().remove(id);
        if let Some(call) = call {
            let answer = Answer { revision: outcome.revision, reply: outcome.reply };
            // The caller may go away at any moment.
            let _ = call.answer.send(Ok(answer));
        }
    }

    /// Notes where call `id` is sent, and gives its payload; `None` when it is gone or under way.
    pub fn send(&self, id: u64, sent: Sent) -> Option<Bytes> {
        let mut inner = self.lock();
        let call = inner.calls.get_mut(&id)?;
        if call.sent.is_some() {
            return None;
        }
        call.sent = Some(sent);
        Some(call.payload.clone())
    }

    /// Takes back that a call was sent as `sent`, because for certain nothing was appended. A call
    /// that was sent again since is left alone.
    pub fn unsend(&self, id: u64, sent: Sent) {
        if let Some(call) = self.lock().calls.get_mut(&id)
            && call.sent == Some(sent)
        {
            call.sent = None;
        }
    }

    /// Marks for another try the calls for which `lost` says that what was sent can never be
    /// applied.
    pub fn revive(&self, lost: impl Fn(Sent) -> bool) {
        for call in self.lock().calls.values_mut() {
            if call.sent.is_some_and(&lost) {
                call.sent = None;
            }
        }
    }

    /// The calls that are to be sent, in the order they were made.
    pub fn unsent(&self) -> Vec<u64> {
        let inner = self.lock();
        let mut ids: Vec<u64> =
            inner.calls.iter().filter(|(_, call)| call.sent.is_none()).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// Whether any call was sent in `term` over a stream before `stream`.
    pub fn any_sent_before(&self, term: u64, stream: u64) -> bool {
        let before = |sent: Sent| sent.term == term && sent.stream != 0 && sent.stream < stream;
        self.lock().calls.values().any(|call| call.sent.is_some_and(before))
    }

    /// Tells every caller whose proposal was sent that its fate is unknown: entries were skipped.
    pub fn fail_sent(&self) {
        let mut inner = self.lock();
        let ids: Vec<u64> =
            inner.calls.iter().filter(|(_, call)| call.sent.is_some()).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(call) = inner.remove(id) {
                let _ = call.answer.send(Err(Failure::Unknown));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(term: u64, stream: u64) -> Option<Sent> {
        Some(Sent { term, stream })
    }

    #[test]
    fn only_what_can_never_be_applied_is_sent_again() {
        let calls = Calls::default();
        let _old = calls.open(1, Bytes::new(), sent(3, 0)).expect("open");
        let _new = calls.open(2, Bytes::new(), sent(4, 0)).expect("open");
        calls.revive(|sent| sent.term < 4);
        assert_eq!(calls.unsent(), vec![1]);
        assert!(calls.send(1, Sent { term: 4, stream: 0 }).is_some());
        assert!(calls.send(1, Sent { term: 4, stream: 0 }).is_none(), "never twice at once");
        assert_eq!(calls.unsent(), Vec::<u64>::new());
    }

    #[tokio::test]
    async fn skipped_entries_leave_sent_calls_unknown_and_others_waiting() {
        let calls = Calls::default();
        let under_way = calls.open(1, Bytes::new(), sent(3, 0)).expect("open");
        let _waiting = calls.open(2, Bytes::new(), None).expect("open");
        calls.fail_sent();
        assert!(matches!(under_way.await, Ok(Err(Failure::Unknown))));
        assert_eq!(calls.unsent(), vec![2]);
    }

    #[test]
    fn proposals_are_bounded_in_bytes() {
        let calls = Calls::default();
        let big = Bytes::from(vec![0; MAX_BYTES]);
        let _held = calls.open(1, big, None).expect("fits exactly");
        let refused = calls.open(2, Bytes::from_static(b"x"), None);
        assert!(matches!(refused, Err(Failure::TooManyRequests)));
        calls.close(1);
        assert!(calls.open(2, Bytes::from_static(b"x"), None).is_ok());
    }
}
