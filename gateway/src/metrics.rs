//! Counters, gauges and histograms, and their exposition.
//!
//! Labels are enums known at compile time, or names from the configuration (routes, rules); never anything a client sends.
//! Recording allocates nothing and takes no lock.

mod counter;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

pub use counter::{Counter, Counters, Label, use_line};

/// A value that goes up and down.
#[derive(Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    pub fn add(&self, count: i64) {
        self.0.fetch_add(count, Relaxed);
    }

    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of the duration buckets, in seconds; the last bucket has none.
const BOUNDS: [f64; 13] = [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// The same in nanoseconds.
const BOUNDS_NANOS: [u64; BOUNDS.len()] = {
    let mut nanos = [0; BOUNDS.len()];
    let mut at = 0;
    while at < BOUNDS.len() {
        nanos[at] = (BOUNDS[at] * 1e9 + 0.5) as u64;
        at += 1;
    }
    nanos
};

/// A histogram of durations.
#[derive(Default)]
pub struct Histogram {
    buckets: [Counter; BOUNDS.len() + 1],
    nanos: Counter,
}

impl Histogram {
    pub fn observe(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_NANOS.iter().position(|bound| nanos <= *bound).unwrap_or(BOUNDS.len());
        self.buckets[bucket].inc();
        self.nanos.add(nanos);
    }
}

/// Declares an enum whose variants are the values of one label.
#[macro_export]
macro_rules! label {
    ($(#[$doc:meta])* $name:ident, $label:literal, { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $crate::metrics::Label for $name {
            const NAME: &'static str = $label;
            const ALL: &'static [Self] = &[$($name::$variant),+];
            fn index(self) -> usize { self as usize }
            fn as_str(self) -> &'static str { match self { $($name::$variant => $text),+ } }
        }
    };
}

/// Labels of one reading: names and values.
pub type Labels<'a> = &'a [(&'a str, &'a str)];
type Read<T> = Box<dyn Fn(&mut dyn FnMut(Labels<'_>, T)) + Send + Sync>;

/// Something with a reading per label set, named when it was registered.
enum Reading {
    Counter(Read<u64>),
    Gauge(Read<f64>),
    Histogram(Arc<Histogram>),
}

struct Exposed {
    name: &'static str,
    help: &'static str,
    reading: Reading,
}

impl fmt::Debug for Exposed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

static EXPOSED: LazyLock<Mutex<BTreeMap<&'static str, Exposed>>> = LazyLock::new(Mutex::default);

fn expose(name: &'static str, help: &'static str, reading: Reading) {
    EXPOSED.lock().unwrap_or_else(PoisonError::into_inner).insert(name, Exposed { name, help, reading });
}

/// Exposes one counter per label value. `name` carries no `_total`; the exposition adds it.
pub fn expose_counters<L: Label>(name: &'static str, help: &'static str, counters: &'static Counters<L>) {
    expose_counter_with(name, help, move |emit| {
        for label in L::ALL {
            emit(&[(L::NAME, label.as_str())], counters.get(*label));
        }
    });
}

/// Exposes counters whose labels are found at scrape time. Exposing a name again replaces it.
pub fn expose_counter_with(
    name: &'static str,
    help: &'static str,
    read: impl Fn(&mut dyn FnMut(Labels<'_>, u64)) + Send + Sync + 'static,
) {
    expose(name, help, Reading::Counter(Box::new(read)));
}

/// Exposes gauges whose labels are found at scrape time. Exposing a name again replaces it.
pub fn expose_gauge_with(
    name: &'static str,
    help: &'static str,
    read: impl Fn(&mut dyn FnMut(Labels<'_>, f64)) + Send + Sync + 'static,
) {
    expose(name, help, Reading::Gauge(Box::new(read)));
}

pub fn expose_histogram(name: &'static str, help: &'static str, histogram: Arc<Histogram>) {
    expose(name, help, Reading::Histogram(histogram));
}

/// No exemplar labels.
type NoLabels = [(&'static str, &'static str); 0];

#[derive(Debug)]
struct Everything;

impl Collector for Everything {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for exposed in EXPOSED.lock().unwrap_or_else(PoisonError::into_inner).values() {
            let kind = match exposed.reading {
                Reading::Counter(_) => MetricType::Counter,
                Reading::Gauge(_) => MetricType::Gauge,
                Reading::Histogram(_) => MetricType::Histogram,
            };
            let metric = encoder.encode_descriptor(exposed.name, exposed.help, None, kind)?;
            encode_reading(&exposed.reading, metric)?;
        }
        Ok(())
    }
}

fn encode_reading(reading: &Reading, mut metric: MetricEncoder<'_>) -> fmt::Result {
    let mut result = Ok(());
    match reading {
        Reading::Counter(read) => read(&mut |labels, value| {
            let labels: Vec<(&str, &str)> = labels.to_vec();
            result = result.and_then(|()| match labels.is_empty() {
                true => metric.encode_counter::<NoLabels, u64, u64>(&value, None),
                false => metric.encode_family(&labels)?.encode_counter::<NoLabels, u64, u64>(&value, None),
            });
        }),
        Reading::Gauge(read) => read(&mut |labels, value| {
            let labels: Vec<(&str, &str)> = labels.to_vec();
            result = result.and_then(|()| match labels.is_empty() {
                true => metric.encode_gauge(&value),
                false => metric.encode_family(&labels)?.encode_gauge(&value),
            });
        }),
        Reading::Histogram(histogram) => result = histogram.encode(metric),
    }
    result
}

impl Histogram {
    /// How many were observed.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(Counter::get).sum()
    }
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let counts: Vec<u64> = self.buckets.iter().map(Counter::get).collect();
        let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(counts.iter().copied()).collect();
        let seconds = Duration::from_nanos(self.nanos.get()).as_secs_f64();
        encoder.encode_histogram::<NoLabels>(seconds, counts.iter().sum(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// The whole exposition in OpenMetrics text.
pub fn exposition() -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Everything));
    let mut text = String::new();
    // Writing to a string fails only if an encoder above does; what was written until then is still of use.
    if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &registry) {
        tracing::warn!(%error, "the metrics exposition is incomplete");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recorded_is_exposed() {
        static SEEN: LazyLock<Counter> = LazyLock::new(Counter::default);
        SEEN.add(3);
        expose_counter_with("test_seen", "Seen.", |emit| emit(&[("kind", "a\"b")], SEEN.get()));
        let histogram = Arc::new(Histogram::default());
        histogram.observe(Duration::from_millis(3));
        expose_histogram("test_duration_seconds", "Duration.", histogram);
        let text = exposition();
        assert!(text.contains("test_seen_total{kind=\"a\\\"b\"} 3\n"), "{text}");
        assert!(text.contains("test_duration_seconds_bucket{le=\"0.005\"} 1\n"), "{text}");
        assert!(text.contains("test_duration_seconds_bucket{le=\"+Inf\"} 1\n"), "{text}");
    }
}
