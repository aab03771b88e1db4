//! The order in which a listener chooses cipher suites: AES with keys of 128 bits first, unless the
//! client lists ChaCha20 first.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::ClientHello;
use rustls::{CipherSuite, ServerConfig};

/// The configuration of handshakes with either order. They share session tickets.
pub(super) struct ServerConfigs {
    /// AES with keys of 128 bits first: its hash is SHA-256, for which CPUs have instructions. The
    /// SHA-384 of AES with 256 bits, which some clients list first, costs a fifth of a handshake.
    aes_first: Arc<ServerConfig>,
    /// As the client lists them: one that lists ChaCha20 first has no instructions for AES.
    as_listed: Arc<ServerConfig>,
}

impl ServerConfigs {
    pub(super) fn new(as_listed: ServerConfig) -> Self {
        let mut aes_first = as_listed.clone();
        aes_first.ignore_client_order = true;
        ServerConfigs { aes_first: Arc::new(aes_first), as_listed: Arc::new(as_listed) }
    }

    /// The configuration for a client.
    pub(super) fn of(&self, hello: &ClientHello<'_>) -> &Arc<ServerConfig> {
        let is_supported = |suite: &&CipherSuite| {
            self.as_listed.crypto_provider().cipher_suites.iter().any(|supported| supported.suite() == **suite)
        };
        match hello.cipher_suites().iter().find(is_supported) {
            Some(first) if is_chacha20(*first) => &self.as_listed,
            _ => &self.aes_first,
        }
    }
}

fn is_chacha20(suite: CipherSuite) -> bool {
    matches!(
        suite,
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
    )
}

/// The provider with the suites in the order of `ServerConfigs::aes_first`.
pub(super) fn crypto_provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    let is_aes_128 = |suite: CipherSuite| suite.as_str().is_some_and(|name| name.contains("AES_128"));
    // Stable: the other suites keep their order.
    provider.cipher_suites.sort_by_key(|suite| !is_aes_128(suite.suite()));
    provider
}

#[cfg(test)]
mod tests {
    use rustls::server::Acceptor;
    use rustls::version::{TLS12, TLS13};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};
    use rustls_pki_types::PrivateKeyDer;

    use super::*;

    /// The suite that is chosen for a client that lists `first` first.
    fn chosen(first: CipherSuite, version: &'static SupportedProtocolVersion) -> CipherSuite {
        let signed = rcgen::generate_simple_self_signed(["gate.test".to_owned()]).expect("a certificate");
        let builder = ServerConfig::builder_with_provider(Arc::new(crypto_provider()));
        let builder = builder.with_protocol_versions(&[version]).expect("a version").with_no_client_auth();
        let key = PrivateKeyDer::try_from(signed.signing_key.serialize_der()).expect("a key");
        let config = builder.with_single_cert(vec![signed.cert.der().clone()], key).expect("a certificate");
        let configs = ServerConfigs::new(config);

        let mut provider = aws_lc_rs::default_provider();
        provider.cipher_suites.sort_by_key(|suite| suite.suite() != first);
        assert_eq!(provider.cipher_suites[0].suite(), first);
        let builder = ClientConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(&[version]);
        let builder = builder.expect("a version").with_root_certificates(RootCertStore::empty());
        let name = "gate.test".try_into().expect("a name");
        let mut client = ClientConnection::new(Arc::new(builder.with_no_client_auth()), name).expect("a client");
        let (mut hello, mut acceptor) = (Vec::new(), Acceptor::default());
        client.write_tls(&mut hello).expect("a ClientHello");
        acceptor.read_tls(&mut &hello[..]).expect("a ClientHello");
        let accepted = acceptor.accept().unwrap_or_else(|(error, _)| panic!("{error}")).expect("the whole ClientHello");
        let config = Arc::clone(configs.of(&accepted.client_hello()));
        let server = accepted.into_connection(config).unwrap_or_else(|(error, _)| panic!("{error}"));
        server.negotiated_cipher_suite().expect("the ServerHello is written").suite()
    }

    #[test]
    fn aes_128_is_chosen_unless_the_client_lists_chacha20_first() {
        use CipherSuite as Suite;
        for (first, choice) in [
            (Suite::TLS13_AES_256_GCM_SHA384, Suite::TLS13_AES_128_GCM_SHA256),
            (Suite::TLS13_AES_128_GCM_SHA256, Suite::TLS13_AES_128_GCM_SHA256),
            (Suite::TLS13_CHACHA20_POLY1305_SHA256, Suite::TLS13_CHACHA20_POLY1305_SHA256),
        ] {
            assert_eq!(chosen(first, &TLS13), choice, "{first:?}");
        }
        for (first, choice) in [
            (Suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, Suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
            (
                Suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
                Suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
            ),
        ] {
            assert_eq!(chosen(first, &TLS12), choice, "{first:?}");
        }
    }
}
