import numpy as np
import pytest
import scipy.stats

from klab.harness.measure.stats import (
    FLOOR_ROUNDS,
    StoppingRule,
    block_ratio,
    counting,
    is_marked,
    median_interval,
    paired_ratio,
    spread,
    throttled,
)


def noisy(seed, rounds=40, noise=0.02):
    return 100.0 * np.random.default_rng(seed).lognormal(0.0, noise, rounds)


def test_spread_is_numpys_median_and_quartiles():
    values = noisy(1)
    found = spread(list(values))
    assert found.median == pytest.approx(np.median(values))
    assert (found.q1, found.q3) == tuple(np.percentile(values, (25, 75)))
    assert found.low <= found.median <= found.high


@pytest.mark.parametrize("count", [6, 7, 8, 15, 40, 301, 5000])
def test_the_interval_lies_between_the_exact_ones_of_two_order_statistics(count):
    """scipy's is the narrowest pair of order statistics that covers at least 95%; the next pair inward covers less."""
    values = np.sort(noisy(count, count))
    safe = scipy.stats.quantile_test(values, q=float(np.median(values)), p=0.5).confidence_interval(0.95)
    low, high = median_interval(values)
    at = int(np.searchsorted(values, low, side="right")) - 1
    assert scipy.stats.binom.cdf(at, count, 0.5) <= 0.025 < scipy.stats.binom.cdf(at + 1, count, 0.5)
    assert min(safe.low, values[at]) <= low < values[at + 1] and values[-2 - at] < high <= max(safe.high, values[-1 - at])


def test_few_values_have_their_range_and_order_means_nothing():
    for count in range(1, 6):
        values = noisy(count, count)
        assert median_interval(values) == (min(values), max(values))
    assert median_interval(noisy(3)) == median_interval(list(noisy(3)[::-1])) and median_interval([2.0] * 9) == (2.0, 2.0)
    assert np.isnan(median_interval([1.0, np.nan, 2.0])).all()
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


@pytest.mark.parametrize("rounds", [6, 7, 15, 25, 60])
@pytest.mark.parametrize("noise", [0.02, 1.5], ids=["nearly normal", "skewed"])
def test_median_interval_covers_the_true_median(rounds, noise):
    """At 7 rounds a percentile bootstrap covers 87%."""
    found = [median_interval(noisy(seed, rounds, noise)) for seed in range(1000)]
    assert 0.93 <= np.mean([low <= 100.0 <= high for low, high in found]) <= 0.975


def test_pairing_cancels_common_drift():
    drift = np.linspace(1.0, 1.5, 60)
    rng = np.random.default_rng(0)
    a = 100 * drift * rng.lognormal(0, 0.002, 60)
    b = 102 * drift * rng.lognormal(0, 0.002, 60)
    ratio, low, high = paired_ratio(list(a), list(b))
    assert low < 100 / 102 < high
    assert high < 1.0
    unpaired_low, unpaired_high = median_interval(a)
    assert high - low < 0.1 * (unpaired_high - unpaired_low) / np.median(a)
    assert ratio == pytest.approx(100 / 102, rel=0.002)


def test_paired_ratio_cuts_the_longer_list():
    assert paired_ratio([2.0] * 8, [1.0] * 5)[0] == 2.0
    with pytest.raises(ValueError, match="no pairs"):
        paired_ratio([], [1.0])


def test_block_ratio_is_the_ratio_of_sums_and_covers_it():
    rng = np.random.default_rng(2)
    launches = np.full(60, 1000.0)
    jitter = rng.normal(0, 30, 61)
    joules = 0.5 * (launches + np.diff(jitter))
    value, low, high = block_ratio(list(joules), list(launches))
    assert value == pytest.approx(joules.sum() / launches.sum())
    assert low <= value <= high
    single = np.percentile([np.mean(rng.choice(joules / launches, 60)) for _ in range(2000)], (2.5, 97.5))
    # What one interval gains its neighbour loses: blocks must not count that as noise.
    assert high - low < single[1] - single[0]


def test_block_ratio_needs_two_blocks():
    with pytest.raises(ValueError, match="two blocks"):
        block_ratio([1.0] * 9, [1.0] * 9)


@pytest.mark.parametrize(
    ("reasons", "marked"), [(None, False), (0, False), (0x4, False), (0x8, True), (0x40, True), (0x84, True), (0x20, False)]
)
def test_only_hardware_throttling_is_marked(reasons, marked):
    assert is_marked(reasons) is marked


def test_marked_rounds_do_not_count():
    assert counting([1.0, 9.0, 2.0], [0, 1, 0]) == [1.0, 2.0]


def test_throttled_when_hardly_a_round_counts():
    assert not throttled([0] * 20)
    assert not throttled([1] * 10 + [0] * 10)
    assert throttled([1] * 19 + [0])
    assert throttled([1] * 12 + [0] * (FLOOR_ROUNDS - 1))
    assert not throttled([])


RULE = StoppingRule(target_ci=0.01, min_rounds=15, max_rounds=50, limit_s=6.0)


def test_stops_when_the_interval_is_narrow_and_not_before_the_least_rounds():
    steady = list(noisy(0, 50, 0.001))
    assert RULE.enough(steady[:14], [0] * 14, 1.0) == ""
    assert RULE.enough(steady[:15], [0] * 15, 1.0) == "interval"


def test_goes_on_while_the_interval_is_wide_until_rounds_or_time_are_used_up():
    wild = list(noisy(0, 50, 0.3))
    assert RULE.enough(wild[:30], [0] * 30, 1.0) == ""
    assert RULE.enough(wild, [0] * 50, 1.0) == "rounds"
    assert RULE.enough(wild[:FLOOR_ROUNDS], [0] * FLOOR_ROUNDS, 6.1) == "time"
    assert RULE.enough(wild[: FLOOR_ROUNDS - 1], [0] * (FLOOR_ROUNDS - 1), 60.0) == ""


def test_marked_rounds_do_not_reach_the_rule():
    steady = list(noisy(0, 20, 0.001))
    assert RULE.enough(steady, [1] * 10 + [0] * 10, 1.0) == ""
