//! Runs `etcdctl` as a user would: arguments in, text or JSON out.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::Value;

use crate::check::SOON;
use crate::process::Cluster;
use crate::program::{command, etcdctl};

/// `etcdctl` with its endpoints set.
#[derive(Debug, Clone)]
pub struct Etcdctl {
    endpoints: String,
}

/// What one run of `etcdctl` printed and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Etcdctl {
    /// For one member of a cluster.
    pub fn member(cluster: &Cluster, member: usize) -> Etcdctl {
        Etcdctl { endpoints: cluster.endpoint(member) }
    }

    /// For whoever serves at `endpoint`.
    pub fn at(endpoint: &str) -> Etcdctl {
        Etcdctl { endpoints: endpoint.to_owned() }
    }

    /// For all members of a cluster.
    pub fn all(cluster: &Cluster) -> Etcdctl {
        let endpoints: Vec<String> = (0..cluster.size()).map(|m| cluster.endpoint(m)).collect();
        Etcdctl { endpoints: endpoints.join(",") }
    }

    /// Runs to the end, whatever that is.
    pub fn run<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Output {
        self.run_with_input(arguments, "")
    }

    /// As [`Etcdctl::run`], with `input` on its standard input.
    pub fn run_with_input<A: AsRef<OsStr>>(&self, arguments: &[A], input: &str) -> Output {
        let mut child = self.command(arguments).spawn().expect("etcdctl runs");
        let mut stdin = child.stdin.take().expect("piped");
        // A command that reads nothing may have closed its end already.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().expect("etcdctl can be waited for");
        Output {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// What a run that must succeed prints.
    #[track_caller]
    pub fn ok<A: AsRef<OsStr> + std::fmt::Debug>(&self, arguments: &[A]) -> String {
        self.ok_with_input(arguments, "")
    }

    /// As [`Etcdctl::ok`], with `input` on its standard input.
    #[track_caller]
    pub fn ok_with_input<A: AsRef<OsStr> + std::fmt::Debug>(
        &self,
        arguments: &[A],
        input: &str,
    ) -> String {
        let output = self.run_with_input(arguments, input);
        assert_eq!(output.code, Some(0), "etcdctl {arguments:?}: {output:?}");
        output.stdout
    }

    /// The lines that a run that must succeed prints.
    #[track_caller]
    pub fn lines<A: AsRef<OsStr> + std::fmt::Debug>(&self, arguments: &[A]) -> Vec<String> {
        self.ok(arguments).lines().map(str::to_owned).collect()
    }

    /// What a run that must succeed prints with `-w json`.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["-w", "json"];
        all.extend(arguments);
        let text = self.ok(&all);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e} in {text:?}"))
    }

    /// What a run that must fail prints on its standard error.
    #[track_caller]
    pub fn fails<A: AsRef<OsStr> + std::fmt::Debug>(&self, arguments: &[A]) -> String {
        let output = self.run(arguments);
        assert_ne!(output.code, Some(0), "etcdctl {arguments:?}: {output:?}");
        output.stderr
    }

    /// Starts a run that is read line by line while it goes on.
    pub fn spawn<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Running {
        let mut child = self.command(arguments).spawn().expect("etcdctl runs");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Running { child, stdin, lines }
    }

    fn command<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Command {
        let mut command = command(etcdctl());
        command
            .env("ETCDCTL_API", "3")
            .arg("--endpoints")
            .arg(&self.endpoints)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }
}

/// A run of `etcdctl` that is still going on. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Running {
    /// The next line it prints.
    ///
    /// # Panics
    ///
    /// If none comes soon.
    #[track_caller]
    pub fn line(&self) -> String {
        match self.lines.recv_timeout(SOON) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("etcdctl printed no line within {SOON:?}"),
            Err(RecvTimeoutError::Disconnected) => panic!("etcdctl ended without another line"),
        }
    }

    /// Asserts that the next lines are exactly these.
    #[track_caller]
    pub fn expect(&self, lines: &[&str]) {
        for line in lines {
            assert_eq!(self.line(), *line);
        }
    }

    /// Asserts that it prints nothing for this long.
    #[track_caller]
    pub fn expect_silence(&self, time: Duration) {
        if let Ok(line) = self.lines.recv_timeout(time) {
            panic!("expected silence, got {line:?}");
        }
    }

    /// Closes its standard input, or writes to it first.
    pub fn finish_input(&mut self, text: &str) {
        let mut stdin = self.stdin.take().expect("the input is closed once");
        stdin.write_all(text.as_bytes()).expect("it reads its input");
    }

    /// Sends SIGINT, as a user's Ctrl-C does, and gives its exit code.
    pub fn interrupt(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
        self.child.wait().expect("etcdctl can be waited for").code()
    }

    /// Waits for its end and gives its exit code.
    pub fn wait(mut self) -> Option<i32> {
        drop(self.stdin.take());
        self.child.wait().expect("etcdctl can be waited for").code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The text behind a base64 field of etcdctl's JSON; empty when the field is left out.
///
/// # Panics
///
/// If it is something else than base64 of UTF-8.
#[track_caller]
pub fn text(field: &Value) -> String {
    let bytes = BASE64_STANDARD.decode(field.as_str().unwrap_or_default()).expect("base64");
    String::from_utf8(bytes).expect("tests use text")
}
