//! Why handshakes fail: the label of the metric and of the log line.

use std::error::Error as _;
use std::net::IpAddr;
use std::sync::LazyLock;

use rustls::CertificateError;

use super::error::{ErrorWithSource, TlsError};
use crate::event::Event;
use crate::label;
use crate::metrics::{self, Counters, Label as _};

label! {
    /// Why a handshake failed.
    pub(crate) HandshakeFailure, "reason", {
        Timeout = "timeout",
        /// The client closed the connection.
        Closed = "closed",
        /// The client sent an alert, because it does not trust the certificate for instance.
        ClientAlert = "client_alert",
        /// Not TLS, or no common version or algorithm.
        Protocol = "protocol",
        CertificateMissing = "certificate_missing",
        CertificateUnknownIssuer = "certificate_unknown_issuer",
        CertificateExpired = "certificate_expired",
        CertificateNotYetValid = "certificate_not_yet_valid",
        CertificateRevoked = "certificate_revoked",
        /// No current revocation list covers the certificate.
        RevocationUnknown = "revocation_unknown",
        /// Another fault of the client's certificate, or of its signature.
        CertificateInvalid = "certificate_invalid",
    }
}

static FAILURES: LazyLock<Counters<HandshakeFailure>> = LazyLock::new(Counters::default);

/// Registers the metrics of this module.
pub(super) fn expose() {
    metrics::expose_counters("tidegate_tls_handshakes_failed", "TLS handshakes that failed, by reason.", &FAILURES);
}

impl HandshakeFailure {
    fn of(error: &TlsError) -> Self {
        let error = match error {
            TlsError::Handshake(error) => error,
            TlsError::HandshakeTimeout => return HandshakeFailure::Timeout,
            _ => return HandshakeFailure::Protocol,
        };
        match error.get_ref().and_then(|source| source.downcast_ref::<rustls::Error>()) {
            None => HandshakeFailure::Closed,
            Some(rustls::Error::AlertReceived(_)) => HandshakeFailure::ClientAlert,
            Some(rustls::Error::NoCertificatesPresented) => HandshakeFailure::CertificateMissing,
            Some(rustls::Error::InvalidCertificate(error)) => Self::of_certificate(error),
            Some(_) => HandshakeFailure::Protocol,
        }
    }

    fn of_certificate(error: &CertificateError) -> Self {
        match error {
            CertificateError::UnknownIssuer => HandshakeFailure::CertificateUnknownIssuer,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => HandshakeFailure::CertificateExpired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                HandshakeFailure::CertificateNotYetValid
            }
            CertificateError::Revoked => HandshakeFailure::CertificateRevoked,
            CertificateError::UnknownRevocationStatus
            | CertificateError::ExpiredRevocationList
            | CertificateError::ExpiredRevocationListContext { .. } => HandshakeFailure::RevocationUnknown,
            _ => HandshakeFailure::CertificateInvalid,
        }
    }

    fn concerns_certificate(self) -> bool {
        use HandshakeFailure::{
            CertificateExpired, CertificateInvalid, CertificateMissing, CertificateNotYetValid, CertificateRevoked,
            CertificateUnknownIssuer, ClientAlert, Closed, Protocol, RevocationUnknown, Timeout,
        };
        match self {
            Timeout | Closed | ClientAlert | Protocol => false,
            CertificateMissing
            | CertificateUnknownIssuer
            | CertificateExpired
            | CertificateNotYetValid
            | CertificateRevoked
            | RevocationUnknown
            | CertificateInvalid => true,
        }
    }
}

/// Counts and logs a failed handshake with `client`. Any client can cause most failures, which are
/// logged at debug level; a refused certificate is logged as a warning.
pub(super) fn report(error: &TlsError, client: IpAddr) {
    let reason = HandshakeFailure::of(error);
    FAILURES.inc(reason);
    if reason.concerns_certificate() {
        let source = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        Event::ClientCertificateRefused { reason: reason.as_str(), client, error: &source }.emit();
    } else {
        Event::TlsFailed { error: &ErrorWithSource(error) }.emit();
    }
}
