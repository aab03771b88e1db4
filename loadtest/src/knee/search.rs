//! Finds the knee of a service: the highest rate at which p99 and goodput hold.
//!
//! The rate doubles until a step breaks; bisection narrows the gap; further rounds repeat the
//! bisection, which gives a spread. Then twice the knee shows what is left of the goodput.

use crate::error::{LoadtestError, Result};
use crate::load::step::{LoadStep, StepVerdict};
use crate::spread::Spread;

/// Factor around an earlier knee in which later rounds search.
const NEIGHBOURHOOD: f64 = 1.4;
/// Attempts at a step whose generator is late.
const LATE_STEPS_MAX: usize = 3;
/// Least goodput at twice the knee, as a part of the peak.
pub(crate) const GOODPUT_RATIO: f64 = 0.98;

/// Bounds of a search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct KneePlan {
    pub(crate) start_rate: f64,
    pub(crate) max_rate: f64,
    pub(crate) bisections: usize,
    pub(crate) rounds: usize,
}

/// Why a search has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SearchEnd {
    /// The knee and the goodput past it are known.
    Complete,
    /// All rates up to the largest hold.
    MaxRate,
    /// The generator cannot send more.
    Generator,
    Interrupted,
}

/// Measured steps and what follows from them.
#[derive(Debug)]
pub(crate) struct KneeSearch {
    pub(crate) plan: KneePlan,
    /// In the order of their measurement.
    pub(crate) steps: Vec<LoadStep>,
    /// The knee of each round.
    pub(crate) knees: Vec<f64>,
    /// Steps at twice the knee.
    pub(crate) past_knee: Vec<LoadStep>,
    pub(crate) end: SearchEnd,
}

impl KneeSearch {
    pub(crate) fn new(plan: KneePlan) -> Self {
        KneeSearch { plan, steps: Vec::new(), knees: Vec::new(), past_knee: Vec::new(), end: SearchEnd::Complete }
    }

    /// Runs the search with `measure`, which measures a step at a rate. An interruption ends it
    /// with the steps so far; any other error is returned.
    pub(crate) fn run(&mut self, mut measure: impl FnMut(f64) -> Result<LoadStep>) -> Result<()> {
        self.end = match self.search(&mut measure) {
            Ok(end) => end,
            Err(LoadtestError::Interrupted) => SearchEnd::Interrupted,
            Err(failure) => return Err(failure),
        };
        Ok(())
    }

    /// Median and range of the knees.
    pub(crate) fn knee(&self) -> Option<Spread> {
        Spread::of(self.knees.iter().copied())
    }

    /// The highest of the goodputs at each rate, which are medians of the steps at that rate.
    pub(crate) fn peak(&self) -> Option<f64> {
        let counted = || self.steps.iter().filter(|step| step.verdict != StepVerdict::Generator);
        let mut rates: Vec<f64> = counted().map(|step| step.rate).collect();
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        let goodputs = rates.into_iter().filter_map(|rate| {
            let at_rate = counted().filter(|step| step.rate == rate).map(|step| step.goodput);
            Spread::of(at_rate).map(|spread| spread.median)
        });
        goodputs.max_by(f64::total_cmp)
    }

    /// Goodput at twice the knee as a part of the peak: median and range of the rounds.
    pub(crate) fn goodput_ratio(&self) -> Option<Spread> {
        let peak = self.peak().filter(|peak| *peak > 0.0)?;
        Spread::of(self.past_knee.iter().map(|step| step.goodput / peak))
    }

    fn search(&mut self, measure: &mut impl FnMut(f64) -> Result<LoadStep>) -> Result<SearchEnd> {
        let Some((low, high)) = self.climb(measure)? else { return Ok(self.end) };
        let Some(first) = self.bisect(measure, (low, high))? else { return Ok(SearchEnd::Generator) };
        self.knees.push(first);
        for _ in 1..self.plan.rounds {
            let bounds = self.neighbourhood(measure, first)?;
            let Some(knee) = self.bisect(measure, bounds)? else { return Ok(SearchEnd::Generator) };
            self.knees.push(knee);
        }
        let knee = self.knee().map_or(first, |knee| knee.median);
        for _ in 0..self.plan.rounds {
            self.step(measure, knee)?;
            if self.step(measure, 2.0 * knee)? == StepVerdict::Generator {
                return Ok(SearchEnd::Generator);
            }
            self.past_knee.extend(self.steps.last().cloned());
        }
        Ok(SearchEnd::Complete)
    }

    /// Measures a step, again if the generator was late: the machine may have paused.
    fn step(&mut self, measure: &mut impl FnMut(f64) -> Result<LoadStep>, rate: f64) -> Result<StepVerdict> {
        let mut verdict = StepVerdict::Generator;
        for _ in 0..LATE_STEPS_MAX {
            let step = measure(rate)?;
            verdict = step.verdict;
            self.steps.push(step);
            if verdict != StepVerdict::Generator {
                break;
            }
        }
        Ok(verdict)
    }

    /// Doubles the rate until a step breaks, twice in a row, because one step may meet a pause of
    /// the machine. `None`: no rate breaks, and `end` says why.
    fn climb(&mut self, measure: &mut impl FnMut(f64) -> Result<LoadStep>) -> Result<Option<(f64, f64)>> {
        let mut held: Option<f64> = None;
        let mut rate = self.plan.start_rate;
        loop {
            let mut verdict = self.step(measure, rate)?;
            if verdict != StepVerdict::Holds {
                verdict = self.step(measure, rate)?;
            }
            match (verdict, held) {
                (StepVerdict::Holds, _) if rate >= self.plan.max_rate => {
                    self.end = SearchEnd::MaxRate;
                    return Ok(None);
                }
                (StepVerdict::Holds, _) => {
                    held = Some(rate);
                    rate = (2.0 * rate).min(self.plan.max_rate);
                }
                (StepVerdict::Generator, _) => {
                    self.end = SearchEnd::Generator;
                    return Ok(None);
                }
                (_, Some(held)) => return Ok(Some((held, rate))),
                (_, None) => return Err(self.first_step_breaks(rate)),
            }
        }
    }

