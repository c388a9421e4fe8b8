//! The state of a cluster as a file, and a cluster from such a file.
//!
//! - [`format`]: our file, byte by byte; [`reader`] reads it and checks all that can be checked;
//! - [`save`]: a running member's state on its way into one;
//! - [`found`]: from a file to the data directory of a member of a new cluster, for [`restore`] from
//!   ours and [`import`] from etcd's;
//! - [`bolt`] and [`etcd`]: etcd's file, read without etcd.

pub mod bolt;
pub mod etcd;
pub mod format;
pub mod found;
pub mod import;
pub mod reader;
pub mod restore;
pub mod save;

#[cfg(test)]
mod tests;
