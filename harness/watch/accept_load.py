"""What is said of a device from what it did: speed, heat, clocks, right results, noise, and how the devices of a machine differ."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from klab.harness.measure.calibration import Calibration
from klab.harness.watch import node_figures as figures
from klab.harness.watch.grade import Checks, Expectation, Figure, Grade, NodeRule, number
from klab.harness.watch.node_facts import Facts
from klab.harness.watch.node_runner import Said
from klab.harness.watch.reference_nodes import MEASURES, Reference
from klab.kernels.contract import Json


@dataclass
class Device:
    """One device: what the driver said of it before and after, and what its processes said. `index` is its place on this machine."""

    index: int
    id: str
    name: str
    before: Facts = field(default_factory=dict)
    after: Facts = field(default_factory=dict)
    probes: list[Said] = field(default_factory=list)
    sustained: Said = field(default_factory=Said)
    # Measured between devices by another process: {"host_to_device_gb_per_s": Figure, ...}.
    links: dict[str, Figure] = field(default_factory=dict)
    # What should have been and was not, with the reason.
    links_missing: dict[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None

    @property
    def trace(self) -> list[dict[str, Json]]:
        """The lines of the sustained run."""
        return figures.trace_of(self.sustained)

    @property
    def error(self) -> str:
        """The first error of one of its processes; "" where all came to their end."""
        return next((said.error for said in (*self.probes, self.sustained) if said.error), "")

    @cached_property
    def measured(self) -> dict[str, Figure]:
        """All figures of this device, by the names of MEASURES; what was not measured is not there. Ask when the run has ended."""
        trace, heated = self.trace, figures.counted(self.trace)
        found: dict[str, Figure | None] = {
            "matmul_tflops": figures.sustained(trace),
            "copy_gb_per_s": figures.figure(figures.probe_rates(self.probes, "copy")),
            "launch_overhead_us": figures.figure(figures.probe_times(self.probes, "events")),
            "load_clock_mhz": figures.sustained(trace, "sm_clock_mhz"),
            "load_power_w": figures.sustained(trace, "power_w"),
        }
        for name in ("temperature_c", "memory_temperature_c"):
            most = figures.extreme(heated, name)
            found[f"load_{name}"] = None if most is None else Figure(most)
        return {name: value for name, value in found.items() if value is not None} | self.links


def performance(add: Checks, device: Device, reference: Reference, rule: NodeRule) -> None:
    """Rates against the expectation, noise from process to process, and right results."""
    found = device.measured
    add = add.on("performance")
    slow, far = "compare clocks, power and temperatures with a machine that reaches it", "look at the PCIe link, and at the host's memory"
    for name, title, needed, remedy in (
        ("matmul_tflops", "sustained matmul", True, slow),
        ("copy_gb_per_s", "copy bandwidth", True, slow),
        ("host_to_device_gb_per_s", "host to GPU", False, far),
        ("device_to_host_gb_per_s", "GPU to host", False, far),
        ("peer_gb_per_s", "GPU to GPU (slowest)", False, "look at the NVLinks, and at nvidia-fabricmanager"),
        ("launch_overhead_us", "launch overhead", False, "look at the host's processor: governor, quota, other work"),
    ):
        if name in found:
            add.measured(title, MEASURES[name][0], found[name], reference.expected.get(name), remedy=remedy, needed=needed)
        elif needed:
            add.unknown(title, device.error or "it was not measured", needed=True)
        elif name in device.links_missing:
            add.unknown(title, device.links_missing[name])
        elif name == "launch_overhead_us":
            add.unknown(title, device.error or "it was not measured")
    for work, title in (("matmul", "noise of the matmul"), ("copy", "noise of the copy")):
        rates = figures.probe_rates(device.probes, work)
        apart = figures.noise(rates)
        if apart is None:
            add.unknown(title, device.error or "it takes two processes or more")
            continue
        inner = figures.within(device.probes, work)
        value = f"{apart:.2%} over {len(rates)} processes" + ("" if inner is None else f", {inner:.2%} within one")
        add.limited(title, Figure(apart), value, warn_above=rule.noise_warn, fail_above=rule.noise_fail,
                    reason="two runs of the same work differ by so much", remedy="find what else runs on this machine")  # fmt: skip
    _since_calibration(add, device, rule)


def _since_calibration(add: Checks, device: Device, rule: NodeRule) -> None:
    """Beside the device's own calibration, where it has one of the same driver and settings."""
    known, described = device.calibration, device.probes[0].get("describe") if device.probes else None
    if known is None or not described:
        return
    if known.epoch != described.get("epoch"):
        add.unknown("since its calibration", f"it was calibrated on {known.at[:10]} with another driver, toolkit or setting")
        return
    for work in ("matmul", "copy"):
        then, now = known.anchors.get(work), figures.figure(figures.probe_times(device.probes, work))
        if then is not None and then.value and now is not None:
            slower = Figure(*(None if us is None else us / then.value - 1 for us in (now.value, now.low, now.high)))  # type: ignore[arg-type]
            add.limited(f"{work} since its calibration", slower, f"{slower.value:+.1%} time since {known.at[:10]}",
                        warn_above=rule.spread_warn, fail_above=None, reason="it was faster when it was calibrated")  # fmt: skip


