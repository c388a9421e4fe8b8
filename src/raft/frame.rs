//! How members wrap what they say to each other: bincode behind a CRC-32.

use bincode::config::{Configuration, Limit};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::Status;

use crate::pb::peer::Frame;

/// The largest message between members, in bytes: one append batch or one snapshot chunk, each of
/// which holds at least one entry of the largest request a client may send.
pub const MAX_FRAME_BYTES: usize = 64 << 20;

type Wire =
    Configuration<bincode::config::LittleEndian, bincode::config::Varint, Limit<MAX_FRAME_BYTES>>;

fn wire() -> Wire {
    bincode::config::standard().with_limit::<MAX_FRAME_BYTES>()
}

/// # Errors
///
/// INTERNAL when `message` is larger than [`MAX_FRAME_BYTES`].
pub fn encode<T: Serialize>(message: &T) -> Result<Frame, Status> {
    let body = bincode::serde::encode_to_vec(message, wire())
        .map_err(|error| Status::internal(format!("peer message: {error}")))?;
    let checksum = crc32fast::hash(&body);
    Ok(Frame { body: Bytes::from(body), checksum, quiet: false })
}

/// # Errors
///
/// DATA_LOSS when the checksum or the form is wrong.
pub fn decode<T: DeserializeOwned>(frame: &Frame) -> Result<T, Status> {
    if crc32fast::hash(&frame.body) != frame.checksum {
        return Err(Status::data_loss("peer message: checksum mismatch"));
    }
    let (message, used) = bincode::serde::decode_from_slice(&frame.body, wire())
        .map_err(|error| Status::data_loss(format!("peer message: {error}")))?;
    if used != frame.body.len() {
        return Err(Status::data_loss("peer message: bytes left over"));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use openraft::raft::{AppendEntriesRequest, VoteRequest};

    use super::super::types::{LogEntry, LogId, Payload, Raft, Vote};
    use super::*;
    use crate::fuzz::mutants;

    #[test]
    fn a_damaged_frame_is_refused() {
        let frame = encode(&vec![1u64, 2, 3]).expect("small");
        assert_eq!(decode::<Vec<u64>>(&frame).expect("intact"), vec![1, 2, 3]);
        for position in 0..frame.body.len() {
            let mut body = frame.body.to_vec();
            body[position] ^= 1;
            let damaged = Frame { body: body.into(), ..frame.clone() };
            assert!(decode::<Vec<u64>>(&damaged).is_err());
        }
    }

    /// The checksum keeps out what the network damages, and not what another release means.
    #[test]
    fn a_message_of_another_form_is_refused_or_understood() {
        let entry = |index| LogEntry {
            log_id: log_id(index),
            payload: openraft::EntryPayload::Normal(Payload(Bytes::from_static(b"an entry"))),
        };
        let append = AppendEntriesRequest::<Raft> {
            vote: Vote::new_committed(3, 1),
            prev_log_id: Some(log_id(4)),
            entries: vec![entry(5), entry(6)],
            leader_commit: Some(log_id(4)),
        };
        let vote = VoteRequest::<Raft>::new(Vote::new(3, 1), Some(log_id(4)));
        let valid = [encode(&append).unwrap().body, encode(&vote).unwrap().body];
        mutants(&valid.map(|body| body.to_vec()), |bytes, _| {
            let body = Bytes::copy_from_slice(bytes);
            let frame = Frame { checksum: crc32fast::hash(&body), body, quiet: false };
            let _ = decode::<AppendEntriesRequest<Raft>>(&frame);
            let _ = decode::<VoteRequest<Raft>>(&frame);
        });
    }

    fn log_id(index: u64) -> LogId {
        LogId { leader_id: openraft::alias::CommittedLeaderIdOf::<Raft>::new(2), index }
    }

    #[test]
    fn a_length_that_promises_too_much_is_refused() {
        let body = Bytes::from_static(&[0xfd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        let frame = Frame { checksum: crc32fast::hash(&body), body, quiet: false };
        assert!(decode::<Vec<u64>>(&frame).is_err());
    }
}
