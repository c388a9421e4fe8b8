//! The URLs at which a member is to be reached, as a client gives them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// `urls` in the form that flags are brought into, so that a member finds itself among them by
/// comparing text; sorted. `None` when there is none, or one is not `http://HOST:PORT`.
pub fn peer_urls(urls: &[String]) -> Option<Vec<String>> {
    let mut normal = urls.iter().map(|url| peer_url(url.trim())).collect::<Option<Vec<_>>>()?;
    normal.sort_unstable();
    normal.dedup();
    (!normal.is_empty()).then_some(normal)
}

fn peer_url(url: &str) -> Option<String> {
    let (scheme, authority) = url.split_once("://")?;
    // Members do not talk by TLS yet.
    if !scheme.eq_ignore_ascii_case("http") {
        return None;
    }
    let (host, port) = authority.rsplit_once(':')?;
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let port: u16 = port.parse().ok().filter(|port| *port != 0)?;
    if let Some(address) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        let address: Ipv6Addr = address.parse().ok()?;
        return Some(format!("http://{}", SocketAddr::new(address.into(), port)));
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Some(format!("http://{address}:{port}"));
    }
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    let last_label = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    // A number at the end makes it a mistyped address; an empty one no name at all.
    let is_name = host.bytes().all(fits) && !last_label.bytes().all(|byte| byte.is_ascii_digit());
    is_name.then(|| format!("http://{}:{port}", host.to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_come_in_one_form() {
        for (url, normal) in [
            ("http://10.0.0.1:2380", "http://10.0.0.1:2380"),
            ("HTTP://Node-1.Example:02380", "http://node-1.example:2380"),
            ("http://[0:0::1]:2380", "http://[::1]:2380"),
            (" http://node_1:80 ", "http://node_1:80"),
        ] {
            assert_eq!(peer_urls(&[url.to_owned()]), Some(vec![normal.to_owned()]), "{url}");
        }
        let two = ["http://b:1", "http://a:1", "http://B:1"].map(str::to_owned);
        assert_eq!(peer_urls(&two), Some(vec!["http://a:1".into(), "http://b:1".into()]));
    }

    #[test]
    fn what_no_member_can_be_reached_at_is_refused() {
        assert_eq!(peer_urls(&[]), None);
        for url in [
            "",
            "10.0.0.1:2380",
            "http://a",
            "http://a:",
            "http://a:0",
            "http://a:+1",
            "http://a:65536",
            "http://:2380",
            "http://a:1/",
            "http://a:1/v3",
            "http://a:1?b",
            "http://u@a:1",
            "https://a:1",
            "unix://a:1",
            "http://10.0.300:1",
            "http://::1:2380",
            "http://[::1:2380",
        ] {
            assert_eq!(peer_urls(&[url.to_owned()]), None, "{url}");
            assert_eq!(peer_urls(&["http://a:1".to_owned(), url.to_owned()]), None, "{url}");
        }
    }
}
