//! Keeps `src/` as `docs/architecture.md` describes it: which module may name which, where a
//! dependency may be named at all, and how a file opens and ends.
//!
//! The checks read text. They look at code without its comments and strings, and most of them leave
//! tests out. Where one stands in the way of a better design, change both together.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

/// From the bottom up: a module names itself and what stands in an earlier row.
const LAYERS: [&[&str]; 9] = [
    &["mutant", "types"],
    &["clock", "codec", "metrics", "pb", "vfs"],
    &["fuzz", "storage"],
    &["machine"],
    &["raft", "watch"],
    &["node"],
    &["backup", "concurrency"],
    &["api"],
    &["cli", "config", "gather", "server", "telemetry"],
];

/// The topmost row wires everything up; its modules may name one another.
const TOP: usize = LAYERS.len() - 1;

/// Words that may be used in some places only.
struct Confined {
    words: &'static [&'static str],
    /// Files, or folders with a slash at the end, below `src/`.
    places: &'static [&'static str],
    reason: &'static str,
}

const CONFINED: [Confined; 4] = [
    Confined {
        words: &["openraft::"],
        places: &["raft/", "node/"],
        reason: "openraft's API changes with nearly every release: wrap what is needed in raft/",
    },
    Confined {
        words: &["sled::"],
        places: &["storage/sled.rs", "storage/mod.rs"],
        reason: "the engine is replaceable: use storage::Engine",
    },
    Confined {
        words: &[
            "etcdserverpb::",
            "mvccpb::",
            "authpb::",
            "v3lockpb::",
            "v3electionpb::",
            "holdfastpb::",
        ],
        places: &["api/", "cli/", "server.rs", "pb.rs", "pb/"],
        reason: "the public protobuf types stop at api, which turns them into checked types",
    },
    Confined {
        words: &["prost::", "pb::"],
        places: &[
            "api/",
            "cli/",
            "server.rs",
            "pb.rs",
            "pb/",
            "backup/etcd.rs",
            "codec.rs",
            "raft/",
            "node/forward.rs",
            "node/members_service.rs",
            "concurrency/peer_service.rs",
        ],
        reason: "protobuf is for the wire: between members it stops where messages are decoded",
    },
];

/// What the replicated state machine does without, so that the same log gives the same state.
const NOT_IN_MACHINE: [&str; 21] = [
    "tokio::",
    "futures::",
    "tracing::",
    "tonic::",
    "prost::",
    "rand::",
    "crate::clock",
    "crate::metrics",
    "crate::vfs",
    "UNIX_EPOCH",
    "std::thread",
    "std::sync::mpsc",
    "std::fs",
    "std::net",
    "std::env",
    "Instant",
    "SystemTime",
    "HashMap",
    "HashSet",
    "async",
    "println!",
];

/// Where a map without an order is looked things up in and never walked through.
const UNORDERED: [(&str, &str); 1] = [("machine/mvcc/live.rs", "HashMap")];

/// Marks of unfinished work, tests included.
const UNFINISHED: [&str; 3] = ["todo!", "unimplemented!", "dbg!"];

const LONGEST_FILE_LINES: usize = 800;

#[test]
fn modules_name_only_what_lies_below_them() {
    report(check_sources(|file, found| {
        let Some(own) = layer(file.module()) else {
            if !["lib", "main"].contains(&file.module()) {
                found.push(file.at(1, "is in no layer: add its module to LAYERS in tests/tidy.rs"));
            }
            return;
        };
        for (line, target) in crate_paths(&file.code) {
            let Some(theirs) = layer(&target) else { continue };
            let allowed = target == file.module() || theirs < own || (own == TOP && theirs == TOP);
            if !allowed {
                let text = format!("names crate::{target}, which does not lie below it");
                found.push(file.at(line, &text));
            }
        }
    }));
}

