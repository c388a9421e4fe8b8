//! Clusters of real processes, of Holdfast or of etcd, to be asked through gRPC.
//!
//! Every member listens on ports of its own on 127.0.0.1 and keeps its data and what it prints in
//! a temporary folder. Dropping a cluster kills its members; when the test fails, the end of what
//! each has printed is shown.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdfast::pb::etcdserverpb::RangeRequest;
use holdfast::pb::etcdserverpb::kv_client::KvClient;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use crate::ports::Port;

/// How long a cluster may take until each member serves.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long one attempt at a first read may take.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);

/// Between two looks at a member that does not serve yet.
const LOOK: Duration = Duration::from_millis(20);

/// How much of each member's output a failing test prints.
const LOG_LINES: usize = 30;

/// What the members run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The binary of this build, or the one that `HOLDFAST_BIN` names.
    Holdfast,
    /// The binary that `ETCD` names.
    Etcd,
}

impl Program {
    /// `None` for etcd when `ETCD` is not set.
    pub fn path(self) -> Option<PathBuf> {
        let named = |variable| std::env::var_os(variable).map(PathBuf::from);
        let path = match self {
            Program::Holdfast => {
                named("HOLDFAST_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_holdfast").into())
            }
            Program::Etcd => named("ETCD")?,
        };
        // Members run in a folder of their own.
        let real = path.canonicalize();
        Some(real.unwrap_or_else(|error| panic!("no program {}: {error}", path.display())))
    }
}

/// One to many members that serve.
pub struct Cluster {
    members: Vec<Member>,
    _dir: TempDir,
}

struct Member {
    name: String,
    child: Child,
    channel: Channel,
    log: PathBuf,
    client: Port,
    _peer: Port,
}

impl Cluster {
    /// Starts members `m1`, `m2` and so on with `flags` beside those they need, and waits until each
    /// serves linearizable reads. To be called inside a tokio runtime, which the channels then
    /// belong to.
    ///
    /// # Panics
    ///
    /// When the program cannot be run (for etcd: when `ETCD` is not set), a member ends, or it takes
    /// too long.
    pub async fn start(program: Program, members: usize, flags: &[&str]) -> Cluster {
        let path = program.path().expect("ETCD names the binary");
        let dir = TempDir::with_prefix("holdfast-semantics-").expect("a folder can be made");
        let ports: Vec<(Port, Port)> =
            (0..members).map(|_| (Port::reserve(), Port::reserve())).collect();
        let everyone: Vec<String> = (1..)
            .zip(&ports)
            .map(|(n, (_, peer))| format!("m{n}=http://127.0.0.1:{}", peer.number()))
            .collect();
        let everyone = everyone.join(",");
        let mut cluster = Cluster { members: Vec::new(), _dir: dir };
        for (n, (client, peer)) in (1..).zip(ports) {
            let name = format!("m{n}");
            let client_url = format!("http://127.0.0.1:{}", client.number());
            let peer_url = format!("http://127.0.0.1:{}", peer.number());
            let folder = cluster._dir.path();
            let log = folder.join(format!("{name}.log"));
            let output = File::create(&log).expect("a log can be made");
            let mut command = Command::new(&path);
            for (variable, _) in std::env::vars_os() {
                let text = variable.to_string_lossy();
                if text.starts_with("ETCD") || text.starts_with("HOLDFAST") {
                    command.env_remove(&variable);
                }
            }
            let child = command
                .arg(format!("--name={name}"))
                .arg(format!("--data-dir={}", folder.join(&name).display()))
                .arg(format!("--listen-client-urls={client_url}"))
                .arg(format!("--advertise-client-urls={client_url}"))
                .arg(format!("--listen-peer-urls={peer_url}"))
                .arg(format!("--initial-advertise-peer-urls={peer_url}"))
                .arg(format!("--initial-cluster={everyone}"))
                .arg(format!("--initial-cluster-token={}", folder.display()))
                .args(flags)
                .current_dir(folder)
                .stdin(Stdio::null())
                .stdout(output.try_clone().expect("a file handle can be copied"))
                .stderr(output)
                .spawn()
                .unwrap_or_else(|error| panic!("cannot run {}: {error}", path.display()));
            let endpoint = Endpoint::from_shared(client_url).expect("it is a URL");
            let channel = endpoint.connect_timeout(ATTEMPT_LIMIT).connect_lazy();
            let member = Member { name, child, channel, log, client, _peer: peer };
            cluster.members.push(member);
        }
        cluster.wait_until_serving().await;
        cluster
    }

    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// A connection to member `index`, counted from zero, shared by all who ask for it.
    pub fn channel(&self, index: usize) -> Channel {
        self.members[index].channel.clone()
    }

    /// Where member `index` serves clients, on 127.0.0.1.
    // Not every test that starts clusters has a use for it.
    #[allow(dead_code)]
    pub fn client_port(&self, index: usize) -> u16 {
        self.members[index].client.number()
    }

    async fn wait_until_serving(&mut self) {
        let deadline = Instant::now() + START_LIMIT;
        for member in &mut self.members {
            while !serves(member.channel.clone()).await {
                let ended = member.child.try_wait().expect("a child can be looked at");
                assert!(ended.is_none(), "{} ended at its start: {ended:?}", member.name);
                assert!(Instant::now() < deadline, "{} does not serve", member.name);
                tokio::time::sleep(LOOK).await;
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            // It may have ended by itself, which is why the test fails.
            let _ = member.child.kill();
        }
        for member in &mut self.members {
            let _ = member.child.wait();
        }
        if std::thread::panicking() {
            for member in &self.members {
                let text = std::fs::read_to_string(&member.log).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("--- the end of what {} printed:", member.name);
                for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                    eprintln!("{line}");
                }
            }
        }
    }
}

/// Whether the member answers a linearizable read, which takes a leader and a quorum.
async fn serves(channel: Channel) -> bool {
    let request = RangeRequest { key: "ready".into(), ..RangeRequest::default() };
    let mut client = KvClient::new(channel);
    matches!(tokio::time::timeout(ATTEMPT_LIMIT, client.range(request)).await, Ok(Ok(_)))
}
