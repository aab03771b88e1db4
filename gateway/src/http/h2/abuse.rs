//! Counts the frames of a client that cost work without being part of a request: PING, SETTINGS,
//! WINDOW_UPDATE, PRIORITY, empty DATA, CONTINUATION, unknown types, resets, and streams that the
//! gateway is made to reset.
//!
//! Requests and responses explain some of them. An address whose connection was ended for such
//! frames has a smaller allowance on its next connections, and is refused at last; that of a
//! trusted proxy stands for all its clients, and has neither.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::label;

/// Frames that a client may send at once beyond those that its requests and responses explain. A
/// page of a hundred resources that is left, or a download with small windows, stays below it.
const BURST_MAX: u32 = 150;
/// The same for a client whose address had a connection ended for frames.
const SUSPECT_BURST_MAX: u32 = 30;
/// How many such frames a second are allowed in the long run.
const FRAMES_PER_SECOND: u32 = 20;
/// Bytes of responses that explain one WINDOW_UPDATE or PING (clients measure bandwidth by PING).
const BYTES_PER_FRAME: usize = 512;
/// Bytes that explain later WINDOW_UPDATE frames, at most: more than a client receives and does not
/// read, and the frames for them cost some milliseconds.
const WINDOW_BYTES_MAX: usize = 16 << 20;
/// Addresses that are remembered, the latest ones, and for how long. A network has more addresses
/// than any table: the memory only shortens what each connection costs.
const SUSPECTS_MAX: usize = 1_024;
const SUSPECT_FOR: Duration = Duration::from_secs(60);
/// Connections of an address that are ended before its next ones are refused, and for how long. An
/// address may stand for many clients, one of which has to go on flooding.
const FLOODED_CONNECTIONS_MAX: u32 = 20;
const REFUSED_FOR: Duration = Duration::from_secs(10);

label! {
    /// The kind of frames that a client sent too many of.
    pub(crate) FrameAbuse, "frames", {
        Control = "control",
        Reset = "reset",
    }
}

/// An address whose connections were ended.
struct Suspect {
    /// An IPv4 address, or the first of an IPv6 /64.
    address: IpAddr,
    last: Instant,
    connections: u32,
}

/// The addresses whose connections were ended, by the time of the last one.
static SUSPECTS: Mutex<VecDeque<Suspect>> = Mutex::new(VecDeque::new());
/// Whether there may be any: most processes never take the lock.
static HAS_SUSPECTS: AtomicBool = AtomicBool::new(false);

/// The address as suspects are remembered: one subscriber usually has an IPv6 /64.
pub(super) fn subscriber(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & (u128::MAX << 64)).into()),
    }
}

/// Applies `read` to what is known of an address; `None`: it is no suspect.
fn suspect<T>(address: IpAddr, read: impl FnOnce(&Suspect) -> T) -> Option<T> {
    if !HAS_SUSPECTS.load(Relaxed) {
        return None;
    }
    let mut suspects = SUSPECTS.lock().unwrap_or_else(PoisonError::into_inner);
    while suspects.front().is_some_and(|suspect| suspect.last.elapsed() > SUSPECT_FOR) {
        suspects.pop_front();
    }
    HAS_SUSPECTS.store(!suspects.is_empty(), Relaxed);
    let address = subscriber(address);
    let known = suspects.iter().find(|suspect| suspect.address == address);
    known.filter(|suspect| suspect.last.elapsed() <= SUSPECT_FOR).map(read)
}

fn record_suspect(address: IpAddr) {
    let address = subscriber(address);
    let mut suspects = SUSPECTS.lock().unwrap_or_else(PoisonError::into_inner);
    let known = suspects.iter().position(|suspect| suspect.address == address);
    let before = known.and_then(|index| suspects.remove(index)).filter(|suspect| suspect.last.elapsed() < SUSPECT_FOR);
    if suspects.len() >= SUSPECTS_MAX {
        suspects.pop_front();
    }
    let connections = before.map_or(0, |suspect| suspect.connections).saturating_add(1);
    suspects.push_back(Suspect { address, last: Instant::now(), connections });
    HAS_SUSPECTS.store(true, Relaxed);
}

