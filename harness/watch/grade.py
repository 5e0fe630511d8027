"""Grades: what a check of a machine found, beside what was expected, with the source of the expectation and the reason of the grade."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from klab.kernels.contract import Json, Record


class Grade(StrEnum):
    """How a check ended. The list is closed; `UNKNOWN` is never taken for a pass."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "not known"


class Outcome(StrEnum):
    """What is said of the whole machine."""

    ACCEPTED = "accepted"
    WARNINGS = "accepted with warnings"
    UNDECIDED = "cannot be decided"
    REFUSED = "not accepted"

    def exit_code(self, *, strict: bool = False) -> int:
        """Of `klab accept`: 0 accepted, 1 not accepted, 3 cannot be decided (with `strict` also for warnings)."""
        codes = {Outcome.ACCEPTED: 0, Outcome.WARNINGS: 3 if strict else 0, Outcome.UNDECIDED: 3, Outcome.REFUSED: 1}
        return codes[self]


@dataclass(frozen=True)
class Check(Record):
    """One finding. `device` is the GPU's index, -1 for the machine as a whole.

    `value` is for people, `figure` with its 95% interval for machines (null where it is no number or was not measured). `label` says what
    the expectation is: reference (published), recorded (measured on earlier devices with this command), chip (the chip's own file), device
    (what the device says of itself), rule (klab's own limit). `needed`: unless it is known, nobody can accept the machine.
    """

    topic: str
    name: str
    grade: str
    value: str = ""
    expected: str = ""
    label: str = ""
    source: str = ""
    reason: str = ""
    remedy: str = ""
    device: int = -1
    figure: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    needed: bool = False

    @property
    def origin(self) -> str:
        """Where the expectation is from: "reference: NVIDIA H200 datasheet"."""
        return ": ".join(part for part in (self.label, self.source) if part)


@dataclass(frozen=True)
class Expectation(Record):
    """What devices of a kind do: the range that good ones lie in, and beyond what a device is to be warned of or refused.

    A limit that is null does not apply. `devices` counts those that a recorded expectation rests on.
    """

    name: str
    low: float | None = None
    high: float | None = None
    warn_below: float | None = None
    fail_below: float | None = None
    warn_above: float | None = None
    fail_above: float | None = None
    label: str = "reference"
    source: str = ""
    devices: int = 0

    @property
    def limitless(self) -> bool:
        """Is there no limit, so that nothing could fail it?"""
        return all(limit is None for limit in (self.warn_below, self.fail_below, self.warn_above, self.fail_above))

    @property
    def said(self) -> str:
        """In words, without the unit: "700 to 800", "at least 18"."""
        if self.low is not None and self.high is not None:
            return f"{number(self.low)} to {number(self.high)}" if self.low != self.high else number(self.low)
        least = next((v for v in (self.low, self.warn_below, self.fail_below) if v is not None), None)
        most = next((v for v in (self.high, self.warn_above, self.fail_above) if v is not None), None)
        parts = ([] if least is None else [f"at least {number(least)}"]) + ([] if most is None else [f"at most {number(most)}"])
        return ", ".join(parts)


