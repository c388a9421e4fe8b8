//! Frames that arrive late, some of them twice and some before others that were sent earlier.
//!
//! The kernel this is for has no `netem`. While the fault is there, packet filters hand what members
//! send each other to a tap device in the bridge, and a thread puts it back by the same device when it
//! is due. The bridge does not learn from that device, so everything else goes as it always does.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

use crate::shell::run;

/// The device, in the network namespace of the run.
pub const DEVICE: &str = "late";

/// How late frames are, one way.
const DELAY_MS: Range<u64> = 20..80;
/// No frame is less late than this.
pub const LEAST: Duration = Duration::from_millis(DELAY_MS.start);
/// A link is as late as it is for so long, then it is drawn anew: drawn for each frame, a busy link
/// would always be as late as its latest.
const DRAWN_ANEW: Duration = Duration::from_millis(50);
/// Of all frames so many come twice, and so many do not wait for those before them.
const DOUBLED: f64 = 0.01;
const HURRIED: f64 = 0.04;

/// Frames that are held at most; further ones are lost, as in any switch.
const MOST_HELD: usize = 20_000;
/// Larger than any frame: a device that promises nothing gets large segments in pieces.
const FRAME_BYTES: usize = 4096;

const TUN: &str = "/dev/net/tun";
const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
/// `IFF_TAP | IFF_NO_PI`: frames, and nothing before them.
const TAP: u16 = 0x0002 | 0x1000;

/// What has become of the frames.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub late: u64,
    pub doubled: u64,
    /// Due before one that came earlier on the same link.
    pub overtook: u64,
    pub lost: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { late, doubled, overtook, lost } = self;
        write!(f, "{late} frames late, {doubled} of them twice, {overtook} overtook, {lost} lost")
    }
}

/// The device and the thread behind it. Both go when this is dropped; what is held then comes at once.
#[derive(Debug)]
pub struct Relay {
    stop: Arc<AtomicBool>,
    counts: Arc<Mutex<Counts>>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Makes the device a port of `bridge`. Nothing is sent to it yet.
    ///
    /// # Errors
    ///
    /// If the kernel has no such devices.
    pub fn start(bridge: &str, seed: u64) -> Result<Relay, String> {
        let tap = open().map_err(|e| format!("{TUN}: {e}"))?;
        // A bridge has the lowest of its ports' addresses, which must not change under the clients.
        run("ip", &["link", "set", DEVICE, "address", "fe:ff:ff:ff:ff:ff", "master", bridge])?;
        let port = "learning off flood off mcast_flood off bcast_flood off";
        let port: Vec<&str> = port.split(' ').collect();
        run("ip", &[&["link", "set", DEVICE, "type", "bridge_slave"], &port[..]].concat())?;
        run("ip", &["link", "set", DEVICE, "up"])?;
        let stop: Arc<AtomicBool> = Arc::default();
        let counts: Arc<Mutex<Counts>> = Arc::default();
        let thread = std::thread::spawn({
            let (stop, counts) = (stop.clone(), counts.clone());
            move || relay(tap, Links::new(seed), &stop, &counts)
        });
        Ok(Relay { stop, counts, thread: Some(thread) })
    }

    pub fn counts(&self) -> Counts {
        *self.counts.lock().expect("counting does not panic")
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether frames can be made late here.
pub fn can_be_had() -> bool {
    Path::new(TUN).exists()
}

#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

fn open() -> std::io::Result<File> {
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).expect("a small flag");
    let tap = File::options().read(true).write(true).custom_flags(nonblocking).open(TUN)?;
    let mut request = Request { name: [0; 16], flags: TAP, rest: [0; 22] };
    request.name[..DEVICE.len()].copy_from_slice(DEVICE.as_bytes());
    // SAFETY: TUNSETIFF reads a `struct ifreq`, which has this layout and size, and keeps no pointer.
    unsafe { ioctl(&tap, Setter::<TUNSETIFF, Request>::new(request))? };
    Ok(tap)
}

fn relay(mut tap: File, mut links: Links, stop: &AtomicBool, counts: &Mutex<Counts>) {
    let mut buffer = [0; FRAME_BYTES];
    while !stop.load(Ordering::SeqCst) {
        let now = Instant::now();
        let rest = links.next_due().map_or(LEAST, |due| due.saturating_duration_since(now));
        let rest = rest.min(LEAST);
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(rest.subsec_nanos()) };
        // It ends early when there is a frame, and an error here shows again at the read.
        let _ = poll(&mut [PollFd::new(&tap, PollFlags::IN)], Some(&timeout));
        loop {
            match tap.read(&mut buffer) {
                Ok(length) => links.hold(&buffer[..length], Instant::now()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // There is nothing more, or the device is not up yet.
                Err(_) => break,
            }
        }
        while let Some(frame) = links.take(Instant::now()) {
            // What the bridge does not take is lost.
            let _ = tap.write(&frame);
        }
        *counts.lock().expect("counting does not panic") = links.counts;
    }
    while let Some(Reverse(held)) = links.held.pop() {
        let _ = tap.write(&held.frame);
    }
}

/// Ordered by when it is due.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    due: Instant,
    number: u64,
    frame: Vec<u8>,
}

