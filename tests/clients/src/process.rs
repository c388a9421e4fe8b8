//! Clusters of real processes: started, killed, restarted, and cleaned up.
//!
//! Every member listens on ports of its own on 127.0.0.1, keeps its data in a temporary directory,
//! and writes what it prints to a file there. A test that fails gets the end of each of these files
//! printed; one that passes leaves nothing behind.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::addresses::Addresses;
use crate::check::{AFTER_ELECTION, SOON, within};
use crate::ports::Port;
use crate::program::{command, program};

/// How many members may run at once in one test process. More would make elections late on a
/// machine of two cores, which is not what these tests look for.
const MEMBERS_AT_ONCE: usize = 4;

/// How much of each member's output a failing test prints.
const LOG_LINES: usize = 30;

/// How long a cluster may live before its members are killed, so that a call without a deadline of
/// its own fails instead of hanging. See [`Cluster::may_live`].
const LIFE: Duration = Duration::from_secs(120);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

/// One to many members, each a process of its own.
///
/// Dropping it kills the members and removes their data.
#[derive(Debug)]
pub struct Cluster {
    addresses: Addresses,
    members: Vec<Member>,
    dir: TempDir,
    watchdog: Watchdog,
    _places: Places,
}

#[derive(Debug)]
struct Member {
    name: String,
    client: Port,
    peer: Port,
    arguments: Vec<String>,
    /// Beside the arguments.
    environment: Vec<(String, String)>,
    log: PathBuf,
    child: Option<Child>,
}

impl Cluster {
    /// Starts `size` members and waits until each of them serves linearizable reads.
    pub async fn start(size: usize) -> Cluster {
        Cluster::start_with(size, &[]).await
    }

    /// As [`Cluster::start`], with further flags for each member.
    pub async fn start_with(size: usize, flags: &[&str]) -> Cluster {
        let mut cluster = Cluster::prepare(size, flags);
        for member in 0..size {
            cluster.spawn(member);
        }
        for member in 0..size {
            cluster.serving(member).await;
        }
        cluster
    }

    /// Settles ports, directories and flags, and starts nothing.
    pub fn prepare(size: usize, flags: &[&str]) -> Cluster {
        let places = Places::take(size);
        let dir =
            TempDir::with_prefix("holdfast-test-").expect("a temporary directory can be made");
        let names: Vec<String> = (1..=size).map(|n| format!("m{n}")).collect();
        let ports: Vec<(Port, Port)> =
            names.iter().map(|_| (Port::reserve(), Port::reserve())).collect();
        let cluster_flag = names
            .iter()
            .zip(&ports)
            .map(|(name, (_, peer))| format!("{name}=http://127.0.0.1:{}", peer.number()))
            .collect::<Vec<_>>()
            .join(",");
        let token = dir.path().file_name().expect("it has a name").to_string_lossy().into_owned();
        let members: Vec<Member> = names
            .into_iter()
            .zip(ports)
            .map(|(name, (client, peer))| {
                let data = dir.path().join(&name);
                let client_url = format!("http://127.0.0.1:{}", client.number());
                let peer_url = format!("http://127.0.0.1:{}", peer.number());
                let mut arguments = Vec::new();
                for (flag, value) in [
                    ("name", name.as_str()),
                    ("data-dir", &data.to_string_lossy()),
                    ("listen-client-urls", &client_url),
                    ("advertise-client-urls", &client_url),
                    ("listen-peer-urls", &peer_url),
                    ("initial-advertise-peer-urls", &peer_url),
                    ("initial-cluster", &cluster_flag),
                    ("initial-cluster-token", &token),
                    ("initial-cluster-state", "new"),
                ] {
                    arguments.extend([format!("--{flag}"), value.to_owned()]);
                }
                arguments.extend(flags.iter().map(|f| (*f).to_owned()));
                let log = dir.path().join(format!("{name}.log"));
                let environment = Vec::new();
                Member { name, client, peer, arguments, environment, log, child: None }
            })
            .collect();
        let url = |member: &Member| format!("http://127.0.0.1:{}", member.client.number());
        let addresses = Addresses::new(members.iter().map(url).collect());
        let watchdog = Watchdog::start();
        Cluster { addresses, members, dir, watchdog, _places: places }
    }

