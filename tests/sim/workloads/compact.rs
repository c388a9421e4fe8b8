//! Compacts what the witness has seen already.

use std::time::Duration;

use holdfast::pb::etcdserverpb::CompactionRequest;
use holdfast::pb::etcdserverpb::kv_client::KvClient;

use crate::client::Client;
use crate::record::{Answered, Asked};

const INTERVAL: Duration = Duration::from_secs(4);

pub async fn compact(mut client: Client) {
    while !client.is_over() {
        client.pause(INTERVAL).await;
        let revision = client.record.witnessed.borrow().revision() - 1;
        let mut kv = KvClient::new(client.channel());
        let request = CompactionRequest { revision, physical: false };
        let call = async { Ok((kv.compact(request).await?.into_inner().header, Answered::Done)) };
        client.call(Asked::Compact { revision }, call).await;
    }
}
