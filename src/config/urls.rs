//! URLs as flags give them: `http://HOST:PORT` and nothing more.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::ConfigError;

/// An address to listen on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ListenUrl {
    /// Port 0 lets the system choose one.
    pub address: SocketAddr,
}

impl ListenUrl {
    /// Whether the system would refuse to listen on both, as far as the addresses tell.
    pub(super) fn overlaps(self, other: ListenUrl) -> bool {
        let (one, two) = (self.address, other.address);
        one.port() == two.port()
            && one.port() != 0
            && (one.ip() == two.ip()
                || one.is_ipv4() == two.is_ipv4()
                    && (one.ip().is_unspecified() || two.ip().is_unspecified()))
    }
}

impl fmt::Display for ListenUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.address)
    }
}

/// What is wrong with one URL, worded to follow it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    #[error("is not a URL; write it like http://10.0.0.1:2379")]
    NoScheme,
    #[error("asks for TLS, which is not supported yet; use http")]
    Tls,
    #[error("is a unix socket, which is not supported; use http://HOST:PORT")]
    UnixSocket,
    #[error("has an unknown scheme; use http://HOST:PORT")]
    UnknownScheme,
    #[error("carries a user name; remove all between // and @")]
    UserName,
    #[error("does not end after the port; remove what follows it")]
    Path,
    #[error("has no host; write it like http://10.0.0.1:2379")]
    NoHost,
    #[error("has a malformed host; use a name, an IPv4 address or an IPv6 address in brackets")]
    Host,
    #[error("has no port; write it like http://10.0.0.1:2379")]
    NoPort,
    #[error("has a malformed port; choose 1 to 65535")]
    Port,
    #[error(
        "has a name as host, but listening needs an IP address or localhost; 0.0.0.0 listens on \
         every interface"
    )]
    ListenOnName,
}

/// Parses the comma-separated URLs of `flag` to listen on.
///
/// # Errors
///
/// When there is none, one is malformed, or two could not both be listened on.
pub(super) fn listen_urls(
    flag: &'static str,
    text: &str,
    example: &'static str,
) -> Result<Vec<ListenUrl>, ConfigError> {
    let mut urls: Vec<ListenUrl> = Vec::new();
    for url in split(text) {
        let parsed = parse(url)
            .and_then(|parsed| parsed.to_listen())
            .map_err(|problem| ConfigError::Url { flag, url: without_user(url), problem })?;
        if urls.iter().any(|earlier| earlier.overlaps(parsed)) {
            return Err(ConfigError::RepeatedUrl { flag, url: parsed.to_string() });
        }
        urls.push(parsed);
    }
    if urls.is_empty() { Err(ConfigError::NoUrl { flag, example }) } else { Ok(urls) }
}

/// Parses the comma-separated URLs of `flag` for others to connect to, normalised: lower case, and
/// nothing behind the port.
///
/// # Errors
///
/// When there is none, one is malformed, or one is given twice.
pub(super) fn advertised_urls(
    flag: &'static str,
    text: &str,
    example: &'static str,
) -> Result<Vec<String>, ConfigError> {
    let mut urls: Vec<String> = Vec::new();
    for url in split(text) {
        let url = advertised_url(flag, url)?;
        if urls.contains(&url) {
            return Err(ConfigError::RepeatedUrl { flag, url });
        }
        urls.push(url);
    }
    if urls.is_empty() { Err(ConfigError::NoUrl { flag, example }) } else { Ok(urls) }
}

/// One URL for others to connect to, normalised.
pub(super) fn advertised_url(flag: &'static str, url: &str) -> Result<String, ConfigError> {
    match parse(url) {
        Ok(parsed) if parsed.port == 0 => Err(UrlError::Port),
        Ok(parsed) => Ok(parsed.to_string()),
        Err(problem) => Err(problem),
    }
    .map_err(|problem| ConfigError::Url { flag, url: without_user(url), problem })
}

/// Whether a normalised URL names no particular machine, such as `http://0.0.0.0:2379`.
pub(super) fn is_unspecified(url: &str) -> bool {
    parse(url).is_ok_and(|url| matches!(url.host, Host::Ip(ip) if ip.is_unspecified()))
}

