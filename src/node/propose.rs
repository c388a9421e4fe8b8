//! Commands on their way into the log.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::calls::{Answer, AnswerReceiver, Sent};
use super::{Failure, Node, told};
use crate::machine::{Command, Entry, Origin};
use crate::raft::types::Payload;
use crate::types::Timestamp;

/// Forgets the call when its caller goes away.
struct OpenCall<'a> {
    node: &'a Node,
    id: u64,
}

impl Drop for OpenCall<'_> {
    fn drop(&mut self) {
        self.node.shared.calls.close(self.id);
    }
}

impl Node {
    /// Makes one entry of `command` and waits until it is applied here.
    pub(super) async fn call(&self, command: Command) -> Result<Answer, Failure> {
        let (id, receiver) = self.begin(command).await?;
        let _open = OpenCall { node: self, id };
        match receiver.await {
            Ok(result) => result,
            Err(_) => Err(Failure::Stopping),
        }
    }

    /// Opens a call for `command` and sends it on its way, if there is one yet.
    pub(super) async fn begin(&self, command: Command) -> Result<(u64, AnswerReceiver), Failure> {
        if *self.stopping.borrow() {
            return Err(Failure::Stopping);
        }
        let id = self.next_call.fetch_add(1, Ordering::Relaxed);
        let origin = Origin { member: self.identity.member_id, call: id };
        let role = self.shared.role.get();
        let Some(leading) = role.leading else {
            let payload = Entry { at: Timestamp(0), origin, command }.encode();
            let receiver = self.shared.calls.open(id, payload, None)?;
            self.forward_or_wait(id).await;
            return Ok((id, receiver));
        };
        let at = leading.now(self.clock.as_ref());
        let payload = Entry { at, origin, command }.encode();
        let sent = Sent { term: role.term, stream: 0 };
        let receiver = self.shared.calls.open(id, payload.clone(), Some(sent))?;
        self.append(role.term, payload).await?;
        Ok((id, receiver))
    }

    /// Hands an entry to openraft, to be appended only in `term`. Whether it was is told by the
    /// log alone.
    async fn append(&self, term: u64, payload: Bytes) -> Result<(), Failure> {
        let write = self.raft.write(Payload(payload)).with_leader(term);
        write.await.map_err(|_| Failure::Stopping)
    }

    /// Appends an encoded entry if this member leads `term`, stamped with its time.
    ///
    /// Returns whether it was handed to openraft.
    pub(super) async fn append_if_leading(
        &self,
        term: u64,
        payload: &[u8],
    ) -> Result<bool, Failure> {
        let role = self.shared.role.get();
        let Some(leading) = role.leading.filter(|_| role.term == term) else {
            return Ok(false);
        };
        let Some(payload) = Entry::stamp(payload, leading.now(self.clock.as_ref())) else {
            // Not ours to apply, whoever sent it. The checksum held, so it is a bug over there.
            tracing::error!("a forwarded proposal is no entry");
            return Ok(false);
        };
        self.append(term, payload).await?;
        Ok(true)
    }

    /// Sends an open call that is not under way: into the log if this member leads, over the
    /// stream to the leader if one stands. Otherwise it waits for [`Node::route`].
    async fn forward_or_wait(&self, id: u64) {
        let role = self.shared.role.get();
        if role.leading.is_some() {
            let sent = Sent { term: role.term, stream: 0 };
            let Some(payload) = self.shared.calls.send(id, sent) else { return };
            match self.append_if_leading(role.term, &payload).await {
                Ok(true) => {}
                // Nothing was handed over: it may be sent again at once.
                Ok(false) => self.shared.calls.unsend(id),
                Err(_) => self.shared.calls.close(id),
            }
            return;
        }
        let Some(stream) = self.forwarder.stream(role.term) else { return };
        let sent = Sent { term: role.term, stream: stream.number };
        let Some(payload) = self.shared.calls.send(id, sent) else { return };
        // When the stream breaks under it, the next stream's barrier tells what became of it.
        stream.send(payload).await;
    }

    /// Sends on what could not be sent, whenever there is a new way: runs as long as the member.
    pub(super) async fn route(self: Arc<Self>) {
        let mut role = self.shared.role.subscribe();
        let mut streams = self.forwarder.watch();
        let mut stopping = self.stopping.subscribe();
        loop {
            let now = *role.borrow_and_update();
            streams.borrow_and_update();
            self.shared.calls.revive(|sent| sent.term < now.applied_term);
            for id in self.shared.calls.unsent() {
                self.forward_or_wait(id).await;
            }
            tokio::select! {
                changed = role.changed() => if changed.is_err() { return },
                changed = streams.changed() => if changed.is_err() { return },
                () = told(&mut stopping) => return,
            }
        }
    }
}
