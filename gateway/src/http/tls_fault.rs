//! Why TLS with an upstream failed.

use std::io;

use rustls::{AlertDescription, CertificateError, OtherError};

use crate::label;

label! {
    /// Why TLS with an upstream failed: the label of the metric and of the log line.
    pub(crate) TlsFault, "reason", {
        /// The certificate is for another name.
        CertificateName = "certificate_name",
        CertificateUnknownIssuer = "certificate_unknown_issuer",
        /// It is its own issuer, and not trusted.
        CertificateSelfSigned = "certificate_self_signed",
        /// It is that of a trusted authority, which no server may use: `openssl req -x509` makes
        /// such certificates.
        CertificateOfAuthority = "certificate_of_authority",
        CertificateExpired = "certificate_expired",
        CertificateNotYetValid = "certificate_not_yet_valid",
        /// Another fault of the certificate, or of its signature.
        CertificateInvalid = "certificate_invalid",
        /// The upstream does not accept the gateway's certificate, or wants one.
        ClientCertificate = "client_certificate",
        /// The upstream has ended the handshake with another alert, such as one without a common
        /// version.
        Alert = "alert",
        /// The upstream has closed the connection in the handshake.
        Closed = "closed",
        /// Not TLS, or no common version or algorithm.
        Protocol = "protocol",
    }
}

impl TlsFault {
    /// The fault of TLS in an error of a handshake; `None` if TLS is not to blame.
    pub(crate) fn of_handshake(error: &io::Error) -> Option<Self> {
        const CLOSED: [io::ErrorKind; 4] = [
            io::ErrorKind::UnexpectedEof,
            io::ErrorKind::ConnectionReset,
            io::ErrorKind::ConnectionAborted,
            io::ErrorKind::BrokenPipe,
        ];
        Self::of(error).or_else(|| CLOSED.contains(&error.kind()).then_some(TlsFault::Closed))
    }

    /// The error type of RFC 9209 section 2.3 is that of a certificate, an alert, the protocol, or
    /// a connection: a server that is overloaded or restarts closes it in the handshake too.
    pub(crate) fn class(self) -> TlsFaultClass {
        match self {
            TlsFault::CertificateName
            | TlsFault::CertificateUnknownIssuer
            | TlsFault::CertificateSelfSigned
            | TlsFault::CertificateOfAuthority
            | TlsFault::CertificateExpired
            | TlsFault::CertificateNotYetValid
            | TlsFault::CertificateInvalid => TlsFaultClass::Certificate,
            TlsFault::ClientCertificate | TlsFault::Alert => TlsFaultClass::Alert,
            TlsFault::Protocol => TlsFaultClass::Protocol,
            TlsFault::Closed => TlsFaultClass::Connection,
        }
    }

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
            rustls::Error::AlertReceived(_) => TlsFault::Alert,
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
            CertificateError::Other(OtherError(error)) if error.is::<SelfSigned>() => TlsFault::CertificateSelfSigned,
            CertificateError::Other(OtherError(error))
                if error.downcast_ref() == Some(&webpki::Error::CaUsedAsEndEntity) =>
            {
                TlsFault::CertificateOfAuthority
            }
            _ => TlsFault::CertificateInvalid,
        }
    }
}

/// The part of TLS that a fault concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsFaultClass {
    Certificate,
    /// The upstream has ended the handshake with an alert.
    Alert,
    Protocol,
    /// Nothing is known but that the connection has ended.
    Connection,
}

/// The certificate of the upstream is its own issuer, and not trusted.
#[derive(Debug, thiserror::Error)]
#[error("the certificate is self-signed and not trusted")]
pub(crate) struct SelfSigned(#[source] pub(crate) rustls::Error);
