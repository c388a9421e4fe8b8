//! Durations as Go writes them, which is how etcd's flags take them.

use std::time::Duration;

/// `1h30m`, `1.5s`, `250ms`, `0`; `None` for anything else, also for a negative one or one that is
/// longer than Go's longest, 292 years.
pub(super) fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut total_ns: u128 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number_end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
        let (number, after) = rest.split_at(number_end);
        let unit_end = after.find(|letter: char| letter.is_ascii_digit() || letter == '.');
        let (unit, after) = after.split_at(unit_end.unwrap_or(after.len()));
        total_ns = total_ns.checked_add(nanoseconds(number, unit)?)?;
        rest = after;
    }
    i64::try_from(total_ns).ok().and_then(|ns| u64::try_from(ns).ok()).map(Duration::from_nanos)
}

fn nanoseconds(number: &str, unit: &str) -> Option<u128> {
    let ns_a_unit: u128 = match unit {
        "ns" => 1,
        "us" | "µs" | "μs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let digits =
        |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u128>().ok() };
    let whole = digits(whole)?.checked_mul(ns_a_unit)?;
    // What is smaller than a nanosecond is cut off.
    let fraction = &fraction[..fraction.len().min(15)];
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    whole.checked_add(digits(fraction)? * ns_a_unit / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        for (text, ms) in [
            ("0", 0),
            ("0s", 0),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("1.5s", 1_500),
            (".5s", 500),
            ("2.s", 2_000),
            ("250ms", 250),
            ("1h0m0.25s", 3_600_250),
            ("+3s", 3_000),
            ("7000us", 7),
            ("7000µs", 7),
        ] {
            assert_eq!(parse(text), Some(Duration::from_millis(ms)), "{text}");
        }
        assert_eq!(parse("1ns"), Some(Duration::from_nanos(1)));
        for bad in ["", "5", "s", ".s", "-1s", "1d", "1 s", "1.2.3s", "1h5", "9999999h", "1e3s"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