#[derive(Debug)]
struct Link {
    delay: Duration,
    drawn: Instant,
    /// When the last frame that waits for those before it is due.
    last: Instant,
}

/// What is held of all links, each from one hardware address to another.
#[derive(Debug)]
struct Links {
    random: StdRng,
    held: BinaryHeap<Reverse<Held>>,
    links: HashMap<[u8; 12], Link>,
    number: u64,
    counts: Counts,
}

impl Links {
    fn new(seed: u64) -> Links {
        Links {
            random: StdRng::seed_from_u64(seed),
            held: BinaryHeap::new(),
            links: HashMap::new(),
            number: 0,
            counts: Counts::default(),
        }
    }

    /// Takes a frame that came now, and settles when it is due.
    fn hold(&mut self, frame: &[u8], now: Instant) {
        // Only IPv4 was sent here by the members; what else there is, the device itself says.
        let (Some(addresses), Some([0x08, 0x00])) = (frame.first_chunk::<12>(), frame.get(12..14))
        else {
            return;
        };
        if self.held.len() >= MOST_HELD {
            self.counts.lost += 1;
            return;
        }
        let random = &mut self.random;
        let draw = |random: &mut StdRng| Duration::from_millis(random.random_range(DELAY_MS));
        let link = self.links.entry(*addresses).or_insert_with(|| Link {
            delay: draw(random),
            drawn: now,
            last: now,
        });
        if now.saturating_duration_since(link.drawn) >= DRAWN_ANEW {
            (link.delay, link.drawn) = (draw(random), now);
        }
        let due = if random.random_bool(HURRIED) {
            self.counts.overtook += u64::from(now + LEAST < link.last);
            now + LEAST
        } else {
            link.last = link.last.max(now + link.delay);
            link.last
        };
        self.counts.late += 1;
        let again = random.random_bool(DOUBLED).then(|| due + draw(random) / 2);
        self.counts.doubled += u64::from(again.is_some());
        for due in [Some(due), again].into_iter().flatten() {
            self.number += 1;
            self.held.push(Reverse(Held { due, number: self.number, frame: frame.to_vec() }));
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.held.peek().map(|Reverse(held)| held.due)
    }

    /// The next frame that is due by now.
    fn take(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.next_due()? > now {
            return None;
        }
        self.held.pop().map(|Reverse(held)| held.frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame of link `link` with this number in it.
    fn frame(link: u8, number: u16) -> Vec<u8> {
        let mut frame = vec![link; 12];
        frame.extend([0x08, 0x00]);
        frame.extend(number.to_be_bytes());
        frame
    }

    #[test]
    fn frames_come_late_some_twice_and_some_before_others() {
        let began = Instant::now();
        let mut links = Links::new(7);
        let (mut arrived, mut now) = (Vec::new(), began);
        for n in 0..1100_u16 {
            now = began + Duration::from_millis(u64::from(n));
            if n < 1000 {
                links.hold(&frame(1, n), now);
            }
            while let Some(frame) = links.take(now) {
                let sent = u16::from_be_bytes([frame[14], frame[15]]);
                assert!(n >= sent + 20, "{sent} arrives at {n}");
                arrived.push(sent);
            }
        }
        while let Some(frame) = links.take(now + Duration::from_secs(1)) {
            arrived.push(u16::from_be_bytes([frame[14], frame[15]]));
        }
        let Counts { late, doubled, overtook, lost } = links.counts;
        assert_eq!((late, lost), (1000, 0));
        assert_eq!(arrived.len() as u64, late + doubled);
        assert!((3..30).contains(&doubled) && (10..60).contains(&overtook), "{:?}", links.counts);
        let backwards = arrived.windows(2).filter(|w| w[1] < w[0]).count();
        assert!(backwards >= 10, "{backwards} of {arrived:?}");
        arrived.sort_unstable();
        arrived.dedup();
        assert_eq!(arrived.len(), 1000, "none is missing");
    }

    #[test]
    fn a_link_that_holds_too_much_loses_the_rest() {
        let now = Instant::now();
        let mut links = Links::new(7);
        for _ in 0..MOST_HELD + 100 {
            links.hold(&frame(1, 0), now);
        }
        assert!(
            links.held.len() <= MOST_HELD + 1 && links.counts.lost >= 100,
            "{:?}",
            links.counts
        );
    }

    #[test]
    fn what_is_no_ipv4_is_left_alone() {
        let mut links = Links::new(7);
        links.hold(&[0xff; 60], Instant::now());
        links.hold(&[8], Instant::now());
        assert!(links.next_due().is_none());
    }
}
