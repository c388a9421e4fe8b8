//! A way to a member that can fall silent: connections stay open and nothing gets through.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub struct Proxy {
    address: SocketAddr,
    silent: watch::Sender<bool>,
}

impl Proxy {
    /// Passes connections on to `target` until it is silenced. To be called inside a tokio runtime.
    pub async fn start(target: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it has an address");
        let (silent, told) = watch::channel(false);
        let target = target.to_owned();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, target.clone(), told.clone()));
            }
        });
        Proxy { address, silent }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// From now on nothing gets through, in neither direction.
    pub fn silence(&self) {
        self.silent.send_replace(true);
    }
}

async fn pass(client: TcpStream, target: String, silent: watch::Receiver<bool>) {
    let member = TcpStream::connect(&target).await.expect("the member listens");
    let (from_client, to_client) = client.into_split();
    let (from_member, to_member) = member.into_split();
    let back = tokio::spawn(copy(from_member, to_client, silent.clone()));
    copy(from_client, to_member, silent).await;
    back.await.expect("copying does not panic");
}

async fn copy(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut silent: watch::Receiver<bool>,
) {
    let mut buffer = [0; 4096];
    loop {
        let read = tokio::select! {
            biased;
            // When the proxy is gone, so are the connections.
            told = async { silent.wait_for(|silent| *silent).await.is_ok() } => {
                if told {
                    std::future::pending::<()>().await;
                }
                return;
            }
            read = from.read(&mut buffer) => read,
        };
        let Ok(count @ 1..) = read else { return };
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
