//! The numbers of a rule: rejected first, then accepted, and rounded so that less is admitted.

use proptest::prelude::*;

use super::*;

fn quota(rate: &str, burst: u32) -> Quota {
    Quota::new(rate.parse().unwrap(), NonZeroU32::new(burst).unwrap()).unwrap()
}

#[test]
fn rejects_malformed_rates() {
    for text in
        ["", "100", "100/", "/s", "100/x", "100/ms", "100/s/s", " 100/s", "1e3/s", "+5/s", "-5/s", "0/s", "1.5/s"]
    {
        assert!(text.parse::<Rate>().is_err(), "{text}");
    }
    assert_eq!("10000001/s".parse::<Rate>(), Err(QuotaError::TooFast("10000001/s".to_owned())));
    assert_eq!("99999999999999999999/s".parse::<Rate>(), Err(QuotaError::Count("99999999999999999999/s".to_owned())));
    assert_eq!("-5/s".parse::<Rate>().unwrap_err().to_string(), "rate `-5/s` needs a whole count from 1 to 100000000");
}

#[test]
fn rejects_a_burst_that_takes_years_to_refill() {
    let error = Quota::new("5/h".parse().unwrap(), NonZeroU32::new(100_000).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "a burst of 100000 at 5/h takes over a year to refill");
}

#[test]
fn rejects_weights_and_percentages_out_of_range() {
    for value in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-9, 10_001.0] {
        assert!(Weight::try_from(value).is_err(), "{value}");
    }
    assert_eq!(Percent::try_from(101), Err(QuotaError::Percent(101)));
}

#[test]
fn rates_are_exact_fractions() {
    assert_eq!("3000/m".parse::<Rate>(), "50/s".parse::<Rate>());
    let hourly: Rate = "5/h".parse().unwrap();
    assert_eq!((hourly.count(), hourly.seconds(), hourly.interval_nanos()), (1, 720, 720_000_000_000));
    assert_eq!("3/s".parse::<Rate>().unwrap().interval_nanos(), 333_333_334);
    assert_eq!(quota("100/s", 200).window(), Duration::from_secs(2));
}

#[test]
fn weight_multiplies_rate_and_burst() {
    let platinum = quota("100/s", 200).weighted(Weight::try_from(3.2).unwrap()).unwrap();
    assert_eq!(platinum, quota("320/s", 640));
    let address = quota("99999989/d", 1).weighted(Weight::try_from(8_639.0).unwrap()).unwrap();
    let again = address.weighted(Weight::try_from(21.352872).unwrap());
    assert!(matches!(again, Err(QuotaError::TooFast(_))), "{again:?}");
    assert_eq!(quota("100/s", 1).weighted(Weight::try_from(0.01).unwrap()).unwrap(), quota("1/s", 1));
}

#[test]
fn percent_selects_that_many_subjects_and_independently_per_rule() {
    let ten = Percent::try_from(10).unwrap();
    let chosen = |salt| (0..100_000).filter(|&key| ten.includes(KeyHash(key), salt)).count();
    assert!((9_500..10_500).contains(&chosen(1)), "{}", chosen(1));
    let both = (0..100_000).filter(|&key| ten.includes(KeyHash(key), 1) && ten.includes(KeyHash(key), 2)).count();
    assert!((700..1_300).contains(&both), "{both}");
}

proptest! {
    #[test]
    fn raising_a_percentage_only_adds_subjects(key: u64, salt: u64, low in 0u8..=100, high in 0u8..=100) {
        let (low, high) = (low.min(high), low.max(high));
        let includes = |percent| Percent::try_from(percent).unwrap().includes(KeyHash(u128::from(key)), salt);
        prop_assert!(!includes(low) || includes(high));
        prop_assert!(includes(100) && !includes(0));
    }

    #[test]
    fn rounding_never_admits_more(count in 1u64..10_000_000, period in prop::sample::select(vec![1u32, 60, 3_600, 86_400])) {
        let rate = Rate::new(count, period).unwrap();
        let tokens_per_period = u128::from(period) * NANOS / u128::from(rate.interval_nanos());
        prop_assert!(tokens_per_period <= u128::from(count));
        prop_assert!(tokens_per_period * 100 >= u128::from(count) * 99 - 100);
    }

    #[test]
    fn any_text_is_parsed_or_rejected(text in "\\PC{0,12}") {
        if let Ok(rate) = text.parse::<Rate>() {
            prop_assert_eq!(rate.to_string().parse::<Rate>().unwrap_or(rate), rate);
        }
    }
}