/// The items of a comma-separated list, trimmed. An item may come from a folded YAML line, and a
/// list may end with a comma.
pub(super) fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

struct HttpUrl {
    host: Host,
    port: u16,
}

enum Host {
    Ip(IpAddr),
    Name(String),
}

impl HttpUrl {
    fn to_listen(&self) -> Result<ListenUrl, UrlError> {
        let ip = match &self.host {
            Host::Ip(ip) => *ip,
            Host::Name(name) if name == "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Host::Name(_) => return Err(UrlError::ListenOnName),
        };
        Ok(ListenUrl { address: SocketAddr::new(ip, self.port) })
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => write!(f, "http://{}", SocketAddr::new(*ip, self.port)),
            Host::Name(name) => write!(f, "http://{name}:{}", self.port),
        }
    }
}

/// By hand, since the `url` crate forgets whether port 80 was written, and a flag must say it.
fn parse(url: &str) -> Result<HttpUrl, UrlError> {
    let (scheme, rest) = url.split_once("://").ok_or(UrlError::NoScheme)?;
    match scheme.to_ascii_lowercase().as_str() {
        "http" => {}
        "https" => return Err(UrlError::Tls),
        "unix" | "unixs" => return Err(UrlError::UnixSocket),
        _ => return Err(UrlError::UnknownScheme),
    }
    let authority_end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    if authority.contains('@') {
        return Err(UrlError::UserName);
    }
    if !matches!(path, "" | "/") {
        return Err(UrlError::Path);
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or(UrlError::Host)?;
            let address: Ipv6Addr = address.parse().map_err(|_| UrlError::Host)?;
            let port = port.strip_prefix(':').ok_or(UrlError::NoPort)?;
            (Host::Ip(IpAddr::V6(address)), port)
        }
        None => {
            if authority.is_empty() {
                return Err(UrlError::NoHost);
            }
            let (host, port) = authority.split_once(':').ok_or(UrlError::NoPort)?;
            (parse_host(host)?, port)
        }
    };
    if port.is_empty() {
        return Err(UrlError::NoPort);
    }
    // `u16` would also parse a leading plus sign.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(if port.contains(':') { UrlError::Host } else { UrlError::Port });
    }
    Ok(HttpUrl { host, port: port.parse().map_err(|_| UrlError::Port)? })
}

fn parse_host(host: &str) -> Result<Host, UrlError> {
    if host.is_empty() {
        return Err(UrlError::NoHost);
    }
    if let Ok(ip) = host.parse::<Ipv4Addr>() {
        return Ok(Host::Ip(IpAddr::V4(ip)));
    }
    let is_name_byte =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    let last_label = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    // No top-level domain is a number: 10.0.0.300 is a mistyped address, not a name.
    let mistyped_ip = last_label.bytes().all(|byte| byte.is_ascii_digit());
    if mistyped_ip || !host.bytes().all(is_name_byte) {
        return Err(UrlError::Host);
    }
    Ok(Host::Name(host.to_ascii_lowercase()))
}