/// Whether new connections of an address are refused: so many of its connections were ended that
/// their handshakes are the flood.
pub(crate) fn is_flooding(address: IpAddr) -> bool {
    let is_flooding =
        |suspect: &Suspect| suspect.connections >= FLOODED_CONNECTIONS_MAX && suspect.last.elapsed() < REFUSED_FOR;
    suspect(address, is_flooding).unwrap_or(false)
}

/// The address of a client, and whether it is that of a trusted proxy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Http2Client {
    pub(crate) address: IpAddr,
    pub(crate) is_trusted_proxy: bool,
}

/// How many frames of a kind are unexplained.
struct FrameBudget {
    burst_max: u32,
    spent: u32,
    refilled_at: Instant,
}

impl FrameBudget {
    /// Counts one frame. Returns whether there were too many. Reads the clock only then.
    fn charge(&mut self) -> bool {
        self.spent += 1;
        if self.spent <= self.burst_max {
            return false;
        }
        let elapsed = self.refilled_at.elapsed().min(Duration::from_secs(60));
        let refilled = (elapsed.as_secs_f64() * f64::from(FRAMES_PER_SECOND)) as u32;
        if refilled > 0 {
            self.refilled_at = Instant::now();
            self.spent = self.spent.saturating_sub(refilled);
        }
        self.spent > self.burst_max
    }

    fn explain(&mut self, frames: u32) {
        self.spent = self.spent.saturating_sub(frames);
    }
}

/// The unexplained frames of one connection.
pub(super) struct FrameCounts {
    client: Http2Client,
    control: FrameBudget,
    /// WINDOW_UPDATE frames that the client may still send for what it was sent, in bytes. A client
    /// may send them long after the bytes, as its application reads.
    window_bytes: usize,
    resets: FrameBudget,
    abuse: Option<FrameAbuse>,
}

impl FrameCounts {
    /// The counts of a new connection.
    pub(super) fn new(client: Http2Client) -> Self {
        let is_suspect = !client.is_trusted_proxy && suspect(client.address, |_| ()).is_some();
        let burst_max = if is_suspect { SUSPECT_BURST_MAX } else { BURST_MAX };
        let budget = || FrameBudget { burst_max, spent: 0, refilled_at: Instant::now() };
        FrameCounts { client, control: budget(), window_bytes: 0, resets: budget(), abuse: None }
    }

    /// The kind of frames that the client sent too many of, if it did.
    pub(super) fn abuse(&self) -> Option<FrameAbuse> {
        self.abuse
    }

    /// `bytes` were sent to the client.
    pub(super) fn record_sent(&mut self, bytes: usize) {
        self.control.explain(u32::try_from(bytes / BYTES_PER_FRAME).unwrap_or(u32::MAX));
        self.window_bytes = (self.window_bytes + bytes).min(WINDOW_BYTES_MAX);
    }

    /// `count` frames of flow control are explained: by a request, or by a DATA frame, which the
    /// client may answer for the stream and for the connection.
    pub(super) fn explain_control(&mut self, count: u32) {
        self.control.explain(count);
        self.window_bytes = (self.window_bytes + count as usize * BYTES_PER_FRAME).min(WINDOW_BYTES_MAX);
    }

    /// A WINDOW_UPDATE. Returns whether there were too many.
    pub(super) fn charge_window(&mut self) -> bool {
        match self.window_bytes.checked_sub(BYTES_PER_FRAME) {
            Some(left) => {
                self.window_bytes = left;
                false
            }
            None => self.charge_control(),
        }
    }

    /// A response was sent to its end.
    pub(super) fn record_response(&mut self) {
        self.resets.explain(1);
    }

    /// A frame that is part of no request. Returns whether there were too many.
    pub(super) fn charge_control(&mut self) -> bool {
        let is_too_many = self.control.charge();
        self.note(FrameAbuse::Control, is_too_many)
    }

    /// A stream that the client has reset, or has made the gateway reset. Returns whether there
    /// were too many.
    pub(super) fn charge_reset(&mut self) -> bool {
        let is_too_many = self.resets.charge();
        self.note(FrameAbuse::Reset, is_too_many)
    }

