//! The calls that wait on this member until their key is first in its queue.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;
use tokio::sync::watch;

use super::locked;
use crate::machine::Effect;

/// The latest that happened to a queue key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WaitingFor {
    #[default]
    Nothing,
    /// It became the first of its queue, at this store revision.
    First { create_revision: i64, revision: i64, lease_alive: bool },
    /// It is gone.
    Left { create_revision: i64 },
}

/// What a listener sees of its key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct News {
    pub latest: WaitingFor,
    /// Grows with everything that may have happened to the key or to what is known of it.
    pub count: u64,
}

/// Waiting calls by their key. Fed while entries are applied, in their order.
#[derive(Default)]
pub struct Waiters {
    by_key: Mutex<HashMap<Bytes, (usize, watch::Sender<News>)>>,
}

/// One call's place; leaving it there costs memory, so it is given up on drop.
pub struct Waiter<'a> {
    waiters: &'a Waiters,
    key: Bytes,
    pub news: watch::Receiver<News>,
}

impl Waiters {
    /// Begins to listen for what happens to `key`. To be called before the command that may create
    /// the key is proposed, so that nothing is missed.
    pub fn listen(&self, key: Bytes) -> Waiter<'_> {
        let mut by_key = locked(&self.by_key);
        let (listeners, news) = by_key.entry(key.clone()).or_default();
        *listeners += 1;
        let news = news.subscribe();
        Waiter { waiters: self, key, news }
    }

    /// Tells the calls concerned what an entry did to the queues; `revision` is the store's after
    /// it.
    pub fn on_effects(&self, effects: &[Effect], revision: i64) {
        if effects.is_empty() {
            return;
        }
        let by_key = locked(&self.by_key);
        if by_key.is_empty() {
            return;
        }
        for effect in effects {
            let (key, latest) = match effect {
                Effect::QueueHead { key, create_revision, lease_alive } => {
                    let create_revision = *create_revision;
                    let lease_alive = *lease_alive;
                    (key, Some(WaitingFor::First { create_revision, revision, lease_alive }))
                }
                Effect::QueueLeft { key, create_revision } => {
                    (key, Some(WaitingFor::Left { create_revision: *create_revision }))
                }
                Effect::LabelChanged { key } => (key, None),
                Effect::LeaseHeld { .. } | Effect::LeaseEnded { .. } => continue,
            };
            if let Some((_, sender)) = by_key.get(key) {
                sender.send_modify(|news| {
                    news.latest = latest.unwrap_or(news.latest);
                    news.count += 1;
                });
            }
        }
    }

    /// Lets every call look at its key anew: a snapshot took the place of entries.
    pub fn on_installed(&self) {
        for (_, sender) in locked(&self.by_key).values() {
            sender.send_modify(|news| news.count += 1);
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut by_key = locked(&self.waiters.by_key);
        if let Some((listeners, _)) = by_key.get_mut(&self.key) {
            *listeners -= 1;
            if *listeners == 0 {
                by_key.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_call_concerned_hears_of_its_key_and_leaves_nothing_behind() {
        let waiters = Waiters::default();
        let first = waiters.listen(Bytes::from_static(b"m/1"));
        let second = waiters.listen(Bytes::from_static(b"m/2"));
        let head = Effect::QueueHead {
            key: Bytes::from_static(b"m/2"),
            create_revision: 7,
            lease_alive: true,
        };
        waiters.on_effects(&[head], 9);
        assert!(!first.news.has_changed().expect("sender lives"));
        assert_eq!(
            second.news.borrow().latest,
            WaitingFor::First { create_revision: 7, revision: 9, lease_alive: true }
        );
        drop((first, second));
        assert!(locked(&waiters.by_key).is_empty());
    }
}
