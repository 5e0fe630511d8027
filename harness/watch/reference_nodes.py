"""What a good machine does: published figures per chip (profiles/acceptance/*.toml), and what was recorded on accepted devices.

A recorded device is one JSON file, so that two machines that record at the same time never meet. From FEW devices on the recorded
distribution replaces the published figure, measure by measure.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from klab.harness.catalog.models import PROFILES
from klab.harness.catalog.toml_file import read_toml
from klab.harness.choose.profile import write_text
from klab.harness.watch.grade import Expectation
from klab.kernels.contract import Chip, Record
from klab.kernels.errors import UsageError

# Measures by name: (unit, +1 where more is better, -1 where less is).
MEASURES: dict[str, tuple[str, int]] = {
    "matmul_tflops": ("TFLOP/s", 1),
    "copy_gb_per_s": ("GB/s", 1),
    "load_clock_mhz": ("MHz", 1),
    "load_power_w": ("W", 1),
    "load_temperature_c": ("C", -1),
    "load_memory_temperature_c": ("C", -1),
    "host_to_device_gb_per_s": ("GB/s", 1),
    "device_to_host_gb_per_s": ("GB/s", 1),
    "peer_gb_per_s": ("GB/s", 1),
    "launch_overhead_us": ("us", -1),
    "nvlinks_active": ("", 1),
    "nvlink_mb_per_s": ("MB/s", 1),
    "pcie_generation": ("", 1),
    "pcie_width": ("", 1),
    "driver_branch": ("", 1),
}
# What a device does and not what it is: only these are recorded. Temperatures are of the room that it stands in.
RECORDED = ("matmul_tflops", "copy_gb_per_s", "load_clock_mhz", "load_power_w", "host_to_device_gb_per_s", "device_to_host_gb_per_s",
            "peer_gb_per_s", "launch_overhead_us")  # fmt: skip
# With fewer recorded devices than this the published figure stands, where there is one; a spread of fewer than three says nothing.
FEW, FEWEST = 5, 3
# The spread of recorded devices is taken to be no less than this: windows of one device differ by 1-3% (helion pull request 3523).
LEAST_SPREAD = 0.01
# Devices of one kind differ by more than 5% without a fault, so nothing nearer than this to the median is refused.
TOLERATED = 0.05
# One-sided probabilities that a good device is warned of, and refused.
WARN_TAIL, FAIL_TAIL = 0.025, 0.001


@dataclass(frozen=True)
class RecordedDevice(Record):
    """What one accepted device did. `device` is a name of node_facts.short_id; `figures` are by MEASURES."""

    chip: str
    device: str
    at: str
    figures: Mapping[str, float] = field(default_factory=dict)
    epoch: str = ""
    outcome: str = ""


def kind_of(chip: Chip) -> str:
    """What devices must share to be compared: a GPU's chip; of a CPU its model and cores ("amd-epyc-9654-96-cores")."""
    return chip.name if chip.kind == "cuda" else re.sub(r"[^a-z0-9]+", "-", chip.title.lower()).strip("-")


@dataclass(frozen=True)
class Reference:
    """What is expected of a chip, by measure; `said` names where it comes from, `notes` what could not be read."""

    name: str
    expected: Mapping[str, Expectation]
    said: str
    devices: int = 0
    notes: tuple[str, ...] = ()


def find_reference(name: str, recorded: Sequence[Path] = ()) -> Reference:
    """The reference of a chip by name, or of a TOML file; `recorded` are folders with recorded devices.

    A chip that nobody has published or recorded anything of has an empty one. UsageError for a file that cannot be used.
    """
    path = Path(name).expanduser()
    chip = name.lower()
    published = path if name.endswith(".toml") or path.is_file() else PROFILES / "acceptance" / f"{chip}.toml"
    expected: dict[str, Expectation] = {}
    if published.is_file():
        chip, expected = read_published(published)
    elif published == path:
        raise UsageError(f"--reference {name}: no such file; profiles/acceptance has those that ship")
    devices, notes = read_recorded(recorded, chip)
    known = distributions(devices)
    for measure, found in known.items():
        if measure not in expected or found.devices >= FEW:
            expected[measure] = found
    said = [f"published figures ({published.name})"] if published.is_file() else []
    if devices:
        replaced = sum(one.label == "recorded" for one in expected.values())
        said.append(f"{len(devices)} recorded devices, which replace {replaced} of {len(expected)} figures")
    return Reference(chip, expected, "; ".join(said) or "nothing is published or recorded yet", len(devices), tuple(notes))