#[test]
fn dependencies_are_named_only_where_they_belong() {
    report(check_sources(|file, found| {
        for Confined { words, places, reason } in &CONFINED {
            let at_home = places.iter().any(|place| {
                file.path == *place || (place.ends_with('/') && file.path.starts_with(place))
            });
            for word in words.iter().filter(|_| !at_home) {
                for line in lines_naming(&file.code, word) {
                    found.push(file.at(line, &format!("names {word} - {reason}")));
                }
            }
        }
    }));
}

#[test]
fn the_machine_is_pure() {
    report(check_sources(|file, found| {
        for word in NOT_IN_MACHINE.iter().filter(|_| file.module() == "machine") {
            if UNORDERED.contains(&(file.path.as_str(), *word)) {
                continue;
            }
            for line in lines_naming(&file.code, word) {
                let text = format!("uses {word}: the machine has only the log to go by");
                found.push(file.at(line, &text));
            }
        }
    }));
}

#[test]
fn files_say_what_they_are_for_and_are_finished_and_short() {
    report(check_sources(|file, found| {
        if !file.text.starts_with("//!") {
            found.push(file.at(1, "does not open with a //! header that says what it is for"));
        }
        let lines = file.text.lines().count();
        if lines > LONGEST_FILE_LINES {
            let text = format!("has {lines} lines, {LONGEST_FILE_LINES} are the limit: split it");
            found.push(file.at(lines, &text));
        }
        let everything = without_comments_and_strings(&file.text);
        for word in UNFINISHED {
            for line in lines_naming(&everything, word) {
                found.push(file.at(line, &format!("has a {word}")));
            }
        }
    }));
}

#[test]
fn every_mutant_is_in_the_table_and_every_line_of_it_is_a_mutant() {
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mutants/table");
    let table = fs::read_to_string(table).unwrap();
    let lines = table.lines().filter(|line| !line.starts_with('#'));
    let mut listed: Vec<String> =
        lines.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    listed.sort();
    let asked = RefCell::new(Vec::new());
    report(check_sources(|file, _| {
        for question in file.text.split("mutant::is(\"").skip(1) {
            if file.module() != "mutant" {
                let name = question.split('"').next().unwrap_or_default();
                asked.borrow_mut().push(name.to_owned());
            }
        }
    }));
    let mut asked = asked.into_inner();
    asked.sort();
    assert_eq!(listed, asked);
}

struct Source {
    /// Below `src/`, with slashes.
    path: String,
    text: String,
    /// Without comments, strings and tests.
    code: String,
}

impl Source {
    fn new(path: String, text: String) -> Source {
        let is_test = path.ends_with("/tests.rs") || path.contains("/tests/");
        let stripped = without_comments_and_strings(&text);
        let product = stripped.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let code = if is_test { String::new() } else { product.to_owned() };
        Source { path, text, code }
    }

    /// The module right below the crate's root: `raft` for `raft/types.rs`, `clock` for `clock.rs`.
    fn module(&self) -> &str {
        self.path.split('/').next().map_or("", |first| first.trim_end_matches(".rs"))
    }

    fn at(&self, line: usize, text: &str) -> String {
        format!("src/{}:{line}: {text}", self.path)
    }
}

fn check_sources(check: impl Fn(&Source, &mut Vec<String>)) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    collect_rust_files(&root, &mut paths);
    paths.sort();
    assert!(!paths.is_empty(), "no sources in {}", root.display());
    let mut found = Vec::new();
    for path in paths {
        let below = path.strip_prefix(&root).expect("it was found below the root");
        let name = below.components().map(|part| part.as_os_str().to_string_lossy());
        let name = name.collect::<Vec<_>>().join("/");
        check(&Source::new(name, fs::read_to_string(&path).unwrap()), &mut found);
    }
    found
}

