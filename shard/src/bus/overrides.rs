//! Owns overrides: short named texts that apply for a limited time, on all nodes or on one. Their
//! meaning is defined by their readers.
//!
//! Each override has a version. Servers deliver overrides in any order, so a node keeps the one
//! with the highest version of each name. Fleet-wide overrides are kept after they expire, so that
//! a server that was unreachable or lost its data can receive the latest one.
//!
//! Refuses more than `OVERRIDES_MAX` names, texts longer than `TEXT_MAX`, and versions too far in
//! the future.
//! Invariant: an override is replaced only by a later one of the same name.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

/// Overrides concern names in a configuration, which are fewer.
pub(super) const OVERRIDES_MAX: usize = 1_024;

/// Maximum length of a name or a text, in bytes.
pub(super) const TEXT_MAX: usize = 512;

/// Longest duration of an override: covers a week's traffic and the following Monday.
pub const OVERRIDE_DURATION_MAX: Duration = Duration::from_secs(8 * 86_400);

/// Microseconds by which a version may be ahead of this node's time: far more than clocks differ. A
/// version further ahead could not be replaced.
const VERSION_AHEAD_MAX: u64 = 86_400_000_000;

/// A named text with its version and the time at which it ends; whether it applies fleet-wide is in
/// [`RegisteredOverride`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedOverride {
    pub name: String,
    pub text: String,
    /// Later overrides of the same name have higher versions.
    pub version: u64,
    pub until: Instant,
}

/// The override was rejected: too many, or too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {OVERRIDES_MAX} overrides already, or this one is longer than {TEXT_MAX} bytes")]
pub struct OverrideRegistryFull;

/// The latest override of each name on this node, behind a lock, with a notification of changes.
pub(super) struct OverrideRegistry {
    state: Mutex<RegistryState>,
    changed: Notify,
    /// Below 1,000: distinguishes versions that two nodes assign in the same millisecond.
    tie_breaker: u64,
}

/// Registered overrides by name, at most `OVERRIDES_MAX`, and the highest known version; behind the
/// registry's lock.
#[derive(Default)]
struct RegistryState {
    overrides: BTreeMap<String, RegisteredOverride>,
    /// The highest version assigned or received, including those of overrides for other nodes.
    latest_version: u64,
}

/// An override, and whether it applies on all nodes or on this one only.
struct RegisteredOverride {
    fleet_override: NamedOverride,
    is_fleet_wide: bool,
}

impl OverrideRegistry {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), tie_breaker: seed % 1_000 }
    }

    /// Registers an override unless a later one of its name is registered; returns whether it is
    /// new. `now` is this node's time.
    pub(super) fn register(
        &self,
        announcement: &NewOverride<'_>,
        duration: Duration,
        now: SystemTime,
    ) -> Result<bool, OverrideRegistryFull> {
        let &NewOverride { name, text, version, is_fleet_wide } = announcement;
        if version > micros(now).saturating_add(VERSION_AHEAD_MAX) {
            return Ok(false);
        }
        let mut state = self.state();
        state.latest_version = state.latest_version.max(version);
        if state.overrides.get(name).is_some_and(|registered| registered.fleet_override.version >= version) {
            return Ok(false);
        }
        let now = Instant::now();
        if state.overrides.len() >= OVERRIDES_MAX {
            state.overrides.retain(|_, registered| registered.fleet_override.until > now);
        }
        let has_room = state.overrides.len() < OVERRIDES_MAX || state.overrides.contains_key(name);
        if !has_room || name.len().max(text.len()) > TEXT_MAX {
            return Err(OverrideRegistryFull);
        }
        let until = now + duration.min(OVERRIDE_DURATION_MAX);
        let fleet_override = NamedOverride { name: name.to_owned(), text: text.to_owned(), version, until };
        state.overrides.insert(name.to_owned(), RegisteredOverride { fleet_override, is_fleet_wide });
        drop(state);
        self.changed.notify_one();
        Ok(true)
    }

    /// Records the version of an override that is for another node.
    pub(super) fn observe_version(&self, version: u64, now: SystemTime) {
        if version <= micros(now).saturating_add(VERSION_AHEAD_MAX) {
            let mut state = self.state();
            state.latest_version = state.latest_version.max(version);
        }
    }

    /// A version for a new override: the time in microseconds, but above all known versions.
    pub(super) fn next_version(&self, now: SystemTime) -> u64 {
        let mut state = self.state();
        state.latest_version = (micros(now) / 1_000 * 1_000 + self.tie_breaker).max(state.latest_version + 1);
        state.latest_version
    }

    /// The overrides that have not expired.
    pub(super) fn active(&self) -> Vec<NamedOverride> {
        let now = Instant::now();
        let state = self.state();
        state
            .overrides
            .values()
            .map(|registered| &registered.fleet_override)
            .filter(|active| active.until > now)
            .cloned()
            .collect()
    }

    /// The latest fleet-wide override of each name, including expired ones.
    pub(super) fn fleet_wide(&self) -> Vec<NamedOverride> {
        let state = self.state();
        state
            .overrides
            .values()
            .filter(|registered| registered.is_fleet_wide)
            .map(|registered| registered.fleet_override.clone())
            .collect()
    }

    /// Waits until an override was registered since the last call. Cancel safe.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn state(&self) -> MutexGuard<'_, RegistryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An override to register, received from the bus or published by this node.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewOverride<'a> {
    pub(super) name: &'a str,
    pub(super) text: &'a str,
    pub(super) version: u64,
    pub(super) is_fleet_wide: bool,
}

