//! Results of authentication.

use crate::label;

label! {
    /// Result of the authentication of a request.
    pub(crate) AuthResult, "result", {
        Valid = "valid",
        /// No credentials of the method of the route.
        Missing = "missing",
        /// More than one.
        Multiple = "multiple",
        /// Not of the form that the method requires.
        Malformed = "malformed",
        /// No key, or no user with this password.
        Unknown = "unknown",
        /// Not verified: the address has sent too many wrong passwords.
        ClientThrottled = "client_throttled",
        /// Not verified: too many passwords wait for their verification.
        VerificationThrottled = "verification_throttled",
        /// The verification service has not answered in time, or with a failure.
        Unavailable = "unavailable",
    }
}

/// Index of a key or of a user in the file of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PrincipalIndex(pub(super) u32);
