//! One direction of a connection through the fault proxy: a reader, a queue of pieces with their
//! times, and a writer with its pace.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, sleep, sleep_until};

use crate::faults::plan::{Direction, FaultEffects, FaultPlan};
use crate::seeded_random::SeededRandom;

const PIECE_BYTES: usize = 16 << 10;
/// Pieces under way: bytes that a latency delays, beyond which the reader waits.
const PIECES_MAX: usize = 256;
/// Pieces of a limited rate are written this often.
const PACE: Duration = Duration::from_millis(20);

/// How a direction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RelayEnd {
    /// The sender has closed its side; everything was forwarded.
    Closed,
    /// The plan closes both sides.
    Cut,
    /// The plan resets both sides.
    Reset,
}

/// Bytes of a direction and how many of them were changed.
#[derive(Debug, Default)]
pub(crate) struct RelayCounts {
    pub(crate) bytes: AtomicU64,
    pub(crate) corrupted: AtomicU64,
}

/// One direction of a connection.
pub(crate) struct FaultRelay {
    pub(crate) direction: Direction,
    /// Seed of the proxy and number of the connection.
    pub(crate) draw: (u64, u64),
    pub(crate) plan: watch::Receiver<Arc<FaultPlan>>,
    pub(crate) counts: Arc<RelayCounts>,
}

impl FaultRelay {
    fn effects(&self) -> FaultEffects {
        self.plan.borrow().effects(self.direction, self.draw)
    }

    /// Forwards until either side ends.
    pub(crate) async fn run(&self, from: ReadHalf<'_>, to: WriteHalf<'_>) -> io::Result<RelayEnd> {
        let (sender, receiver) = mpsc::channel(PIECES_MAX);
        let (read, written) = tokio::join!(self.read(from, sender), self.write(receiver, to));
        let end = written?;
        if end == RelayEnd::Closed { read.map(|()| end) } else { Ok(end) }
    }

