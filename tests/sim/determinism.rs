//! What a process takes from the operating system without being handed it, decided by the seed.
//!
//! Libraries below us draw from the operating system's randomness: hash maps for the order in which
//! they are walked, tokio for the branch of a `select!` that is looked at first, openraft for its
//! election timeouts. And some read its clock. This program defines the two functions of libc by
//! which all of them ask, so the linker takes these instead; one process runs one seed.

#![allow(unsafe_code, reason = "they stand for two functions of libc and keep their contracts")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The state of splitmix64.
static CHANCE: AtomicU64 = AtomicU64::new(1);
/// Zero outside a simulation: then the time is the real one.
static NOW_NS: AtomicU64 = AtomicU64::new(0);

/// Any moment will do; far from zero, so that nobody subtracts below it.
const BEGINNING_NS: u64 = 1_700_000_000_000_000_000;

/// From now on chance follows from `seed`, and time stands still until [`set_time`].
pub fn begin(seed: u64) {
    CHANCE.store(seed, Ordering::Relaxed);
    NOW_NS.store(BEGINNING_NS, Ordering::Relaxed);
}

/// Moves what libraries take for the time to `elapsed` after the beginning.
pub fn set_time(elapsed: Duration) {
    let elapsed_ns = u64::try_from(elapsed.as_nanos()).expect("a simulation is short");
    NOW_NS.store(BEGINNING_NS + elapsed_ns, Ordering::Relaxed);
}

fn random_u64() -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut z = CHANCE.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
}

#[cfg(target_arch = "x86_64")]
const CLOCK_GETTIME: i64 = 228;
#[cfg(target_arch = "aarch64")]
const CLOCK_GETTIME: i64 = 113;

/// # Safety
///
/// That of libc's: `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer, length) };
    for piece in bytes.chunks_mut(8) {
        piece.copy_from_slice(&random_u64().to_le_bytes()[..piece.len()]);
    }
    isize::try_from(length).expect("a buffer is not longer than that")
}

/// # Safety
///
/// That of libc's: `time` points to a place for the answer.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: i32, time: *mut Timespec) -> i32 {
    let now_ns = NOW_NS.load(Ordering::Relaxed);
    if now_ns == 0 {
        // SAFETY: the arguments are those that the system call takes.
        return unsafe { syscall(CLOCK_GETTIME, i64::from(clock), time) } as i32;
    }
    let (seconds, nanoseconds) = (now_ns / 1_000_000_000, now_ns % 1_000_000_000);
    // SAFETY: the caller's promise.
    unsafe { *time = Timespec { seconds: seconds as i64, nanoseconds: nanoseconds as i64 } };
    0
}