    fn first_step_breaks(&self, rate: f64) -> LoadtestError {
        let step = self.steps.last().expect("a step was measured");
        LoadtestError::Load(format!(
            "the lowest load, {rate:.0}/s, breaks already: {}; p99 {:.1} ms. Lower --start-rate, raise --p99, or \
             check --url and --header",
            step.faults(),
            step.p99_ms
        ))
    }

    /// Rates around an earlier knee of which the lower one holds and the upper one breaks.
    fn neighbourhood(&mut self, measure: &mut impl FnMut(f64) -> Result<LoadStep>, knee: f64) -> Result<(f64, f64)> {
        let (mut low, mut high) = (knee / NEIGHBOURHOOD, knee * NEIGHBOURHOOD);
        while low > self.plan.start_rate && self.step(measure, low)? != StepVerdict::Holds {
            high = low;
            low /= NEIGHBOURHOOD;
        }
        if high > knee {
            while high < self.plan.max_rate && self.step(measure, high)? == StepVerdict::Holds {
                low = high;
                high *= NEIGHBOURHOOD;
            }
        }
        Ok((low.max(self.plan.start_rate), high.min(self.plan.max_rate)))
    }

    /// Halves the gap of a rate that holds and one that breaks, on the logarithmic scale. `None`:
    /// the generator cannot send a rate between them.
    fn bisect(&mut self, measure: &mut impl FnMut(f64) -> Result<LoadStep>, bounds: (f64, f64)) -> Result<Option<f64>> {
        let (mut low, mut high) = bounds;
        for _ in 0..self.plan.bisections {
            let middle = (low * high).sqrt();
            match self.step(measure, middle)? {
                StepVerdict::Holds => low = middle,
                StepVerdict::Generator => return Ok(None),
                StepVerdict::P99 | StepVerdict::Goodput => high = middle,
            }
        }
        Ok(Some(low))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::step::tests::step;

    const PLAN: KneePlan = KneePlan { start_rate: 10.0, max_rate: 100_000.0, bisections: 6, rounds: 3 };

    /// A service with a capacity, and the goodput that is left of it beyond.
    fn service(capacity: f64, left: f64) -> impl FnMut(f64) -> Result<LoadStep> {
        move |rate| Ok(if rate <= capacity { step(rate, rate, 5.0) } else { step(rate, left * capacity, 80.0) })
    }

    #[test]
    fn knee_of_any_capacity_is_found_within_the_resolution() {
        for capacity in [11.0, 777.0, 5_120.0, 40_000.0] {
            let mut search = KneeSearch::new(PLAN);
            search.run(service(capacity, 1.0)).expect("a search");
            let knee = search.knee().expect("a knee");
            assert_eq!((search.end, search.knees.len(), search.past_knee.len()), (SearchEnd::Complete, 3, 3));
            assert!(knee.max <= capacity && knee.min >= capacity / 1.03, "{capacity}: {knee:?}");
        }
    }

    #[test]
    fn goodput_past_the_knee_is_a_part_of_the_peak() {
        for (left, holds) in [(1.0, true), (0.97, false), (0.0, false)] {
            let mut search = KneeSearch::new(PLAN);
            search.run(service(1_000.0, left)).expect("a search");
            let ratio = search.goodput_ratio().expect("a ratio").median;
            assert_eq!(ratio >= GOODPUT_RATIO, holds, "{left}: {ratio}");
        }
    }

    #[test]
    fn one_disturbed_step_does_not_end_the_climb() {
        let mut inner = service(1_000.0, 1.0);
        let mut count = 0;
        let mut search = KneeSearch::new(PLAN);
        let disturbed = |rate| {
            count += 1;
            if count == 3 { Ok(step(rate, 0.0, 1.0)) } else { inner(rate) }
        };
        search.run(disturbed).expect("a search");
        assert!(search.knee().expect("a knee").min > 900.0);
    }

    #[test]
    fn search_without_a_knee_says_why() {
        let mut search = KneeSearch::new(KneePlan { max_rate: 500.0, ..PLAN });
        search.run(service(1_000.0, 1.0)).expect("a search");
        assert_eq!((search.end, search.knee()), (SearchEnd::MaxRate, None));
        assert!(search.steps.iter().all(|step| step.rate <= 500.0));

        let failure = KneeSearch::new(PLAN).run(service(5.0, 0.5)).expect_err("the first step breaks").to_string();
        assert!(failure.contains("the lowest load, 10/s") && failure.contains("--start-rate"), "{failure}");

        let (mut inner, mut count) = (service(1_000.0, 1.0), 0);
        let mut search = KneeSearch::new(PLAN);
        let interrupted = |rate| {
            count += 1;
            if count == 5 { Err(LoadtestError::Interrupted) } else { inner(rate) }
        };
        search.run(interrupted).expect("what was measured");
        assert_eq!((search.end, search.steps.len()), (SearchEnd::Interrupted, 4));

        let mut search = KneeSearch::new(PLAN);
        let saturated = |rate: f64| {
            let mut step = step(rate, rate, 5.0);
            step.verdict = if rate > 300.0 { StepVerdict::Generator } else { StepVerdict::Holds };
            Ok(step)
        };
        search.run(saturated).expect("a search");
        assert_eq!(search.end, SearchEnd::Generator);
    }
}
