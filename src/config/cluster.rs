//! The members a cluster begins with, and the ids derived from them.
//!
//! Every member computes all ids from the same flags, so they need not be exchanged. They are
//! stored with the data and never change afterwards: the derivation is part of the stored format.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::args::flag;
use super::urls::{advertised_url, split, without_user};
use super::{ConfigError, InitialClusterState};
use crate::types::{ClusterId, MemberId};

/// The id of the member that first announces `peer_urls`, in any order, in the cluster named
/// `token`. Never zero.
pub fn member_id(peer_urls: &[String], token: &str) -> MemberId {
    let mut sorted: Vec<&str> = peer_urls.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    MemberId(id_of(format!("{}\n{token}", sorted.join(",")).as_bytes()))
}

/// The id of the cluster that begins with `members`, in any order. Never zero. The cluster's token
/// is in it through theirs.
pub fn cluster_id(members: &[MemberId]) -> ClusterId {
    let mut sorted = members.to_vec();
    sorted.sort_unstable();
    let bytes: Vec<u8> = sorted.iter().flat_map(|MemberId(id)| id.to_be_bytes()).collect();
    ClusterId(id_of(&bytes))
}

fn id_of(bytes: &[u8]) -> u64 {
    let digest = Sha256::digest(bytes);
    let (first, _) = digest.split_first_chunk().expect("SHA-256 gives 32 bytes");
    // Zero means "no id" on the wire.
    u64::from_be_bytes(*first).max(1)
}

/// Parses `a=http://10.0.0.1:2380,b=...` into names and their normalised peer URLs, sorted by
/// name. A name may be repeated to give it several URLs. Members that an existing cluster waits for
/// have no names yet.
pub(super) fn initial_cluster(
    text: &str,
    state: InitialClusterState,
) -> Result<Vec<(String, Vec<String>)>, ConfigError> {
    let nameless = state == InitialClusterState::Existing;
    let mut members: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut owners: BTreeMap<String, String> = BTreeMap::new();
    for item in split(text) {
        let (name, url) = match item.split_once('=') {
            Some((name, url)) if nameless || !name.trim().is_empty() => (name.trim(), url.trim()),
            _ => return Err(ConfigError::NotAMember(without_user(item))),
        };
        let url = advertised_url(flag::INITIAL_CLUSTER, url)?;
        if let Some(owner) = owners.insert(url.clone(), name.to_owned()) {
            return Err(if owner == name {
                ConfigError::RepeatedUrl { flag: flag::INITIAL_CLUSTER, url }
            } else {
                ConfigError::SharedPeerUrl { url, first: owner, second: name.to_owned() }
            });
        }
        members.entry(name.to_owned()).or_default().push(url);
    }
    if members.is_empty() {
        return Err(ConfigError::NotAMember(text.to_owned()));
    }
    Ok(members.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(urls: &[&str]) -> Vec<String> {
        urls.iter().map(|url| (*url).to_owned()).collect()
    }

    #[test]
    fn ids_stay_what_they_were_in_every_release() {
        let a = member_id(&urls(&["http://localhost:2380"]), "etcd-cluster");
        let b = member_id(&urls(&["http://b:1", "http://b:2"]), "etcd-cluster");
        assert_eq!(a, MemberId(0x0db8_05e5_fd74_debc));
        assert_eq!(b, MemberId(0xb66d_747b_05fa_5ab5));
        assert_eq!(cluster_id(&[a]), ClusterId(0x3363_732f_f525_1d5d));
        assert_eq!(cluster_id(&[a, b]), ClusterId(0xe358_e83b_b772_7e27));
    }

    #[test]
    fn ids_ignore_order_and_depend_on_urls_and_token() {
        let id = member_id(&urls(&["http://a:1", "http://b:1"]), "t");
        assert_eq!(member_id(&urls(&["http://b:1", "http://a:1"]), "t"), id);
        assert_ne!(member_id(&urls(&["http://a:1"]), "t"), id);
        assert_ne!(member_id(&urls(&["http://a:1", "http://b:1"]), "u"), id);
        let (one, two) = (MemberId(1), MemberId(2));
        assert_eq!(cluster_id(&[one, two]), cluster_id(&[two, one]));
        assert_ne!(cluster_id(&[one]), cluster_id(&[two]));
    }

    #[test]
    fn a_repeated_name_has_several_urls_and_members_sort_by_name() {
        let text = "b=http://b:1, a=http://A:1/,\n b=http://b:2";
        let members = initial_cluster(text, InitialClusterState::New).unwrap();
        assert_eq!(
            members,
            [
                ("a".to_owned(), urls(&["http://a:1"])),
                ("b".to_owned(), urls(&["http://b:1", "http://b:2"]))
            ]
        );
    }

    #[test]
    fn a_malformed_cluster_is_refused() {
        let refusal =
            |text| initial_cluster(text, InitialClusterState::New).unwrap_err().to_string();
        assert_eq!(
            refusal("a=http://a:1,http://b:1"),
            r#"--initial-cluster: "http://b:1" is not NAME=URL; write it like a=http://10.0.0.1:2380"#
        );
        assert!(refusal("=http://a:1").contains("is not NAME=URL"));
        assert!(refusal("").contains("is not NAME=URL"));
        assert_eq!(
            refusal("a=http://x:1,b=http://x:1"),
            "--initial-cluster gives http://x:1 to both a and b; correct one of them"
        );
        assert_eq!(
            refusal("a=http://x:1,a=http://x:1/"),
            "--initial-cluster lists http://x:1 twice; remove one of them"
        );
        assert_eq!(
            refusal("a=https://x:1"),
            r#"--initial-cluster: "https://x:1" asks for TLS, which is not supported yet; use http"#
        );
    }
}
