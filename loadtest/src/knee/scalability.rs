//! The universal scalability law: throughput by the number of requests in progress.
//!
//! X(N) = lambda * N / (1 + sigma * (N - 1) + kappa * N * (N - 1)), with contention sigma (the
//! serial part) and coherence kappa (the cost of agreement, which makes throughput fall).

use serde::Serialize;

/// Rounds of the weighted least squares; the weights settle in a few.
const ROUNDS: usize = 20;

/// The fitted law.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct ScalabilityLaw {
    /// Throughput of one request at a time, per second.
    pub(crate) lambda: f64,
    pub(crate) sigma: f64,
    pub(crate) kappa: f64,
    /// Part of the variance of the throughput that the law explains.
    pub(crate) r_squared: f64,
    pub(crate) points: usize,
}

impl ScalabilityLaw {
    /// Fits points of requests in progress and throughput. `None` with fewer than four points, or
    /// if no law with `sigma` and `kappa` of at least 0 fits.
    ///
    /// The law is linear in its parameters as N / X = (1 + sigma (N - 1) + kappa N (N - 1)) /
    /// lambda. Least squares of that form would minimise the error of N / X; the weights make it
    /// that of X.
    pub(crate) fn fit(points: &[(f64, f64)]) -> Option<Self> {
        let points: Vec<(f64, f64)> = points.iter().copied().filter(|(n, x)| *n > 0.0 && *x > 0.0).collect();
        if points.len() < 4 {
            return None;
        }
        // Constraints are met by leaving out parameters: the best of the fits without a negative
        // one is the constrained optimum.
        let forms = [[true, true], [true, false], [false, true], [false, false]];
        let fits = forms.into_iter().filter_map(|form| fit_form(&points, form));
        fits.max_by(|one, other| one.r_squared.total_cmp(&other.r_squared))
    }

    pub(crate) fn throughput(&self, n: f64) -> f64 {
        self.lambda * n / (1.0 + self.sigma * (n - 1.0) + self.kappa * n * (n - 1.0))
    }

    /// The number of requests in progress with the highest throughput; `None` if throughput only
    /// grows.
    pub(crate) fn peak(&self) -> Option<f64> {
        (self.kappa > 0.0 && self.sigma < 1.0).then(|| ((1.0 - self.sigma) / self.kappa).sqrt())
    }
}

/// Fits with contention and coherence, or without one of them.
fn fit_form(points: &[(f64, f64)], form: [bool; 2]) -> Option<ScalabilityLaw> {
    let columns = |n: f64| {
        let terms = [1.0, n - 1.0, n * (n - 1.0)];
        [terms[0], if form[0] { terms[1] } else { 0.0 }, if form[1] { terms[2] } else { 0.0 }]
    };
    let mut fitted: Vec<f64> = points.iter().map(|(_, x)| *x).collect();
    let mut law = None;
    for _ in 0..ROUNDS {
        let mut matrix = [[0.0; 4]; 3];
        for ((n, x), fit) in points.iter().zip(&fitted) {
            // dX = -(X^2 / N) d(N / X).
            let weight = (fit * x / n).powi(2);
            let row = columns(*n);
            for i in 0..3 {
                for j in 0..3 {
                    matrix[i][j] += weight * row[i] * row[j];
                }
                matrix[i][3] += weight * row[i] * n / x;
            }
        }
        let [base, contention, coherence] = solve(matrix, [true, form[0], form[1]])?;
        if base <= 0.0 || contention < 0.0 || coherence < 0.0 {
            return None;
        }
        let candidate = ScalabilityLaw {
            lambda: 1.0 / base,
            sigma: contention / base,
            kappa: coherence / base,
            r_squared: 0.0,
            points: points.len(),
        };
        fitted = points.iter().map(|(n, _)| candidate.throughput(*n)).collect();
        if fitted.iter().any(|fit| !fit.is_finite() || *fit <= 0.0) {
            return None;
        }
        law = Some(candidate);
    }
    law.map(|law| ScalabilityLaw { r_squared: r_squared(points, &law), ..law })
}

