//! The protobuf codec of every service here, with buffers sized for small messages.
//!
//! tonic's own codec reserves 8 KiB for each message it encodes, hundreds of times the size of
//! an acknowledgement. `build.rs` names [`LeanCodec`] as the codec of the generated code.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// How much to reserve at first; a larger message makes its buffer grow.
const FIRST_BYTES: usize = 512;

/// How much a stream gathers before it hands a piece to HTTP/2.
const YIELD_BYTES: usize = 32 * 1024;

/// Encodes `T` and decodes `U` as `tonic_prost::ProstCodec` does, in smaller buffers.
#[derive(Debug, Clone)]
pub struct LeanCodec<T, U> {
    messages: PhantomData<(T, U)>,
}

impl<T, U> Default for LeanCodec<T, U> {
    fn default() -> Self {
        LeanCodec { messages: PhantomData }
    }
}

impl<T, U> Codec for LeanCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(FIRST_BYTES, YIELD_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(FIRST_BYTES, YIELD_BYTES))
    }
}
