//! Slows down the senders of wrong admin tokens.
//!
//! Each address gets one check at a time: after a wrong token, its next check waits, twice as long
//! after each further one. The right token waits for its turn too, since otherwise the delay of an
//! answer would tell that a token is wrong. Refuses requests that would wait for longer than
//! `WAIT_MAX`. An address without wrong tokens never waits.
//!
//! Invariant: the table is bounded; an address that is not in it is treated as a new one.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Wait after the first wrong token; doubles with each further one.
const DELAY_MIN: Duration = Duration::from_millis(100);
/// An address can try 17,280 tokens a day.
pub(super) const DELAY_MAX: Duration = Duration::from_secs(5);
/// A check that is further away than this is refused: a waiting request holds a connection.
pub(super) const WAIT_MAX: Duration = DELAY_MAX;
/// Wrong tokens are forgotten after this time without another one.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
/// Addresses in the table, about 64 KiB. More than that many attackers are not slowed by a table.
const ADDRESSES_MAX: usize = 1_024;

/// The wrong tokens of each address.
#[derive(Default)]
pub(super) struct TokenThrottle {
    addresses: HashMap<IpAddr, WrongTokens>,
}

/// The wrong tokens of one address.
struct WrongTokens {
    count: u32,
    last: Instant,
    next_check: Instant,
}

impl TokenThrottle {
    /// Takes the next check of `address` and returns the wait for it.
    ///
    /// # Errors
    /// The wait is longer than `WAIT_MAX`; no check is taken.
    pub(super) fn reserve_check(&mut self, address: IpAddr, now: Instant) -> Result<Duration, Duration> {
        let Some(wrong) = self.addresses.get_mut(&network(address)) else { return Ok(Duration::ZERO) };
        let wait = wrong.next_check.saturating_duration_since(now);
        if wait > WAIT_MAX {
            return Err(wait);
        }
        wrong.next_check = now.max(wrong.next_check) + delay(wrong.count);
        Ok(wait)
    }

    /// Records a wrong token. Returns the wrong tokens of the address.
    pub(super) fn record_wrong(&mut self, address: IpAddr, now: Instant) -> u32 {
        let address = network(address);
        if !self.addresses.contains_key(&address) {
            self.make_room(now);
        }
        let wrong = self.addresses.entry(address).or_insert(WrongTokens { count: 0, last: now, next_check: now });
        wrong.count = wrong.count.saturating_add(1);
        wrong.last = now;
        wrong.next_check = wrong.next_check.max(now + delay(wrong.count));
        wrong.count
    }

    /// Forgets the wrong tokens of an address that has sent the right one.
    pub(super) fn record_right(&mut self, address: IpAddr) {
        self.addresses.remove(&network(address));
    }

    /// Removes forgotten addresses and, if the table is still full, the one with the fewest wrong
    /// tokens.
    fn make_room(&mut self, now: Instant) {
        if self.addresses.len() < ADDRESSES_MAX {
            return;
        }
        self.addresses.retain(|_, wrong| now.duration_since(wrong.last) < FORGOTTEN_AFTER);
        if self.addresses.len() >= ADDRESSES_MAX {
            let fewest = self.addresses.iter().min_by_key(|(_, wrong)| (wrong.count, wrong.last));
            if let Some(address) = fewest.map(|(address, _)| *address) {
                self.addresses.remove(&address);
            }
        }
    }
}

fn delay(count: u32) -> Duration {
    DELAY_MIN.saturating_mul(1 << count.saturating_sub(1).min(16)).min(DELAY_MAX)
}

/// One host usually has a whole /64 of IPv6 addresses.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// The waits of `count` requests with wrong tokens, each sent when the previous one was
    /// answered.
    fn waits(throttle: &mut TokenThrottle, peer: IpAddr, count: usize) -> Vec<u128> {
        let mut now = Instant::now();
        let attempt = |_| {
            let wait = throttle.reserve_check(peer, now).expect("a check");
            now += wait;
            throttle.record_wrong(peer, now);
            wait.as_millis()
        };
        (0..count).map(attempt).collect()
    }

    #[test]
    fn wrong_tokens_wait_ever_longer_up_to_a_maximum() {
        let mut throttle = TokenThrottle::default();
        let peer = address("192.0.2.1");
        assert_eq!(waits(&mut throttle, peer, 9), [0, 100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        assert_eq!(throttle.reserve_check(address("192.0.2.2"), Instant::now()), Ok(Duration::ZERO));
        throttle.record_right(peer);
        assert_eq!(throttle.reserve_check(peer, Instant::now()), Ok(Duration::ZERO));
    }

    /// Concurrent requests do not buy more checks.
    #[test]
    fn concurrent_requests_queue_and_are_refused_beyond_the_longest_wait() {
        let mut throttle = TokenThrottle::default();
        let (peer, now) = (address("192.0.2.1"), Instant::now());
        (0..4).for_each(|_| _ = throttle.record_wrong(peer, now));
        let results: Vec<_> = (0..100).map(|_| throttle.reserve_check(peer, now)).collect();
        let (accepted, refused): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        assert_eq!((accepted.len(), refused.len()), (6, 94), "every 800 ms within 5 s");
        assert!(accepted.is_sorted());
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one() {
        let mut throttle = TokenThrottle::default();
        let now = Instant::now();
        throttle.record_wrong(address("2001:db8:0:1::1"), now);
        assert_ne!(throttle.reserve_check(address("2001:db8:0:1:ffff::2"), now), Ok(Duration::ZERO));
        assert_eq!(throttle.reserve_check(address("2001:db8:0:2::1"), now), Ok(Duration::ZERO));
    }

    #[test]
    fn table_is_bounded_and_keeps_persistent_senders() {
        let mut throttle = TokenThrottle::default();
        let (peer, now) = (address("192.0.2.1"), Instant::now());
        (0..5).for_each(|_| _ = throttle.record_wrong(peer, now));
        for number in 0..10 * ADDRESSES_MAX as u32 {
            throttle.record_wrong(IpAddr::V4(number.into()), now);
        }
        assert_eq!(throttle.addresses.len(), ADDRESSES_MAX);
        assert!(throttle.addresses.contains_key(&peer));
        throttle.record_wrong(address("192.0.2.9"), now + FORGOTTEN_AFTER);
        assert_eq!(throttle.addresses.len(), 1, "forgotten");
    }
}
