"""Made nights with stated noise, judged by the real rule: how often it alarms for nothing, and what it sees how soon (docs/night.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klab.harness.watch.judge import judge_night, suspects, too_noisy
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Call, Metric, Point, Role, Series, Verdict
from klab.kernels.contract import Record

Floats = NDArray[np.float64]

# Own noise of a night by duration: below 50, 200, 1000 us and above. A sixth of the (p80 - p20)/p50 within a run that public rows show
# (4-8%, 2%, 0.5-0.9%, 0.1%), as a night's value is the median of dozens of rounds; the sixth is a guess.
DURATION_NOISE = (0.010, 0.0035, 0.0012, 0.0002)


@dataclass(frozen=True)
class Noise(Record):
    """What moves a measurement, as standard deviations of its logarithm unless said otherwise.

    own: of one series in one night, the same at every look of that night. process: of one fresh process. night: common to all series of
    a night (temperature, clocks); an anchor of the same laps takes away all but `leak` of it, which differs from series to series, and
    brings `anchor` of its own. spikes: the share of looks that a neighbour makes slower by spike_least to spike_most; night_spikes: the
    share of series whose whole night is so. tails: degrees of freedom of Student's t in place of the normal distribution (own, process),
    scaled to the same quartiles; 0: normal. persistence: correlation of own noise from one night to the next. drift: every series slower
    by so much each night. by_duration: own noise by the duration of the series, in place of `own`, and process noise in proportion.
    device_spread: of a device's speed, for `devices` that take turns at random; device_leak is what remains of it over the anchor.
    anchored: whether there is an anchor. clock: whether clocks are read; the night effect is then the clock's.
    """

    own: float = 0.006
    process: float = 0.009
    night: float = 0.008
    leak: float = 0.25
    anchor: float = 0.002
    spikes: float = 0.02
    spike_least: float = 0.04
    spike_most: float = 0.15
    night_spikes: float = 0.0
    tails: int = 0
    persistence: float = 0.0
    drift: float = 0.0
    by_duration: bool = False
    devices: int = 1
    device_spread: float = 0.05
    device_leak: float = 0.01
    anchored: bool = True
    clock: bool = True


@dataclass(frozen=True)
class Change(Record):
    """From night `at` on, the series with these indices take `size` more time (0.05: 5% slower; every=True: so much more each night).

    source: whether their source changed that night too, as it does where a commit is the cause.
    """

    at: int
    size: float
    series: tuple[int, ...]
    every: bool = False
    source: bool = False


@dataclass(frozen=True)
class NewEpoch(Record):
    """From night `at` on there is another driver, and each series has another level, by a deviation of `shift`."""

    at: int
    shift: float = 0.03


class World:
    """A fleet of series with made nights. The same seed gives the same nights, whatever is asked of them and in which order."""

    def __init__(
        self,
        count: int = 200,
        noise: Noise | None = None,
        *,
        changes: Sequence[Change | NewEpoch] = (),
        processes: int = 3,
        looks: int = 3,
        seed: int = 0,
    ) -> None:
        """`processes` fresh processes a look, at most `looks` looks a night."""
        self.count, self.noise, self.changes, self.processes, self.looks, self.seed = (
            count,
            noise or Noise(),
            changes,
            processes,
            looks,
            seed,
        )
        rng = np.random.default_rng((seed, 0))
        self.durations_us = np.exp(rng.uniform(np.log(5.0), np.log(5000.0), count))
        self.sensitivity = rng.normal(size=count)
        self.device_speed = rng.normal(size=self.noise.devices)
        self.device_quirk = rng.normal(size=(self.noise.devices, count))
        roles = [(Role.CHOSEN if i % 2 else Role.LIBRARY).value for i in range(count)]
        made = [Series("made", "matmul", f"p{i}", f"p{i}", role, Metric.TIME.value) for i, role in enumerate(roles)]
        self.series = {s.identity: s for s in made}
        self.identities = list(self.series)
        self._index = {identity: row for row, identity in enumerate(self.identities)}
        self._own = np.zeros(count)
        self._nights: dict[int, dict[str, Any]] = {}

    def points(self, night: int, looks: Mapping[str, int]) -> dict[str, Point]:
        """The points of a night of those series, each looked at so often. Nights are made in their order, as some noise persists."""
        for earlier in range(len(self._nights), night + 1):
            self._nights[earlier] = self._make(earlier)
        made = self._nights[night]
        return {identity: self._point(made, self._index[identity], count, night) for identity, count in looks.items()}

    def _point(self, made: Mapping[str, Any], row: int, looks: int, night: int) -> Point:
        def taken(name: str) -> tuple[float, ...]:
            return () if made[name] is None else tuple(made[name][row, :looks].ravel().tolist())

        anchor = "" if made["anchored"] is None else "matmul"
        return Point(
            taken("values"), taken("anchored"), taken("cycles"), anchor=anchor, looks=looks, kernel="made",
            source_digest=str(made["source"][row]),
            device_uuid=f"GPU-{made['device']}", epoch=f"epoch {made['epoch']}", night=f"{night:05d}",
        )  # fmt: skip

    def _make(self, night: int) -> dict[str, Any]:
        noise, count = self.noise, self.count
        rng = np.random.default_rng((self.seed, 1, night))
        common = noise.night * rng.normal()
        own = noise.own * np.ones(count)
        if noise.by_duration:
            own = np.asarray(DURATION_NOISE)[np.searchsorted((50.0, 200.0, 1000.0), self.durations_us)]
        fresh = _draw(rng, (count,), noise.tails)
        rho = noise.persistence if night else 0.0
        self._own = rho * self._own + np.sqrt(1.0 - rho * rho) * fresh
        device = int(rng.integers(noise.devices))
        level = np.log(self.durations_us) + noise.drift * night
        epoch, source = 0, np.zeros(count, dtype=np.int64)
        for change in self.changes:
            if night < change.at:
                continue
            if isinstance(change, NewEpoch):
                epoch += 1
                level += change.shift * np.random.default_rng((self.seed, 2, change.at)).normal(size=count)
            else:
                source[list(change.series)] += change.source
                level[list(change.series)] += np.log1p(change.size) * (night - change.at + 1 if change.every else 1)
        slow = np.where(rng.random(count) < noise.night_spikes, rng.uniform(noise.spike_least, noise.spike_most, count), 0.0)
        shape = (count, self.looks, self.processes)
        spread = own / noise.own * noise.process if noise.own else np.full(count, noise.process)
        process = spread[:, None, None] * _draw(rng, shape, noise.tails)
        spiked = rng.random((count, self.looks)) < noise.spikes
        spike = np.where(spiked, rng.uniform(noise.spike_least, noise.spike_most, spiked.shape), 0.0)[:, :, None]
        kernel = (level + own * self._own + slow)[:, None, None] + process + spike
        speed = noise.device_spread * self.device_speed[device] if noise.devices > 1 else 0.0
        quirk = noise.device_leak * self.device_quirk[device] if noise.devices > 1 else np.zeros(count)
        anchor = (noise.anchor * rng.normal(size=(1, self.looks, self.processes))) if noise.anchored else 0.0
        felt = common * (1.0 + noise.leak * self.sensitivity)[:, None, None]
        value = np.exp(kernel + felt + speed + quirk[:, None, None])
        # The anchor takes 100 us; what it does not feel as this series does remains.
        anchored = value / (100.0 * np.exp(common + speed + anchor)) if noise.anchored else None
        cycles = value * (1.5e3 * np.exp(-common)) if noise.clock else None
        return {"values": value, "anchored": anchored, "cycles": cycles, "device": device, "epoch": epoch, "source": source}


def _draw(rng: np.random.Generator, shape: tuple[int, ...], tails: int) -> Floats:
    """Normal values, or Student's t with the quartiles of normal ones."""
    if not tails:
        return rng.normal(size=shape)
    from scipy.special import stdtrit

    return np.asarray(rng.standard_t(tails, shape) * (0.6744897501960817 / float(stdtrit(tails, 0.75))))


