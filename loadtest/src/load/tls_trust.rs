//! The certificate authorities that TLS clients of the load trust: those of the system, and one
//! more if it is named.

use std::fs;
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::error::{LoadtestError, Result};

/// The authorities of the system, and those in the PEM file `ca`.
pub(crate) fn roots(ca: Option<&Path>) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(system.certs);
    let Some(path) = ca else {
        return if roots.is_empty() {
            Err(LoadtestError::Usage("the system has no certificate authorities: name one with --ca FILE".to_owned()))
        } else {
            Ok(roots)
        };
    };
    let fault = |what: &str| LoadtestError::Usage(format!("--ca {}: {what}", path.display()));
    let pem = fs::read(path).map_err(LoadtestError::io(format!("cannot read {}", path.display())))?;
    let mut added = 0;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|_| fault("not a PEM file"))?;
        roots.add(certificate).map_err(|_| fault("not a certificate"))?;
        added += 1;
    }
    if added == 0 { Err(fault("no certificate in it")) } else { Ok(roots) }
}
