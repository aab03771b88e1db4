//! Why TLS cannot be set up, and why a handshake fails.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use rustls::server::VerifierBuilderError;
use rustls_pki_types::pem;

/// Why TLS could not be set up, or a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("no certificate is configured")]
    NoCertificate,
    #[error("{}: no usable PEM content", path.display())]
    Pem { path: PathBuf, source: pem::Error },
    #[error("{}: invalid certificate", path.display())]
    Certificate { path: PathBuf, source: webpki::Error },
    #[error("{}: private key does not match the certificate", path.display())]
    Key { path: PathBuf, source: rustls::Error },
    #[error("{}: the certificate has expired on {}", path.display(), httpdate::fmt_http_date(*since))]
    Expired { path: PathBuf, since: SystemTime },
    #[error("{}: unusable certificate of an authority", path.display())]
    Authority { path: PathBuf, source: rustls::Error },
    #[error("{}: client certificates cannot be verified", path.display())]
    Verifier { path: PathBuf, source: VerifierBuilderError },
    #[error("failed to set up TLS")]
    Setup(#[from] rustls::Error),
    #[error("handshake failed")]
    Handshake(#[source] io::Error),
    #[error("handshake timed out")]
    HandshakeTimeout,
}

/// Displays an error and its source in one line.
pub(super) struct ErrorWithSource<'a>(pub(super) &'a TlsError);

impl fmt::Display for ErrorWithSource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        std::error::Error::source(self.0).map_or(Ok(()), |source| write!(f, ": {source}"))
    }
}
