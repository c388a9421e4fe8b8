//! The first state of a new cluster, as each of its members gets it.
//!
//! All members are made from one file, each on its own machine, without asking each other. So
//! everything in which they must agree follows from the file and from flags that are the same for
//! all: members' ids as on any first start, and a cluster id that is in no other use.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::format::HASH_BYTES;
use crate::machine::{Afresh, Machine};
use crate::node::Identity;
use crate::node::founding::{Founding, FoundingError};
use crate::raft::types::PeerNode;
use crate::types::{ClusterId, MemberId};
use crate::vfs::OsVfs;

/// Revisions skipped unless the operator says otherwise: more than were written since the file was
/// saved, at 1,500 a second for a week. etcd's documentation advises the same.
pub const BUMP_REVISION: i64 = 1_000_000_000;

/// The member whose data directory is made, as its flags describe it.
#[derive(Debug, Clone)]
pub struct NewMember {
    pub data_dir: PathBuf,
    /// With the id that the cluster had if it began empty.
    pub identity: Identity,
    /// All members of the new cluster, itself among them.
    pub members: BTreeMap<u64, PeerNode>,
}

/// What a member will start with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// The first revision of the new cluster.
    pub revision: i64,
    /// -1: all history can be read.
    pub compacted: i64,
    pub keys: usize,
    pub leases: usize,
}

impl Standing {
    pub fn of(machine: &Machine) -> Standing {
        Standing {
            revision: machine.store().revision(),
            compacted: machine.store().compacted(),
            keys: machine.live_keys(),
            leases: machine.leases().len(),
        }
    }
}

/// What was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Founded {
    pub cluster_id: ClusterId,
    pub member_id: MemberId,
    pub standing: Standing,
}

/// Hands the directory over. `standing`: of the state in it, which was found to be one. `content`:
/// the hash of the file. `index`: the log goes on behind it.
pub fn finish(
    founding: Founding,
    member: &NewMember,
    standing: Standing,
    content: &[u8; HASH_BYTES],
    afresh: Afresh,
    index: u64,
) -> Result<Founded, FoundingError> {
    let described = member.identity.cluster_id;
    let cluster_id = cluster_id(described, content, afresh);
    let identity = Identity { cluster_id, ..member.identity.clone() };
    founding.finish(&identity, described, &member.members, index, Arc::new(OsVfs))?;
    Ok(Founded { cluster_id, member_id: identity.member_id, standing })
}

/// The id of the cluster that begins with a file. Members that were made from another file, in
/// another way, or not from any, have another one and are not talked to. Never zero.
fn cluster_id(described: ClusterId, content: &[u8; HASH_BYTES], afresh: Afresh) -> ClusterId {
    let mut hash = Sha256::new();
    hash.update(b"holdfast: a cluster that begins with a state\n");
    hash.update(described.0.to_be_bytes());
    hash.update(content);
    hash.update(afresh.bump_revision.to_be_bytes());
    hash.update([u8::from(afresh.mark_compacted)]);
    let hash = hash.finalize();
    let (first, _) = hash.split_first_chunk().expect("SHA-256 gives 32 bytes");
    ClusterId(u64::from_be_bytes(*first).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_file_restored_alike_gives_the_same_cluster() {
        let afresh = Afresh { bump_revision: 1, mark_compacted: true };
        let id = cluster_id(ClusterId(1), &[0; 32], afresh);
        assert_eq!(id, ClusterId(0x00f2_e616_f403_f036), "members of two releases agree, too");
        assert_ne!(id, ClusterId(1));
        assert_ne!(id, cluster_id(ClusterId(2), &[0; 32], afresh));
        assert_ne!(id, cluster_id(ClusterId(1), &[1; 32], afresh));
        let other = Afresh { bump_revision: 2, ..afresh };
        assert_ne!(id, cluster_id(ClusterId(1), &[0; 32], other));
        let other = Afresh { mark_compacted: false, ..afresh };
        assert_ne!(id, cluster_id(ClusterId(1), &[0; 32], other));
    }
}
