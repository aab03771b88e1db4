//! An HTTP/2 client that writes and reads frames by hand, over TLS: for frames that no client
//! sends.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// How long a read or write may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The bytes of a frame.
pub(crate) fn frame((kind, flags): (u8, u8), stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A head block without compression; texts of less than 127 bytes.
pub(crate) fn head_block(method: &str, path: &str) -> Vec<u8> {
    let fields = [(":method", method), (":scheme", "https"), (":path", path), (":authority", "localhost")];
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap_or(0)], text.as_bytes()].concat();
    fields.into_iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

/// Accepts the certificate of the process that was started.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The settings of TLS of all clients.
pub(crate) fn client_config() -> Result<Arc<ClientConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let verifier = Arc::new(AnyCertificate(provider));
    let mut config = builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// One connection.
pub(crate) struct FrameConnection {
    stream: StreamOwned<ClientConnection, TcpStream>,
    received: Vec<u8>,
}

impl FrameConnection {
    /// Connects, and sends the preface with settings and large windows.
    pub(crate) fn open(address: SocketAddr, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let socket = TcpStream::connect_timeout(&address, STEP_TIMEOUT)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(STEP_TIMEOUT))?;
        socket.set_write_timeout(Some(STEP_TIMEOUT))?;
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let connection = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
        let mut client = FrameConnection { stream: StreamOwned::new(connection, socket), received: Vec::new() };
        let settings = frame((SETTINGS, 0), 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]);
        let window = frame((WINDOW_UPDATE, 0), 0, &0x7fff_0000_u32.to_be_bytes());
        client.send(&[PREFACE, &settings, &frame((SETTINGS, ACK), 0, &[]), &window].concat())?;
        Ok(client)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// Reads until a frame ends the stream.
    pub(crate) fn read_response(&mut self, stream: u32) -> io::Result<()> {
        loop {
            let (kind, flags, id) = self.next_frame()?;
            if id == stream && kind == RST_STREAM {
                return Err(io::Error::other("the stream was reset"));
            }
            if id == stream && matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0 {
                return Ok(());
            }
        }
    }

    /// Reads until the server closes the connection.
    pub(crate) fn read_to_end(&mut self) {
        let mut space = [0; 4 << 10];
        while self.stream.read(&mut space).is_ok_and(|count| count > 0) {}
    }

    /// Kind, flags and stream of the next frame.
    fn next_frame(&mut self) -> io::Result<(u8, u8, u32)> {
        loop {
            if let Some([a, b, c, kind, flags, id @ ..]) = self.received.first_chunk::<9>().copied() {
                let end = 9 + u32::from_be_bytes([0, a, b, c]) as usize;
                if self.received.len() >= end {
                    self.received.drain(..end);
                    return Ok((kind, flags, u32::from_be_bytes(id)));
                }
            }
            let mut space = [0; 16 << 10];
            match self.stream.read(&mut space)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.received.extend_from_slice(&space[..count]),
            }
        }
    }
}