/// `url` as an error message may show it: a password before the `@` stays out of logs.
pub(super) fn without_user(url: &str) -> String {
    match (url.find("//"), url.rfind('@')) {
        (Some(slashes), Some(at)) if slashes < at => {
            format!("{}...{}", &url[..slashes + 2], &url[at..])
        }
        _ => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalised(url: &str) -> String {
        parse(url).unwrap().to_string()
    }

    fn refusal(url: &str) -> UrlError {
        parse(url).err().unwrap_or_else(|| panic!("{url} was accepted"))
    }

    #[test]
    fn urls_are_normalised_as_text() {
        assert_eq!(normalised("http://localhost:2379"), "http://localhost:2379");
        assert_eq!(normalised("HTTP://Node-1.Example:2379/"), "http://node-1.example:2379");
        assert_eq!(normalised("http://node_1:80"), "http://node_1:80");
        assert_eq!(normalised("http://[0:0::1]:02379"), "http://[::1]:2379");
    }

    #[test]
    fn a_malformed_url_is_refused_for_what_is_wrong_with_it() {
        for (url, problem) in [
            ("", UrlError::NoScheme),
            ("localhost:2379", UrlError::NoScheme),
            ("http:/localhost:2379", UrlError::NoScheme),
            ("https://localhost:2379", UrlError::Tls),
            ("unix://localhost:2379", UrlError::UnixSocket),
            ("unixs:///run/etcd.sock", UrlError::UnixSocket),
            ("ftp://localhost:2379", UrlError::UnknownScheme),
            ("http://u:p@localhost:2379", UrlError::UserName),
            ("http://localhost:2379/v3", UrlError::Path),
            ("http://localhost:2379?a=b", UrlError::Path),
            ("http://localhost:2379#a", UrlError::Path),
            ("http://localhost:2379//", UrlError::Path),
            ("http://", UrlError::NoHost),
            ("http://:2379", UrlError::NoHost),
            ("http://a b:2379", UrlError::Host),
            ("http://10.0.0.300:2379", UrlError::Host),
            ("http://10.0.1:2379", UrlError::Host),
            ("http://...:2379", UrlError::Host),
            ("http://::1:2379", UrlError::NoHost),
            ("http://fe80::1:2379", UrlError::Host),
            ("http://[::1:2379", UrlError::Host),
            ("http://[localhost]:2379", UrlError::Host),
            ("http://localhost", UrlError::NoPort),
            ("http://localhost:", UrlError::NoPort),
            ("http://[::1]", UrlError::NoPort),
            ("http://localhost:+80", UrlError::Port),
            ("http://localhost:65536", UrlError::Port),
            ("http://localhost:http", UrlError::Port),
        ] {
            assert_eq!(refusal(url), problem, "{url}");
        }
    }

    #[test]
    fn listening_needs_an_address_and_localhost_is_one() {
        let listen = |text| listen_urls("listen-client-urls", text, "http://127.0.0.1:2379");
        let urls = listen("http://localhost:2379, http://[::]:0,").unwrap();
        let shown: Vec<String> = urls.iter().map(ListenUrl::to_string).collect();
        assert_eq!(shown, ["http://127.0.0.1:2379", "http://[::]:0"]);
        assert!(matches!(
            listen("http://node:2379"),
            Err(ConfigError::Url { problem: UrlError::ListenOnName, .. })
        ));
        assert!(matches!(listen(" , "), Err(ConfigError::NoUrl { .. })));
    }

    #[test]
    fn listeners_that_the_system_would_refuse_are_repeated() {
        let listen = |text| listen_urls("listen-client-urls", text, "http://127.0.0.1:2379");
        for text in [
            "http://127.0.0.1:2379,http://localhost:2379",
            "http://127.0.0.1:2379,http://0.0.0.0:2379",
            "http://[::]:2379,http://[::1]:2379",
        ] {
            assert!(matches!(listen(text), Err(ConfigError::RepeatedUrl { .. })), "{text}");
        }
        for text in [
            "http://127.0.0.1:2379,http://127.0.0.1:2378",
            "http://127.0.0.1:2379,http://10.0.0.1:2379",
            "http://127.0.0.1:2379,http://[::1]:2379",
            "http://127.0.0.1:0,http://127.0.0.1:0",
        ] {
            assert_eq!(listen(text).map(|urls| urls.len()), Ok(2), "{text}");
        }
    }

    #[test]
    fn advertised_urls_name_a_port_and_differ() {
        let advertise = |text| advertised_urls("advertise-client-urls", text, "http://a:2379");
        assert_eq!(
            advertise("http://a:1,http://b:1/"),
            Ok(vec!["http://a:1".into(), "http://b:1".into()])
        );
        assert!(matches!(
            advertise("http://a:1,http://A:1/"),
            Err(ConfigError::RepeatedUrl { .. })
        ));
        assert!(matches!(
            advertise("http://a:0"),
            Err(ConfigError::Url { problem: UrlError::Port, .. })
        ));
        assert!(is_unspecified("http://0.0.0.0:1") && is_unspecified("http://[::]:1"));
        assert!(!is_unspecified("http://a:1"));
    }

    #[test]
    fn a_password_in_a_url_is_not_repeated() {
        let error = advertised_url("advertise-client-urls", "http://me:hunter2@a:1").unwrap_err();
        let line = error.to_string();
        assert!(!line.contains("hunter2") && line.contains("http://...@a:1"), "{line}");
    }
}
