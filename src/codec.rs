//! The protobuf codec of every service here, with buffers sized for small messages.
//!
//! tonic's own codec reserves 8 KiB for each message it encodes, hundreds of times the size of
//! an acknowledgement, and lets the buffer of a large one grow by and by, copying it each time.
//! `build.rs` names [`LeanCodec`] as the codec of the generated code.

use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, EncodeBuf, Encoder};
use tonic_prost::ProstDecoder;

/// How much to reserve at first; a larger message reserves what it takes.
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
    type Encoder = LeanEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        LeanEncoder { messages: PhantomData }
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(FIRST_BYTES, YIELD_BYTES))
    }
}

/// Encodes each message into room of its own size.
#[derive(Debug, Clone)]
pub struct LeanEncoder<T> {
    messages: PhantomData<T>,
}

impl<T: Message> Encoder for LeanEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, message: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(message.encoded_len());
        message.encode(buffer).expect("the buffer has room for the message");
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(FIRST_BYTES, YIELD_BYTES)
    }
}
