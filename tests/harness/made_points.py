"""Nights of one series made by hand: a level, a quiet seeded noise, and what the test changes about them."""

import numpy as np

from klab.harness.watch.judge import judge_night
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Point, Series

IDENTITY = "h200/p1/chosen/time"
SERIES = {IDENTITY: Series("h200", "matmul", "p1", "m16", "chosen", "time")}
RULE = Rule()


def made(values, *, noise=0.002, seed=0, looks=1, processes=3, anchor=True, clock=1500.0, **fields):
    """One point per value (microseconds); a `clock` may be a list, one per night."""
    rng = np.random.default_rng(seed)
    clocks = clock if isinstance(clock, list) else [clock] * len(values)
    points = []
    for night, (value, mhz) in enumerate(zip(values, clocks, strict=True)):
        taken = tuple((value * np.exp(noise * rng.normal(size=looks * processes))).tolist())
        points.append(
            Point(
                taken,
                tuple(v / 100 for v in taken) if anchor else (),
                tuple(v * mhz for v in taken) if mhz else (),
                anchor="matmul" if anchor else "",
                looks=looks,
                **{"kernel": "triton_matmul", "device_uuid": "GPU-0", "epoch": "e0", "night": f"{night:04d}", **fields},
            )
        )
    return points


def judged(history, tonight, rule=RULE, **how):
    """The verdict on one series."""
    return judge_night({IDENTITY: history}, {IDENTITY: tonight}, rule, SERIES, **how)[IDENTITY]


def nights(values, *, seed=0, rule=RULE, **how):
    """Judge a course of nights, each suspect looked at three times; the calls, one per night."""
    three = made(values, seed=seed, looks=3, **how)
    history, calls = [], []
    for point in three:
        once = cut(point, 1)
        verdict = judged(history, once, rule)
        if verdict.call == "suspect":
            once = point
            verdict = judged(history, point, rule)
        history.append(once)
        calls.append(verdict.call)
    return calls


def cut(point, looks):
    """The point after so many of its looks."""
    from dataclasses import replace

    kept = looks * len(point.values) // point.looks
    return replace(point, values=point.values[:kept], anchored=point.anchored[:kept], cycles=point.cycles[:kept], looks=looks)
