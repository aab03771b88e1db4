//! The start of a client connection: PROXY protocol header, TLS handshake, then HTTP.

use std::future::poll_fn;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::state::SharedState;
use crate::accept::{AcceptedConnection, ConnectionPermit};
use crate::http::buffer::ReadBuffer;
use crate::http::deadline::ResettableDeadline;
use crate::http::message::Scheme;
use crate::http::transport::TransportStream;
use crate::peer::{ConnectionPeer, PeerDetails};
use crate::proxy_protocol::{self, ProxiedClient, ProxyHeaderRefusal, ProxyProtocolMode};
use crate::serve::{self, DrainStage, HttpTransport, WorkerContext};
use crate::tasks::{self, TaskKind, TaskWait};
use crate::tls::{Alpn, TlsConnection, TlsTerminator};

/// How long a client that has just connected has for its first byte once idle connections end: it
/// cannot know that the gateway drains.
const FIRST_BYTE_GRACE: Duration = Duration::from_secs(1);

/// Spawns the task of a connection. The task owns the permit and drops it when the connection ends.
pub(super) fn spawn_connection(context: &Rc<WorkerContext>, shared: &Arc<SharedState>, accepted: AcceptedConnection) {
    let AcceptedConnection { stream, listener, proxy_protocol, peer, mut permit, .. } = accepted;
    let (context, ip) = (Rc::clone(context), peer.ip());
    let terminator = shared.tls_terminators.get(listener).cloned().flatten();
    let transport = match shared.http2.get(listener) {
        Some(true) => HttpTransport::PlainOrHttp2,
        _ => HttpTransport::Plain,
    };
    if proxy_protocol == ProxyProtocolMode::Off && terminator.is_none() {
        tasks::spawn(TaskKind::Connection, async move {
            tasks::set_waiting_for(TaskWait::ClientHead);
            serve::serve_h1(context, TransportStream::plain(stream), ConnectionPeer::from(ip), transport).await;
            drop(permit);
        });
        return;
    }
    tasks::spawn(TaskKind::Connection, async move {
        let start = ConnectionStart { context: &context, proxy_protocol, ip, permit: &mut permit };
        // Boxed: its state is larger than that of an idle connection, and short-lived.
        let Some((opened, peer)) = Box::pin(start.open(stream, terminator)).await else { return };
        tasks::set_waiting_for(TaskWait::ClientHead);
        match opened {
            OpenedConnection::Plain(stream) => serve::serve_h1(context, stream, peer, transport).await,
            OpenedConnection::TlsH1(stream) => serve::serve_h1(context, stream, peer, HttpTransport::Tls).await,
            OpenedConnection::TlsH2(stream) => {
                serve::serve_h2(context, (stream, ReadBuffer::default()), peer, Scheme::Https).await;
            }
        }
        drop(permit);
    });
}

/// A connection that is ready for its first request.
enum OpenedConnection {
    Plain(TransportStream),
    TlsH1(TransportStream),
    TlsH2(TransportStream),
}

/// A connection before its first byte of HTTP.
struct ConnectionStart<'a> {
    context: &'a Rc<WorkerContext>,
    proxy_protocol: ProxyProtocolMode,
    /// Canonical address of the socket's peer.
    ip: IpAddr,
    permit: &'a mut ConnectionPermit,
}

impl ConnectionStart<'_> {
    /// `None`: the connection is refused, which has been counted and logged.
    async fn open(
        mut self,
        stream: TcpStream,
        terminator: Option<Arc<TlsTerminator>>,
    ) -> Option<(OpenedConnection, ConnectionPeer)> {
        let begin_timeout = self.context.snapshot.load().http.header_timeout;
        let began = Instant::now();
        tasks::set_waiting_for(TaskWait::ClientHead);
        if timeout(begin_timeout, self.has_begun(&stream)).await == Ok(false) {
            return None;
        }
        // A client that is late is counted and logged as what it should have begun.
        let begin_timeout = begin_timeout.saturating_sub(began.elapsed());
        let (ip, mut details) = match self.proxy_protocol {
            ProxyProtocolMode::Off => (self.ip, PeerDetails::default()),
            _ => self.proxied_client(&stream, begin_timeout).await?,
        };
        let Some(terminator) = terminator else {
            let opened = OpenedConnection::Plain(TransportStream::plain(stream));
            return Some((opened, ConnectionPeer::new(ip, details)));
        };
        tasks::set_waiting_for(TaskWait::TlsHandshake);
        let handshake_timeout = match self.proxy_protocol {
            ProxyProtocolMode::Off => begin_timeout,
            _ => self.context.snapshot.load().http.header_timeout,
        };
        // A failed handshake has been counted and logged by the terminator.
        let TlsConnection { stream, alpn, version, fingerprint, certificate, server_name } =
            terminator.accept(stream, handshake_timeout, ip).await.ok()?;
        details.tls_version = Some(version);
        details.fingerprint = fingerprint;
        details.certificate = certificate;
        details.server_name = server_name;
        let opened = match alpn {
            Alpn::H1 => OpenedConnection::TlsH1(TransportStream::tls(stream)),
            Alpn::H2 => OpenedConnection::TlsH2(TransportStream::tls(stream)),
        };
        Some((opened, ConnectionPeer::new(ip, details)))
    }

    /// Waits for the first byte. False: there is none, and the gateway drains.
    async fn has_begun(&self, stream: &TcpStream) -> bool {
        let mut drain = self.context.drain_guard();
        let mut grace = None;
        poll_fn(|cx| {
            // The readiness of a new socket is assumed until a call would block.
            if stream.poll_peek(cx, &mut ReadBuf::new(&mut [0])).is_ready() {
                return Poll::Ready(true);
            }
            if drain.poll_stage(cx, DrainStage::Closing).is_pending() {
                return Poll::Pending;
            }
            grace.get_or_insert_with(|| ResettableDeadline::after(FIRST_BYTE_GRACE)).poll(cx).map(|()| false)
        })
        .await
    }

    /// The address of the client, from a PROXY protocol header if the peer may send one. Counts the
    /// connection for that address.
    async fn proxied_client(&mut self, stream: &TcpStream, deadline: Duration) -> Option<(IpAddr, PeerDetails)> {
        tasks::set_waiting_for(TaskWait::ProxyHeader);
        let is_trusted = self.context.snapshot.load().identity.is_trusted_proxy(self.ip);
        let header = if is_trusted {
            proxy_protocol::read_header(stream, deadline).await
        } else {
            match self.proxy_protocol {
                ProxyProtocolMode::Required => Err(ProxyHeaderRefusal::Untrusted),
                _ => Ok(None),
            }
        };
        let header = match header {
            Ok(None) if is_trusted && self.proxy_protocol == ProxyProtocolMode::Required => {
                Err(ProxyHeaderRefusal::Missing)
            }
            header => header,
        };
        let (ip, proxy) = match header.inspect_err(|refusal| refusal.report(self.ip)).ok()? {
            None | Some(ProxiedClient::Local) => (self.ip, None),
            Some(ProxiedClient::Unknown) => (self.ip, Some(self.ip)),
            Some(ProxiedClient::Address(client)) => (client.ip().to_canonical(), Some(self.ip)),
        };
        let is_unknown = header == Ok(Some(ProxiedClient::Unknown));
        // Counted and logged by the permit.
        self.permit.count_address(ip).ok()?;
        Some((ip, PeerDetails { proxy, is_unknown, ..PeerDetails::default() }))
    }
}