def read_published(path: Path) -> tuple[str, dict[str, Expectation]]:
    """(chip, expectations) of a TOML file; UsageError names what is wrong in it."""
    data = read_toml(path)
    unknown = sorted(set(data) - {"chip", "expected"})
    if unknown or not isinstance(data.get("chip"), str) or not isinstance(data.get("expected"), dict):
        instead = f", not {', '.join(unknown)}" if unknown else ""
        raise UsageError(f"{path}: a reference has chip = NAME and tables [expected.MEASURE]{instead}")
    found = {}
    limits = ("low", "high", "warn_below", "fail_below", "warn_above", "fail_above")
    for name, table in data["expected"].items():
        if name not in MEASURES:
            raise UsageError(f"{path}: [expected.{name}] is no measure; there are {', '.join(MEASURES)}")
        strange = sorted(set(table) - {*limits, "source"}) if isinstance(table, dict) else ["what is no table"]
        if strange:
            raise UsageError(f"{path}: [expected.{name}] has {', '.join(strange)}; it takes {', '.join(limits)} and source")
        if not str(table.get("source", "")):
            raise UsageError(f"{path}: [expected.{name}] needs a source")
        for key, value in table.items():
            if key != "source" and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
                raise UsageError(f"{path}: [expected.{name}] {key} is {value!r}; it must be a number")
        wanted = ("warn_below", "fail_below") if MEASURES[name][1] > 0 else ("warn_above", "fail_above")
        if not any(key in table for key in wanted):
            raise UsageError(f"{path}: [expected.{name}] needs {' or '.join(wanted)}: without one it could only pass")
        found[name] = Expectation(name, **table)
    return data["chip"].lower(), found


def read_recorded(folders: Iterable[Path], chip: str) -> tuple[list[RecordedDevice], list[str]]:
    """(devices, notes): the newest record of each device under FOLDER/CHIP/*.json. A file that cannot be read is a note, never an error."""
    newest: dict[str, RecordedDevice] = {}
    notes = []
    for path in sorted({path for folder in folders for path in (folder / chip).glob("*.json")}):
        try:
            found = RecordedDevice.from_json(json.loads(path.read_text(encoding="utf-8")))
            figures = {str(k): float(v) for k, v in found.figures.items() if k in MEASURES and math.isfinite(float(v))}
            if found.chip != chip:
                raise ValueError(f"it is of a {found.chip}")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError, UsageError) as error:
            notes.append(f"{path.name} is not used: {error}")
            continue
        if found.device not in newest or newest[found.device].at < found.at:
            newest[found.device] = replace(found, figures=figures)
    return sorted(newest.values(), key=lambda one: one.device), notes


def record(folder: Path, found: RecordedDevice) -> Path:
    """Write a device's record, in place of an older one of the same device; CannotMeasure where the disk does not take it."""
    path = folder / found.chip / f"{found.device}.json"
    write_text(path, json.dumps(found.to_json(), indent=1) + "\n")
    return path


def distributions(devices: Sequence[RecordedDevice]) -> dict[str, Expectation]:
    """The expectation that recorded devices give, by measure; none of fewer than FEWEST devices.

    The limits are those of the next device of the same kind: median -+ t * spread * sqrt(1 + 1/n), with the spread from the median
    absolute deviation, so that one bad device that was recorded does not widen them. That deviation is ill known of few devices: the tails
    are then some twice WARN_TAIL, and some seven times FAIL_TAIL where devices differ by 3% (docs/acceptance.md has the simulation).
    """
    found = {}
    for name in RECORDED:
        values = [device.figures[name] for device in devices if name in device.figures]
        if len(values) >= FEWEST:
            found[name] = _distribution(name, values)
    return found


def _distribution(name: str, values: Sequence[float]) -> Expectation:
    from scipy.special import stdtrit

    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    spread = max(deviation, LEAST_SPREAD * abs(middle)) * math.sqrt(1 + 1 / len(values))
    warn = float(stdtrit(len(values) - 1, 1 - WARN_TAIL)) * spread
    fail = max(float(stdtrit(len(values) - 1, 1 - FAIL_TAIL)) * spread, TOLERATED * abs(middle))
    if MEASURES[name][1] > 0:
        limits = {"warn_below": middle - warn, "fail_below": middle - fail}
    else:
        limits = {"warn_above": middle + warn, "fail_above": middle + fail}
    source = f"{len(values)} recorded devices: median {middle:.4g}, robust spread {deviation / abs(middle or 1):.1%}"
    return Expectation(name, low=min(values), high=max(values), label="recorded", source=source, devices=len(values), **limits)
