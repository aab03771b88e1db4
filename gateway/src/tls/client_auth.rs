//! Verification of client certificates: the authorities and revocation lists of a listener.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};

use super::error::TlsError;

/// Client certificates of one listener (`client_ca`, `client_auth` and `client_crl` of
/// `[listen.tls]`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ClientAuthConfig {
    /// PEM file with the certificates of the authorities.
    pub(crate) ca: PathBuf,
    /// PEM file with their revocation lists; `None`: no certificate is revoked.
    pub(crate) crl: Option<PathBuf>,
    pub(crate) mode: ClientAuthMode,
}

/// Whether a client must have a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ClientAuthMode {
    #[default]
    Required,
    /// A client without a certificate is served; an invalid one is refused.
    Optional,
}

/// The verifier of a listener and the contents of the files that it was built from.
pub(super) struct LoadedClientAuth {
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
    /// Certificates of authorities.
    pub(super) authorities: usize,
    contents: (Vec<u8>, Option<Vec<u8>>),
}

impl LoadedClientAuth {
    /// Blocking file I/O.
    pub(super) fn load(config: &ClientAuthConfig) -> Result<LoadedClientAuth, TlsError> {
        let read = |path: &Path| {
            let error = |source| TlsError::Pem { path: path.to_owned(), source: pem::Error::Io(source) };
            std::fs::read(path).map_err(error)
        };
        let contents = (read(&config.ca)?, config.crl.as_deref().map(read).transpose()?);
        let authorities: Vec<CertificateDer<'static>> = items(&config.ca, &contents.0)?;
        let mut roots = RootCertStore::empty();
        for authority in &authorities {
            let unusable = |source| TlsError::Authority { path: config.ca.clone(), source };
            roots.add(authority.clone()).map_err(unusable)?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        if let (Some(path), Some(content)) = (&config.crl, &contents.1) {
            // An outdated list says nothing about later revocations.
            let lists: Vec<CertificateRevocationListDer<'static>> = items(path, content)?;
            builder = builder.with_crls(lists).enforce_revocation_expiration();
        }
        if config.mode == ClientAuthMode::Optional {
            builder = builder.allow_unauthenticated();
        }
        let file = config.crl.as_ref().unwrap_or(&config.ca);
        let verifier = builder.build().map_err(|source| TlsError::Verifier { path: file.clone(), source })?;
        Ok(LoadedClientAuth { verifier, authorities: authorities.len(), contents })
    }

    pub(super) fn is_same(&self, other: &LoadedClientAuth) -> bool {
        self.contents == other.contents
    }
}

/// The items of a PEM file, at least one.
fn items<T: PemObject>(path: &Path, content: &[u8]) -> Result<Vec<T>, TlsError> {
    let items = T::pem_slice_iter(content).collect::<Result<Vec<T>, _>>();
    items
        .and_then(|items| if items.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(items) })
        .map_err(|source| TlsError::Pem { path: path.to_owned(), source })
}
