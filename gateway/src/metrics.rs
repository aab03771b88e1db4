//! Counters, gauges and histograms, and their exposition.
//!
//! Label values are enums or names from the configuration (routes, rules), never values that a
//! client sends. Recording does not allocate and takes no lock.

mod counter;
mod exposition;
mod quantile;

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use counter::CounterGroup;
pub(crate) use counter::{Counter, Counters, Label, use_stripe};
pub(crate) use exposition::ExpositionFormat;
pub(crate) use quantile::DurationCounts;

/// Upper bounds of the duration buckets in seconds. The last bucket has no bound.
const BOUNDS: [f64; 13] = [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// `BOUNDS` in nanoseconds.
const BOUNDS_NANOS: [u64; BOUNDS.len()] = {
    let mut nanos = [0; BOUNDS.len()];
    let mut at = 0;
    while at < BOUNDS.len() {
        nanos[at] = (BOUNDS[at] * 1e9 + 0.5) as u64;
        at += 1;
    }
    nanos
};

/// Parts of a bucket, which the gateway's own quantiles use; scrapes get whole buckets.
const PARTS: usize = 4;
/// Parts of all buckets.
const PARTS_ALL: usize = (BOUNDS.len() + 1) * PARTS;
/// Upper bounds of the parts in nanoseconds. The parts of a bucket have equal ratios of their
/// bounds; those of the first and of the last bucket double. The last part has no bound.
const PART_NANOS: [u64; PARTS_ALL - 1] = {
    let mut nanos = [0; PARTS_ALL - 1];
    let mut bucket = 0;
    while bucket < BOUNDS.len() {
        let upper = BOUNDS_NANOS[bucket];
        let bounds = if bucket == 0 {
            [upper / 8, upper / 4, upper / 2, upper]
        } else {
            let lower = BOUNDS_NANOS[bucket - 1];
            let middle = geometric_mean(lower, upper);
            [geometric_mean(lower, middle), middle, geometric_mean(middle, upper), upper]
        };
        let mut part = 0;
        while part < PARTS {
            nanos[bucket * PARTS + part] = bounds[part];
            part += 1;
        }
        bucket += 1;
    }
    let mut part = BOUNDS.len() * PARTS;
    while part < PARTS_ALL - 1 {
        nanos[part] = nanos[part - 1] * 2;
        part += 1;
    }
    nanos
};

const fn geometric_mean(a: u64, b: u64) -> u64 {
    // The root of a product of two numbers is no larger than the larger one.
    (a as u128 * b as u128).isqrt() as u64
}

/// A histogram of durations: a counter for each part of the buckets of `BOUNDS`, and one for the
/// sum in nanoseconds.
pub(crate) struct Histogram(CounterGroup);

impl Default for Histogram {
    fn default() -> Self {
        Histogram(CounterGroup::new(Histogram::CELLS))
    }
}

/// Cells for the counters of the configuration. Those of the process itself are far fewer than one
/// in a thousand.
pub(crate) const CELLS_MAX: usize = counter::cells_for_groups_of(Histogram::CELLS) / 1_000 * 999;

impl Histogram {
    /// The number of its cells, more than those of a label have.
    pub(crate) const CELLS: usize = PARTS_ALL + 1;

    pub(crate) fn observe(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_NANOS.iter().position(|bound| nanos <= *bound).unwrap_or(BOUNDS.len());
        let first = bucket * PARTS;
        let part = PART_NANOS[first..first + PARTS - 1].iter().filter(|bound| **bound < nanos).count();
        self.0.add(first + part, 1);
        self.0.add(PARTS_ALL, nanos);
    }

    /// The observations of each bucket of `BOUNDS`, and of the one without a bound.
    fn buckets(&self) -> impl Iterator<Item = u64> {
        (0..=BOUNDS.len()).map(|bucket| (0..PARTS).map(|part| self.0.get(bucket * PARTS + part)).sum())
    }
}

/// One histogram per value of a label.
pub(crate) struct Histograms<L> {
    all: Vec<Histogram>,
    label: PhantomData<L>,
}

impl<L: Label> Default for Histograms<L> {
    fn default() -> Self {
        Histograms { all: L::ALL.iter().map(|_| Histogram::default()).collect(), label: PhantomData }
    }
}

impl<L: Label> Histograms<L> {
    pub(crate) fn observe(&self, label: L, duration: Duration) {
        self.all[label.index()].observe(duration);
    }

    /// Number of observations of all labels.
    pub(crate) fn count(&self) -> u64 {
        self.all.iter().map(Histogram::count).sum()
    }
}

/// Declares an enum whose variants are the values of one label.
#[macro_export]
macro_rules! label {
    (
        $(#[$doc:meta])* $vis:vis $name:ident, $label:literal,
        { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        $vis enum $name { $($(#[$vdoc])* $variant),+ }

        impl $crate::metrics::Label for $name {
            const NAME: &'static str = $label;
            const ALL: &'static [Self] = &[$($name::$variant),+];
            fn index(self) -> usize { self as usize }
            fn as_str(self) -> &'static str { match self { $($name::$variant => $text),+ } }
        }
    };
}

/// Names and values of the labels of one sample.
pub(crate) type Labels<'a> = &'a [(&'a str, &'a str)];
/// Callback that emits the labels and value of each sample at scrape time.
pub(crate) type ReadSamples<T> = Box<dyn Fn(&mut dyn FnMut(Labels<'_>, T)) + Send + Sync>;

/// Callback that emits the labels and the histogram of each sample at scrape time.
pub(crate) type ReadHistograms = Box<dyn Fn(&mut dyn FnMut(Labels<'_>, &Histogram)) + Send + Sync>;

/// Source of the samples of a metric, one for each set of labels.
pub(crate) enum MetricSource {
    Counter(ReadSamples<u64>),
    /// A counter of fractions.
    FractionCounter(ReadSamples<f64>),
    Gauge(ReadSamples<f64>),
    Histogram(ReadHistograms),
}

/// Entry of the process-wide registry of metrics: name, help text and source of samples.
struct RegisteredMetric {
    name: &'static str,
    help: &'static str,
    source: MetricSource,
}

impl fmt::Debug for RegisteredMetric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

static METRICS: LazyLock<Mutex<BTreeMap<&'static str, RegisteredMetric>>> = LazyLock::new(Mutex::default);

fn expose(name: &'static str, help: &'static str, source: MetricSource) {
    METRICS.lock().unwrap_or_else(PoisonError::into_inner).insert(name, RegisteredMetric { name, help, source });
}

/// Exposes one counter per label value. The exposition appends `_total` to `name`.
pub(crate) fn expose_counters<L: Label>(name: &'static str, help: &'static str, counters: &'static Counters<L>) {
    expose_counter_with(name, help, move |emit| {
        for label in L::ALL {
            emit(&[(L::NAME, label.as_str())], counters.get(*label));
        }
    });
}

/// A number that counters have.
pub(crate) trait CounterValue: Sized {
    /// The source of a counter of such numbers.
    fn source(read: ReadSamples<Self>) -> MetricSource;
}

impl CounterValue for u64 {
    fn source(read: ReadSamples<u64>) -> MetricSource {
        MetricSource::Counter(read)
    }
}

impl CounterValue for f64 {
    fn source(read: ReadSamples<f64>) -> MetricSource {
        MetricSource::FractionCounter(read)
    }
}

/// Exposes counters that `read` emits at scrape time. Exposing a name again replaces the metric.
pub(crate) fn expose_counter_with<V: CounterValue>(
    name: &'static str,
    help: &'static str,
    read: impl Fn(&mut dyn FnMut(Labels<'_>, V)) + Send + Sync + 'static,
) {
    expose(name, help, V::source(Box::new(read)));
}

/// Exposes gauges that `read` emits at scrape time. Exposing a name again replaces the metric.
pub(crate) fn expose_gauge_with(
    name: &'static str,
    help: &'static str,
    read: impl Fn(&mut dyn FnMut(Labels<'_>, f64)) + Send + Sync + 'static,
) {
    expose(name, help, MetricSource::Gauge(Box::new(read)));
}

/// Exposes one histogram per label value.
pub(crate) fn expose_histograms<L: Label>(name: &'static str, help: &'static str, histograms: &'static Histograms<L>) {
    let read = move |emit: &mut dyn FnMut(Labels<'_>, &Histogram)| {
        for label in L::ALL {
            emit(&[(L::NAME, label.as_str())], &histograms.all[label.index()]);
        }
    };
    expose(name, help, MetricSource::Histogram(Box::new(read)));
}

/// Exposes histograms that `read` emits at scrape time.
pub(crate) fn expose_histogram_with(
    name: &'static str,
    help: &'static str,
    read: impl Fn(&mut dyn FnMut(Labels<'_>, &Histogram)) + Send + Sync + 'static,
) {
    expose(name, help, MetricSource::Histogram(Box::new(read)));
}

/// No exemplar labels.
type NoLabels = [(&'static str, &'static str); 0];

/// Collects all registered metrics.
#[derive(Debug)]
struct AllMetrics;

impl Collector for AllMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for metric in METRICS.lock().unwrap_or_else(PoisonError::into_inner).values() {
            let kind = match metric.source {
                MetricSource::Counter(_) | MetricSource::FractionCounter(_) => MetricType::Counter,
                MetricSource::Gauge(_) => MetricType::Gauge,
                MetricSource::Histogram(_) => MetricType::Histogram,
            };
            let encoder = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
            encode_samples(&metric.source, encoder)?;
        }
        Ok(())
    }
}

fn encode_samples(source: &MetricSource, mut encoder: MetricEncoder<'_>) -> fmt::Result {
    let mut result = Ok(());
    match source {
        MetricSource::Counter(read) => read(&mut |labels, value| {
            let labels: Vec<(&str, &str)> = labels.to_vec();
            result = result.and_then(|()| match labels.is_empty() {
                true => encoder.encode_counter::<NoLabels, u64, u64>(&value, None),
                false => encoder.encode_family(&labels)?.encode_counter::<NoLabels, u64, u64>(&value, None),
            });
        }),
        MetricSource::FractionCounter(read) => read(&mut |labels, value| {
            let labels: Vec<(&str, &str)> = labels.to_vec();
            result = result.and_then(|()| match labels.is_empty() {
                true => encoder.encode_counter::<NoLabels, f64, f64>(&value, None),
                false => encoder.encode_family(&labels)?.encode_counter::<NoLabels, f64, f64>(&value, None),
            });
        }),
        MetricSource::Gauge(read) => read(&mut |labels, value| {
            let labels: Vec<(&str, &str)> = labels.to_vec();
            result = result.and_then(|()| match labels.is_empty() {
                true => encoder.encode_gauge(&value),
                false => encoder.encode_family(&labels)?.encode_gauge(&value),
            });
        }),
        MetricSource::Histogram(read) => read(&mut |labels, histogram| {
            let labels: Vec<(&str, &str)> = labels.to_vec();
            result = result.and_then(|()| histogram.encode(encoder.encode_family(&labels)?));
        }),
    }
    result
}

impl Histogram {
    /// Number of observations.
    pub(crate) fn count(&self) -> u64 {
        self.buckets().sum()
    }

    /// The observations by bucket.
    pub(crate) fn counts(&self) -> DurationCounts {
        let bounds = PART_NANOS.iter().map(|nanos| *nanos as f64 / 1e9).chain([f64::INFINITY]);
        DurationCounts::new(bounds.zip((0..PARTS_ALL).map(|part| self.0.get(part))).collect())
    }
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let counts: Vec<u64> = self.buckets().collect();
        let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(counts.iter().copied()).collect();
        let seconds = Duration::from_nanos(self.0.get(PARTS_ALL)).as_secs_f64();
        encoder.encode_histogram::<NoLabels>(seconds, counts.iter().sum(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// The exposition of all metrics.
pub(crate) fn exposition(format: ExpositionFormat) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(AllMetrics));
    let mut text = String::new();
    // Writing to a string fails only if an encoder above fails. The text up to the failure is still
    // useful.
    if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &registry) {
        tracing::warn!(%error, "the metrics exposition is incomplete");
    }
    match format {
        ExpositionFormat::OpenMetrics => text,
        ExpositionFormat::Text => exposition::to_text(&text),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The largest ratio between the bounds of a part that holds `nanos`.
    fn ratio_at(nanos: u64) -> f64 {
        match nanos {
            ..=500_000 => 2.0,
            500_001..=2_500_000_000 => 1.26,
            2_500_000_001..=10_000_000_000 => 1.42,
            _ => 2.0,
        }
    }

    proptest! {
        #[test]
        fn parts_add_up_to_the_buckets_of_scrapes(durations in proptest::collection::vec(0_u64..20_000_000_000, 1..50)) {
            let histogram = Histogram::default();
            let mut expected = [0; BOUNDS.len() + 1];
            for nanos in &durations {
                histogram.observe(Duration::from_nanos(*nanos));
                expected[BOUNDS_NANOS.iter().position(|bound| nanos <= bound).unwrap_or(BOUNDS.len())] += 1;
            }
            prop_assert_eq!(histogram.buckets().collect::<Vec<_>>(), expected);
            prop_assert_eq!(histogram.0.get(PARTS_ALL), durations.iter().sum::<u64>());
        }

        /// As docs/operations.md says.
        #[test]
        fn quantiles_are_as_exact_as_the_parts(
            mut durations in proptest::collection::vec(62_500_u64..80_000_000_000, 1..200),
            part in 0.01_f64..1.0,
        ) {
            let histogram = Histogram::default();
            durations.iter().for_each(|nanos| histogram.observe(Duration::from_nanos(*nanos)));
            durations.sort_unstable();
            let exact = durations[(part * durations.len() as f64).ceil() as usize - 1];
            let estimate = histogram.counts().quantile(part).expect("observations").as_nanos() as f64;
            let (ratio, bound) = (estimate / exact as f64, ratio_at(exact));
            prop_assert!((1.0 / bound..=bound).contains(&ratio), "{exact} {estimate}");
        }
    }

    #[test]
    fn recorded_values_are_exposed() {
        static SEEN: LazyLock<Counter> = LazyLock::new(Counter::default);
        SEEN.add(3);
        expose_counter_with("test_seen", "Seen.", |emit| emit(&[("kind", "a\"b")], SEEN.get()));
        label! { TestLabel, "color", { Red = "red", Blue = "blue" } }
        static TAKEN: LazyLock<Histograms<TestLabel>> = LazyLock::new(Histograms::default);
        TAKEN.observe(TestLabel::Blue, Duration::from_millis(3));
        expose_histograms("test_duration_seconds", "Duration.", &TAKEN);
        let text = exposition(ExpositionFormat::OpenMetrics);
        assert!(text.contains("test_seen_total{kind=\"a\\\"b\"} 3\n"), "{text}");
        assert!(text.contains("test_duration_seconds_bucket{le=\"0.005\",color=\"blue\"} 1\n"), "{text}");
        assert!(text.contains("test_duration_seconds_bucket{le=\"+Inf\",color=\"blue\"} 1\n"), "{text}");
        assert!(text.contains("test_duration_seconds_count{color=\"red\"} 0\n"), "{text}");
        assert_eq!((TAKEN.count(), TestLabel::Red.index()), (1, 0));
    }
}
