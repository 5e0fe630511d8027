"""What a night says of one series: the calls, their reasons, and what must not be hidden or invented."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_points import IDENTITY, RULE, SERIES, cut, judged, made, nights

from klab.harness.watch.judge import judge_night, may_confirm, suspects, too_noisy
from klab.harness.watch.night_json import night_json, read_night
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Night, Point, Series
from klab.kernels.errors import UsageError

STEADY = [100.0] * 20


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_nights_are_unknown(count):
    verdict = judged(made([100.0] * count), made([150.0], seed=1)[0])
    assert verdict.call == "unknown" and not verdict.fails and verdict.limit is None
    assert verdict.reason == (
        "its first night" if count == 0 else f"{count} earlier night{'s'[: count > 1]} of the 5 that a judgement needs"
    )


def test_after_five_nights_a_large_change_is_seen():
    assert judged(made([100.0] * 5), made([150.0], looks=3, seed=1)[0]).call == "slower"


def test_a_step_is_suspect_at_first_and_slower_when_all_looks_agree():
    history, tonight = made(STEADY), made([105.0], looks=3, seed=1)[0]
    first = judged(history, cut(tonight, 1))
    assert first.call == "suspect" and first.reason.endswith("looked at 1 of 3 times") and not first.fails
    assert suspects({IDENTITY: first}, RULE) == [IDENTITY]
    second = judged(history, cut(tonight, 2))
    assert second.call == "suspect" and may_confirm(second.point, RULE)
    third = judged(history, tonight)
    assert third.call == "slower" and third.fails and not may_confirm(third.point, RULE) and not suspects({IDENTITY: third}, RULE)
    assert third.ratio == pytest.approx(1.05, abs=0.004) and third.low < third.ratio < third.high and third.low > 1.03
    assert third.nights == 20 and third.limit == pytest.approx(1.02, abs=0.001)
    assert third.reason.startswith("+5.0% [") and "limit 2.0% (level of 20 nights); at all 3 looks and in cycles" in third.reason
    assert "\n" not in third.reason


@pytest.mark.parametrize("looks", [(107.0, 100.1, 100.0), (107.0, 106.0, 100.0), (107.0, 100.0, 109.0)])
def test_a_spike_that_one_look_denies_is_ok(looks):
    points = [made([value], seed=n)[0] for n, value in enumerate(looks)]
    tonight = replace(
        points[0],
        values=sum((p.values for p in points), ()),
        anchored=sum((p.anchored for p in points), ()),
        cycles=sum((p.cycles for p in points), ()),
        looks=3,
    )
    verdict = judged(made(STEADY), tonight)
    assert verdict.call == "ok" and not verdict.fails


def test_what_is_within_the_limit_says_what_it_could_have_shown():
    verdict = judged(made(STEADY), made([101.0], seed=1)[0])
    assert verdict.call == "ok" and verdict.reason.endswith("%, within its limit of 2.0% (level of 20 nights)")
    assert verdict.ratio == pytest.approx(1.01, abs=0.004)
    assert verdict.limit == pytest.approx(1.02, abs=0.001)


def test_a_standing_regression_never_becomes_normal():
    calls = nights([100.0] * 12 + [105.0] * 40)
    assert calls[5:12] == ["ok"] * 7 and set(calls[12:]) == {"slower"}


def test_a_small_standing_regression_never_becomes_normal_either():
    calls = nights([100.0] * 20 + [103.0] * 40, noise=0.004)
    assert set(calls[22:]) == {"slower"}


def test_after_a_mend_nothing_is_faster():
    calls = nights([100.0] * 12 + [106.0] * 15 + [100.0] * 15)
    assert set(calls[12:27]) == {"slower"} and set(calls[27:]) == {"ok"}


def test_a_better_level_is_told_at_once_and_becomes_the_reference_within_a_week():
    calls = nights([100.0] * 12 + [90.0] * 15 + [100.0] * 3)
    assert calls[12] == "faster" and "faster" not in calls[19:27] and calls.count("faster") <= 5
    assert set(calls[27:]) == {"slower"}, "the old level is a regression now"


def test_three_lucky_nights_are_no_level():
    assert set(nights([100.0] * 12 + [90.0] * 3 + [100.0] * 10)[15:]) == {"ok"}


def test_slow_drift_is_found_and_stays_found():
    calls = nights([100.0 * 1.001**n for n in range(55)])
    first = calls.index("slower")
    assert 15 <= first <= 40 and set(calls[first + 3 :]) == {"slower"}


def test_a_new_epoch_is_reported_and_not_judged():
    history = made(STEADY)
    verdict = judged(history, made([108.0], epoch="e1", seed=1)[0])
    assert verdict.call == "unknown" and verdict.new_epoch and verdict.ratio == pytest.approx(1.08, abs=0.01)
    assert "night 1 of a new epoch" in verdict.reason and "+8.0% against the epoch before" in verdict.reason.replace("+7.9%", "+8.0%")
    later = history + made([108.0] * 5, epoch="e1", seed=2)
    assert judged(later, made([108.0], epoch="e1", seed=3)[0]).call == "ok"
    assert judged(later, made([113.5], epoch="e1", seed=3, looks=3)[0]).call == "slower"
    # Back to the old driver: its nights count again.
    assert judged(later, made([105.0], seed=4, looks=3)[0]).call == "slower"


def test_a_lower_clock_alone_is_not_called_slower():
    history = made(STEADY, anchor=False)
    throttled = made([106.0], anchor=False, clock=1500 / 1.06, looks=3, seed=1)[0]
    verdict = judged(history, throttled)
    assert verdict.call == "suspect" and "the clock changed" in verdict.reason and not suspects({IDENTITY: verdict}, RULE)
    assert judged(history, made([106.0], anchor=False, looks=3, seed=1)[0]).call == "slower"
    assert judged([replace(p, cycles=()) for p in history], throttled).call == "slower", "no clock is known of the earlier nights"


def test_a_clock_that_stays_lower_than_the_anchors_is_the_kernels():
    calls = nights([100.0] * 20 + [106.0] * 4, clock=[1500.0] * 20 + [1500 / 1.06] * 4)
    assert calls[20] == "suspect" and calls[-1] == "slower"


def test_failures():
    history = made(STEADY)
    for status in ("incorrect", "crashed", "timeout", "compile_error", "out_of_memory"):
        verdict = judged(history, Point(status=status, reason="so it was"))
        assert verdict.call == "broken" and verdict.fails and verdict.reason == f"{status}: so it was"
        assert suspects({IDENTITY: verdict}, RULE) == ([] if status == "incorrect" else [IDENTITY])
        assert suspects({IDENTITY: replace(verdict, point=replace(verdict.point, looks=2))}, RULE) == []
    for status in ("unsupported", "screened"):
        assert judged(history, Point(status=status)).call == "missing"


def test_wrong_beside_good_values_is_broken():
    assert judged(made(STEADY), replace(made([100.0])[0], status="incorrect")).call == "broken"


def test_no_value_is_excused_for_three_nights():
    history = made(STEADY)
    unreached = Point(reason="not reached within the budget")
    for earlier in range(3):
        verdict = judged(history + [unreached] * earlier, unreached)
        assert verdict.call == "unknown" and verdict.reason == "not reached within the budget"
    verdict = judged(history + [unreached] * 3, unreached)
    assert verdict.call == "missing" and verdict.reason == "no value for 4 nights; not reached within the budget"
    assert judged(history, Point(status="throttled", reason="91% of the rounds")).reason == "throttled: 91% of the rounds"


def test_missing():
    history = made(STEADY)
    assert judge_night({IDENTITY: history}, {}, RULE, SERIES)[IDENTITY].call == "missing"
    # Tracked, and never seen.
    assert judge_night({}, {}, RULE, SERIES)[IDENTITY].call == "missing"
    # No longer described by anybody, but seen in the last nights.
    gone = judge_night({IDENTITY: history}, {}, RULE, {})[IDENTITY]
    assert gone.call == "missing" and gone.series.identity == IDENTITY
    # Last seen long ago: other series have had many nights since.
    other = made([100.0] * 40)
    assert set(judge_night({IDENTITY: history, "h200/p2/chosen/time": other}, {"h200/p2/chosen/time": other[-1]}, RULE, {})) == {
        "h200/p2/chosen/time"
    }


def test_a_noisy_series_says_so():
    history = made([100.0] * 30, noise=0.06)
    verdict = judged(history, made([103.0], seed=1)[0])
    assert verdict.call == "ok" and 1.05 < verdict.limit < 1.25
    assert too_noisy([verdict], RULE) == [verdict]
    blind = judged(made([100.0] * 30, noise=0.2), made([103.0], seed=1)[0])
    assert blind.call == "unknown" and blind.reason.startswith("too noisy to judge")
    quiet = judged(made(STEADY), made([100.0], seed=1)[0])
    assert not too_noisy([quiet], RULE)


def test_a_noisy_series_shows_in_ten_nights_what_one_night_hides():
    calls = nights([100.0] * 30 + [106.0] * 10, noise=0.03)
    assert calls[30] == "ok" and "slower" in calls[31:40]


def test_devices_that_differ_by_5_percent_take_turns():
    values = [100.0 if n % 2 else 105.0 for n in range(40)]
    three = made(values, looks=3)
    history, calls = [], []
    for n, point in enumerate(three):
        point = replace(point, device_uuid=f"GPU-{n % 2}")
        once = cut(point, 1)
        verdict = judged(history, once)
        if verdict.call == "suspect":
            once, verdict = point, judged(history, point)
        history.append(once)
        calls.append(verdict.call)
    assert not {"slower", "faster"} & set(calls) and set(calls[10:]) == {"ok"}
    # One of them 5% slower than itself is seen, though the other was always so slow.
    assert judged(history, replace(made([105.0], looks=3, seed=1)[0], device_uuid="GPU-1")).call == "slower"


def test_a_new_device_is_judged_with_room_for_what_devices_differ_by():
    history = made(STEADY)
    other = judged(history, made([104.0], looks=3, seed=1, device_uuid="GPU-9")[0])
    assert other.call == "ok" and "few of this one" in other.reason and other.limit > 1.05
    assert judged(history, made([120.0], looks=3, seed=1, device_uuid="GPU-9")[0]).call == "slower"
    bare = [replace(p, anchored=(), anchor="") for p in history]
    assert judged(bare, made([115.0], looks=3, seed=1, device_uuid="GPU-9", anchor=False)[0]).limit > other.limit


def test_an_accepted_level_is_the_level():
    history = made([100.0] * 20 + [105.0] * 3)
    tonight = made([105.0], looks=3, seed=1)[0]
    assert judged(history, tonight).call == "slower"
    assert judged(history, tonight, since={IDENTITY: 20}).call == "ok"
    assert judged(history, made([110.5], looks=3, seed=1)[0], since={IDENTITY: 20}).call == "slower"


def test_only_values_over_the_same_anchor_are_compared():
    history = made(STEADY)
    unanchored = replace(made([100.0], seed=1)[0], anchored=(), anchor="")
    assert judged(history, unanchored).call == "ok" and "no anchor" in judged(history, unanchored).reason
    other = replace(made([100.0], seed=1)[0], anchored=(7.0, 7.0, 7.0), anchor="copy")
    assert judged(history, other).call == "ok" and "no anchor" in judged(history, other).reason


def test_an_anchor_without_a_time_is_no_anchor():
    """Neither in its first nights nor later: the times themselves are compared."""
    for count in (2, 20):
        tonight = replace(made([100.0], seed=1)[0], anchored=(math.nan, 0.0, -1.0), epoch="e1")
        verdict = judged(made([100.0] * 20) + made([100.0] * count, epoch="e1"), tonight)
        assert verdict.call == ("ok" if count == 20 else "unknown") and verdict.ratio == pytest.approx(1, abs=0.01)


def test_the_anchor_takes_away_what_the_whole_night_felt():
    slow_night = made([108.0], looks=3, seed=1)[0]
    slow_night = replace(slow_night, anchored=tuple(v / 108 for v in slow_night.values))
    assert judged(made(STEADY), slow_night).call == "ok"


def test_a_change_names_what_changed_since_its_last_good_night():
    history = made([100.0] * 20, source_digest="a") + made([105.0] * 2, source_digest="b", seed=1)
    verdict = judged(history, made([105.0], source_digest="b", looks=3, seed=2)[0])
    assert verdict.reason.endswith("for 3 nights now; since then its source changed")
    verdict = judged(made(STEADY), made([105.0], kernel="other", looks=3, seed=2)[0])
    assert verdict.reason.endswith("the kernel changed from triton_matmul to other")
    verdict = judged(made(STEADY), made([105.0], config={"block_m": 64}, looks=3, seed=2)[0])
    assert verdict.reason.endswith("its configuration changed")
    assert "changed" not in judged(made(STEADY), made([105.0], looks=3, seed=2)[0]).reason


def test_energy_has_more_room():
    identity = "h200/p1/chosen/energy"
    series = {identity: Series("h200", "matmul", "p1", "m16", "chosen", "energy")}
    history = made(STEADY, anchor=False, clock=None)

    def call(value):
        return judge_night({identity: history}, {identity: made([value], anchor=False, clock=None, looks=3, seed=1)[0]}, RULE, series)[
            identity
        ].call

    assert call(103.0) == "ok" and call(105.0) == "slower"


def test_values_that_are_no_times_are_no_values():
    history = made(STEADY)
    for bad in (math.nan, math.inf, 0.0, -3.0):
        assert judged(history, Point((bad,), epoch="e0")).call == "unknown"
    polluted = [*history, Point((math.nan,), epoch="e0", device_uuid="GPU-0"), Point((0.0, -1.0), epoch="e0", device_uuid="GPU-0")]
    assert judged(polluted, made([100.0], seed=1, anchor=False)[0]).call == "ok"


def test_the_unit_does_not_matter():
    for scale in (0.13, 1.0, 7.7):
        history = made([100.0 * scale] * 20, anchor=False)
        verdict = judged(history, made([103.0 * scale], looks=3, seed=1, anchor=False)[0])
        assert verdict.call == "slower" and verdict.ratio == pytest.approx(1.03, abs=0.004)


VALUES = st.lists(st.sampled_from([1.0, 1.01, 2.0, 1e-9, 1e9, 0.0, -1.0, math.nan, math.inf]), max_size=4).map(tuple)
POINTS = st.builds(
    Point,
    VALUES,
    VALUES,
    VALUES,
    anchor=st.sampled_from(["", "copy"]),
    status=st.sampled_from(["ok", "ok", "ok", "crashed", "throttled", "odd"]),
    looks=st.integers(1, 4),
    epoch=st.sampled_from(["", "a"]),
    device_uuid=st.sampled_from(["", "g"]),
    night=st.sampled_from(["", "1", "2"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(POINTS, max_size=14), POINTS, st.sampled_from([None, 0, 3, 99]))
def test_anything_gets_a_verdict_that_can_be_stored(history, tonight, since):
    verdict = judged(history, tonight, since=None if since is None else {IDENTITY: since})
    for value in (verdict.ratio, verdict.low, verdict.high, verdict.limit):
        assert value is None or (math.isfinite(value) and value > 0)
    assert verdict.reason and "\n" not in verdict.reason and "nan" not in verdict.reason


def test_a_verdict_goes_to_json_and_back():
    verdict = judged(made(STEADY), made([105.0], looks=3, seed=1)[0])
    night = Night("n1", "2026-01-01T00:00:00Z", "h200", verdicts=(verdict,))
    assert read_night(night_json(night)).verdicts[0].to_json() == verdict.to_json()


@pytest.mark.parametrize(
    "wrong", [{"looks": 1}, {"window": 3.5}, {"multiples": 0}, {"spans": (2, 3)}, {"least_nights": 20}, {"floor": -1}, {"patience": 0}]
)
def test_a_rule_without_sense_is_refused_by_name(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Rule(**wrong)


def test_another_anchor_hides_no_standing_regression():
    old = made(STEADY)
    slower = [replace(p, anchor="copy", anchored=tuple(v / 55 for v in p.values)) for p in made([105.0] * 25, looks=3, seed=5)]
    same = [replace(p, anchor="copy", anchored=tuple(v / 55 for v in p.values)) for p in made([100.0] * 25, looks=3, seed=5)]
    for count in (0, 4, 5, 12, 24):
        assert judged(old + slower[:count], slower[count]).call == "slower", count
        assert judged(old + same[:count], same[count]).call == "ok", count


def _restless(nights, **fields):
    """30 series of 30 nights; on each of `nights` another one of them is 8% slower, the next night it is not. Histories by identity."""
    series = {f"h200/p{n}/chosen/time": Series("h200", "matmul", f"p{n}", "m16", "chosen", "time") for n in range(30)}
    history = {identity: made([100.0] * 30, seed=n) for n, identity in enumerate(series)}
    for n, night in enumerate(nights):
        history[f"h200/p{n}/chosen/time"][night] = made([108.0], looks=3, seed=99, night=f"{night:04d}", **fields)[0]
    return series, history


def test_where_changes_come_and_go_the_next_night_must_agree():
    def call(value, rule=RULE, **fields):
        tonight = {i: made([100.0], seed=7)[0] for i in history} | {other: made([value], looks=3, seed=7, **fields)[0]}
        return judge_night(history, tonight, rule, series)[other]

    series, history = _restless((8, 11, 14))
    other = list(series)[20]
    first = call(106.0)
    assert first.call == "suspect" and not first.fails and "came and went here: slower if the next night agrees" in first.reason
    assert call(115.0).call == "slower", "more than came and went"
    assert call(106.0, source_digest="new").call == "slower", "a commit is the likely cause"
    history[other].append(made([106.0], looks=3, seed=9)[0])
    assert call(106.0).call == "slower" and call(106.0, Rule(spans=(1,))).call == "slower"


def test_what_is_no_habit_of_the_machine_holds_nothing_back():
    def call():
        tonight = {i: made([106.0 if i == other else 100.0], looks=3, seed=7)[0] for i in history}
        return judge_night(history, tonight, RULE, series)[other].call

    series, history = _restless((8,))
    other = list(series)[20]
    assert call() == "slower", "once in 25 nights"
    series, history = _restless((8, 8, 8, 8))
    assert call() == "slower", "one night, however many series"
    series, history = _restless((8, 11, 14), source_digest="tried")
    assert call() == "slower", "commits that were taken back"
    series, history = _restless(())
    for n in range(6):
        history[f"h200/p{n}/chosen/time"][12 + n :] = made([108.0] * (18 - n), looks=3, seed=n)
    assert call() == "slower", "what stayed did not come and go"
