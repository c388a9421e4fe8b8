//! Fenced writes: metadata by which a write says which locks its caller believes to hold.
//!
//! Each value of `holdfast-fence` is `NAME=TOKEN`: the name of a plain lock and the fencing token of
//! its holder, in decimal. The last `=` counts, so a name may contain some. A name that is not
//! printable ASCII goes into `holdfast-fence-bin`, in the same form. All fences of a call must hold
//! at the very entry of the log that writes.

use bytes::Bytes;
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::machine::{Command, Fence, Fenced, FencedWrite};

use super::status;

/// Metadata of a request, as text and as bytes.
const FENCE: &str = "holdfast-fence";
const FENCE_BINARY: &str = "holdfast-fence-bin";

/// How many fences a write may have.
const MAX_FENCES: usize = 16;

/// The fences that a call names; none allocates nothing.
///
/// # Errors
///
/// INVALID_ARGUMENT for a value that is no fence, and for too many of them.
pub fn of(metadata: &MetadataMap) -> Result<Vec<Fence>, Status> {
    let mut fences = Vec::new();
    for value in metadata.get_all(FENCE) {
        fences.push(parse(value.as_bytes())?);
    }
    for value in metadata.get_all_bin(FENCE_BINARY) {
        let bytes = value.to_bytes().map_err(|_| status::malformed_fence("it is not base64"))?;
        fences.push(parse(&bytes)?);
    }
    if fences.len() > MAX_FENCES {
        return Err(status::too_many_fences(MAX_FENCES));
    }
    Ok(fences)
}

fn parse(value: &[u8]) -> Result<Fence, Status> {
    let Some(equals) = value.iter().rposition(|byte| *byte == b'=') else {
        return Err(status::malformed_fence("there is no '='"));
    };
    let (name, digits) = (&value[..equals], &value[equals + 1..]);
    let token = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
    match token {
        Some(token) if token > 0 && digits[0].is_ascii_digit() => {
            Ok(Fence { name: Bytes::copy_from_slice(name), token })
        }
        _ => Err(status::malformed_fence("the token is not a positive decimal integer")),
    }
}

/// `write`, if `fences` hold.
pub fn guard(fences: Vec<Fence>, write: FencedWrite) -> Command {
    if !fences.is_empty() {
        return Command::Fenced(Fenced { fences, write });
    }
    match write {
        FencedWrite::Put(put) => Command::Put(put),
        FencedWrite::DeleteRange(delete) => Command::DeleteRange(delete),
        FencedWrite::Txn(txn) => Command::Txn(txn),
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic::metadata::{AsciiMetadataValue, BinaryMetadataValue};

    use super::*;

    fn text(values: &[&'static str]) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        for value in values {
            metadata.append(FENCE, AsciiMetadataValue::from_static(value));
        }
        metadata
    }

    fn fence(name: &'static [u8], token: i64) -> Fence {
        Fence { name: Bytes::from_static(name), token }
    }

    #[test]
    fn fences_are_named_by_text_or_bytes_and_split_at_the_last_equals_sign() {
        assert_eq!(of(&MetadataMap::new()).unwrap(), []);
        let mut metadata = text(&["jobs=7", "a=b/c=8", "=9"]);
        metadata.append_bin(FENCE_BINARY, BinaryMetadataValue::from_bytes(b"\xff\0=10"));
        assert_eq!(
            of(&metadata).unwrap(),
            [fence(b"jobs", 7), fence(b"a=b/c", 8), fence(b"", 9), fence(b"\xff\0", 10)]
        );
    }

    #[test]
    fn what_is_no_fence_is_refused() {
        for value in ["", "jobs", "jobs=", "jobs=0", "jobs=-1", "jobs=+1", "jobs= 1", "7", "j=0x7"]
        {
            let refused = of(&text(&[value])).unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{value}");
        }
        let too_large = of(&text(&["jobs=9223372036854775808"])).unwrap_err();
        assert_eq!(too_large.code(), Code::InvalidArgument);
        assert_eq!(of(&text(&["a=1"; 16])).unwrap().len(), 16);
        assert_eq!(of(&text(&["a=1"; 17])).unwrap_err().code(), Code::InvalidArgument);
    }
}
