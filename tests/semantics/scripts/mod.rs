//! Scripts: semantics as text, answered alike by the machine alone, by a cluster of Holdfast, and by
//! a cluster of etcd.
//!
//! They are in `tests/scripts/`, whose README tells the language. Here they are read ([`text`],
//! [`parse`]), run ([`session`]) against one of the targets ([`core`], [`live`]), and printed
//! ([`print`]); all three targets share everything but the call itself.

mod core;
mod live;
mod parse;
mod print;
mod session;
mod text;
mod words;

use self::core::Core;
use self::live::Live;
use self::session::Target;
use self::text::Script;
use crate::cluster::{Cluster, Program};

/// How many members a cluster has.
const MEMBERS: usize = 3;

#[tokio::test]
async fn the_core_answers_as_the_scripts_say() {
    let mut failures = Vec::new();
    let mut core = Core::new();
    for script in text::all().iter().filter(|script| !script.without_core) {
        compare(script, script.answers_of_holdfast(), &mut core, &mut failures).await;
    }
    report("the core", &failures);
}

#[tokio::test]
async fn a_cluster_answers_as_the_scripts_say() {
    let mut failures = Vec::new();
    let scripts = text::all();
    for_each(Program::Holdfast, &scripts, async |script, live| {
        compare(script, script.answers_of_holdfast(), live, &mut failures).await;
    })
    .await;
    report("a cluster of Holdfast", &failures);
}

/// With `HOLDFAST_SCRIPTS=record` the scripts are written anew with what etcd answers.
#[tokio::test]
async fn etcd_answers_as_the_scripts_say() {
    let records = std::env::var("HOLDFAST_SCRIPTS").is_ok_and(|mode| mode == "record");
    if Program::Etcd.path().is_none() {
        assert!(!records, "ETCD is to name the binary whose answers are recorded");
        println!("skipped: ETCD is not set");
        return;
    }
    let mut failures = Vec::new();
    let mut scripts = text::all();
    scripts.retain(|script| !script.without_etcd);
    for_each(Program::Etcd, &scripts, async |script, live| {
        if records {
            match session::run(script, live).await {
                Ok(answers) => script.record(&answers),
                Err(reason) => failures.push(format!("{}: {reason}", script.name)),
            }
        } else {
            compare(script, &script.answers_of_etcd, live, &mut failures).await;
        }
    })
    .await;
    report("a cluster of etcd", &failures);
}

/// Calls `run` for each script: on one cluster for all, or on its own for a script that needs a
/// store that nothing was written to.
async fn for_each(
    program: Program,
    scripts: &[Script],
    mut run: impl AsyncFnMut(&Script, &mut Live),
) {
    let start = async || Live::new(Cluster::start(program, MEMBERS, &[]).await);
    let (fresh, shared): (Vec<&Script>, Vec<&Script>) =
        scripts.iter().partition(|script| script.fresh);
    if !shared.is_empty() {
        let mut live = start().await;
        for script in shared {
            run(script, &mut live).await;
        }
    }
    for script in fresh {
        run(script, &mut start().await).await;
    }
}

async fn compare(
    script: &Script,
    expected: &[String],
    target: &mut impl Target,
    failures: &mut Vec<String>,
) {
    match session::run(script, target).await {
        Ok(found) if found == expected => {}
        Ok(found) => {
            let difference = print::difference(expected, &found);
            failures.push(format!("{} (- expected, + found):\n{difference}", script.name));
        }
        Err(reason) => failures.push(format!("{}: {reason}", script.name)),
    }
}

fn report(target: &str, failures: &[String]) {
    let count = failures.len();
    assert!(failures.is_empty(), "{target}: {count} scripts differ:\n\n{}", failures.join("\n"));
}
