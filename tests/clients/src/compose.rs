//! The cluster of `deploy/docker-compose.yml`, as its users start it, and what can happen to it.
//!
//! Needs a Docker engine, `docker` and `docker-compose`, and a static binary as the program under
//! test. No image is pulled: the image is made of that binary and nothing else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::addresses::Addresses;
use crate::check::{AFTER_ELECTION, SOON, eventually};
use crate::ports::Port;
use crate::program::{command, program};

/// How the compose file calls its services.
const MEMBERS: [&str; 3] = ["member1", "member2", "member3"];

/// What is done to a container, and undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; started again.
    Kill,
    /// Frozen; thawed.
    Pause,
    /// Cut off from the other members and from its clients; connected again, as a new address.
    Disconnect,
}

/// Three containers, their network and volumes. Dropping it removes all of them, and the image.
#[derive(Debug)]
pub struct Compose {
    pub addresses: Addresses,
    project: String,
    /// What the image is built from.
    context: TempDir,
    ports: Vec<Port>,
}

impl Compose {
    /// Builds the image, brings the containers up, and waits until each member serves.
    pub async fn up() -> Compose {
        let context = context();
        let ports: Vec<Port> = MEMBERS.iter().map(|_| Port::reserve()).collect();
        let url = |port: &Port| format!("http://127.0.0.1:{}", port.number());
        let addresses = Addresses::new(ports.iter().map(url).collect());
        let project = format!("holdfast-test-{}", ports[0].number());
        let compose = Compose { addresses, project, context, ports };
        compose.compose(&["up", "--detach", "--build"]);
        for member in 0..MEMBERS.len() {
            compose.serving(member).await;
        }
        compose
    }

    /// Waits until a member answers a linearizable read.
    pub async fn serving(&self, member: usize) {
        let what = format!("{} serves", MEMBERS[member]);
        eventually(AFTER_ELECTION + SOON, &what, || async move {
            self.addresses.serves(member).await.then_some(())
        })
        .await;
    }

    /// Waits until Docker's own health check calls a member so.
    pub async fn health_is(&self, member: usize, health: &str) {
        let what = format!("{} is {health}", MEMBERS[member]);
        eventually(Duration::from_secs(40), &what, || async move {
            let format = "--format={{.State.Health.Status}}";
            (docker(&["inspect", format, &self.container(member)]).trim() == health).then_some(())
        })
        .await;
    }

    pub fn inject(&self, fault: Fault, member: usize) {
        let container = self.container(member);
        match fault {
            Fault::Kill => docker(&["kill", &container]),
            Fault::Pause => docker(&["pause", &container]),
            Fault::Disconnect => docker(&["network", "disconnect", &self.network(), &container]),
        };
    }

    /// Undoes what [`Compose::inject`] did; the member may need a moment.
    pub fn heal(&self, fault: Fault, member: usize) {
        let container = self.container(member);
        match fault {
            Fault::Kill => docker(&["start", &container]),
            Fault::Pause => docker(&["unpause", &container]),
            Fault::Disconnect => {
                let alias = MEMBERS[member];
                docker(&["network", "connect", "--alias", alias, &self.network(), &container])
            }
        };
    }

    /// Takes the containers away, and brings others up on the volumes that they leave.
    pub async fn replace_all(&self) {
        self.compose(&["down"]);
        self.compose(&["up", "--detach"]);
        for member in 0..MEMBERS.len() {
            self.serving(member).await;
        }
    }

    fn container(&self, member: usize) -> String {
        self.compose(&["ps", "--quiet", MEMBERS[member]]).trim().to_owned()
    }

    fn network(&self) -> String {
        format!("{}_default", self.project)
    }

    fn compose(&self, arguments: &[&str]) -> String {
        run(self.compose_command().args(arguments))
    }

    fn compose_command(&self) -> Command {
        let mut command = command(Path::new("docker-compose"));
        command
            .arg("--file")
            .arg(repository().join("deploy/docker-compose.yml"))
            .args(["--project-name", &self.project])
            .env("HOLDFAST_CONTEXT", self.context.path())
            .env("HOLDFAST_DOCKERFILE", "Dockerfile")
            .env("HOLDFAST_IMAGE", &self.project)
            .env("HOLDFAST_TOKEN", &self.project);
        for (number, port) in self.ports.iter().enumerate() {
            command.env(format!("HOLDFAST_PORT{}", number + 1), port.number().to_string());
        }
        command
    }
}

impl Drop for Compose {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.compose_command().args(["logs", "--tail=30"]).output();
            let logs = logs.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            eprintln!("{}", logs.unwrap_or_else(|error| error.to_string()));
        }
        let mut down = self.compose_command();
        // A test that fails has said why already.
        let down = down.args(["down", "--volumes", "--timeout=5", "--rmi=all"]).output();
        if let Err(error) = down {
            eprintln!("the containers of {} may be left behind: {error}", self.project);
        }
    }
}

/// A directory as `deploy/build-static` lays it out, with the program under test.
fn context() -> TempDir {
    let elf = std::fs::read(program()).expect("the program can be read");
    assert!(
        !elf[..elf.len().min(1 << 16)].windows(6).any(|bytes| bytes == b"/lib64"),
        "{} is not static: build it with deploy/build-static",
        program().display()
    );
    let directory = TempDir::with_prefix("holdfast-image-").expect("a temporary directory");
    let into = |name: &str| directory.path().join(name);
    std::fs::copy(program(), into("holdfast")).expect("the program can be copied");
    let dockerfile = repository().join("deploy/Dockerfile.binary");
    std::fs::copy(dockerfile, into("Dockerfile")).expect("the Dockerfile can be copied");
    std::fs::create_dir(into("data")).expect("a directory can be made");
    directory
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn docker(arguments: &[&str]) -> String {
    run(command(Path::new("docker")).args(arguments))
}

/// What a command prints.
///
/// # Panics
///
/// If it fails.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed, {}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