fn collect_rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn report(found: Vec<String>) {
    assert!(found.is_empty(), "{} findings:\n\n{}\n", found.len(), found.join("\n"));
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|row| row.contains(&module))
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// The lines, from one, that name `word` as a whole word; a word that is a path's start only where a
/// path starts, so that `storage::sled::` is not the crate `sled::`.
fn lines_naming(code: &str, word: &str) -> Vec<usize> {
    let places = code.match_indices(word).filter(|(at, _)| {
        let (before, after) = (&code[..*at], &code[at + word.len()..]);
        let continues = before.ends_with(is_word)
            || is_crate(word)
                && before.strip_suffix("::").is_some_and(|path| path.ends_with(is_word));
        let goes_on = word.ends_with(is_word) && after.starts_with(is_word);
        !continues && !goes_on
    });
    places.map(|(at, _)| line_of(code, at)).collect()
}

/// A dependency, rather than a module of ours, which is reached through other modules.
fn is_crate(word: &str) -> bool {
    word.ends_with("::") && !word.ends_with("pb::")
}

fn line_of(code: &str, at: usize) -> usize {
    1 + code[..at].matches('\n').count()
}

/// What follows each `crate::`, with its line; for `crate::{a::B, c}` both `a` and `c`.
fn crate_paths(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, start) in code.match_indices("crate::") {
        if code[..at].ends_with(is_word) {
            continue;
        }
        let rest = &code[at + start.len()..];
        let line = line_of(code, at);
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0_i32;
            let mut item = String::new();
            for character in group.chars() {
                match character {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => found.push((line, first_word(&std::mem::take(&mut item)))),
                    _ if depth == 0 => item.push(character),
                    _ => {}
                }
            }
            found.push((line, first_word(&item)));
        } else {
            found.push((line, first_word(rest)));
        }
    }
    found
}

fn first_word(text: &str) -> String {
    text.trim_start().chars().take_while(|character| is_word(*character)).collect()
}

/// The same text with comments gone and strings empty, line by line.
fn without_comments_and_strings(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(hashes) = raw_string(rest).filter(|_| !code.ends_with(is_word)) {
            let (open, close) = (hashes + 2, format!("\"{}", "#".repeat(hashes)));
            rest[open..].find(&close).map_or(rest.len(), |end| open + end + close.len())
        } else if character == '"' {
            string_bytes(rest)
        } else if rest.starts_with("'\"'") {
            3
        } else if let Some(escape) = rest.strip_prefix("'\\") {
            escape.char_indices().skip(1).find(|(_, c)| *c == '\'').map_or(2, |(at, _)| at + 3)
        } else {
            0
        };
        if skipped == 0 {
            code.push(character);
            rest = &rest[character.len_utf8()..];
        } else {
            code.extend(rest[..skipped].chars().filter(|character| *character == '\n'));
            rest = &rest[skipped..];
        }
    }
    code
}

/// How many hashes the raw string has that begins here.
fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix('r')?;
    let hashes = after.chars().take_while(|character| *character == '#').count();
    after[hashes..].starts_with('"').then_some(hashes)
}

/// How long the string is that begins here, quotes included.
fn string_bytes(text: &str) -> usize {
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[test]
fn the_checks_see_code_and_not_what_is_written_about_it() {
    let text = "//! uses tokio::\nlet a = \"tokio::\\\"\"; /* tokio:: */\nlet b = r#\"\"tokio::\"#;\n\
                let quote = '\"'; let escape = '\\''; tokio::spawn();\n\
                #[cfg(test)]\nmod tests { use tokio::test; }\n";
    let file = Source::new("machine/mod.rs".to_owned(), text.to_owned());
    assert_eq!(lines_naming(&file.code, "tokio::"), [4]);
    assert_eq!(lines_naming("use crate::storage::sled::Sled; use ::sled::Db;", "sled::").len(), 1);
    assert_eq!(lines_naming("crate::pb::etcdserverpb::PutRequest", "pb::").len(), 1);
    assert_eq!(lines_naming("MyHashMap HashMapper HashMap", "HashMap").len(), 1);
}

#[test]
fn grouped_imports_are_taken_apart() {
    let names = |code| crate_paths(code).into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    assert_eq!(
        names("use crate::{api::{kv, lease}, node};\ncrate::raft::x"),
        ["api", "node", "raft"]
    );
    assert_eq!(names("$crate::a; mycrate::b"), ["a"]);
}
