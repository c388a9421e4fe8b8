//! What Holdfast answers, compared with what etcd answers.

// Real processes, in real time.
#![allow(clippy::disallowed_methods)]

mod cluster;
mod differential;
mod scripts;

// The client tests' own, so that the two never take each other's ports.
#[path = "../clients/src/ports.rs"]
#[allow(dead_code)]
mod ports;
