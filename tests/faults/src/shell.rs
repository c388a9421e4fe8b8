//! The system's own tools, run to their end.

use std::io::Write;
use std::process::{Command, Stdio};

/// Runs a program and gives what it printed.
///
/// # Errors
///
/// If it is not there or does not end with 0, with what it said.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    run_with_input(program, arguments, "")
}

/// As [`run`], with this on its standard input.
pub fn run_with_input(program: &str, arguments: &[&str], input: &str) -> Result<String, String> {
    let what = || format!("{program} {}", arguments.join(" "));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{}: {e}", what()))?;
    let mut stdin = child.stdin.take().expect("piped");
    // One that does not read its input says itself why.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().map_err(|e| format!("{}: {e}", what()))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: {}: {}", what(), output.status, complaint.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