    /// Settles ports and a directory for one more member, which knows nothing of a cluster yet: its
    /// name and the initial cluster come with [`Cluster::introduce`]. Starts nothing.
    pub fn prepare_another(&mut self, flags: &[&str]) -> usize {
        let name = format!("m{}", self.members.len() + 1);
        let (client, peer) = (Port::reserve(), Port::reserve());
        let client_url = format!("http://127.0.0.1:{}", client.number());
        let peer_url = format!("http://127.0.0.1:{}", peer.number());
        let data = self.dir.path().join(&name);
        let mut arguments = Vec::new();
        for (flag, value) in [
            ("data-dir", &*data.to_string_lossy()),
            ("listen-client-urls", &client_url),
            ("advertise-client-urls", &client_url),
            ("listen-peer-urls", &peer_url),
        ] {
            arguments.extend([format!("--{flag}"), value.to_owned()]);
        }
        arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let log = self.dir.path().join(format!("{name}.log"));
        let environment = Vec::new();
        self.members.push(Member { name, client, peer, arguments, environment, log, child: None });
        self.addresses.push(client_url);
        self.members.len() - 1
    }

    /// Starts `member` with these variables from now on, such as `etcdctl member add` prints.
    pub fn introduce(&mut self, member: usize, variables: Vec<(String, String)>) {
        self.members[member].environment = variables;
    }

    /// Gives a member that is down another value for a flag.
    pub fn set_flag(&mut self, member: usize, flag: &str, value: &str) {
        let arguments = &mut self.members[member].arguments;
        let at = arguments.iter().position(|argument| argument == flag).expect("it has the flag");
        arguments[at + 1] = value.to_owned();
    }

    /// The name a member is given, and the last part of its data directory.
    pub fn name(&self, member: usize) -> &str {
        &self.members[member].name
    }

    /// Waits until a member's process has ended by itself, and gives how.
    pub async fn ended(&mut self, member: usize, limit: Duration) -> Exit {
        let what = format!("{} ends by itself", self.members[member].name);
        within(limit, &what, async {
            while self.runs(member) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        let mut child = self.members[member].child.take().expect("it has been started");
        exit_of(child.wait().expect("a child can be waited for"))
    }

    /// What a member has printed so far.
    pub fn printed(&self, member: usize) -> String {
        std::fs::read_to_string(&self.members[member].log).unwrap_or_default()
    }

    /// Lets the cluster live this long from now, for a test that takes longer than two minutes.
    pub fn may_live(&self, time: Duration) {
        self.watchdog.put_off(time);
    }

    /// The port that a member serves clients on.
    pub fn client_port(&self, member: usize) -> u16 {
        self.members[member].client.number()
    }

    /// The port that a member serves other members on.
    pub fn peer_port(&self, member: usize) -> u16 {
        self.members[member].peer.number()
    }

    /// The flags a member is started with, for a test that starts another process much like it.
    pub fn arguments(&self, member: usize) -> &[String] {
        &self.members[member].arguments
    }

    /// A directory that goes away with the cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where a member keeps its data.
    pub fn data_dir(&self, member: usize) -> PathBuf {
        self.dir.path().join(&self.members[member].name)
    }

    /// The process of a member.
    ///
    /// # Panics
    ///
    /// If it is down.
    pub fn pid(&self, member: usize) -> u32 {
        self.members[member].child.as_ref().expect("the member runs").id()
    }

    /// Whether a member's process is there.
    pub fn runs(&mut self, member: usize) -> bool {
        let Some(child) = self.members[member].child.as_mut() else { return false };
        let runs = child.try_wait().expect("a child can be waited for").is_none();
        if !runs {
            self.watchdog.release(child);
        }
        runs
    }

    /// Starts a member's process and does not wait for anything.
    pub fn spawn(&mut self, member: usize) {
        self.spawn_with(member, &[]);
    }

    /// As [`Cluster::spawn`], with these variables in its environment.
    pub fn spawn_with(&mut self, member: usize, environment: &[(&str, &OsStr)]) {
        let m = &mut self.members[member];
        assert!(m.child.is_none(), "{} runs already", m.name);
        let log =
            File::options().create(true).append(true).open(&m.log).expect("a log can be made");
        let child = command(program())
            .args(&m.arguments)
            .envs(m.environment.iter().map(|(name, value)| (name, value)))
            .envs(environment.iter().copied())
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file handle can be copied"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run {}: {e}", program().display()));
        self.watchdog.guard(Pid::from_child(&child));
        m.child = Some(child);
    }

