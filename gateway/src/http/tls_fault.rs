//! Why TLS with an upstream failed.

use std::io;

use rustls::{AlertDescription, CertificateError};

use crate::label;

label! {
    /// Why TLS with an upstream failed: the label of the metric and of the log line.
    pub(crate) TlsFault, "reason", {
        /// The certificate is for another name.
        CertificateName = "certificate_name",
        CertificateUnknownIssuer = "certificate_unknown_issuer",
        CertificateExpired = "certificate_expired",
        CertificateNotYetValid = "certificate_not_yet_valid",
        /// Another fault of the certificate, or of its signature.
        CertificateInvalid = "certificate_invalid",
        /// The upstream does not accept the gateway's certificate, or wants one.
        ClientCertificate = "client_certificate",
        /// Not TLS, or no common version or algorithm.
        Protocol = "protocol",
    }
}

impl TlsFault {
    /// The fault of TLS in an error of a connection; `None` if TLS is not to blame.
    pub(crate) fn of(error: &io::Error) -> Option<Self> {
        let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
        Some(match error {
            rustls::Error::InvalidCertificate(error) => Self::of_certificate(error),
            rustls::Error::AlertReceived(
                AlertDescription::CertificateRequired
                | AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied,
            ) => TlsFault::ClientCertificate,
            _ => TlsFault::Protocol,
        })
    }

    fn of_certificate(error: &CertificateError) -> Self {
        match error {
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                TlsFault::CertificateName
            }
            CertificateError::UnknownIssuer => TlsFault::CertificateUnknownIssuer,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => TlsFault::CertificateExpired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                TlsFault::CertificateNotYetValid
            }
            _ => TlsFault::CertificateInvalid,
        }
    }
}
