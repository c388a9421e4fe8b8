//! Defects that can be switched on, one at a time, to see that the tests notice.
//!
//! A place that matters asks `mutant::is("name")` and does the wrong thing if so. Only a build with
//! debug assertions ever gets "yes", for the name in the environment variable `HOLDFAST_MUTANT`; in a
//! release the question is the constant "no" and the defect is not compiled at all.
//!
//! `tests/mutants/table` names each, with the run that must fail because of it.

/// Whether this process is the mutant `name`.
#[cfg(debug_assertions)]
pub fn is(name: &str) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var("HOLDFAST_MUTANT").ok());
    chosen.as_deref() == Some(name)
}

/// No: mutants are for tests.
#[cfg(not(debug_assertions))]
pub const fn is(_name: &str) -> bool {
    false
}
