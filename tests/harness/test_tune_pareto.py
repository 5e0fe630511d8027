"""The time/energy front: dominance where the intervals say so, and energy for those near the time front alone."""

import dataclasses
import json

from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import failed, made

from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Result, Status
from klab.harness.tune.objective import Interval
from klab.harness.tune.pareto import COLUMNS, Point, front_of, points_of, worth_metering
from klab.kernels.contract import NoConfig
from klab.kernels.matmul.problem import Matmul

SHAPE = Matmul(16, 256, 128)


def around(median, width=0.01):
    return Interval(median, median * (1 - width), median * (1 + width))


def point(name, us, joules, width=0.01):
    return Point(f"matmul/{name}", {"block": 1}, around(us, width), None if joules is None else around(joules, width))


def names(points):
    return [p.kernel.removeprefix("matmul/") for p in points]


def test_the_front_and_who_beats_the_others():
    front = front_of([point("fast", 100, 0.06), point("thrifty", 120, 0.04), point("bad", 130, 0.05), point("unmetered", 90, None)])
    assert names(front.points) == ["fast", "thrifty"] and names(front.unmetered) == ["unmetered"]
    assert [(names([p])[0], names([by])[0]) for p, by in front.beaten] == [("bad", "thrifty")]


def test_what_the_intervals_do_not_tell_apart_stays():
    # Slower for sure, and perhaps thriftier: not beaten. Slower for sure, and by its median no thriftier: beaten.
    front = front_of([point("fast", 100, 0.0500), point("perhaps", 110, 0.0498)])
    assert names(front.points) == ["fast", "perhaps"]
    assert names(front_of([point("fast", 100, 0.0500), point("not", 110, 0.0502)]).points) == ["fast"]
    # Alike in both: neither beats the other, though one is a little better in both.
    assert len(front_of([point("a", 100, 0.05), point("b", 100.5, 0.0502)]).points) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 2), st.floats(1, 2), st.floats(0, 0.2)), min_size=1, max_size=12))
def test_there_is_a_front_and_everything_else_is_beaten_by_something(made_of):
    points = [point(f"p{n}", *values) for n, values in enumerate(made_of)]
    front = front_of(points)
    assert front.points and len(front.points) + len(front.beaten) == len(points)
    fastest = min(points, key=lambda p: p.time.median)
    assert not any(winner.time.median > loser.time.median for loser, winner in front.beaten)
    assert any(p.time.overlaps(fastest.time) for p in front.points), "one of those that may be the fastest is on it"


def test_points_come_from_the_rows_that_have_both():
    fast = made(SHAPE, "triton_a", config={"block": 64}, level_us=80.0)
    metered = dataclasses.replace(fast, energy_j=0.05, energy_ci_low_j=0.049, energy_ci_high_j=0.051, recorded_at="2026-11-19T00:00:00Z")
    slow = made(SHAPE, "triton_b", level_us=100.0, energy_reason="not asked for")
    found = points_of([fast, slow, metered, failed(SHAPE, "triton_c", Status.CRASHED, "gone")])
    assert [(p.kernel, p.joules is not None) for p in found] == [("matmul/triton_a", True), ("matmul/triton_b", False)]
    front = front_of(found)
    rows = [json.loads(json.dumps(row, allow_nan=False)) for row in front.to_json()]
    assert [(row["state"], row["energy_j"], row["reason"]) for row in rows] == [("front", 0.05, ""), ("no energy", None, "not asked for")]
    table = front.table()
    assert all(len(line) == len(COLUMNS) for line in table) and table[0][0] == "*" and table[1][5] == "not asked for"


def test_energy_is_for_those_near_the_time_front():
    def trial(n):
        return Trial(f"matmul/k{n}", "0" * 16, SHAPE, NoConfig(), "h200", Policy())

    trials = [trial(n) for n in range(20)]

    def row(n, us, **how):
        times = {"median_us": us, "ci_low_us": us * 0.999, "ci_high_us": us * 1.001}
        return Result.of(trials[n], Status.OK, backend="triton", run_id="r", **({"library": False} | how), **times)

    rows = [row(n, 100.0 + n) for n in range(20)]
    assert [t.kernel for t in worth_metering(trials, rows)] == [f"matmul/k{n}" for n in range(8)]
    rows[10] = row(10, 110.0, library=True)
    chosen = worth_metering(trials, rows)
    assert [t.kernel for t in chosen] == [f"matmul/k{n}" for n in (*range(7), 10)] and all(t.policy.energy for t in chosen)
    assert len(worth_metering(trials, rows, slack=0.02)) == 3 and worth_metering(trials, []) == []
