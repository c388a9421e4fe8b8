//! The network between the members: a namespace for each, one bridge, and what is cut of it.
//!
//! Clients run in the runner and reach every member over the bridge, whatever is cut between the
//! members: rules are on what the bridge forwards from one port to another.

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::late::{self, Relay};
use crate::shell::{run, run_with_input};

/// How long a new namespace may take to be there.
const NAMESPACE: Duration = Duration::from_secs(5);

/// Packets sent back and forth to take the time of one, and how long one may take.
const ECHOES: u32 = 5;
const ECHO: Duration = Duration::from_secs(2);

/// A directed link between two members.
pub type Way = (usize, usize);

#[derive(Debug)]
pub struct Net {
    /// Each holds the namespace of a member, which thereby outlives the member's process.
    holders: Vec<Child>,
    /// There while packets come late.
    relay: Mutex<Option<Relay>>,
}

impl Net {
    /// Makes the bridge and a namespace with one link to it for each member.
    pub fn new(members: usize) -> Result<Net, String> {
        let mut net = Net { holders: Vec::new(), relay: Mutex::default() };
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

    /// From now on what takes these ways comes late, some of it twice and some out of order.
    pub fn delay(&self, ways: &[Way], seed: u64) -> Result<(), String> {
        let relay = Relay::start("bridge", seed)?;
        *self.relay.lock().expect("nothing panics with it") = Some(relay);
        let mut rules = "add table netdev faults\n".to_owned();
        for (from, to) in ways {
            let (chain, to) = (port(*from), address(*to));
            // Added again, a chain that is there stays as it is.
            rules += &format!(
                "add chain netdev faults {chain} {{ type filter hook ingress device \"{chain}\" priority 0; }}\n\
                 add rule netdev faults {chain} ip daddr {to} fwd to \"{}\"\n",
                late::DEVICE
            );
        }
        run_with_input("nft", &["-f", "-"], &rules).map(|_| ())
    }

    /// What has become of the packets since they come late.
    pub fn late(&self) -> late::Counts {
        let relay = self.relay.lock().expect("nothing panics with it");
        relay.as_ref().map(Relay::counts).unwrap_or_default()
    }

    /// The shortest of some round trips from a member's namespace to another's.
    pub fn round_trip(&self, from: usize, to: usize) -> Result<Duration, String> {
        let (near, far) = (self.socket(from)?, self.socket(to)?);
        let io = |e: std::io::Error| format!("from {from} to {to} and back: {e}");
        let mut shortest = None;
        for echo in 0..ECHOES {
            let sent = Instant::now();
            near.send_to(&echo.to_be_bytes(), far.local_addr().map_err(io)?).map_err(io)?;
            receive(&far, echo).map_err(io)?;
            far.send_to(&echo.to_be_bytes(), near.local_addr().map_err(io)?).map_err(io)?;
            receive(&near, echo).map_err(io)?;
            shortest = Some(shortest.unwrap_or(Duration::MAX).min(sent.elapsed()));
        }
        shortest.ok_or_else(|| "nothing was sent".to_owned())
    }

    /// A socket in the namespace of a member, where it stays whoever uses it.
    fn socket(&self, member: usize) -> Result<UdpSocket, String> {
        let namespace = self.namespace(member);
        let opened = std::thread::spawn(move || {
            let file = File::open(namespace)?;
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
            let socket = UdpSocket::bind((address(member), 0))?;
            socket.set_read_timeout(Some(ECHO))?;
            Ok(socket)
        });
        let opened: std::io::Result<UdpSocket> = opened.join().expect("it does not panic");
        opened.map_err(|e| format!("no socket in the namespace of {member}: {e}"))
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

    /// Makes it whole, and what comes late comes at once.
    pub fn heal(&self) -> Result<(), String> {
        if let Some(relay) = self.relay.lock().expect("nothing panics with it").take() {
            run("nft", &["delete", "table", "netdev", "faults"])?;
            drop(relay);
        }
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

/// Waits for the packet with this number; others are earlier ones that came twice.
fn receive(socket: &UdpSocket, number: u32) -> std::io::Result<()> {
    let mut buffer = [0; 4];
    while socket.recv(&mut buffer)? != buffer.len() || u32::from_be_bytes(buffer) != number {}
    Ok(())
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
