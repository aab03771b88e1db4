//! One client connection of the load, in clear text or over TLS, with one request at a time.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::load::response_reader::ResponseReader;
use crate::load::target::TlsClient;

const READ_BYTES: usize = 16 << 10;

trait ByteStream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> ByteStream for T {}

/// A connection to a service.
pub(crate) struct LoadConnection {
    pub(crate) address: SocketAddr,
    stream: Box<dyn ByteStream>,
    buffer: Vec<u8>,
}

impl LoadConnection {
    /// Cancel safe: the connection is closed.
    pub(crate) async fn open(address: SocketAddr, tls: Option<&TlsClient>) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let stream: Box<dyn ByteStream> = match tls {
            None => Box::new(stream),
            Some(client) => {
                Box::new(TlsConnector::from(client.config.clone()).connect(client.name.clone(), stream).await?)
            }
        };
        Ok(LoadConnection { address, stream, buffer: vec![0; READ_BYTES] })
    }

    /// Sends a request and reads its response. After an error or cancellation, the connection is
    /// not usable.
    pub(crate) async fn exchange(&mut self, request: &[u8], response: &mut ResponseReader) -> io::Result<()> {
        self.stream.write_all(request).await?;
        self.stream.flush().await?;
        while !response.is_complete() {
            match self.stream.read(&mut self.buffer).await? {
                0 => response.end()?,
                length => response.feed(&self.buffer[..length])?,
            }
        }
        Ok(())
    }
}