    /// Reads pieces and gives each the time at which it may be written.
    async fn read(&self, mut from: ReadHalf<'_>, pieces: mpsc::Sender<(Instant, Vec<u8>)>) -> io::Result<()> {
        let stream = self.draw.1.wrapping_mul(2) + u64::from(self.direction == Direction::Up);
        let mut random = SeededRandom::new(self.draw.0 ^ 0x6a69_7474_6572, stream);
        let mut last = Instant::now();
        loop {
            let mut piece = Vec::with_capacity(PIECE_BYTES);
            // The writer has ended: nothing more is needed.
            let length = tokio::select! {
                length = from.read_buf(&mut piece) => length?,
                () = pieces.closed() => return Ok(()),
            };
            if length == 0 {
                return Ok(());
            }
            let effects = self.effects();
            // Bytes stay in order, whatever the jitter.
            last = last.max(Instant::now() + effects.latency + effects.jitter.mul_f64(random.unit()));
            if pieces.send((last, piece)).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn write(
        &self,
        mut pieces: mpsc::Receiver<(Instant, Vec<u8>)>,
        mut to: WriteHalf<'_>,
    ) -> io::Result<RelayEnd> {
        let mut total = 0_u64;
        let mut noise = Noise::new(self.draw, self.direction);
        let mut plan = self.plan.clone();
        // A limit of 0 bytes ends the connection before the first byte.
        if let Some(end) = reached(&self.effects(), total) {
            return Ok(end);
        }
        while let Some((due, mut piece)) = pieces.recv().await {
            sleep_until(due).await;
            let mut rest = piece.as_mut_slice();
            while !rest.is_empty() {
                let effects = self.effects();
                if effects.hangs {
                    // The proxy ends: so does the connection.
                    plan.changed().await.map_err(io::Error::other)?;
                    continue;
                }
                let length = piece_length(&effects, total, rest.len());
                let (now, later) = rest.split_at_mut(length);
                rest = later;
                self.counts.corrupted.fetch_add(noise.corrupt(now, effects.corrupt), Relaxed);
                to.write_all(now).await?;
                total += length as u64;
                self.counts.bytes.fetch_add(length as u64, Relaxed);
                if let Some(end) = reached(&effects, total) {
                    return Ok(end);
                }
                sleep(pause(&effects, length)).await;
            }
        }
        to.shutdown().await?;
        Ok(RelayEnd::Closed)
    }
}

/// The next bytes that are written at once.
fn piece_length(effects: &FaultEffects, total: u64, available: usize) -> usize {
    let paced = effects.bytes_per_second.map(|rate| ((rate as f64 * PACE.as_secs_f64()) as u64).max(1));
    let left = |limit: Option<u64>| limit.map(|limit| limit.saturating_sub(total).max(1));
    let bounds = [paced, effects.drip.map(|(bytes, _)| bytes), left(effects.cut_after), left(effects.reset_after)];
    let least = bounds.into_iter().flatten().min().unwrap_or(u64::MAX);
    available.min(usize::try_from(least).unwrap_or(usize::MAX))
}

fn reached(effects: &FaultEffects, total: u64) -> Option<RelayEnd> {
    let is_over = |limit: Option<u64>| limit.is_some_and(|limit| total >= limit);
    if is_over(effects.reset_after) {
        Some(RelayEnd::Reset)
    } else {
        is_over(effects.cut_after).then_some(RelayEnd::Cut)
    }
}

/// The time after `length` bytes.
fn pause(effects: &FaultEffects, length: usize) -> Duration {
    let by_rate = effects.bytes_per_second.map(|rate| Duration::from_secs_f64(length as f64 / rate as f64));
    let by_drip = effects.drip.map(|(_, interval)| interval);
    by_rate.into_iter().chain(by_drip).max().unwrap_or_default()
}

/// Changes bytes at random, by the distances between them.
struct Noise {
    random: SeededRandom,
    /// Bytes until the next changed one, at the probability for which it was drawn.
    next: Option<(f64, u64)>,
}

impl Noise {
    fn new((seed, connection): (u64, u64), direction: Direction) -> Self {
        let stream = connection.wrapping_mul(2) + u64::from(direction == Direction::Up);
        Noise { random: SeededRandom::new(seed ^ 0x6e_6f69_7365, stream), next: None }
    }

    fn distance(&mut self, probability: f64) -> u64 {
        if probability >= 1.0 {
            return 0;
        }
        // Geometric; the cast saturates.
        ((1.0 - self.random.unit()).ln() / (1.0 - probability).ln()) as u64
    }

    /// Returns the number of changed bytes.
    fn corrupt(&mut self, bytes: &mut [u8], probability: f64) -> u64 {
        if probability <= 0.0 {
            self.next = None;
            return 0;
        }
        let (mut at, mut changed) = (0_u64, 0);
        loop {
            let left = match self.next {
                Some((drawn_for, left)) if drawn_for == probability => left,
                _ => self.distance(probability),
            };
            let position = at.saturating_add(left);
            let Some(byte) = usize::try_from(position).ok().and_then(|position| bytes.get_mut(position)) else {
                self.next = Some((probability, position - bytes.len() as u64));
                return changed;
            };
            // Never 0, so that the byte changes.
            *byte ^= (self.random.next() % 255) as u8 + 1;
            changed += 1;
            at = position + 1;
            self.next = Some((probability, self.distance(probability)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_change_at_their_probability_whatever_the_pieces() {
        for pieces in [1, 7, 1_000, 100_000] {
            let mut noise = Noise::new((3, 4), Direction::Up);
            let mut bytes = vec![0_u8; 100_000];
            let changed: u64 = bytes.chunks_mut(pieces).map(|piece| noise.corrupt(piece, 0.01)).sum();
            assert_eq!(changed, bytes.iter().filter(|byte| **byte != 0).count() as u64);
            assert!((900..1_100).contains(&changed), "{pieces}: {changed}");
        }
        let mut all = vec![0_u8; 10];
        assert_eq!(Noise::new((0, 0), Direction::Down).corrupt(&mut all, 1.0), 10);
        assert_eq!(Noise::new((0, 0), Direction::Down).corrupt(&mut all, 0.0), 0);
    }

    #[test]
    fn pieces_end_at_the_nearest_limit() {
        let effects = FaultEffects { cut_after: Some(10), reset_after: Some(12), ..FaultEffects::default() };
        assert_eq!((piece_length(&effects, 0, 100), piece_length(&effects, 7, 100)), (10, 3));
        assert_eq!((reached(&effects, 9), reached(&effects, 10)), (None, Some(RelayEnd::Cut)));
        assert_eq!(reached(&effects, 12), Some(RelayEnd::Reset));
        let slow = FaultEffects { bytes_per_second: Some(1_000), ..FaultEffects::default() };
        assert_eq!((piece_length(&slow, 0, 100), pause(&slow, 20)), (20, PACE));
    }
}
