"""How often a night alarms for nothing and what it sees how soon, on made nights of 200 series; docs/night.md holds what this prints.

pytest ci/overheads/test_night_rates.py --benchmark-enable -s -o timeout=0   (KLAB_NIGHT_WORLDS=8 worlds of each kind: minutes on one core)
"""

from __future__ import annotations

import os
import time

import pytest

from klab.harness.watch.judge import judge_night
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Call
from klab.harness.watch.simulate import Change, Noise, Rates, World, rates, watch

WORLDS = int(os.environ.get("KLAB_NIGHT_WORLDS", "8"))

MODELS = {
    "as stated": Noise(),
    "half the noise": Noise(own=0.003, process=0.0045, night=0.004, anchor=0.001),
    "own noise by duration": Noise(by_duration=True),
    "no anchor": Noise(anchored=False),
    "no spikes": Noise(spikes=0.0),
    "spikes that last the night, 1 in 2,000": Noise(night_spikes=0.0005),
    "heavy tails (t, 4 degrees)": Noise(tails=4),
    "nights alike (0.8)": Noise(persistence=0.8),
    "two devices, 5% apart": Noise(devices=2),
    "twice the noise": Noise(own=0.012, process=0.018, night=0.016, anchor=0.004),
}
SOME = "as stated"


# The steps of these come with a new source too, as a commit brings it.
SOURCED = ("heavy tails (t, 4 degrees)", "spikes that last the night, 1 in 2,000")


@pytest.mark.parametrize(("name", "source"), [*((name, False) for name in MODELS), *((name, True) for name in SOURCED)])
def test_rates(name: str, source: bool, benchmark) -> None:
    found = benchmark.pedantic(rates, args=(MODELS[name], WORLDS), kwargs={"source": source}, rounds=1)
    (first3, third3), (first5, third5) = found.seen[0.03], found.seen[0.05]
    told = f"{name}, new source" if source else name
    series = sum(found.calls.values()) / found.nights
    print(
        f"\n| {told} | {found.nights} | {_share(found.false_nights / found.nights)} | {found.calls[Call.FASTER] / found.nights:.2f} "
        f"| {found.again / found.nights:.1f} | {found.noisy / found.nights / series:.0%} "
        f"| {first5:.0%} / {third5:.0%} | {first3:.0%} / {third3:.0%} |"
    )
    if name == SOME:
        _keeps_its_promise(found)


def _keeps_its_promise(found: Rates) -> None:
    assert found.false_nights <= 0.05 * found.nights
    assert found.seen[0.05][0] >= 0.9 and found.seen[0.03][1] >= 0.8


def test_drift(benchmark) -> None:
    """Series that get 0.1% slower each night: on which night they are called slower (10th, 50th, 90th in 100), and whether it stays so."""

    def run() -> tuple[list[int], float]:
        begun, stays, after = [], 0, 0
        for world in range(max(1, WORLDS // 4)):
            here = tuple(range(0, 60, 3))
            made = World(60, changes=[Change(10, 0.001, here, every=True)], seed=world)
            seen: dict[int, int] = {}
            for night, verdicts in watch(made, 70, first=5):
                for i in here:
                    slower = verdicts[made.identities[i]].call == Call.SLOWER
                    if night >= 10 and slower and i not in seen:
                        seen[i] = night - 10
                    elif i in seen:
                        after, stays = after + 1, stays + slower
            begun += [seen.get(i, 99) for i in here]
        return sorted(begun), stays / max(after, 1)

    begun, stays = benchmark.pedantic(run, rounds=1)
    tenths = " / ".join(str(begun[tenth * len(begun) // 10]) for tenth in (1, 5, 9))
    print(
        f"\n| drift 0.1% a night | called slower after {tenths} nights (10%, half, 90% of the series) | {stays:.0%} of the nights after |"
    )
    assert begun[-1] < 99


@pytest.mark.benchmark(timer=time.process_time)
def test_judging_200_series_of_30_nights(benchmark) -> None:
    world = World()
    once = dict.fromkeys(world.identities, 1)
    history = {identity: [world.points(night, {identity: 1})[identity] for night in range(30)] for identity in world.identities}
    tonight = world.points(30, once)
    benchmark(judge_night, history, tonight, Rule(), world.series)
    if benchmark.stats is not None:
        assert benchmark.stats["min"] < 0.5


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
