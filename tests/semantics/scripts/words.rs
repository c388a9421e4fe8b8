//! The words of a line, and the values they stand for.

use std::collections::BTreeMap;

use bytes::Bytes;

/// What bytes may be written without quotes.
fn is_bare(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_-/+#:".contains(&byte)
}

/// From this length on, a value of one repeated byte is printed as `BYTE*LENGTH`.
const LONG: usize = 40;

/// What a script's revisions, leases and hashes are called.
///
/// Revisions count from the state at the start of the script, which is `@1` as on a fresh store, so
/// that a script reads alike wherever it runs. What the server picks has the name that the script
/// gave it, or a number in the order of its appearance.
#[derive(Default)]
pub struct Names {
    /// The store's revision at the start of the script.
    pub base: i64,
    leases: BTreeMap<String, i64>,
    hashes: Vec<u32>,
}

impl Names {
    pub fn new(base: i64) -> Names {
        Names { base, ..Names::default() }
    }

    pub fn revision(&self, revision: i64) -> String {
        // Zero and below have meanings of their own.
        if revision <= 0 { revision.to_string() } else { format!("@{}", revision - self.base + 1) }
    }

    pub fn name_lease(&mut self, name: &str, id: i64) {
        self.leases.insert(name.to_owned(), id);
    }

    pub fn lease(&self, id: i64) -> String {
        match self.leases.iter().find(|(_, named)| **named == id) {
            Some((name, _)) => name.clone(),
            None => id.to_string(),
        }
    }

    pub fn hash(&mut self, hash: u32) -> String {
        let known = self.hashes.iter().position(|known| *known == hash);
        let place = known.unwrap_or_else(|| {
            self.hashes.push(hash);
            self.hashes.len() - 1
        });
        format!("#{}", place + 1)
    }

    /// A plain number, or a revision of the script.
    pub fn parse_number(&self, text: &str) -> Result<i64, String> {
        let number = match text.strip_prefix('@') {
            Some(relative) => match relative.parse::<i64>() {
                // What was before the script began differs from run to run.
                Ok(relative) if relative >= 1 => Some(self.base + relative - 1),
                _ => None,
            },
            None => match text {
                "max" => Some(i64::MAX),
                "min" => Some(i64::MIN),
                _ => text.parse().ok(),
            },
        };
        number.ok_or_else(|| format!("{text:?} is no number"))
    }

    pub fn parse_lease(&self, text: &str) -> Result<i64, String> {
        match self.leases.get(text) {
            Some(id) => Ok(*id),
            None => self.parse_number(text).map_err(|_| format!("{text:?} is no lease")),
        }
    }
}

/// Splits at spaces, except inside quotes.
pub fn split(line: &str) -> Result<Vec<&str>, String> {
    let mut words = Vec::new();
    let mut rest = line.trim();
    while !rest.is_empty() {
        let end = find(rest, " ")?.unwrap_or(rest.len());
        words.push(&rest[..end]);
        rest = rest[end..].trim_start();
    }
    Ok(words)
}

/// What stands before and after the first `pattern` that is not inside quotes.
pub fn split_once<'t>(text: &'t str, pattern: &str) -> Result<Option<(&'t str, &'t str)>, String> {
    Ok(find(text, pattern)?.map(|at| (&text[..at], &text[at + pattern.len()..])))
}

fn find(text: &str, pattern: &str) -> Result<Option<usize>, String> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, character) in text.char_indices() {
        if !quoted && text[at..].starts_with(pattern) {
            return Ok(Some(at));
        }
        match character {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ => {}
        }
    }
    if quoted { Err(format!("a quote is not closed in {text:?}")) } else { Ok(None) }
}

/// Bare or in quotes, and `*N` behind it to repeat it.
pub fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let (literal, rest) = match text.strip_prefix('"') {
        Some(quoted) => unquote(quoted)?,
        None => {
            let end = text.find('*').unwrap_or(text.len());
            (text.as_bytes()[..end].to_vec(), &text[end..])
        }
    };
    if !text.starts_with('"') && (literal.is_empty() || !literal.iter().all(|b| is_bare(*b))) {
        return Err(format!("{text:?} needs quotes"));
    }
    let times = match rest.strip_prefix('*') {
        Some(times) => times.parse().map_err(|_| format!("{times:?} is no count"))?,
        None if rest.is_empty() => 1,
        None => return Err(format!("{rest:?} behind {literal:?}")),
    };
    Ok(literal.repeat(times).into())
}

/// The bytes up to the closing quote, and what follows it.
fn unquote(text: &str) -> Result<(Vec<u8>, &str), String> {
    let mut bytes = Vec::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((bytes, &text[at + 1..])),
            '\\' => match characters.next() {
                Some((_, '0')) => bytes.push(0),
                Some((_, 'n')) => bytes.push(b'\n'),
                Some((_, escaped @ ('"' | '\\'))) => bytes.push(escaped as u8),
                Some((at, 'x')) => {
                    let digits = text.get(at + 1..at + 3).unwrap_or_default();
                    let byte = u8::from_str_radix(digits, 16);
                    bytes.push(byte.map_err(|_| format!("{digits:?} is no byte"))?);
                    characters.next();
                    characters.next();
                }
                other => return Err(format!("an escape {other:?} in {text:?}")),
            },
            other => bytes.extend(other.to_string().into_bytes()),
        }
    }
    Err(format!("a quote is not closed in {text:?}"))
}

/// `KEY`, `KEY..END`, `KEY..` for all keys from KEY on, `..` for everything: as key and range end.
pub fn parse_range(text: &str) -> Result<(Bytes, Bytes), String> {
    let zero = Bytes::from_static(&[0]);
    match split_once(text, "..")? {
        None => Ok((parse_bytes(text)?, Bytes::new())),
        Some(("", "")) => Ok((zero.clone(), zero)),
        Some((key, "")) => Ok((parse_bytes(key)?, zero)),
        Some((key, end)) => Ok((parse_bytes(key)?, parse_bytes(end)?)),
    }
}

pub fn show_bytes(bytes: &[u8]) -> String {
    if bytes.len() >= LONG && bytes.iter().all(|byte| *byte == bytes[0]) {
        return format!("{}*{}", show_bytes(&bytes[..1]), bytes.len());
    }
    if !bytes.is_empty() && bytes.iter().all(|byte| is_bare(*byte)) {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    let mut text = String::from("\"");
    for byte in bytes {
        match byte {
            0 => text.push_str("\\0"),
            b'\n' => text.push_str("\\n"),
            b'"' => text.push_str("\\\""),
            b'\\' => text.push_str("\\\\"),
            b' '..=b'~' => text.push(*byte as char),
            _ => text.push_str(&format!("\\x{byte:02x}")),
        }
    }
    text + "\""
}

#[test]
fn bytes_are_read_as_they_are_printed() {
    let long = vec![b'x'; 100];
    for bytes in [&b"a/b-1"[..], b"", b"\0", b"a b", b"\"\\\n", b"\xff\x01", b"a*2", b"a=b", &long]
    {
        let shown = show_bytes(bytes);
        assert_eq!(parse_bytes(&shown).unwrap(), bytes, "{shown}");
    }
    for wrong in ["", "a b", "a.b", "\"a", "\"a\"b", "a*", "\"\\q\"", "*3"] {
        assert!(parse_bytes(wrong).is_err(), "{wrong}");
    }
}
