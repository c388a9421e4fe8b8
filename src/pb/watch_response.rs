//! The answers of the service Watch, whose events may be encoded already.
//!
//! When a thousand clients watch a key, each of its events goes out a thousand times: it is encoded
//! once, and the bytes are shared. On the wire there is no difference, and what was received has no
//! packed events.

use bytes::{Buf, BufMut, Bytes};
use prost::DecodeError;
use prost::encoding::{self, DecodeContext, WireType};
use prost::{Message, bytes};

use super::etcdserverpb::ResponseHeader;
use super::mvccpb::Event;

/// The number of the field `events`.
const EVENTS: u32 = 11;

/// `etcdserverpb.WatchResponse`, as `proto/etcd/watch.proto` has it but for `packed`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WatchResponse {
    pub header: Option<ResponseHeader>,
    pub watch_id: i64,
    pub created: bool,
    pub canceled: bool,
    pub compact_revision: i64,
    pub cancel_reason: String,
    pub fragment: bool,
    pub events: Vec<Event>,
    /// Further events, after the others: each as [`pack`] makes it.
    pub packed: Vec<Bytes>,
}

/// An event as a field of an answer: with its tag and its length.
pub fn pack(event: &Event) -> Bytes {
    let mut packed = Vec::with_capacity(encoding::message::encoded_len(EVENTS, event));
    encoding::message::encode(EVENTS, event, &mut packed);
    packed.into()
}

impl WatchResponse {
    /// The answer with all its events in `events`, for what is not protobuf.
    pub fn unpacked(mut self) -> WatchResponse {
        for packed in std::mem::take(&mut self.packed) {
            self.merge(packed).expect("a packed event is one field of an answer");
        }
        self
    }
}

impl Message for WatchResponse {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        if let Some(header) = &self.header {
            encoding::message::encode(1, header, buffer);
        }
        if self.watch_id != 0 {
            encoding::int64::encode(2, &self.watch_id, buffer);
        }
        for (tag, flag) in [(3, self.created), (4, self.canceled)] {
            if flag {
                encoding::bool::encode(tag, &flag, buffer);
            }
        }
        if self.compact_revision != 0 {
            encoding::int64::encode(5, &self.compact_revision, buffer);
        }
        if !self.cancel_reason.is_empty() {
            encoding::string::encode(6, &self.cancel_reason, buffer);
        }
        if self.fragment {
            encoding::bool::encode(7, &self.fragment, buffer);
        }
        encoding::message::encode_repeated(EVENTS, &self.events, buffer);
        for packed in &self.packed {
            buffer.put_slice(packed);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buffer: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            1 => {
                let header = self.header.get_or_insert_default();
                encoding::message::merge(wire_type, header, buffer, context)
            }
            2 => encoding::int64::merge(wire_type, &mut self.watch_id, buffer, context),
            3 => encoding::bool::merge(wire_type, &mut self.created, buffer, context),
            4 => encoding::bool::merge(wire_type, &mut self.canceled, buffer, context),
            5 => encoding::int64::merge(wire_type, &mut self.compact_revision, buffer, context),
            6 => encoding::string::merge(wire_type, &mut self.cancel_reason, buffer, context),
            7 => encoding::bool::merge(wire_type, &mut self.fragment, buffer, context),
            EVENTS => {
                encoding::message::merge_repeated(wire_type, &mut self.events, buffer, context)
            }
            _ => encoding::skip_field(wire_type, tag, buffer, context),
        }
    }

    fn encoded_len(&self) -> usize {
        let flag = |flag: bool, tag| if flag { encoding::bool::encoded_len(tag, &flag) } else { 0 };
        let number = |number: i64, tag| match number {
            0 => 0,
            number => encoding::int64::encoded_len(tag, &number),
        };
        let header = self.header.as_ref();
        header.map_or(0, |header| encoding::message::encoded_len(1, header))
            + number(self.watch_id, 2)
            + flag(self.created, 3)
            + flag(self.canceled, 4)
            + number(self.compact_revision, 5)
            + match self.cancel_reason.as_str() {
                "" => 0,
                _ => encoding::string::encoded_len(6, &self.cancel_reason),
            }
            + flag(self.fragment, 7)
            + encoding::message::encoded_len_repeated(EVENTS, &self.events)
            + self.packed.iter().map(Bytes::len).sum::<usize>()
    }

    fn clear(&mut self) {
        *self = WatchResponse::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::mvccpb::KeyValue;

    fn event(number: u8) -> Event {
        let kv = KeyValue {
            key: vec![number; 3].into(),
            value: vec![number; usize::from(number)].into(),
            mod_revision: number.into(),
            ..KeyValue::default()
        };
        Event { kv: Some(kv.clone()), prev_kv: Some(kv), r#type: i32::from(number % 2) }
    }

    fn full() -> WatchResponse {
        WatchResponse {
            header: Some(ResponseHeader { cluster_id: 1, member_id: 2, revision: 3, raft_term: 4 }),
            watch_id: -5,
            created: true,
            canceled: true,
            compact_revision: 6,
            cancel_reason: "seven".to_owned(),
            fragment: true,
            events: vec![event(1), event(200)],
            packed: Vec::new(),
        }
    }

    #[test]
    fn an_answer_survives_its_bytes() {
        for answer in [full(), WatchResponse::default()] {
            let bytes = answer.encode_to_vec();
            assert_eq!(bytes.len(), answer.encoded_len());
            assert_eq!(WatchResponse::decode(&*bytes), Ok(answer));
        }
    }

    #[test]
    fn packed_events_are_the_same_on_the_wire_as_others() {
        let plain = full();
        let packed = WatchResponse {
            events: vec![event(1)],
            packed: vec![pack(&event(200))],
            ..plain.clone()
        };
        assert_eq!(packed.encoded_len(), plain.encoded_len());
        assert_eq!(packed.encode_to_vec(), plain.encode_to_vec());
        assert_eq!(packed.unpacked(), plain);
    }

    #[test]
    fn fields_of_a_later_version_are_skipped() {
        let mut bytes = full().encode_to_vec();
        encoding::string::encode(99, &"later".to_owned(), &mut bytes);
        assert_eq!(WatchResponse::decode(&*bytes), Ok(full()));
    }
}