    /// Waits until a member answers a linearizable read, which takes a leader and a quorum.
    ///
    /// # Panics
    ///
    /// If its process ends instead, or it takes too long.
    pub async fn serving(&mut self, member: usize) {
        let what = format!("{} serves linearizable reads", self.members[member].name);
        within(AFTER_ELECTION + SOON, &what, async {
            loop {
                assert!(self.runs(member), "{} ended at start", self.members[member].name);
                if self.serves(member).await {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Kills a member with SIGKILL and waits until its process is gone.
    pub fn kill(&mut self, member: usize) {
        let mut child = self.members[member].child.take().expect("the member runs");
        self.watchdog.release(&child);
        child.kill().expect("a child can be killed");
        child.wait().expect("a child can be waited for");
    }

    /// Kills all members that run, all of them before waiting for any.
    pub fn kill_all(&mut self) {
        let mut children: Vec<Child> =
            self.members.iter_mut().filter_map(|m| m.child.take()).collect();
        for child in &mut children {
            self.watchdog.release(child);
            child.kill().expect("a child can be killed");
        }
        for child in &mut children {
            child.wait().expect("a child can be waited for");
        }
    }

    /// Starts a killed member again on its data, and waits until it serves.
    pub async fn restart(&mut self, member: usize) {
        self.spawn(member);
        self.serving(member).await;
    }

    /// Makes a member stand still with SIGSTOP.
    pub fn pause(&self, member: usize) {
        self.signal(member, Signal::STOP);
    }

    /// Lets a member go on that was paused.
    pub fn resume(&self, member: usize) {
        self.signal(member, Signal::CONT);
    }

    fn signal(&self, member: usize, signal: Signal) {
        let child = self.members[member].child.as_ref().expect("the member runs");
        kill_process(Pid::from_child(child), signal).expect("a child can be signalled");
    }

    /// Asks a member to end with SIGTERM, and waits up to `limit` for how it does.
    pub async fn terminate(&mut self, member: usize, limit: Duration) -> Exit {
        let mut child = self.members[member].child.take().expect("the member runs");
        let pid = Pid::from_child(&child);
        self.watchdog.release(&child);
        kill_process(pid, Signal::TERM).expect("a child can be signalled");
        let exited = tokio::time::timeout(limit, async {
            loop {
                if let Some(status) = child.try_wait().expect("a child can be waited for") {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        match exited {
            Ok(status) => exit_of(status),
            Err(_) => {
                self.members[member].child = Some(child);
                panic!("{} did not end within {limit:?} of SIGTERM", self.members[member].name);
            }
        }
    }

    /// The member that leads, once all running members agree on one that runs.
    pub async fn leader(&mut self) -> usize {
        let running: Vec<usize> = (0..self.size()).filter(|m| self.runs(*m)).collect();
        self.addresses.leader_among(&running).await
    }

    fn print_logs(&self) {
        for member in &self.members {
            let text = std::fs::read_to_string(&member.log).unwrap_or_default();
            let mut end: VecDeque<&str> = VecDeque::new();
            for line in text.lines() {
                if end.len() == LOG_LINES {
                    end.pop_front();
                }
                end.push_back(line);
            }
            eprintln!("--- the end of what {} printed:", member.name);
            for line in end {
                eprintln!("{line}");
            }
        }
    }
}

impl Deref for Cluster {
    type Target = Addresses;

    fn deref(&self) -> &Addresses {
        &self.addresses
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking() {
            self.print_logs();
        }
    }
}

/// A process that was run to its end: how it ended, and what it printed.
#[derive(Debug)]
pub struct Finished {
    pub exit: Exit,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the program under test with these arguments until it ends by itself, or gives `None` after
/// killing it when it is still up at the end of `limit`.
pub async fn run_to_end(dir: &Path, arguments: &[String], limit: Duration) -> Option<Finished> {
    let mut child = command(program())
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let drain = |mut from: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            from.read_to_end(&mut text).expect("a pipe can be read");
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let stdout = drain(Box::new(child.stdout.take().expect("piped")));
    let stderr = drain(Box::new(child.stderr.take().expect("piped")));
    let ended = tokio::time::timeout(limit, async {
        loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    if ended.is_err() {
        child.kill().expect("a child can be killed");
        child.wait().expect("a child can be waited for");
    }
    let (stdout, stderr) = (stdout.join().expect("no panic"), stderr.join().expect("no panic"));
    ended.ok().map(|status| Finished { exit: exit_of(status), stdout, stderr })
}

fn exit_of(status: std::process::ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => unreachable!("a process that ended has a code or a signal"),
    }
}

/// Kills what it guards when the time is up.
#[derive(Debug)]
struct Watchdog {
    guarded: Arc<Mutex<Vec<Pid>>>,
    put_off: Sender<Duration>,
}

impl Watchdog {
    fn start() -> Watchdog {
        let guarded = Arc::new(Mutex::new(Vec::new()));
        let (put_off, times) = channel::<Duration>();
        let watched: Arc<Mutex<Vec<Pid>>> = guarded.clone();
        std::thread::spawn(move || {
            let mut left = LIFE;
            loop {
                match times.recv_timeout(left) {
                    Ok(time) => left = time,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => break,
                }
            }
            eprintln!("the test takes too long: killing its members");
            for pid in watched.lock().expect("listing does not panic").drain(..) {
                // Not waited for before it is released, so the number is still its own.
                kill_process(pid, Signal::KILL).expect("a child can be signalled");
            }
        });
        Watchdog { guarded, put_off }
    }

    fn guard(&self, pid: Pid) {
        self.guarded.lock().expect("listing does not panic").push(pid);
    }

    /// To be called before a child is waited for: afterwards its number may be another's.
    fn release(&self, child: &Child) {
        let pid = Pid::from_child(child);
        self.guarded.lock().expect("listing does not panic").retain(|p| *p != pid);
    }

    fn put_off(&self, time: Duration) {
        // When it has struck already there is nothing to put off.
        let _ = self.put_off.send(time);
    }
}

/// Leave to run some members, given back when dropped.
#[derive(Debug)]
struct Places(usize);

static RUNNING: Mutex<usize> = Mutex::new(0);
static FREED: Condvar = Condvar::new();

impl Places {
    /// Waits until `wanted` more members may run, or until none runs at all.
    ///
    /// This blocks the thread: each test has one of its own.
    fn take(wanted: usize) -> Places {
        let running = RUNNING.lock().expect("counting does not panic");
        let mut running = FREED
            .wait_while(running, |running| *running > 0 && *running + wanted > MEMBERS_AT_ONCE)
            .expect("counting does not panic");
        *running += wanted;
        Places(wanted)
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        *RUNNING.lock().expect("counting does not panic") -= self.0;
        FREED.notify_all();
    }
}
