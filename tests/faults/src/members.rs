//! The members: processes of the program under test, each in its own network namespace.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use holdfast_client_tests::addresses::Addresses;
use holdfast_client_tests::program::command;
use rustix::process::{Pid, Signal, kill_process};

use crate::net::{Net, address};

const CLIENTS: u16 = 2379;
const PEERS: u16 = 2380;
/// Of a member, in its mount.
const DATA_DIR: &str = "member-data";

/// They end with the runner, or when this is dropped.
#[derive(Debug)]
pub struct Members {
    addresses: Addresses,
    members: Vec<Member>,
    program: PathBuf,
    processes: Processes,
}

/// The number of each member's process, 0 without one, for who looks on while the members come and go.
#[derive(Debug, Clone)]
pub struct Processes(Arc<Vec<AtomicU32>>);

impl Processes {
    pub fn pid(&self, member: usize) -> Option<u32> {
        Some(self.0[member].load(Ordering::SeqCst)).filter(|pid| *pid != 0)
    }

    fn set(&self, member: usize, pid: u32) {
        self.0[member].store(pid, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct Member {
    namespace: String,
    data: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    child: Option<Child>,
}

impl Members {
    /// Settles flags and directories below `dir`, and starts nothing.
    pub fn prepare(dir: &Path, program: &Path, net: &Net, size: usize, flags: &[&str]) -> Members {
        let url = |member, port: u16| format!("http://{}:{port}", address(member));
        let cluster: Vec<String> =
            (0..size).map(|m| format!("{}={}", name(m), url(m, PEERS))).collect();
        let members = (0..size).map(|m| {
            let data = dir.join("data").join(name(m));
            let mut arguments = Vec::new();
            for (flag, value) in [
                ("name", name(m)),
                ("data-dir", data.join(DATA_DIR).to_string_lossy().into_owned()),
                ("listen-client-urls", url(m, CLIENTS)),
                ("advertise-client-urls", url(m, CLIENTS)),
                ("listen-peer-urls", url(m, PEERS)),
                ("initial-advertise-peer-urls", url(m, PEERS)),
                ("initial-cluster", cluster.join(",")),
                ("initial-cluster-token", "faults".to_owned()),
                ("initial-cluster-state", "new".to_owned()),
            ] {
                arguments.extend([format!("--{flag}"), value]);
            }
            arguments.extend(flags.iter().map(|f| (*f).to_owned()));
            Member {
                namespace: net.namespace(m),
                data,
                log: dir.join(format!("{}.log", name(m))),
                arguments,
                environment: Vec::new(),
                child: None,
            }
        });
        Members {
            addresses: Addresses::new((0..size).map(|m| url(m, CLIENTS)).collect()),
            members: members.collect(),
            program: program.to_owned(),
            processes: Processes(Arc::new((0..size).map(|_| AtomicU32::new(0)).collect())),
        }
    }

    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// From its next start on, a member has this variable in its environment.
    pub fn set(&mut self, member: usize, variable: &str, value: &str) {
        self.members[member].environment.push((variable.to_owned(), value.to_owned()));
    }

    /// From its next start on, a member has another value of this flag.
    pub fn set_flag(&mut self, member: usize, flag: &str, value: &str) {
        let arguments = &mut self.members[member].arguments;
        let at = arguments.iter().position(|a| a.strip_prefix("--") == Some(flag));
        arguments[1 + at.expect("every member is started with it")] = value.to_owned();
    }

    /// Where the others reach a member.
    pub fn peer_url(&self, member: usize) -> String {
        format!("http://{}:{PEERS}", address(member))
    }

    /// The directory, or the mount, with the data of a member.
    pub fn data(&self, member: usize) -> &Path {
        &self.members[member].data
    }

    /// What the member itself keeps there.
    pub fn data_dir(&self, member: usize) -> PathBuf {
        self.data(member).join(DATA_DIR)
    }

    pub fn processes(&self) -> &Processes {
        &self.processes
    }

    /// The program under test.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// What a member has printed.
    pub fn printed(&self, member: usize) -> String {
        let bytes = std::fs::read(&self.members[member].log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Starts a member's process. To be called from the runner's main thread: the process ends with
    /// the thread that starts it.
    pub fn start(&mut self, member: usize) -> Result<(), String> {
        let m = &mut self.members[member];
        assert!(m.child.is_none(), "{} runs already", name(member));
        let io = |e: std::io::Error| format!("{}: {e}", m.data.display());
        std::fs::create_dir_all(&m.data).map_err(io)?;
        let log = File::options().create(true).append(true).open(&m.log).map_err(io)?;
        // Each of these becomes the next, so the child's number is the member's.
        let child = command(Path::new("setpriv"))
            .args(["--pdeathsig", "KILL", "nsenter"])
            .arg(format!("--net={}", m.namespace))
            .arg("env")
            .args(m.environment.iter().map(|(variable, value)| format!("{variable}={value}")))
            .arg(&self.program)
            .args(&m.arguments)
            .current_dir(&m.data)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(io)?)
            .stderr(log)
            .spawn()
            .map_err(|e| format!("cannot start {}: {e}", name(member)))?;
        self.processes.set(member, child.id());
        m.child = Some(child);
        Ok(())
    }

    /// How a member's process ended, if it did; `None` while it runs.
    pub fn ended(&mut self, member: usize) -> Option<String> {
        match self.members[member].child.as_mut() {
            None => Some("stopped".to_owned()),
            Some(child) => {
                let status = child.try_wait().expect("a child can be waited for")?;
                self.members[member].child = None;
                self.processes.set(member, 0);
                Some(status.to_string())
            }
        }
    }

    /// Kills a member, if it runs, and waits until it is gone.
    pub fn kill(&mut self, member: usize) {
        if let Some(mut child) = self.members[member].child.take() {
            self.processes.set(member, 0);
            child.kill().expect("a child can be killed");
            child.wait().expect("a child can be waited for");
        }
    }

    pub fn pid(&self, member: usize) -> Option<u32> {
        self.members[member].child.as_ref().map(Child::id)
    }

    /// Sends a signal to a member that runs.
    pub fn signal(&self, member: usize, signal: Signal) -> Result<(), String> {
        let child = self.members[member].child.as_ref().ok_or("it does not run")?;
        kill_process(Pid::from_child(child), signal).map_err(|e| e.to_string())
    }

    /// The state of a member's process as the kernel names it: `T` is stopped.
    pub fn state(&self, member: usize) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid(member)?)).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    /// The member that leads, as far as these agree on one within `limit`.
    pub async fn leader(&self, among: &[usize], limit: Duration) -> Option<usize> {
        let leader = self.addresses.leader_among(among);
        tokio::time::timeout(limit, leader).await.ok()
    }

    /// Waits until each of these has answered a linearizable read, at most for `limit`; those that
    /// did not.
    pub async fn not_serving(&self, among: &[usize], limit: Duration) -> Vec<usize> {
        let deadline = tokio::time::Instant::now() + limit;
        let mut left = Vec::new();
        for member in among {
            loop {
                if self.addresses.serves(*member).await {
                    break;
                }
                if tokio::time::Instant::now() > deadline {
                    left.push(*member);
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        left
    }
}

impl Deref for Members {
    type Target = Addresses;

    fn deref(&self) -> &Addresses {
        &self.addresses
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        for member in 0..self.members.len() {
            self.kill(member);
        }
    }
}

/// What a member is called.
pub fn name(member: usize) -> String {
    format!("m{member}")
}
