//! What the black-box tests stand on: clusters of real processes, etcd's own command line, and checks.
//!
//! Nothing here knows how the server is built. The program under test is a path, it is given etcd's
//! flags, and it is asked through the network only, so the same tests run against Holdfast and
//! against etcd itself:
//!
//! ```text
//! HOLDFAST_BIN=DIR/usr/bin/etcd ETCDCTL=DIR/usr/bin/etcdctl cargo test
//! ```
//!
//! Where Holdfast differs from etcd on purpose, a test asks [`target_is_etcd`] and expects the
//! behaviour of the one it talks to; there is no third possibility and no test is left out.

pub mod addresses;
pub mod check;
pub mod compose;
pub mod crowd;
pub mod disks;
pub mod etcdctl;
pub mod history;
pub mod holders;
pub mod holding;
pub mod load;
pub mod memory;
pub mod moment;
pub mod ports;
pub mod process;
pub mod program;
pub mod raw;
pub mod text;
pub mod watchers;
pub mod watching;
pub mod wire;

pub use check::{eventually, status_of, within};
pub use etcdctl::Etcdctl;
pub use process::{Cluster, Exit};
pub use program::target_is_etcd;
