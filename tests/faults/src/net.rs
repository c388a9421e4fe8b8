//! The network between the members: a namespace for each, one bridge, and what is cut of it.
//!
//! Clients run in the runner and reach every member over the bridge, whatever is cut between the
//! members: rules are on what the bridge forwards from one port to another.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::shell::{run, run_with_input};

/// How long a new namespace may take to be there.
const NAMESPACE: Duration = Duration::from_secs(5);

/// A directed link between two members.
pub type Way = (usize, usize);

#[derive(Debug)]
pub struct Net {
    /// Each holds the namespace of a member, which thereby outlives the member's process.
    holders: Vec<Child>,
}

impl Net {
    /// Makes the bridge and a namespace with one link to it for each member.
    pub fn new(members: usize) -> Result<Net, String> {
        let mut net = Net { holders: Vec::new() };
        run("ip", &["link", "add", "bridge", "type", "bridge"])?;
        run("ip", &["addr", "add", "10.77.0.1/24", "dev", "bridge"])?;
        run("ip", &["link", "set", "bridge", "up"])?;
        for member in 0..members {
            net.attach(member)?;
        }
        run_with_input(
            "nft",
            &["-f", "-"],
            "table bridge faults {\nchain cut {\ntype filter hook forward priority 0;\n}\n}\n",
        )?;
        Ok(net)
    }

    fn attach(&mut self, member: usize) -> Result<(), String> {
        let holder = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()
            .map_err(|e| format!("no namespace: {e}"))?;
        let pid = holder.id();
        self.holders.push(holder);
        let own = std::fs::read_link("/proc/self/ns/net").map_err(|e| e.to_string())?;
        let deadline = Instant::now() + NAMESPACE;
        // It is there as soon as the holder has left ours.
        while std::fs::read_link(self.namespace(member)).map_or(true, |theirs| theirs == own) {
            if Instant::now() > deadline {
                return Err(format!("no namespace of its own for member {member}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let (port, pid) = (port(member), pid.to_string());
        run("ip", &["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &pid])?;
        run("ip", &["link", "set", &port, "master", "bridge", "up"])?;
        let inside = format!("--net={}", self.namespace(member));
        let cidr = format!("{}/24", address(member));
        for arguments in [
            &["link", "set", "lo", "up"][..],
            &["link", "set", "eth0", "up"],
            &["addr", "add", &cidr, "dev", "eth0"],
        ] {
            run("nsenter", &[&[inside.as_str(), "ip"], arguments].concat())?;
        }
        Ok(())
    }

    /// The file that stands for a member's namespace.
    pub fn namespace(&self, member: usize) -> String {
        format!("/proc/{}/ns/net", self.holders[member].id())
    }

    /// From now on nothing passes these ways.
    pub fn cut(&self, ways: &[Way]) -> Result<(), String> {
        let rule = |(from, to): &Way| {
            let (from, to) = (port(*from), port(*to));
            format!("add rule bridge faults cut iifname \"{from}\" oifname \"{to}\" counter drop\n")
        };
        run_with_input("nft", &["-f", "-"], &ways.iter().map(rule).collect::<String>()).map(|_| ())
    }

    /// From now on this part of what members send each other is lost, at random.
    pub fn lose(&self, percent: u32) -> Result<(), String> {
        let rule =
            format!("add rule bridge faults cut numgen random mod 100 < {percent} counter drop\n");
        run_with_input("nft", &["-f", "-"], &rule).map(|_| ())
    }

    /// How many packets have been dropped since the network was whole.
    pub fn dropped(&self) -> Result<u64, String> {
        let listed = run("nft", &["-j", "list", "table", "bridge", "faults"])?;
        let listed: serde_json::Value =
            serde_json::from_str(&listed).map_err(|e| format!("nft: {e}"))?;
        let objects = listed["nftables"].as_array().ok_or("nft lists nothing")?;
        let expressions = objects.iter().filter_map(|o| o["rule"]["expr"].as_array()).flatten();
        Ok(expressions.filter_map(|e| e["counter"]["packets"].as_u64()).sum())
    }

    /// Makes it whole.
    pub fn heal(&self) -> Result<(), String> {
        run("nft", &["flush", "chain", "bridge", "faults", "cut"]).map(|_| ())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for holder in &mut self.holders {
            // They would end with the runner as well.
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}

/// A member's address, in the namespaces of this run only.
pub fn address(member: usize) -> String {
    format!("10.77.0.{}", 11 + member)
}

fn port(member: usize) -> String {
    format!("member{member}")
}

/// Both ways between each of these and each of those.
pub fn between(these: &[usize], those: &[usize]) -> Vec<Way> {
    let pairs = these.iter().flat_map(|a| those.iter().map(|b| (*a, *b)));
    pairs.flat_map(|(a, b)| [(a, b), (b, a)]).collect()
}

/// What to cut so that each member still talks with its neighbours in a ring: of three members one
/// link goes, beside `keep`, which still talks with both.
pub fn ring(members: usize, keep: usize) -> Vec<Way> {
    let place = |m: usize| (m + members - keep) % members;
    let mut ways = Vec::new();
    for a in 0..members {
        for b in 0..a {
            let (near, far) = (place(a).min(place(b)), place(a).max(place(b)));
            let neighbours = far - near == 1 || (near == 0 && far == members - 1);
            // With three all are neighbours: then the two that are not kept part.
            if !neighbours || (members == 3 && near != 0) {
                ways.extend([(a, b), (b, a)]);
            }
        }
    }
    ways
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_of_five_cuts_what_are_no_neighbours() {
        let mut links: Vec<Way> = ring(5, 0).into_iter().filter(|(a, b)| a < b).collect();
        links.sort_unstable();
        assert_eq!(links, [(0, 2), (0, 3), (1, 3), (1, 4), (2, 4)]);
    }

    #[test]
    fn of_three_the_kept_one_talks_with_both() {
        let links: Vec<Way> = ring(3, 1).into_iter().filter(|(a, b)| a < b).collect();
        assert_eq!(links, [(0, 2)]);
    }
}