def correctness(add: Checks, device: Device) -> None:
    """The same product, over and over, must stay the same; and be right in the first place."""
    add = add.on("correctness")
    said = device.sustained
    checked, wrong = said.get("checked"), said.get("wrong_at_first")
    if wrong is None:
        add.unknown("right results", device.error or "no result was compared", needed=True)
        return
    so_far = max((int(line.get("differ") or 0) for line in device.trace), default=0)
    failed = int(said.get("wrong") or so_far)
    if checked is None and not wrong and not failed:
        reason = device.error or "the process ended before it said how many products were right"
        add.unknown("right results", reason, needed=True)
        return
    reason = str(wrong) or f"{failed} of {checked} products of the same inputs differ from the first: silent corruption of data"
    value = f"{failed} of {checked if checked is not None else len(device.trace)} products differ"
    add.holds("right results", not wrong and not failed, value, "none", label="rule", reason=reason, needed=True,
              source="the first is compared with float64", remedy="replace the device")  # fmt: skip


def memory(add: Checks, device: Device, rule: NodeRule) -> None:
    """Was what was written to the memory read back?"""
    add, said = add.on("correctness"), device.probes[0] if device.probes else Said()
    tested, total, wrong = (said.get(f"memory_{name}") for name in ("bytes_tested", "bytes_total", "words_wrong"))
    if tested is None:
        add.unknown("whole memory", device.error or "it was not tested")
        return
    value = f"{wrong} words wrong in {tested / 1e9:.0f} of {total / 1e9:.0f} GB"
    few = tested < rule.memory_tested_warn * total
    add.add("whole memory", Grade.FAIL if wrong else Grade.WARN if few else Grade.PASS, value, expected="none wrong", label="rule",
            reason="what was written was not read back" if wrong else "much of it was in use, and is not tested",
            remedy="replace the GPU" if wrong else "end what uses it, and run this again")  # fmt: skip


def processes(add: Checks, device: Device) -> None:
    """Did the processes on this device come to their end?"""
    if device.probes or device.sustained.lines or device.error:
        add.on("errors").holds(
            "processes", not device.error, device.error or "all ended well", "all end well", label="rule",
            reason="a process on this device died, hung or reported an error", remedy="look at the kernel's log of that time",
        )  # fmt: skip


