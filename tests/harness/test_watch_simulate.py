"""The simulator: its noise is what it says, and the rule keeps its promises on made nights (more in ci/overheads/test_night_rates.py)."""

import numpy as np
import pytest

from klab.harness.watch.rule import Rule
from klab.harness.watch.simulate import Change, NewEpoch, Noise, World, rates, watch

QUIET = {"own": 0.0, "process": 0.0, "night": 0.0, "anchor": 0.0, "spikes": 0.0}


def logs(world, nights, *, of="anchored"):
    return np.array(
        [[np.log(np.median(getattr(p, of))) for p in world.points(n, dict.fromkeys(world.identities, 1)).values()] for n in nights]
    )


def scatter(noise, nights=12, of="anchored"):
    """The standard deviation over the nights, the median over the series."""
    return float(np.median(logs(World(60, noise), range(nights), of=of).std(axis=0, ddof=1)))


def test_looks_and_order_change_no_night():
    world, again = World(5, seed=3), World(5, seed=3)
    once = world.points(2, dict.fromkeys(world.identities, 1))
    three = again.points(2, dict.fromkeys(again.identities, 3))
    for identity in world.identities:
        assert three[identity].values[:3] == once[identity].values and len(three[identity].values) == 9
    assert world.points(0, dict.fromkeys(world.identities, 2)) == again.points(0, dict.fromkeys(again.identities, 2))
    assert World(5, seed=4).points(2, dict.fromkeys(world.identities, 1)) != once


def test_noise_has_the_stated_size():
    assert scatter(Noise(**{**QUIET, "own": 0.01})) == pytest.approx(0.01, rel=0.15)
    assert scatter(Noise(**{**QUIET, "process": 0.01})) == pytest.approx(0.0067, rel=0.15)
    assert scatter(Noise(**{**QUIET, "anchor": 0.01})) == pytest.approx(0.0067, rel=0.4)
    assert scatter(Noise(**QUIET)) < 1e-12


def test_the_anchor_and_the_cycles_take_away_the_night():
    noise = Noise(**{**QUIET, "night": 0.02})
    assert scatter(noise, of="values") == pytest.approx(0.02, rel=0.5)
    assert scatter(noise, of="anchored") < 0.3 * scatter(noise, of="values")
    assert scatter(noise, of="cycles") < 0.3 * scatter(noise, of="values")


def test_spikes_drift_steps_and_epochs_are_where_they_are_said_to_be():
    spiked = logs(World(200, Noise(**{**QUIET, "spikes": 0.02})), range(20))
    over = spiked - np.median(spiked, axis=0)
    assert (over > 0.03).mean() == pytest.approx(0.02, abs=0.006) and over.max() <= 0.1501 and over.min() > -1e-9
    drift = logs(World(3, Noise(**{**QUIET, "drift": 0.001})), (0, 10))
    assert drift[1] - drift[0] == pytest.approx(0.01)
    step = logs(World(3, Noise(**QUIET), changes=[Change(2, 0.05, (1,))]), (1, 2))
    assert np.exp(step[1] - step[0]) == pytest.approx([1.0, 1.05, 1.0])
    slide = logs(World(3, Noise(**QUIET), changes=[Change(2, 0.01, (0,), every=True)]), (1, 2, 3))
    assert np.exp(slide[2] - slide[0])[0] == pytest.approx(1.01**2)
    world = World(3, Noise(**QUIET), changes=[NewEpoch(2)])
    assert [next(iter(world.points(n, {world.identities[0]: 1}).values())).epoch for n in (1, 2)] == ["epoch 0", "epoch 1"]


def test_heavy_tails_keep_their_quartiles():
    noise = {**QUIET, "own": 0.01}
    heavy, normal = (logs(World(200, Noise(**noise, tails=tails)), range(10)) for tails in (3, 0))
    heavy, normal = heavy - np.median(heavy, axis=0), normal - np.median(normal, axis=0)
    assert np.percentile(np.abs(heavy), 50) == pytest.approx(np.percentile(np.abs(normal), 50), rel=0.1)
    assert np.percentile(np.abs(heavy), 99.5) > 1.5 * np.percentile(np.abs(normal), 99.5)


def test_persistent_noise_resembles_the_night_before():
    made = logs(World(100, Noise(**{**QUIET, "own": 0.01}, persistence=0.8)), range(30))
    made = made - made.mean(axis=0)
    assert (made[1:] * made[:-1]).mean() / (made**2).mean() == pytest.approx(0.76, abs=0.06)


def test_the_promises_are_kept():
    """Of 200 series 20 get 5% slower and 20 get 3% slower on night 28; the figures of many worlds stand in docs/night.md."""
    five, three = set(range(0, 200, 10)), set(range(5, 200, 10))
    world = World(changes=[Change(28, 0.05, tuple(five)), Change(28, 0.03, tuple(three))], seed=4)
    false_nights, again, first, seen = 0, 0, set(), set()
    for night, verdicts in watch(world, 31, first=6):
        slower = {i for i, identity in enumerate(world.identities) if verdicts[identity].call == "slower"}
        changed = five | three if night >= 28 else set()
        false_nights += bool(slower - changed)
        again += sum(v.point.looks > 1 for v in verdicts.values()) if night < 28 else 0
        first |= slower & five if night == 28 else set()
        seen |= slower & changed
    assert false_nights <= 2, "5% of 25 nights is 1.25"
    assert 20 <= again <= 22 * 12, "some two in a hundred are looked at again"
    assert len(first) >= 18 and five <= seen and len(seen & three) >= 16


def test_a_new_driver_raises_no_alarm():
    calls = {night: verdicts.values() for night, verdicts in watch(World(changes=[NewEpoch(12)], seed=1), 20, first=11)}
    for night in range(12, 17):
        assert {v.call for v in calls[night]} == {"unknown"} and all(v.new_epoch for v in calls[night])
    assert not any(v.call in ("slower", "faster", "unknown") for night in range(17, 20) for v in calls[night])


def test_the_simulator_can_tell_a_bad_rule():
    """What gives little room and has a low bar alarms on most nights: the figures are the rule's, not the simulator's."""
    bad = Rule(multiples=1.5, first_look=1.0, confirm=0.01, floor=0.001)
    assert sum(any(v.call == "slower" for v in verdicts.values()) for _, verdicts in watch(World(60, seed=1), 15, bad, first=10)) >= 4


def test_rates_counts_what_it_says():
    found = rates(Noise(), 1, count=20, sizes=(0.2,))
    assert found.nights == 25 and sum(found.calls.values()) == 500 and found.false_nights <= 2
    assert found.seen == {0.2: (1.0, 1.0)} and found.noisy < 250 and found.again < 75