fn micros(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn register(
        registry: &OverrideRegistry,
        (name, text, version): (&str, &str, u64),
        duration: Duration,
    ) -> Result<bool, OverrideRegistryFull> {
        registry.register(&NewOverride { name, text, version, is_fleet_wide: name != "mine" }, duration, UNIX_EPOCH)
    }

    #[test]
    fn the_highest_version_of_a_name_wins_in_any_order() {
        let registry = OverrideRegistry::new(7);
        assert_eq!(register(&registry, ("a", "second", 2), HOUR), Ok(true));
        assert_eq!(register(&registry, ("a", "first", 1), HOUR), Ok(false));
        assert_eq!(register(&registry, ("a", "again", 2), HOUR), Ok(false));
        assert_eq!(register(&registry, ("a", "of the future", 2 * VERSION_AHEAD_MAX), HOUR), Ok(false));
        assert_eq!(register(&registry, ("b", "expired", 1), Duration::ZERO), Ok(true));
        assert_eq!(register(&registry, ("mine", "here", 1), HOUR), Ok(true));
        let texts = |overrides: Vec<NamedOverride>| overrides.into_iter().map(|active| active.text).collect::<Vec<_>>();
        assert_eq!(
            (texts(registry.active()), texts(registry.fleet_wide())),
            (vec!["second".into(), "here".into()], vec!["second".to_owned(), "expired".into()])
        );
    }

    #[test]
    fn versions_increase_across_clock_steps_and_nodes() {
        let (registry, second) = (OverrideRegistry::new(123_007), UNIX_EPOCH + Duration::from_secs(1));
        let given = [second, second, UNIX_EPOCH].map(|now| registry.next_version(now));
        assert_eq!(given, [1_000_007, 1_000_008, 1_000_009]);
        registry.observe_version(2_000_000, second);
        registry.observe_version(u64::MAX, second);
        assert_eq!(registry.next_version(second), 2_000_001);
    }

    #[test]
    fn a_full_registry_evicts_expired_overrides_only() {
        let registry = OverrideRegistry::new(0);
        for n in 0..OVERRIDES_MAX {
            let duration = if n == 0 { Duration::ZERO } else { HOUR };
            assert_eq!(register(&registry, (&n.to_string(), "text", 1), duration), Ok(true));
        }
        assert_eq!(register(&registry, ("new", "text", 1), HOUR), Ok(true), "one had expired");
        assert_eq!(register(&registry, ("newer", "text", 1), HOUR), Err(OverrideRegistryFull));
        assert_eq!(register(&registry, ("new", "text", 2), HOUR), Ok(true));
        assert_eq!(register(&registry, ("new", &"x".repeat(TEXT_MAX + 1), 3), HOUR), Err(OverrideRegistryFull));
    }
}
