//! Addresses as the command line writes them.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// Where a receiver listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `tcp://host:port` or `host:port`.
    Tcp(String),
    /// `unix:/path`.
    Unix(PathBuf),
}

/// What is wrong with an address.
#[derive(Debug, Error)]
pub enum AddressError {
    /// No form that is known.
    #[error("address \"{0}\": expected tcp://HOST:PORT or unix:/PATH")]
    Form(String),
    /// A transport of a later version.
    #[error("address \"{0}\": QUIC is not there yet; use tcp://HOST:PORT")]
    Later(String),
    /// A name that leads nowhere.
    #[error("address \"{0}\" cannot be resolved")]
    Resolve(String, #[source] std::io::Error),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.starts_with("quic://") {
            return Err(AddressError::Later(text.to_owned()));
        }
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let host = text.strip_prefix("tcp://").unwrap_or(text);
        let port =
            host.rsplit_once(':').filter(|(name, _)| !name.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
        if port.is_none() || host.contains('/') {
            return Err(AddressError::Form(text.to_owned()));
        }
        Ok(Self::Tcp(host.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host) => write!(f, "tcp://{host}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Address {
    /// The socket addresses of a TCP address; none for a Unix socket.
    ///
    /// # Errors
    /// The name cannot be resolved.
    pub fn resolve(&self) -> Result<Vec<SocketAddr>, AddressError> {
        let Self::Tcp(host) = self else { return Ok(Vec::new()) };
        let found = host.to_socket_addrs().map_err(|error| AddressError::Resolve(self.to_string(), error))?;
        Ok(found.collect())
    }

    /// Whether nobody but this host can be on the way: a Unix socket, or loopback under every name it resolves to.
    ///
    /// # Errors
    /// The name cannot be resolved.
    pub fn is_local(&self) -> Result<bool, AddressError> {
        Ok(self.resolve()?.iter().all(|address| address.ip().to_canonical().is_loopback()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_known_forms_and_names_the_rest() {
        for (text, shown) in [
            ("tcp://a:1", "tcp://a:1"),
            ("127.0.0.1:7", "tcp://127.0.0.1:7"),
            ("unix:/x", "unix:/x"),
            ("[::1]:9", "tcp://[::1]:9"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "host",
            "tcp://",
            "tcp://host",
            "tcp://:5",
            "host:port",
            "host:70000",
            "unix:",
            "http://h:1/x",
            "quic://h:1",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn only_loopback_and_unix_sockets_are_local() {
        let local = |text: &str| text.parse::<Address>().unwrap().is_local().unwrap();
        assert!(
            local("127.0.0.1:1")
                && local("127.8.8.8:1")
                && local("[::1]:1")
                && local("[::ffff:127.0.0.1]:1")
                && local("unix:/x")
        );
        assert!(!local("0.0.0.0:1") && !local("10.0.0.1:1") && !local("[::]:1"));
    }
}
