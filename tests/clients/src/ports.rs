//! Ports on 127.0.0.1 that no other test, in this process or another, is using.
//!
//! Asking the kernel for "any free port" and letting it go again is a race: the number may be given
//! to the next asker, or to an outgoing connection, before the server binds it. So ports come from
//! below the range that outgoing connections use, and each is held by a locked file for as long as
//! the [`Port`] lives, also while the member that uses it is down.

use std::fs::File;
use std::net::TcpListener;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Above the well-known ports, below Linux' ephemeral range (32768 to 60999).
const FIRST: u16 = 12_000;
const LAST: u16 = 32_000;

/// A port of 127.0.0.1, reserved until this is dropped.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _held: File,
}

impl Port {
    /// Reserves a port that nobody listens on.
    ///
    /// # Panics
    ///
    /// If all 20,000 are taken.
    pub fn reserve() -> Port {
        static NEXT: Mutex<Option<u16>> = Mutex::new(None);
        let mut next = NEXT.lock().expect("reserving does not panic halfway");
        for _ in FIRST..LAST {
            let number = next.unwrap_or_else(|| rand::random_range(FIRST..LAST));
            *next = Some(if number + 1 < LAST { number + 1 } else { FIRST });
            if let Some(port) = Port::try_reserve(number) {
                return port;
            }
        }
        panic!("every port from {FIRST} to {LAST} is taken");
    }

    /// Waits until exactly this port is free, for tests of the default ports.
    ///
    /// # Panics
    ///
    /// If it is still taken after `limit`.
    pub fn reserve_exactly(number: u16, limit: Duration) -> Port {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(port) = Port::try_reserve(number) {
                return port;
            }
            assert!(Instant::now() < deadline, "port {number} is in use by another program");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The port's number.
    pub fn number(&self) -> u16 {
        self.number
    }

    fn try_reserve(number: u16) -> Option<Port> {
        let dir = std::env::temp_dir().join("holdfast-test-ports");
        std::fs::create_dir_all(&dir).expect("the temporary directory is writable");
        let held = File::create(dir.join(number.to_string())).expect("a lock file can be made");
        held.try_lock().ok()?;
        TcpListener::bind(("127.0.0.1", number)).ok()?;
        Some(Port { number, _held: held })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_port_is_given_to_nobody_else() {
        let ports: Vec<Port> = (0..50).map(|_| Port::reserve()).collect();
        let mut numbers: Vec<u16> = ports.iter().map(Port::number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 50);
        assert!(Port::try_reserve(numbers[0]).is_none());
    }
}
