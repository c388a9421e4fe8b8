//! Commands on their way into the log.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use super::calls::{Answer, AnswerReceiver, Sent};
use super::{Failure, Node};
use crate::machine::{Command, Entry, Origin, Principal};
use crate::mutant;
use crate::raft::types::{OnRefused, Payload, ProposalResponder};
use crate::types::Timestamp;

/// What openraft refuses is not offered again sooner: its lease comes back with the next heartbeat.
const REFUSAL_PAUSE: Duration = Duration::from_millis(20);
/// How often calls that were to be sent are looked for, beside whenever there is a new way.
const LOOK: Duration = Duration::from_millis(100);

/// A call that waits for its outcome. Forgotten when its caller goes away.
pub(super) struct OpenCall<'a> {
    node: &'a Node,
    pub id: u64,
    receiver: AnswerReceiver,
}

impl OpenCall<'_> {
    pub async fn answer(&mut self) -> Result<Answer, Failure> {
        match (&mut self.receiver).await {
            Ok(result) => result,
            Err(_) => Err(Failure::Stopping),
        }
    }
}

impl Drop for OpenCall<'_> {
    fn drop(&mut self) {
        self.node.shared.calls.close(self.id);
    }
}

impl Node {
    /// Makes one entry of `command` and waits until it is applied here.
    pub(super) async fn call(
        &self,
        by: Option<Principal>,
        command: Command,
    ) -> Result<Answer, Failure> {
        self.admit(&command).await?;
        let role = self.shared.role.get();
        let Some(leading) = role.leading else {
            let (mut call, _) = self.open(by, command, Timestamp(0), None)?;
            self.send(call.id).await;
            return call.answer().await;
        };
        let at = leading.now(self.clock.as_ref());
        let sent = Sent { term: role.term, stream: 0 };
        let (mut call, payload) = self.open(by, command, at, Some(sent))?;
        self.append(call.id, role.term, payload, &self.on_refused).await?;
        call.answer().await
    }

    /// Opens a call, and encodes its entry.
    pub(super) fn open(
        &self,
        principal: Option<Principal>,
        command: Command,
        at: Timestamp,
        sent: Option<Sent>,
    ) -> Result<(OpenCall<'_>, Bytes), Failure> {
        let id = self.next_call.fetch_add(1, Ordering::Relaxed);
        let origin = Origin { member: self.identity.member_id, call: id };
        let payload = Entry { at, origin, command, principal }.encode();
        let receiver = self.shared.calls.open(id, payload.clone(), sent)?;
        Ok((OpenCall { node: self, id, receiver }, payload))
    }

    /// Hands an entry to openraft, to be appended only in `term`. Whether it was appended is told
    /// by the log, or by a refusal.
    async fn append(
        &self,
        id: u64,
        term: u64,
        payload: Bytes,
        on_refused: &OnRefused,
    ) -> Result<(), Failure> {
        let responder = ProposalResponder::new(id, term, on_refused.clone());
        let write = self.raft.write(Payload(payload)).with_leader(term).responder(responder);
        write.await.map_err(|_| Failure::Stopping)
    }

    /// Appends an encoded entry if this member leads `term`, stamped with its time.
    ///
    /// Returns whether it was handed to openraft.
    pub(super) async fn append_if_leading(
        &self,
        id: u64,
        term: u64,
        payload: &[u8],
        on_refused: &OnRefused,
    ) -> Result<bool, Failure> {
        let role = self.shared.role.get();
        let Some(leading) = role.leading.filter(|_| role.term == term) else {
            return Ok(false);
        };
        let Some(payload) = Entry::stamp(payload, leading.now(self.clock.as_ref())) else {
            return Ok(false);
        };
        self.append(id, term, payload, on_refused).await?;
        Ok(true)
    }

    /// Sends an open call that is not under way: into the log if this member leads, over the
    /// stream to the leader if one stands. Otherwise it waits for [`Node::route`].
    async fn send(&self, id: u64) {
        let role = self.shared.role.get();
        if role.leading.is_some() {
            let sent = Sent { term: role.term, stream: 0 };
            let Some(payload) = self.shared.calls.send(id, sent) else { return };
            match self.append_if_leading(id, role.term, &payload, &self.on_refused).await {
                Ok(true) => {}
                // Nothing was handed over.
                Ok(false) => self.shared.calls.unsend(id, sent),
                Err(_) => self.shared.calls.close(id),
            }
            return;
        }
        let Some(stream) = self.forwarder.stream(role.term) else { return };
        let sent = Sent { term: role.term, stream: stream.number };
        let Some(payload) = self.shared.calls.send(id, sent) else { return };
        if !stream.send(payload).await {
            self.shared.calls.unsend(id, sent);
        }
    }

    /// Sends on what could not be sent, whenever there is a new way: runs as long as the member.
    pub(super) async fn route(self: Arc<Self>) {
        let mut role = self.shared.role.subscribe();
        let mut streams = self.forwarder.watch();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let now = *role.borrow_and_update();
            streams.borrow_and_update();
            let guess = mutant::is("forwarded-twice");
            self.shared.calls.revive(|it| it.term < now.applied_term || guess && it.stream != 0);
            for id in self.shared.calls.unsent() {
                self.send(id).await;
            }
            tokio::select! {
                changed = role.changed() => if changed.is_err() { return },
                changed = streams.changed() => if changed.is_err() { return },
                () = self.shared.refused.notified() => tokio::time::sleep(REFUSAL_PAUSE).await,
                _ = look.tick() => {}
            }
        }
    }
}
