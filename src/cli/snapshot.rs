//! `snapshot status`: what a snapshot file holds.
//!
//! Columns and fields are those of `etcdutl snapshot status`. The hash is that of `HashKV`: members
//! that were at this revision, and had compacted alike, tell the same.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use crate::backup::restore::{Contents, inspect};

/// The command line of `snapshot`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Clone, Subcommand)]
enum Action {
    /// Read all of a snapshot file, check it, and tell what it holds
    Status {
        /// The file, as `etcdctl snapshot save` got it from Holdfast
        file: PathBuf,
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        write_out: Output,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status<'a> {
    hash: u32,
    revision: i64,
    total_key: usize,
    total_size: u64,
    version: &'a str,
    compact_revision: i64,
    leases: usize,
    cluster_id: &'a str,
    applied_index: u64,
}

/// Does what is asked; the exit code is 1 when the file is not a whole snapshot.
pub fn run(options: &Options) -> ExitCode {
    let Action::Status { file, write_out } = &options.action;
    let contents = match inspect(file) {
        Ok(contents) => contents,
        Err(error) => {
            eprintln!("holdfast: {error}");
            return ExitCode::FAILURE;
        }
    };
    match write_out {
        Output::Table => print!("{}", table(&contents)),
        Output::Json => {
            let status = status(&contents);
            println!("{}", serde_json::to_string(&status).expect("plain numbers and texts"));
        }
    }
    ExitCode::SUCCESS
}

fn status(contents: &Contents) -> Status<'_> {
    Status {
        hash: contents.hash.hash,
        revision: contents.standing.revision,
        total_key: contents.standing.keys,
        total_size: contents.bytes,
        version: &contents.header.release,
        compact_revision: contents.standing.compacted,
        leases: contents.standing.leases,
        cluster_id: &contents.header.cluster_id,
        applied_index: contents.header.applied_index,
    }
}

fn table(contents: &Contents) -> String {
    let columns = [
        ("HASH", format!("{:x}", contents.hash.hash)),
        ("REVISION", contents.standing.revision.to_string()),
        ("TOTAL KEYS", contents.standing.keys.to_string()),
        ("TOTAL SIZE", size(contents.bytes)),
        ("VERSION", contents.header.release.clone()),
    ];
    let widths = columns.each_ref().map(|(title, value)| title.len().max(value.len()));
    let line: String = widths.iter().map(|width| format!("+-{}-", "-".repeat(*width))).collect();
    let cells = columns.iter().zip(widths);
    let (titles, values): (Vec<String>, Vec<String>) = cells
        .map(|((title, value), width)| {
            (format!("| {title:^width$} "), format!("| {value:>width$} "))
        })
        .unzip();
    format!("{line}+\n{}|\n{line}+\n{}|\n{line}+\n", titles.concat(), values.concat())
}

/// Bytes as etcd's tools print them: `20 kB`, `1.2 MB`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1_000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "";
    for next in UNITS {
        if value < 1_000.0 {
            break;
        }
        value /= 1_000.0;
        unit = next;
    }
    if value < 10.0 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_in_etcds_tools() {
        let sizes = [0, 999, 1_000, 20_512, 1_234_567, 123_456_789].map(size);
        assert_eq!(sizes, ["0 B", "999 B", "1.0 kB", "21 kB", "1.2 MB", "123 MB"]);
    }
}