@dataclass(frozen=True)
class NodeRule(Record):
    """klab's own limits, which hold for every chip. None is published as a limit for acceptance: each has the reason beside it, and where
    that is no more than a judgement the word guess."""

    # GPUs of one node differ by more than 5% in published runs, so 5% is a finding and not a fault; twice that is one (guess).
    spread_warn: float = 0.05
    spread_fail: float = 0.10
    # Sequential windows drift by 1-3% (helion pull request 3523); beyond that a tuner cannot tell kernels apart. Fail: guess.
    noise_warn: float = 0.03
    noise_fail: float = 0.08
    # A device in thermal balance holds its rate; 3% is what a drifting window does, 10% a cooling that does not keep up (guess).
    drop_warn: float = 0.03
    drop_fail: float = 0.10
    # The slowest half minute against the median: a slope does not see a fall in the last minute. A housekeeping pause is shorter (guess).
    dip_warn: float = 0.05
    dip_fail: float = 0.10
    # Shorter than this, a heat sink and a rack have not warmed up, and the slope is said to be not known (guess).
    slope_least_s: float = 120.0
    # What is left to the temperature at which the hardware slows itself down: the accuracy of the sensor is a few degrees (guess).
    margin_warn_c: float = 5.0
    # Share of the readings under load in which the hardware throttled for heat or for its power supply; 2% is one reading in 50 (guess).
    throttle_warn: float = 0.0
    throttle_fail: float = 0.02
    # GPUs of one node under the same load: more than so many degrees apart points at one cold plate or fan (guess).
    temperature_spread_warn_c: float = 15.0
    # Power that a saturated board draws, over its limit; a board far below it with low clocks is held back by something else (guess).
    power_share_warn: float = 0.80
    # NVML's total memory is what ECC and the firmware leave of the chip's: 97% (143771 MiB of 141 GB on an H200 is more than all of it).
    memory_share_fail: float = 0.97
    # Nine tenths of the free memory are tested; with less than this of all of it somebody else holds the rest (guess).
    memory_tested_warn: float = 0.80


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95% interval, where there are samples enough for one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass
class Checks:
    """Collects the checks of one device (or of the machine, where `device` is -1) under one topic."""

    device: int = -1
    topic: str = ""
    found: list[Check] = field(default_factory=list)

    def on(self, topic: str) -> Checks:
        """The same collection under another topic."""
        return Checks(self.device, topic, self.found)

    def add(self, name: str, grade: Grade, value: str = "", **more: Json) -> None:
        """Note a finding that was judged elsewhere; a pass needs neither reason nor remedy."""
        if grade is Grade.PASS:
            more = {key: text for key, text in more.items() if key not in ("reason", "remedy")}
        self.found.append(Check(self.topic, name, grade.value, value, device=self.device, **more))

    def unknown(self, name: str, reason: str | None, **more: Json) -> None:
        """Note what could not be found out, and why."""
        self.add(name, Grade.UNKNOWN, reason=reason or "no reason was given", **more)

    def holds(self, name: str, fine: bool, value: str, expected: str, *, bad: Grade = Grade.FAIL, **more: Json) -> None:
        """Note whether something is as it must be; `reason` and `remedy` are for when it is not."""
        self.add(name, Grade.PASS if fine else bad, value, expected=expected, **{"label": "device", **more})

    def measured(self, name: str, unit: str, figure: Figure, expected: Expectation | None, *, value: str = "", **more: Json) -> None:
        """Judge a figure by an expectation; not known where nobody knows what to expect."""
        grade, reason = judge(figure, expected)
        if expected is not None:
            more |= {"expected": f"{expected.said} {unit}".strip(), "label": expected.label, "source": expected.source}
        numbers = {"figure": figure.value, "low": figure.low, "high": figure.high, "unit": unit}
        self.add(name, grade, value or shown(figure, unit), **{"reason": reason, **more, **numbers})

    def limited(self, name: str, figure: Figure, value: str, *, warn_above: float, fail_above: float | None = None, **more: Json) -> None:
        """Judge a share or a count where less is better, by klab's own rule."""
        grade, _ = judge(figure, Expectation(name, warn_above=warn_above, fail_above=fail_above))
        most = f"{warn_above:.3g}" if warn_above >= 1 or warn_above == 0 else f"{warn_above:.1%}"
        more = {"label": "rule", "expected": f"at most {most}", **more}
        self.add(name, grade, value, **more, figure=figure.value, low=figure.low, high=figure.high)


UNEXPECTED = "nothing is recorded or published for this chip; klab accept --record on good machines makes it known"