def heat(add: Checks, device: Device, reference: Reference, rule: NodeRule) -> None:
    """Does the rate hold, how hot is it, and did the hardware slow itself down?"""
    add = add.on("heat and power")
    if not device.trace:
        add.unknown("under load", device.error or "it was not put under load", needed=True)
        return
    _slope(add, device, rule)
    trace = figures.counted(device.trace)
    limits = device.after or device.before
    margin = figures.extreme(trace, "margin_c", least=True)
    if margin is not None:
        below = Expectation("margin", warn_below=rule.margin_warn_c, fail_below=0.0, label="rule")
        add.measured("margin to slowdown", "C", Figure(margin), below, remedy="better cooling: air flow, inlet temperature, cold plate")
    for name, title, limit, key in (
        ("load_temperature_c", "temperature", "operating_limit_c", "temperature_c"),
        ("load_memory_temperature_c", "memory temperature", "memory_limit_c", "memory_temperature_c"),
    ):
        most = figures.extreme(trace, key)
        expected = reference.expected.get(name)
        if limits.get(limit):
            own = float(limits[limit])
            expected = Expectation(name, warn_above=own - rule.margin_warn_c, fail_above=own, label="device", source="NVML's threshold")
        if most is None:
            if device.before:
                add.unknown(title, _why(device, key))
        elif expected is not None or margin is None:
            add.measured(title, "C", Figure(most), expected, remedy="better cooling: air flow, inlet temperature, cold plate")
        else:
            add.add(title, Grade.PASS, f"{number(most)} C", expected="a margin to slowdown", label="device", figure=most, unit="C")
    _reasons(add, device, trace, rule)
    _clock_and_power(add, device, reference, rule)


def _slope(add: Checks, device: Device, rule: NodeRule) -> None:
    slope = figures.slope(device.trace)
    if slope is None:
        for name in ("steadiness", "slowest half minute"):
            add.unknown(name, device.error or "the run under load was too short for a slope")
        return
    value = f"{slope.change:+.1%} over {slope.seconds:.0f} s"
    if slope.low is not None and slope.high is not None:
        value += f" ({slope.low:+.1%} to {slope.high:+.1%})"
    if slope.seconds < rule.slope_least_s:
        reason = f"{slope.seconds:.0f} s are too few to warm a machine through: {rule.slope_least_s:.0f} s are needed, with more --minutes"
        add.add("steadiness", Grade.UNKNOWN, value, reason=reason, figure=slope.change, low=slope.low, high=slope.high)
        add.unknown("slowest half minute", reason)
        return
    lost = Figure(-slope.change, None if slope.high is None else -slope.high, None if slope.low is None else -slope.low)
    add.limited("steadiness", lost, value, warn_above=rule.drop_warn, fail_above=rule.drop_fail,
                expected=f"no more than {rule.drop_warn:.0%} slower by the end", reason="it slows down as it warms",
                remedy="better cooling: air flow, inlet temperature, cold plate")  # fmt: skip
    below = figures.dip(device.trace)
    if below is not None:
        add.limited("slowest half minute", Figure(below), f"{below:.1%} below the median", warn_above=rule.dip_warn,
                    fail_above=rule.dip_fail, reason="it did not hold its rate",
                    remedy="look at clocks, temperatures and power at that time")  # fmt: skip


def _reasons(add: Checks, device: Device, trace: Sequence[Mapping[str, Json]], rule: NodeRule) -> None:
    cool, set_by = "cooling, or the power supply of the machine", "the owner resets what nvidia-smi -lgc or -ac has set"
    for title, reasons, fail_above, remedy in (
        ("thermal throttling", figures.HEAT, rule.throttle_fail, cool),
        ("power brake", figures.SUPPLY, rule.throttle_fail, cool),
        ("hardware slowdown", figures.SLOWDOWN, rule.throttle_fail, cool),
        ("clock setting", figures.SETTING, None, set_by),
    ):
        held = figures.share(trace, sum(reasons))
        if held is None:
            if device.before:
                add.unknown(title, _why(device, "reasons"))
            continue
        what = ", ".join(text for bit, text in reasons.items() if figures.share(trace, bit))
        add.limited(title, Figure(held), f"{held:.1%} of the readings" + (f": {what}" if what else ""), warn_above=rule.throttle_warn,
                    fail_above=fail_above, expected="none", reason="the clock was held back under load", remedy=remedy)  # fmt: skip
    counts = [int(line["throttles"]) for line in trace if line.get("throttles") is not None]
    if not counts and not device.before:
        add.unknown("thermal throttling", "this system counts no throttling")
    elif counts:
        add.limited("thermal throttling", Figure(float(counts[-1] - counts[0])), f"{counts[-1] - counts[0]} events of the package",
                    warn_above=0, expected="none", reason="the processor slowed itself down", remedy="cooling")  # fmt: skip