    fn note(&mut self, kind: FrameAbuse, is_too_many: bool) -> bool {
        if is_too_many && self.abuse.is_none() {
            self.abuse = Some(kind);
            if !self.client.is_trusted_proxy {
                record_suspect(self.client.address);
            }
        }
        is_too_many
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts_of(address: IpAddr) -> FrameCounts {
        FrameCounts::new(Http2Client { address, is_trusted_proxy: false })
    }

    fn charges_until_abuse(counts: &mut FrameCounts, mut charge: impl FnMut(&mut FrameCounts) -> bool) -> usize {
        (1..1_000).find(|_| charge(counts)).unwrap_or(usize::MAX)
    }

    #[tokio::test(start_paused = true)]
    async fn floods_end_within_200_frames_and_sooner_the_next_time() {
        for (number, charge) in [FrameCounts::charge_control, FrameCounts::charge_reset].into_iter().enumerate() {
            let address = IpAddr::from([192, 0, 2, u8::try_from(number).expect("few")]);
            let first = charges_until_abuse(&mut counts_of(address), charge);
            let second = charges_until_abuse(&mut counts_of(address), charge);
            assert_eq!((first, second), (151, 31));
            let other = charges_until_abuse(&mut counts_of(IpAddr::from([192, 0, 2, 99])), charge);
            assert_eq!(other, 151);
            tokio::time::advance(SUSPECT_FOR * 2).await;
            assert_eq!(charges_until_abuse(&mut counts_of(address), charge), 151);
            tokio::time::advance(SUSPECT_FOR * 2).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn address_that_floods_again_and_again_is_refused_for_a_while() {
        let address: IpAddr = "2001:db8::1".parse().expect("an address");
        let same_subscriber: IpAddr = "2001:db8::2".parse().expect("an address");
        for _ in 0..FLOODED_CONNECTIONS_MAX {
            assert!(!is_flooding(same_subscriber));
            charges_until_abuse(&mut counts_of(address), FrameCounts::charge_control);
        }
        assert!(is_flooding(same_subscriber) && !is_flooding("2001:db8:0:1::1".parse().expect("an address")));
        tokio::time::advance(REFUSED_FOR).await;
        assert!(!is_flooding(address));
        charges_until_abuse(&mut counts_of(address), FrameCounts::charge_control);
        assert!(is_flooding(address));
        tokio::time::advance(SUSPECT_FOR * 2).await;
        charges_until_abuse(&mut counts_of(address), FrameCounts::charge_control);
        assert!(!is_flooding(address));
    }

    #[tokio::test(start_paused = true)]
    async fn trusted_proxy_is_neither_suspected_nor_refused() {
        let address = IpAddr::from([192, 0, 2, 55]);
        for _ in 0..FLOODED_CONNECTIONS_MAX * 2 {
            let mut counts = FrameCounts::new(Http2Client { address, is_trusted_proxy: true });
            assert_eq!(charges_until_abuse(&mut counts, FrameCounts::charge_reset), 151);
            assert!(!is_flooding(address));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn steady_rate_is_no_flood() {
        let mut counts = counts_of(IpAddr::from([192, 0, 2, 77]));
        for _ in 0..2_000 {
            assert!(!counts.charge_control());
            tokio::time::advance(Duration::from_secs(1) / (FRAMES_PER_SECOND / 2)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn windows_may_be_opened_long_after_the_bytes() {
        let mut counts = counts_of(IpAddr::from([192, 0, 2, 79]));
        counts.record_sent(1 << 20);
        let frames = (1 << 20) / BYTES_PER_FRAME;
        for _ in 0..frames {
            assert!(!counts.charge_window());
        }
        assert_eq!(charges_until_abuse(&mut counts, FrameCounts::charge_window), 151);
        // They explain no other frames.
        let mut counts = counts_of(IpAddr::from([192, 0, 2, 80]));
        counts.record_sent(1 << 20);
        assert_eq!(charges_until_abuse(&mut counts, FrameCounts::charge_control), 151);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_and_responses_explain_frames() {
        let mut counts = counts_of(IpAddr::from([192, 0, 2, 78]));
        for _ in 0..2_000 {
            counts.explain_control(2);
            counts.record_response();
            assert!(!counts.charge_control() && !counts.charge_control() && !counts.charge_reset());
        }
    }
}
