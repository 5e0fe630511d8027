"""Acceptance of a machine that somebody hands over: what is run, in which order, and the Acceptance that comes of it.

The driver is asked, copies run over the links, fresh processes repeat a short probe, then all devices are loaded at the same time for the
rest of the minutes, and the driver is asked again. No setting is changed, and a device that fails does not stop the others.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from klab.harness.fleet.devices import Device as Place
from klab.harness.fleet.devices import devices as find_devices
from klab.harness.measure import environment, nvml
from klab.harness.measure.calibration import Calibration, device_id
from klab.harness.measure.faults import one_line
from klab.harness.measure.lock import exclusive
from klab.harness.measure.probes import host
from klab.harness.watch import accept_load, accept_settings, node_facts
from klab.harness.watch.accept_load import Device
from klab.harness.watch.grade import UNEXPECTED, Check, Checks, Figure, Grade, NodeRule, Outcome, outcome
from klab.harness.watch.node_figures import counted
from klab.harness.watch.node_runner import Job, ProcessRunner, Runner, Said
from klab.harness.watch.reference_nodes import RecordedDevice, Reference, kind_of
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import CannotMeasure

SCHEMA = "klab-acceptance-1"
# Seconds that a probe and the copies over the links may take, beyond the start of a process.
PROBE_S, LINKS_S = 12.0, 40.0
# Left for the last questions to the driver.
RESERVE_S = 3.0
HOST_LINKS = ("host_to_device_gb_per_s", "device_to_host_gb_per_s")
# However short the time: with less nothing can be said of the rate.
LEAST_SUSTAIN_S = 2.0
# (at least so many seconds in all, fresh processes). Their start takes 5 to 10 s each.
REPEATS = ((300.0, 5), (60.0, 3), (0.0, 2))

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Acceptance:
    """The answer, and everything that it rests on."""

    chip: str
    title: str
    reference: str
    expected_from: str
    outcome: Outcome
    at: str
    seconds: float
    checks: tuple[Check, ...]
    devices: tuple[Device, ...]
    environment: Mapping[str, Json]
    ran: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    links: tuple[Mapping[str, Json], ...] = ()

    def to_json(self) -> dict[str, Json]:
        """Everything, raw readings included; devices by their short names, without serial numbers and UUIDs."""
        return {
            "schema": SCHEMA,
            "chip": self.chip,
            "reference": self.reference,
            "expected_from": self.expected_from,
            "outcome": self.outcome.value,
            "at": self.at,
            "seconds": round(self.seconds, 1),
            "ran": list(self.ran),
            "notes": list(self.notes),
            "checks": [{**check.to_json(), "grade": check.grade} for check in self.checks],
            "devices": [_device_json(device) for device in self.devices],
            "links": [dict(line) for line in self.links],
            "environment": dict(self.environment),
        }

    def records(self) -> list[RecordedDevice]:
        """What `klab accept --record` writes; none of a machine that was not accepted, whose devices are no example.

        One that is undecided only because nobody has recorded its kind yet is where a record begins.
        """
        undecided = [check for check in self.checks if check.needed and check.grade == Grade.UNKNOWN]
        if self.outcome is Outcome.REFUSED or any(check.reason != UNEXPECTED for check in undecided):
            return []
        epoch = str(self.environment.get("epoch", ""))
        made = []
        for device in self.devices:
            figures = {name: found.value for name, found in device.measured.items()}
            if "matmul_tflops" in figures:
                made.append(RecordedDevice(self.chip, device.id, self.at, figures, epoch, self.outcome.value))
        return made


def _device_json(device: Device) -> dict[str, Json]:
    figures = {name: {"value": f.value, "low": f.low, "high": f.high} for name, f in device.measured.items()}
    hidden = ("uuid", "processes")
    return {
        "index": device.index,
        "id": device.id,
        "name": device.name,
        "figures": figures,
        "before": {name: value for name, value in device.before.items() if name not in hidden},
        "after": {name: value for name, value in device.after.items() if name not in hidden},
        "probes": [[line for line in said.lines if "work" in line] for said in device.probes],
        "trace": device.trace,
        "error": device.error,
    }


@dataclass
class Node:
    """What is on this machine: the places to load, and the driver's library (None for a CPU, or with `trouble`)."""

    places: list[Place]
    library: Any = None
    trouble: str = ""
    handles: dict[int, Any] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    # By place: why the driver does not answer for it. `lost`: GPUs of the machine that the driver itself has lost.
    silent: dict[int, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def facts(self) -> dict[int, node_facts.Facts]:
        """The driver's answers by place; empty without a driver."""
        return {index: node_facts.read(self.library, handle) for index, handle in self.handles.items()}


def find_node(chip: Chip, only: Sequence[str] | None = None) -> Node:
    """The devices here that are this chip, with the driver opened. CannotMeasure, saying what is here, when there is none."""
    node = Node(find_devices(chip, only))
    if chip.kind != "cuda":
        return node
    try:
        node.library = nvml.load()
        _open(node, everything=only is None)
    except Exception as error:  # noqa: BLE001  ImportError, NVMLError or a broken driver library: every fact is then not known, and says so
        node.trouble = one_line(error)
        node.handles = {}
    return node


def _open(node: Node, *, everything: bool) -> None:
    """Handles of the places and names of the other GPUs. One that does not answer must not hide the others."""
    library = node.library
    for index, place in enumerate(node.places):
        try:
            node.handles[index] = nvml.handle_of(library, uuid=place.id)
        except library.NVMLError as error:
            node.silent[index] = one_line(error)
    chosen = {place.id for place in node.places}
    for number in range(library.nvmlDeviceGetCount()):
        try:
            handle = library.nvmlDeviceGetHandleByIndex(number)
            if str(library.nvmlDeviceGetUUID(handle)) not in chosen:
                node.others.append(str(library.nvmlDeviceGetName(handle)))
        except library.NVMLError as error:
            if everything and getattr(error, "value", None) == library.NVML_ERROR_GPU_IS_LOST:
                node.lost.append(f"NVML's GPU {number}: {one_line(error)}")
            else:
                node.others.append(f"one that does not answer ({one_line(error)})")


def accept(
    chip: Chip,
    reference: Reference,
    *,
    minutes: float,
    expected_gpus: int | None = None,
    only: Sequence[str] | None = None,
    results: Path | None = None,
    calibrations: Mapping[str, Calibration] | None = None,
    rule: NodeRule | None = None,
    node: Node | None = None,
    runner: Runner | None = None,
    tell: Tell = lambda line: None,
) -> Acceptance:
    """Run everything and judge it; `calibrations` are by device, as calibration.read_calibrations has them.

    CannotMeasure when the chip is not here, is being measured by somebody else, or is a CPU on which the work does not run.
    """
    rule = rule or NodeRule()
    found = node or find_node(chip, only)
    run = _Run(chip, found, runner or ProcessRunner(chip), minutes * 60.0, tell)
    run.calibrations = calibrations or {}
    with ExitStack() as locks:
        for place in found.places:
            locks.enter_context(exclusive(place.id))
        run.go()
    checks = judge(run, reference, rule, expected_gpus) + judge_host(host(results or Path()))
    return Acceptance(
        chip=kind_of(chip),
        title=chip.title,
        reference=reference.name,
        expected_from=reference.said,
        outcome=outcome(checks),
        at=run.at,
        seconds=run.seconds,
        checks=tuple(checks),
        devices=tuple(run.devices),
        environment=run.environment,
        ran=tuple(run.ran),
        notes=(*reference.notes, *run.notes),
        links=tuple(run.links.all("link")),
    )


class _Run:
    """The course of one acceptance."""

    def __init__(self, chip: Chip, node: Node, runner: Runner, total_s: float, tell: Tell) -> None:
        self.chip, self.node = chip, node
        self._runner, self._total_s, self._tell = runner, total_s, tell
        self.at = datetime.now(UTC).isoformat(timespec="seconds")
        self.devices = [
            Device(index, node_facts.short_id(place.id) if place.kind == "cuda" else "cpu", place.name)
            for index, place in enumerate(node.places)
        ]
        self.links = Said()
        self.xids: list[dict[str, int]] = []
        self.xid_trouble = node.trouble
        self.deaf: dict[int, str] = {}
        self.environment: dict[str, Json] = {}
        self.ran: list[str] = []
        self.notes: list[str] = [f"the driver's library cannot be asked: {node.trouble}"] if node.trouble else []
        self.calibrations: Mapping[str, Calibration] = {}
        self.seconds = 0.0

    def go(self) -> None:
        """Everything, in order."""
        began = time.monotonic()
        self._ask("before")
        watch = node_facts.XidWatch(self.node.library, self.node.handles) if self.node.handles else None
        if self.chip.kind == "cuda":
            self._links()
        repeats = next(count for least, count in REPEATS if self._total_s >= least)
        for turn in range(repeats):
            self._tell(f"probe {turn + 1} of {repeats}: matmul and copy in fresh processes")
            for device, said in self._all("probe" if turn else "first", PROBE_S):
                device.probes.append(said)
            if turn == 0:
                self._first()
        if self.chip.kind == "cuda":
            self.ran.append("nine tenths of the free memory written and read three times")
        self.ran.append(f"{repeats} fresh processes per device, matmul and copy in turn")
        left = self._total_s - (time.monotonic() - began) - RESERVE_S
        seconds = max(left, LEAST_SUSTAIN_S)
        self._tell(f"all {len(self.devices)} devices under load for {seconds:.0f} s")
        for device, said in self._all("sustain", seconds):
            device.sustained = said
        self.ran.append(f"matmul without a gap on all {len(self.devices)} devices at the same time for {seconds:.0f} s")
        self._ask("after")
        if watch is not None:
            self.xids = watch.collect()
            self.xid_trouble, self.deaf = watch.trouble, watch.deaf
        self.seconds = time.monotonic() - began

    def _ask(self, when: str) -> None:
        for index, facts in self.node.facts().items():
            setattr(self.devices[index], when, facts)

    def _all(self, work: str, seconds: float) -> list[tuple[Device, Said]]:
        """The work on all devices at the same time; one whose process has failed is left alone from then on."""
        chosen = [device for device in self.devices if not device.error]
        jobs = [Job(work, seconds, self._visible([device.index])) for device in chosen]
        return list(zip(chosen, self._runner.run(jobs), strict=True))

    def _visible(self, indices: Sequence[int]) -> str:
        return ",".join(self.node.places[index].cuda_visible for index in indices)

    def _first(self) -> None:
        """After the first probe: where this is. A GPU on which nothing runs is a finding; a CPU is this process's own."""
        if self.chip.kind != "cuda" and self.devices[0].error:
            raise CannotMeasure(f"the work does not run on this machine: {self.devices[0].error}")
        for device in self.devices:
            described = device.probes[0].get("describe")
            if described:
                self.environment = self.environment or {k: v for k, v in described.items() if k not in ("uuid", "processes")}
                device.name = str(described.get("device") or device.name)
                if self.chip.kind != "cuda":
                    device.id = device_id(described)
                device.calibration = self.calibrations.get(device_id(described))
                if device.before and described.get("sm_count"):
                    device.before["sm_count"] = described["sm_count"]
        self.environment |= {"cpus": os.cpu_count()} | environment.checkout()

    def _links(self) -> None:
        """Copies over the links, one after another, in one process that sees all GPUs."""
        self._tell("copies between host and GPUs, and between GPUs")
        limit_s = min(LINKS_S, max(self._total_s / 6, 5.0))
        (self.links,) = self._runner.run([Job("links", limit_s, self._visible(range(len(self.devices))))])
        self.ran.append(f"copies of 256 MiB between host and each GPU, and between all pairs of GPUs ({len(self.links.all('link'))} paths)")
        if self.links.error:
            self.notes.append(f"the copies over the links did not come to their end: {self.links.error}")
        for device in self.devices:
            device.links = _link_figures(device.index, self.links)
            wanted = HOST_LINKS if len(self.devices) == 1 else (*HOST_LINKS, "peer_gb_per_s")
            missing = self.links.error or "the time was up, or the process did not say"
            device.links_missing = {name: missing for name in wanted if name not in device.links}


def _link_figures(index: int, said: Said) -> dict[str, Figure]:
    """Of one GPU: to it and from it, and its slowest pair."""
    found = {}
    lines = [line for line in said.all("link") if line["gb_per_s"]]
    for name, start, end in zip(HOST_LINKS, (-1, index), (index, -1), strict=True):
        values = [value for line in lines if (line["link"], line["from"], line["to"]) == ("host", start, end) for value in line["gb_per_s"]]
        if values:
            found[name] = Figure(statistics.median(values))
    pairs = [statistics.median(line["gb_per_s"]) for line in lines if line["link"] == "peer" and line["from"] == index]
    if pairs:
        found["peer_gb_per_s"] = Figure(min(pairs))
    return found


def judge(run: _Run, reference: Reference, rule: NodeRule, expected_gpus: int | None = None) -> list[Check]:
    """All checks: those of the machine first, then device by device."""
    whole = Checks()
    if run.chip.kind == "cuda" or expected_gpus is not None:
        _count(whole, run, expected_gpus)
    if run.chip.kind != "cuda":
        whole.on("identity").holds("chip", kind_of(run.chip) == reference.name, run.chip.title, reference.name, label="chip",
                                   reason="another chip", remedy="name the right one with --reference")  # fmt: skip
    accept_load.between(whole, run.devices, rule)
    strays = [event["xid"] for event in run.xids if event["device"] == -1]
    if strays:
        accept_settings.xids(whole, strays, "")
    found = list(whole.found)
    for device in run.devices:
        add = Checks(device.index)
        accept_load.performance(add, device, reference, rule)
        accept_load.correctness(add, device)
        if run.chip.kind == "cuda":
            accept_load.memory(add, device, rule)
        accept_load.heat(add, device, reference, rule)
        if device.before:
            _driver_checks(add, run, device, reference, rule)
        elif run.chip.kind == "cuda":
            for topic in ("identity", "settings", "memory health", "links"):
                add.on(topic).unknown(topic, run.node.trouble or run.node.silent.get(device.index), needed=topic == "memory health")
            add.on("errors").unknown("Xid", run.node.trouble or run.node.silent.get(device.index))
        accept_load.processes(add, device)
        found += add.found
    return found


def _driver_checks(add: Checks, run: _Run, device: Device, reference: Reference, rule: NodeRule) -> None:
    after = device.after or device.before
    accept_settings.identity(add, device.before, run.chip, reference, rule)
    accept_settings.settings(add, device.before, run.chip, reference)
    accept_settings.memory_health(add, device.before, after)
    accept_settings.links(add, device.before, after, counted(device.trace), reference, alone=len(run.devices) == 1)
    mine = [event["xid"] for event in run.xids if event["device"] == device.index]
    accept_settings.xids(add, mine, run.xid_trouble or run.deaf.get(device.index, ""))


def _count(add: Checks, run: _Run, expected: int | None) -> None:
    add, count = add.on("identity"), len(run.devices)
    value = f"{count} x {run.chip.title}"
    if run.node.others:
        value += f", not looked at: {', '.join(run.node.others)}"
    if run.node.lost:
        add.add("devices", Grade.FAIL, f"{value}; lost: {', '.join(run.node.lost)}", label="device", expected="all answer",
                reason="the driver has lost a GPU of this machine", remedy="look for Xid 79 in the kernel's log")  # fmt: skip
    elif expected is None:
        add.add("devices", Grade.UNKNOWN, value, reason="how many were ordered is not stated: --gpus N states it")
    else:
        add.holds("devices", count == expected, value, str(expected), label="rule", reason="not as many as were ordered",
                  remedy="one may have fallen off the bus: look for Xid 79 in the kernel's log")  # fmt: skip


def judge_host(facts: Mapping[str, Any]) -> list[Check]:
    """The host's processors: a GPU waits for them at every launch, and a CPU is measured on them."""
    add = Checks().on("settings")
    governor, quota = facts["governor"], facts["quota"]
    if governor is None:
        add.unknown("frequency governor", "this system shows none (a virtual machine, or a container)")
    else:
        add.holds("frequency governor", governor == "performance", governor, "performance", bad=Grade.WARN, label="rule",
                  reason="times will vary with the load", remedy="the owner sets it: cpupower frequency-set -g performance")  # fmt: skip
    short = quota is not None and quota < facts["cpus"]
    add.holds("quota", not short, "none" if quota is None else f"{quota:.1f} of {facts['cpus']} CPUs", "none", bad=Grade.WARN, label="rule",
              reason="times will show pauses", remedy="give the container whole CPUs (cpuset)")  # fmt: skip
    return add.found