fn r_squared(points: &[(f64, f64)], law: &ScalabilityLaw) -> f64 {
    let mean = points.iter().map(|(_, x)| x).sum::<f64>() / points.len() as f64;
    let total: f64 = points.iter().map(|(_, x)| (x - mean).powi(2)).sum();
    let rest: f64 = points.iter().map(|(n, x)| (x - law.throughput(*n)).powi(2)).sum();
    if total > 0.0 { 1.0 - rest / total } else { 0.0 }
}

/// Solves a symmetric system by elimination; unused unknowns are 0. `None` if it is singular.
fn solve(mut matrix: [[f64; 4]; 3], used: [bool; 3]) -> Option<[f64; 3]> {
    let scale = matrix.iter().flatten().fold(0.0_f64, |most, value| most.max(value.abs()));
    for i in (0..3).filter(|i| used[*i]) {
        let pivot = matrix[i][i];
        if pivot.abs() < scale * 1e-14 {
            return None;
        }
        for j in (0..3).filter(|j| *j != i && used[*j]) {
            let factor = matrix[j][i] / pivot;
            let row = matrix[i];
            matrix[j].iter_mut().zip(row).for_each(|(cell, above)| *cell -= factor * above);
        }
    }
    Some(std::array::from_fn(|i| if used[i] { matrix[i][3] / matrix[i][i] } else { 0.0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(law: &ScalabilityLaw, counts: &[f64]) -> Vec<(f64, f64)> {
        counts.iter().map(|n| (*n, law.throughput(*n))).collect()
    }

    const COUNTS: [f64; 8] = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];

    #[test]
    fn too_few_points_have_no_law() {
        assert_eq!(ScalabilityLaw::fit(&[(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]), None);
        assert_eq!(ScalabilityLaw::fit(&[(0.0, 1.0); 8]), None);
    }

    #[test]
    fn parameters_of_exact_points_are_found() {
        for (sigma, kappa) in [(0.0, 0.0), (0.05, 0.0), (0.02, 0.000_5), (0.0, 0.001), (0.3, 0.01)] {
            let law = ScalabilityLaw { lambda: 995.0, sigma, kappa, r_squared: 1.0, points: 8 };
            let fit = ScalabilityLaw::fit(&points(&law, &COUNTS)).expect("a law");
            assert!((fit.lambda / 995.0 - 1.0).abs() < 1e-6, "{fit:?}");
            assert!((fit.sigma - sigma).abs() < 1e-6 && (fit.kappa - kappa).abs() < 1e-8, "{fit:?}");
            assert!(fit.r_squared > 0.999_999, "{fit:?}");
        }
    }

    #[test]
    fn noise_lowers_the_explained_part_and_no_parameter_is_negative() {
        let law = ScalabilityLaw { lambda: 100.0, sigma: 0.0, kappa: 0.0, r_squared: 1.0, points: 8 };
        let noisy: Vec<(f64, f64)> =
            points(&law, &COUNTS).iter().enumerate().map(|(i, (n, x))| (*n, x * [1.1, 0.92][i % 2])).collect();
        let fit = ScalabilityLaw::fit(&noisy).expect("a law");
        assert!(fit.r_squared < 1.0 && fit.r_squared > 0.9, "{fit:?}");
        assert!(fit.sigma >= 0.0 && fit.kappa >= 0.0, "{fit:?}");
    }

    #[test]
    fn peak_is_where_throughput_is_highest() {
        let law = ScalabilityLaw { lambda: 100.0, sigma: 0.1, kappa: 0.001, r_squared: 1.0, points: 8 };
        let peak = law.peak().expect("a peak");
        assert!((peak - 30.0).abs() < 1e-9);
        assert!(law.throughput(peak) > law.throughput(peak * 1.1) && law.throughput(peak) > law.throughput(peak / 1.1));
        assert_eq!(ScalabilityLaw { kappa: 0.0, ..law }.peak(), None);
    }
}
