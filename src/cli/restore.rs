//! `restore` and `import`: a member of a new cluster from a file.
//!
//! The flags that say who the member is are the server's, from the environment too: a member is
//! restored and started with the same ones.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::backup::found::{BUMP_REVISION, Founded, NewMember};
use crate::backup::import::{self, Imported};
use crate::backup::restore as from_snapshot;
use crate::config::{ConfigError, MemberArgs, ServerArgs};
use crate::machine::Afresh;
use crate::server;

/// The command line of `restore`.
#[derive(Debug, Clone, Args)]
pub struct RestoreOptions {
    /// The snapshot, as `etcdctl snapshot save` got it from Holdfast
    file: PathBuf,
    #[command(flatten)]
    shared: Shared,
    /// Tell who watches from before the first revision that history is compacted; =false keeps the
    /// history of the snapshot readable
    #[arg(
        long,
        action = clap::ArgAction::Set,
        default_value_t = true,
        default_missing_value = "true",
        num_args = 0..=1,
        require_equals = true,
    )]
    mark_compacted: bool,
}

/// The command line of `import`.
#[derive(Debug, Clone, Args)]
pub struct ImportOptions {
    /// A snapshot of etcd, or the db of a member that has stopped
    file: PathBuf,
    #[command(flatten)]
    shared: Shared,
}

#[derive(Debug, Clone, Args)]
struct Shared {
    #[command(flatten)]
    member: MemberArgs,
    /// How many revisions to skip, more than were written since the file was made
    #[arg(long, value_name = "COUNT", default_value_t = BUMP_REVISION)]
    #[arg(value_parser = clap::value_parser!(i64).range(0..))]
    bump_revision: i64,
    /// Take the file even if it is not as the hash at its end says, or has none
    #[arg(long)]
    skip_hash_check: bool,
}

impl Shared {
    fn new_member(&self) -> Result<NewMember, ConfigError> {
        let settings = server::settings(&ServerArgs::from(self.member.clone()).check()?);
        Ok(NewMember {
            data_dir: settings.data_dir,
            identity: settings.identity,
            members: settings.initial_members,
        })
    }
}

/// Does what is asked; the exit code is 1 when it is refused, 2 for wrong flags.
pub fn restore(options: RestoreOptions) -> ExitCode {
    let RestoreOptions { file, shared, mark_compacted } = options;
    let member = match shared.new_member() {
        Ok(member) => member,
        Err(error) => return refuse(error, ExitCode::from(2)),
    };
    let afresh = Afresh { bump_revision: shared.bump_revision, mark_compacted };
    match from_snapshot::restore(&file, !shared.skip_hash_check, afresh, &member) {
        Ok(founded) => {
            report(&founded, &member);
            ExitCode::SUCCESS
        }
        Err(error) => refuse(error, ExitCode::FAILURE),
    }
}

/// As [`restore`], from a file of etcd.
pub fn import(options: ImportOptions) -> ExitCode {
    let ImportOptions { file, shared } = options;
    let member = match shared.new_member() {
        Ok(member) => member,
        Err(error) => return refuse(error, ExitCode::from(2)),
    };
    match import::import(&file, !shared.skip_hash_check, shared.bump_revision, &member) {
        Ok(imported) => {
            println!("etcd was at revision {}", imported.etcd_revision);
            report(&imported.founded, &member);
            remark(&imported);
            ExitCode::SUCCESS
        }
        Err(error) => refuse(error, ExitCode::FAILURE),
    }
}

fn report(founded: &Founded, member: &NewMember) {
    let Founded { cluster_id, member_id, standing } = founded;
    println!(
        "made {} of member {} ({member_id}), one of {} in the new cluster {cluster_id}",
        member.data_dir.display(),
        member.identity.name,
        member.members.len(),
    );
    let history = match standing.compacted {
        compacted if compacted == standing.revision => "history before it is compacted".to_owned(),
        compacted if compacted > 0 => format!("history is readable from revision {compacted}"),
        _ => "all history is readable".to_owned(),
    };
    println!(
        "{} keys, {} leases, revision {}: {history}",
        standing.keys, standing.leases, standing.revision
    );
}

/// What was not taken over, a line each.
fn remark(imported: &Imported) {
    let Imported { hash_checked, orphans, left, .. } = imported;
    if !hash_checked {
        eprintln!("holdfast: no hash was checked: the file has none, or nobody wanted it");
    }
    if *orphans > 0 {
        eprintln!("holdfast: {orphans} keys named leases that are not there, and have none now");
    }
    if left.users + left.roles > 0 {
        let enabled = if left.auth_enabled { "enabled" } else { "not enabled" };
        eprintln!(
            "holdfast: left behind: {} users and {} roles (auth was {enabled})",
            left.users, left.roles
        );
    }
    if left.alarms > 0 {
        eprintln!("holdfast: left behind: {} alarms", left.alarms);
    }
}

fn refuse(reason: impl std::fmt::Display, code: ExitCode) -> ExitCode {
    eprintln!("holdfast: {reason}");
    code
}
