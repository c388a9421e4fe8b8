//! Between protobuf and the machine's own types.
//!
//! A request becomes a command only after every check that needs no state, made in etcd's order, so
//! that a request with several mistakes gets the answer etcd would give. Keys and values pass
//! through by reference count, never copied: the node copies them once when it encodes the proposal.

mod alarm;
mod duplicates;
mod peer_urls;
mod reply;
mod request;

pub use alarm::{AlarmAsked, alarm, alarm_name, alarm_response};
pub use peer_urls::peer_urls;
pub use reply::{
    delete_range_response, key_value, lease_time_to_live_response, members, put_response,
    range_response, range_stream_response, txn_response,
};
pub use request::{
    check_size, delete_range, is_serializable, lease_ttl_seconds, put, range, range_stream, txn,
};
