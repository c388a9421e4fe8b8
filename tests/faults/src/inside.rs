//! A network and a mount namespace of the run's own.
//!
//! The bridge, its rules, the mounts and the namespaces of the members hang on these, and the members
//! end with the runner. So nothing has a name that another run could have taken, and when the runner
//! goes, however it goes, the kernel removes all of it.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Set in the environment of a runner that is inside.
const INSIDE: &str = "HOLDFAST_FAULTS_INSIDE";

/// Starts this program again inside, in this process, unless it is there already. The checks learn by
/// `HOLDFAST_BIN` what the program under test is.
///
/// # Errors
///
/// If that is not possible, as without being root.
pub fn enter(binary: &Path) -> Result<(), String> {
    if std::env::var_os(INSIDE).is_some() {
        return crate::shell::run("ip", &["link", "set", "lo", "up"]).map(|_| ());
    }
    if !rustix::process::geteuid().is_root() {
        return Err("namespaces, mounts and packet filters need root".to_owned());
    }
    let own = std::env::current_exe().map_err(|e| format!("no path of this program: {e}"))?;
    let error = Command::new("unshare")
        .args(["--net", "--mount", "--propagation", "private", "--"])
        .arg(own)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .env("HOLDFAST_BIN", binary)
        .exec();
    Err(format!("cannot run unshare: {error}"))
}
