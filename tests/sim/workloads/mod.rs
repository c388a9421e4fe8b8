//! What clients do, over and over until there is enough of it.

mod compact;
mod kv;
mod lease;
mod lock;
mod witness;

pub use compact::compact;
pub use kv::{kv, put_request, read_around};
pub use lease::{brink, leases};
pub use lock::locks;
pub use witness::{history_of, witness};