def watch(world: World, nights: int, rule: Rule | None = None, *, first: int = 0) -> Iterator[tuple[int, dict[str, Verdict]]]:
    """Judge the nights of a world one after the other, suspects measured again; yields (night, verdicts) from night `first` on.

    Nights before `first` are history alone: they are measured once and not judged.
    """
    rule = rule or Rule(looks=world.looks)
    history: dict[str, list[Point]] = {identity: [] for identity in world.identities}
    for night in range(nights):
        looks = dict.fromkeys(world.identities, 1)
        points = world.points(night, looks)
        if night >= first:
            verdicts = judge_night(history, points, rule, world.series)
            if again := suspects(verdicts, rule):
                # All looks at once: whether a look denies the first is seen then too, and judging is what takes the time here.
                points |= world.points(night, dict.fromkeys(again, rule.looks))
                verdicts = judge_night(history, points, rule, world.series)
            yield night, verdicts
        for identity, point in points.items():
            history[identity].append(point)


@dataclass
class Rates:
    """What came of made nights: how many there were, how many of them had at least one `slower` where nothing had changed, how often each
    call was made, how many series could not have shown 5%, and how many were looked at again. seen: per size of a step, the share of the
    changed series that were `slower` on the first night, and by the third.
    """

    nights: int = 0
    false_nights: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    noisy: int = 0
    again: int = 0
    seen: dict[float, tuple[float, float]] = field(default_factory=dict)


# The first night that is judged, and that on which steps come. The nights between count for false alarms.
FIRST, STEP = 5, 30
SIZES = (0.05, 0.03)
# Of so many series one changes, of each size.
EVERY = 10


def rates(
    noise: Noise,
    worlds: int,
    *,
    count: int = 200,
    rule: Rule | None = None,
    sizes: Sequence[float] = SIZES,
    seed: int = 0,
    source: bool = False,
) -> Rates:
    """Judge worlds in which nothing happens before night 30; from then on a tenth of the series takes longer by each of the `sizes`.

    source: with a new source, as after a commit.
    """
    rule, found = rule or Rule(), Rates()
    first, third, changed = Counter[float](), Counter[float](), Counter[float]()
    for world in range(worlds):
        here = {size: set(range((world + n * EVERY // len(sizes)) % EVERY, count, EVERY)) for n, size in enumerate(sizes)}
        made = World(
            count, noise, changes=[Change(STEP, size, tuple(which), source=source) for size, which in here.items()], seed=seed + world
        )
        seen: set[int] = set()
        for night, verdicts in watch(made, STEP + 3, rule, first=FIRST):
            if night < STEP:
                _count(found, verdicts, rule)
                continue
            seen |= {i for i, identity in enumerate(made.identities) if verdicts[identity].call == Call.SLOWER}
            for size, which in here.items():
                first[size] += len(seen & which) if night == STEP else 0
                third[size] += len(seen & which) if night == STEP + 2 else 0
        changed.update({size: len(which) for size, which in here.items()})
    found.seen = {size: (first[size] / changed[size], third[size] / changed[size]) for size in sizes}
    return found


def _count(found: Rates, verdicts: Mapping[str, Verdict], rule: Rule) -> None:
    calls = Counter(v.call for v in verdicts.values())
    found.nights += 1
    found.false_nights += bool(calls[Call.SLOWER])
    found.calls += calls
    found.noisy += len(too_noisy(verdicts.values(), rule))
    found.again += sum(v.point is not None and v.point.looks > 1 for v in verdicts.values())