def judge(figure: Figure, expected: Expectation | None) -> tuple[Grade, str]:
    """The grade of a figure, with the reason. It fails only where its whole interval lies beyond the limit; near it, it is warned of."""
    if expected is None:
        return Grade.UNKNOWN, UNEXPECTED
    if not math.isfinite(figure.value):
        return Grade.UNKNOWN, "what was measured is no number"
    if expected.limitless:
        return Grade.UNKNOWN, "the expectation names no limit"
    low = figure.value if figure.low is None else figure.low
    high = figure.value if figure.high is None else figure.high
    for limit, value, surely, beyond in (
        (expected.fail_below, figure.value, high, "below"),
        (expected.fail_above, -figure.value, -low, "above"),
    ):
        if limit is None:
            continue
        signed = limit if beyond == "below" else -limit
        if surely < signed:
            return Grade.FAIL, f"{beyond} {number(limit)}"
        if value < signed:
            return Grade.WARN, f"{beyond} {number(limit)}, but its interval reaches beyond that: measure again"
    if expected.warn_below is not None and figure.value < expected.warn_below:
        return Grade.WARN, f"below {number(expected.warn_below)}"
    if expected.warn_above is not None and figure.value > expected.warn_above:
        return Grade.WARN, f"above {number(expected.warn_above)}"
    return Grade.PASS, ""


def outcome(checks: Iterable[Check]) -> Outcome:
    """Of all checks together: one failure refuses; what is needed and not known leaves it undecided."""
    found = list(checks)
    grades = {check.grade for check in found}
    if Grade.FAIL in grades:
        return Outcome.REFUSED
    if not found or any(check.needed and check.grade == Grade.UNKNOWN for check in found):
        return Outcome.UNDECIDED
    return Outcome.WARNINGS if Grade.WARN in grades else Outcome.ACCEPTED


@dataclass(frozen=True)
class Finding:
    """What did not pass, once for all devices (and, where it is not known, for all checks) that have it in common."""

    grade: Grade
    devices: str
    names: str
    topic: str
    value: str
    expected: str
    origin: str
    reason: str
    remedy: str


def findings(checks: Sequence[Check]) -> list[Finding]:
    """The worst first. `devices` is "machine" or "0-3, 7"."""
    groups: dict[tuple[object, ...], list[Check]] = {}
    for check in worst(checks):
        if check.grade == Grade.UNKNOWN and not check.value:
            groups.setdefault((check.grade, check.device, check.reason), []).append(check)
        elif check.grade != Grade.PASS:
            groups.setdefault((check.grade, check.topic, check.name, check.reason, check.remedy), []).append(check)
    # Then devices that have the same list of unknown checks for the same reason.
    merged: dict[tuple[object, ...], list[Check]] = {}
    for key, group in groups.items():
        names = tuple(dict.fromkeys(check.name for check in group))
        merged.setdefault((key[0], names, group[0].reason, group[0].remedy), []).extend(group)
    return [_finding(group) for group in merged.values()]


def _finding(group: Sequence[Check]) -> Finding:
    first = group[0]
    values = list(dict.fromkeys(check.value for check in group if check.value))
    return Finding(
        Grade(first.grade),
        _ranges(sorted({check.device for check in group})),
        ", ".join(dict.fromkeys(check.name for check in group)),
        ", ".join(dict.fromkeys(check.topic for check in group)),
        values[0] if len(values) == 1 else f"{values[0]} ... {values[-1]}" if values else "",
        first.expected,
        first.origin,
        first.reason,
        first.remedy,
    )


def _ranges(devices: Sequence[int]) -> str:
    if devices[0] < 0:
        return "machine"
    runs: list[list[int]] = []
    for device in devices:
        if runs and device == runs[-1][-1] + 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def number(value: float) -> str:
    """Three to four digits, and thousands with commas: 0.031, 4.21, 788, 4,310."""
    if not math.isfinite(value):
        return str(value)
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def shown(figure: Figure, unit: str) -> str:
    """For people: "788 (781 to 793) TFLOP/s"."""
    interval = "" if figure.low is None or figure.high is None else f" ({number(figure.low)} to {number(figure.high)})"
    return f"{number(figure.value)}{interval} {unit}".strip()


def worst(checks: Sequence[Check]) -> list[Check]:
    """Failures first, then what is not known though it is needed, warnings, what is not known, passes; each in the order given."""
    order = {Grade.FAIL: 0, Grade.WARN: 2, Grade.UNKNOWN: 3, Grade.PASS: 4}
    return sorted(checks, key=lambda c: 1 if c.needed and c.grade == Grade.UNKNOWN else order[Grade(c.grade)])