def _clock_and_power(add: Checks, device: Device, reference: Reference, rule: NodeRule) -> None:
    found, trace = device.measured, figures.counted(device.trace)
    clock, power = found.get("load_clock_mhz"), found.get("load_power_w")
    capped = figures.share(trace, figures.POWER_CAP)
    note = "" if capped is None else f", at the power limit in {capped:.0%} of the readings"
    if clock is None:
        add.unknown("clock under load", _why(device, "sm_clock_mhz"))
    else:
        expected = reference.expected.get("load_clock_mhz")
        add.measured("clock under load", "MHz", clock, expected, value=f"{number(clock.value)} MHz{note}",
                     remedy="cooling or the power limit; a clock set by nvidia-smi -lgc shows only here")  # fmt: skip
    if power is None:
        if device.before:
            add.unknown("power under load", _why(device, "power_w"))
        return
    limit = device.before.get("power_limit_w")
    if not limit:
        add.add("power under load", Grade.UNKNOWN, f"{power.value:.0f} W", reason="its limit is not known", figure=power.value, unit="W")
        return
    idle = (capped or 0.0) < 0.5 and power.value < rule.power_share_warn * limit
    add.holds("power under load", not idle, f"{power.value:.0f} W of {limit:.0f}", f"at least {rule.power_share_warn:.0%}", bad=Grade.WARN,
              label="rule", reason="a saturated board draws more: something else holds it back",
              remedy="look at clocks, reasons and the other GPUs", figure=power.value, unit="W")  # fmt: skip


def _why(device: Device, name: str) -> str:
    """Why a reading under load is missing."""
    if device.error:
        return device.error
    lines = [line["why"] for line in device.trace if line.get("why")]
    found = next((why.get(name) or why.get("sensors") for why in lines if why.get(name) or why.get("sensors")), "")
    return str(found or device.before.get("why", {}).get(name) or "it was not read")


def between(add: Checks, devices: Sequence[Device], rule: NodeRule) -> None:
    """How the devices of one machine differ under the same load at the same time."""
    if len(devices) < 2:
        return
    add = add.on("between devices")
    all_found = [(device, device.measured) for device in devices]
    for name, title in (("matmul_tflops", "spread of the matmul"), ("copy_gb_per_s", "spread of the copy")):
        values = [(found[name].value, device) for device, found in all_found if name in found]
        if len(values) < 2:
            add.unknown(title, "fewer than two devices were measured")
            continue
        numbers = [value for value, _ in values]
        least, slowest = min(values, key=lambda pair: pair[0])
        apart = (max(numbers) - least) / statistics.median(numbers)
        add.limited(title, Figure(apart), f"{apart:.1%}, device {slowest.index} is the slowest", warn_above=rule.spread_warn,
                    fail_above=rule.spread_fail, reason="one device holds the others up: in tensor parallelism the slowest sets the pace",
                    remedy="compare the temperatures and clocks of that device with the others'")  # fmt: skip
    heat = [(found["load_temperature_c"].value, device) for device, found in all_found if "load_temperature_c" in found]
    if len(heat) >= 2:
        most, hottest = max(heat, key=lambda pair: pair[0])
        apart = most - min(value for value, _ in heat)
        add.limited("spread of the temperature", Figure(apart), f"{apart:.0f} C, device {hottest.index} is the hottest",
                    warn_above=rule.temperature_spread_warn_c,
                    expected=f"at most {rule.temperature_spread_warn_c:.0f} C", reason="one cold plate or fan cools worse than the others",
                    remedy="look at that device's cooling")  # fmt: skip
    for key, title in (("vbios", "VBIOS"), ("driver", "driver"), ("power_limit_w", "power limits"), ("pcie_generation_max", "PCIe links")):
        kinds = sorted({str(device.before[key]) for device in devices if device.before.get(key) is not None})
        if kinds:
            add.holds(f"same {title}", len(kinds) == 1, ", ".join(kinds), "one for all", bad=Grade.WARN, label="rule",
                      reason="the devices are not set up alike", remedy="bring them to the same state")  # fmt: skip
