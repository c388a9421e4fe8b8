//! Script files: found, read, and written anew with what etcd answers.

use std::fs;
use std::path::{Path, PathBuf};

/// Parts what is done from what is answered.
const ANSWERS: &str = "---";
/// Parts etcd's answers from Holdfast's, where they differ on purpose.
const HOLDFAST_ANSWERS: &str = "--- holdfast";

/// A script. Its file is described in `tests/scripts/README.md`.
pub struct Script {
    /// Its path below `tests/scripts/`, without the ending.
    pub name: String,
    path: PathBuf,
    /// Everything before the answers.
    head: String,
    /// Each step with the number of its first line.
    pub steps: Vec<(usize, Vec<String>)>,
    /// It needs a store that nothing was ever written to.
    pub fresh: bool,
    /// It speaks of what only a running member has.
    pub without_core: bool,
    /// It asks for what etcd does not survive, or does not answer alike twice.
    pub without_etcd: bool,
    pub answers_of_etcd: Vec<String>,
    differs: Option<Vec<String>>,
}

impl Script {
    pub fn answers_of_holdfast(&self) -> &[String] {
        self.differs.as_ref().unwrap_or(&self.answers_of_etcd)
    }

    /// # Errors
    ///
    /// What is wrong with the file.
    fn read(name: String, path: PathBuf, text: &str) -> Result<Script, String> {
        let lines: Vec<&str> = text.lines().collect();
        let part = |line| lines.iter().position(|found| *found == line);
        let end = part(ANSWERS).unwrap_or(lines.len());
        let own = part(HOLDFAST_ANSWERS).unwrap_or(lines.len());
        if own < end {
            return Err(format!("{HOLDFAST_ANSWERS:?} comes after {ANSWERS:?}"));
        }
        let collect = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
        let mut script = Script {
            name,
            path,
            head: lines[..end].iter().map(|line| format!("{line}\n")).collect(),
            steps: Vec::new(),
            fresh: false,
            without_core: false,
            without_etcd: false,
            answers_of_etcd: collect(lines.get(end + 1..own).unwrap_or_default()),
            differs: lines.get(own + 1..).map(collect),
        };
        if !lines.first().is_some_and(|line| line.starts_with("# ")) {
            return Err("the first line says what the script protects".into());
        }
        let mut says_why = false;
        for (number, line) in (1..).zip(&lines[..end]) {
            match *line {
                comment if comment.is_empty() || comment.starts_with('#') => {}
                "store: fresh" => script.fresh = true,
                "without: core" => script.without_core = true,
                "without: etcd" => script.without_etcd = true,
                reason if reason.starts_with("differs: ") => says_why = true,
                inner if inner.starts_with(' ') => match script.steps.last_mut() {
                    Some((_, step)) => step.push(inner.to_owned()),
                    None => return Err(format!("line {number} belongs to no step")),
                },
                step => script.steps.push((number, vec![step.to_owned()])),
            }
        }
        if script.steps.is_empty() {
            return Err("there is no step".into());
        }
        if says_why != script.differs.is_some() {
            return Err(format!("`differs: REASON` and {HOLDFAST_ANSWERS:?} go together"));
        }
        Ok(script)
    }

    /// Writes the file anew with these answers of etcd. Those of Holdfast, where they differ, stay.
    pub fn record(&self, answers: &[String]) {
        let mut text = format!("{}{ANSWERS}\n", self.head);
        let mut add = |lines: &[String]| lines.iter().for_each(|line| text += &format!("{line}\n"));
        add(answers);
        if let Some(differs) = &self.differs {
            add(&[HOLDFAST_ANSWERS.to_owned()]);
            add(differs);
        }
        fs::write(&self.path, text).expect("a script can be written");
    }
}

/// The scripts whose name contains what `HOLDFAST_SCRIPT` says, all when it is not set.
pub fn all() -> Vec<Script> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let mut paths = Vec::new();
    collect(&root, &mut paths);
    paths.sort();
    assert!(!paths.is_empty(), "there are scripts in {}", root.display());
    let wanted = std::env::var("HOLDFAST_SCRIPT").unwrap_or_default();
    let mut scripts = Vec::new();
    for path in paths {
        let below = path.strip_prefix(&root).expect("it was found there").with_extension("");
        let name = below.to_string_lossy().replace('\\', "/");
        if name.contains(&wanted) {
            let text = fs::read_to_string(&path).expect("a script can be read");
            let script = Script::read(name.clone(), path, &text);
            scripts.push(script.unwrap_or_else(|reason| panic!("{name}: {reason}")));
        }
    }
    scripts
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("the folder can be read") {
        let path = entry.expect("the folder can be read").path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "txt") {
            found.push(path);
        }
    }
}

#[test]
fn a_script_has_steps_headers_and_answers() {
    let read = |text| Script::read("s".into(), "s.txt".into(), text);
    let text = "# Why.\nstore: fresh\n\ntxn\n  then put a=b\nget a\n---\n@2 txn\n";
    let script = read(text).unwrap();
    assert!(script.fresh && !script.without_core);
    assert_eq!(script.steps[0], (4, vec!["txn".to_owned(), "  then put a=b".to_owned()]));
    assert_eq!(script.steps[1].0, 6);
    assert_eq!(script.answers_of_holdfast(), ["@2 txn"]);
    let differing = read("# Why.\ndiffers: reason\nget a\n---\n1\n--- holdfast\n2\n").unwrap();
    assert_eq!(
        (differing.answers_of_etcd[0].as_str(), &*differing.answers_of_holdfast()[0]),
        ("1", "2")
    );
    for wrong in [
        "get a\n---\n",
        "# Why.\n---\n",
        "# Why.\n  get a\n",
        "# Why.\ndiffers: x\nget a\n---\n",
        "# Why.\nget a\n---\n--- holdfast\n",
    ] {
        assert!(read(wrong).is_err(), "{wrong}");
    }
}
