"""One budget over a model's problems: where the next slice goes, and that this saves more than an even split."""

import math

import numpy as np
import pytest
from contest import CPU

from klab.harness.catalog import find_model
from klab.harness.plan import plan, scenario_for
from klab.harness.store.result import Status
from klab.harness.tune.pack import SLICE, Prospect, choose_next, outlook, ranking, step_times, weights
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.search import Search
from klab.harness.tune.space import Space
from klab.harness.tune.strategy import Ask, Prior, find_strategy


def recorded(seed, bound_us, spread):
    """480 candidates at 1.1 to some times the bound; the wider the spread, the more is to be had over the first."""
    space = Space.of({"a": a, "b": b, "c": c} for a in range(8) for b in range(10) for c in range(6))
    rng = np.random.default_rng(seed)
    time_us = bound_us * (1.1 + rng.gamma(2.0, spread, len(space)))
    time_us[0] = np.quantile(time_us, 0.6)  # the default: neither bad nor good
    none = np.zeros(len(space))
    return RecordedSpace("made", "made", "made", space, time_us, [Status.OK] * len(space), none, none + 0.1, [()] * len(space))


class Part:
    """A problem of a made model, searched at random."""

    def __init__(self, key, seed, *, weight, bound_us, spread, library=math.inf):
        self.recorded = recorded(seed, bound_us, spread)
        self.search = Search(find_strategy("random").make(self.recorded.space, seed, Prior()))
        default_us = float(self.recorded.time_us[0])
        self.prospect = Prospect(key, weight, bound_us, own_us=default_us, rival_us=library * bound_us)

    def slice(self):
        ask = self.search.open()
        if ask is None:
            self.prospect.exhausted = True
            return 0.0
        told = list(self.recorded.evaluate(Ask(ask.candidates[:SLICE], ask.rounds)))
        for evaluation in told:
            self.search.answer(evaluation)
        spent = sum(e.spent_s for e in told)
        self.prospect.note((e.value for e in told), spent)
        return spent


def model(seed):
    """A third of the time is in one wide-open matmul, a third in one that is at its bound, the rest in ten that hardly count."""
    parts = [
        Part("heavy", seed, weight=30, bound_us=100.0, spread=0.8),
        Part("tuned already", seed + 1, weight=60, bound_us=100.0, spread=0.01),
        Part("vendor's", seed + 2, weight=30, bound_us=100.0, spread=1.5, library=1.02),
    ]
    return parts + [Part(f"small {i}", seed + 3 + i, weight=1, bound_us=30.0, spread=0.5) for i in range(10)]


def step_us(parts):
    return sum(p.prospect.weight * p.prospect.now_us for p in parts)


def saved(parts, seconds, following):
    before = step_us(parts)
    by_key = {part.prospect.key: part for part in parts}
    while seconds > 0:
        chosen = following(parts)
        if chosen is None:
            break
        seconds -= by_key[chosen.key].slice()
    return before - step_us(parts)


def scheduled(parts):
    return choose_next([p.prospect for p in parts])


def evenly(parts):
    left = [p.prospect for p in parts if not p.prospect.exhausted]
    return min(left, key=lambda p: p.slices) if left else None


def test_it_saves_more_of_the_models_time_than_an_even_split():
    left = []
    for seed in range(0, 1200, 100):
        for following in (scheduled, evenly):
            parts = model(seed)
            least = sum(p.prospect.weight * min(p.recorded.optimum_us, p.prospect.rival_us) for p in parts)
            saved(parts, 40.0, following)
            left.append(step_us(parts) - least)
    ours, even = np.array(left).reshape(-1, 2).T
    assert (ours < even).mean() >= 0.75
    assert ours.mean() < 0.75 * even.mean(), "of what there was to be saved, less is left"


def test_what_is_at_its_bound_and_what_the_vendor_wins_get_little():
    parts = model(7)
    saved(parts, 20.0, scheduled)
    spent = {p.prospect.key: p.prospect.spent_s for p in parts}
    assert spent["heavy"] > 2 * max(spent["tuned already"], spent["vendor's"])


def test_every_problem_is_looked_at_again_when_the_heaviest_gives_no_more():
    parts = model(3)
    saved(parts, 300.0, scheduled)
    assert all(p.prospect.slices > 0 for p in parts)


def test_slices_without_gain_lower_what_is_expected_and_a_gain_raises_it():
    prospect = Prospect("k", 1.0, 10.0, own_us=40.0)
    first = prospect.per_second(1.0)
    for _ in range(5):
        prospect.note([], 1.0)
    assert prospect.per_second(1.0) < 0.3 * first
    low = prospect.closing
    prospect.note([15.0], 1.0)
    assert prospect.closing > low and prospect.own_us == 15.0


def test_who_is_not_ready_is_waited_for_only_when_it_is_worth_much_more():
    near, far = Prospect("near", 1.0, 10.0, own_us=40.0), Prospect("far", 1.2, 10.0, own_us=40.0)
    assert choose_next([near, far]) is far
    assert choose_next([near, far], {"near"}) is near
    far.weight = 100.0
    assert choose_next([near, far], {"near"}) is None
    far.exhausted = True
    assert choose_next([near, far], {"near"}) is near and ranking([near, far]) == [near]
    near.exhausted = True
    assert choose_next([near, far]) is None


def test_more_time_promises_more_but_never_below_the_bound():
    parts = [Prospect("a", 1.0, 10.0, own_us=40.0, slices=2, spent_s=2.0), Prospect("b", 1.0, 10.0, own_us=11.0, rival_us=10.5)]
    little, much = outlook(parts, 2.0), outlook(parts, 200.0)
    assert 0 < little["a"] < much["a"] <= 30.0 and much["b"] <= 0.5
    assert parts[0].own_us == 40.0, "a look ahead changes nothing"
    for _ in range(3):
        parts[1].note([12.0], 1.0)
    assert outlook(parts, 2.0)["a"] == 0.0, "promises of which nothing came are not made again"
    assert outlook([Prospect("c", 1.0, 10.0)], 5.0) == {"c": 0.0}, "where nothing is known nothing is promised"


def test_a_problem_counts_by_its_share_of_each_step():
    model = find_model("qwen3-0.6b")
    made = plan(model, CPU, scenario_for(model, CPU, isl=64, osl=16, batches=(1, 4)))
    bounds = {row.problem.key: row.bound_us for row in made.rows if row.problem}
    whole = weights(made, {})
    assert sum(whole[key] * bounds[key] for key in whole) == pytest.approx(len(made.steps))
    decode = weights(made, {}, "decode")
    assert set(decode) < set(whole) and sum(decode[key] * bounds[key] for key in decode) == pytest.approx(2.0)
    slow = next(iter(decode))
    later = weights(made, {slow: 100 * bounds[slow]}, "decode")
    assert later[slow] * 100 * bounds[slow] > decode[slow] * bounds[slow], "what is slow is a larger share"
    assert step_times(made, bounds)[made.steps[0]] == pytest.approx(
        sum(row.count * row.bound_us for row in made.step(*made.steps[0]) if row.problem)
    )
    assert step_times(made, {})[made.steps[0]] == math.inf
