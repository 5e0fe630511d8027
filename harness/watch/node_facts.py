"""What the driver says of every GPU of a machine, through NVML. Reads only: no clock, limit, mode or counter is ever set or cleared.

What cannot be read is None, and `why` holds the reason under the same name: a fact that is not known must not look like a good one.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from klab.harness.measure import environment, nvml
from klab.kernels.contract import Json

# Fields of nvmlDeviceGetFieldValues, by NVML's header (nvidia-ml-py has the same names behind NVML_FI_DEV_).
FIELD_MEMORY_TEMPERATURE = 82
FIELD_NVLINK_SPEED_COMMON = 90
FIELD_NVLINK_SPEED = 164
FIELD_NVLINK_RECOVERIES = 215
FIELD_NVLINK_SYMBOL_ERRORS = 221
FIELD_RECOVERY_ACTION = 230
# Replays, recoveries and the two kinds of CRC errors of a link; NVLink 5 has fields of its own instead.
NVLINK_COUNTERS = (0, 1, 2, 3)
# NVML 13 says 36; 18 are on a Hopper or Blackwell GPU.
MAX_LINKS = 36
RECOVERY_ACTIONS = {
    0: "none", 1: "reset of the GPU", 2: "reboot of the node", 3: "drain of peer-to-peer", 4: "drain and reset",
    5: "recovery of the IMEX domain", 6: "reset of the bus", 7: "reboot of the system",
}  # fmt: skip
FABRIC_STATES = {0: "not supported", 1: "not started", 2: "in progress", 3: "completed"}
# What only grows, and must not grow during a run.
COUNTERS = (
    "ecc_corrected", "ecc_uncorrected", "ecc_corrected_ever", "ecc_uncorrected_ever", "rows_corrected", "rows_uncorrected", "pcie_replays",
    "nvlink_errors",
)  # fmt: skip

Facts = dict[str, Json]


class Asked:
    """Answers of one device by name, and why there is none."""

    def __init__(self, library: Any) -> None:
        self.facts: Facts = {}
        self.why: dict[str, str] = {}
        self._library = library

    def ask(self, name: str, question: Callable[[], Any]) -> Any:
        """Note the answer, or None with NVML's reason; whatever a driver of another version lacks is no error of the run."""
        try:
            self.facts[name] = question()
        except self._library.NVMLError as error:
            self.facts[name], self.why[name] = None, f"NVML: {error}"
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.facts[name], self.why[name] = None, f"this nvidia-ml-py or driver does not answer it ({type(error).__name__})"
        return self.facts[name]

    def call(self, name: str, function: str, *given: Any) -> Any:
        """The answer of a function by its name, which this library may not have."""
        return self.ask(name, lambda: getattr(self._library, function)(*given))


def short_id(uuid: str) -> str:
    """A short name of a device that betrays neither its serial number nor its UUID, and is the same in every run: "gpu-3fa92c1b"."""
    return f"gpu-{hashlib.sha256(uuid.encode()).hexdigest()[:8]}"


def read(library: Any, handle: Any) -> Facts:
    """Everything about one GPU; {"why": {name: reason}} for what is None."""
    asked = Asked(library)
    ask = asked.ask
    ask("name", lambda: str(library.nvmlDeviceGetName(handle)))
    ask("uuid", lambda: str(library.nvmlDeviceGetUUID(handle)))
    ask("pci_bus_id", lambda: str(library.nvmlDeviceGetPciInfo(handle).busId))
    ask("vbios", lambda: str(library.nvmlDeviceGetVbiosVersion(handle)))
    ask("inforom_valid", lambda: library.nvmlDeviceValidateInforom(handle) is None)
    ask("memory_bytes", lambda: int(library.nvmlDeviceGetMemoryInfo(handle).total))
    ask("mig", lambda: bool(library.nvmlDeviceGetMigMode(handle)[0]))
    ask("compute_mode", lambda: int(library.nvmlDeviceGetComputeMode(handle)))
    ask("recovery_action", lambda: int(_field(library, handle, FIELD_RECOVERY_ACTION)))
    _settings(asked, library, handle)
    _memory_health(asked, library, handle)
    _links(asked, library, handle)
    asked.facts |= live(library, handle, asked.why)
    return asked.facts | {"why": asked.why}


def _settings(asked: Asked, library: Any, handle: Any) -> None:
    ask = asked.ask
    known = environment.nvml_facts(library, handle)
    for name, value in known.items():
        asked.facts[name] = value
        if value is None:
            asked.why[name] = "NVML does not say"
    ask("power_limit_max_w", lambda: library.nvmlDeviceGetPowerManagementLimitConstraints(handle)[1] / 1e3)
    ask("ecc_pending", lambda: bool(library.nvmlDeviceGetEccMode(handle)[1]))
    ask("memory_clock_mhz", lambda: float(library.nvmlDeviceGetClockInfo(handle, 2)))
    ask("max_memory_clock_mhz", lambda: float(library.nvmlDeviceGetMaxClockInfo(handle, 2)))
    for name, threshold in (("slowdown_c", 1), ("memory_limit_c", 2), ("operating_limit_c", 3)):
        asked.call(name, "nvmlDeviceGetTemperatureThreshold", handle, threshold)


def _memory_health(asked: Asked, library: Any, handle: Any) -> None:
    ask = asked.ask
    for name, kind, counter in (
        ("ecc_corrected", 0, 0),
        ("ecc_uncorrected", 1, 0),
        ("ecc_corrected_ever", 0, 1),
        ("ecc_uncorrected_ever", 1, 1),
    ):
        asked.call(name, "nvmlDeviceGetTotalEccErrors", handle, kind, counter)
    ask("sram_threshold_exceeded", lambda: _sram(library, handle))
    rows = ask("rows", lambda: [int(value) for value in library.nvmlDeviceGetRemappedRows(handle)])
    names = ("rows_corrected", "rows_uncorrected", "rows_pending", "rows_failed")
    for name, value in zip(names, rows or (None,) * 4, strict=True):
        asked.facts[name] = value
        if value is None:
            asked.why[name] = asked.why.get("rows", "")
    asked.facts.pop("rows")
    asked.why.pop("rows", None)
    ask("remap_reserve", lambda: _histogram(library, handle))


def _sram(library: Any, handle: Any) -> bool:
    status = library.c_nvmlEccSramErrorStatus_v1_t()
    library.nvmlDeviceGetSramEccErrorStatus(handle, _pointer(status))
    return bool(status.bThresholdExceeded)


def _pointer(structure: Any) -> Any:
    """nvidia-ml-py passes these two structures on as they are, so NVML must be given a pointer here."""
    return ctypes.byref(structure) if isinstance(structure, ctypes.Structure) else structure


def _histogram(library: Any, handle: Any) -> dict[str, int]:
    """Banks by how many spare rows are left to them."""
    values = library.nvmlDeviceGetRowRemapperHistogram(handle)
    return {name: int(getattr(values, name)) for name in ("max", "high", "partial", "low", "none")}


def _links(asked: Asked, library: Any, handle: Any) -> None:
    ask = asked.ask
    ask("pcie_generation_max", lambda: int(library.nvmlDeviceGetMaxPcieLinkGeneration(handle)))
    ask("pcie_width_max", lambda: int(library.nvmlDeviceGetMaxPcieLinkWidth(handle)))
    ask("pcie_generation_gpu", lambda: int(library.nvmlDeviceGetGpuMaxPcieLinkGeneration(handle)))
    ask("pcie_replays", lambda: int(library.nvmlDeviceGetPcieReplayCounter(handle)))
    ask("fabric", lambda: _fabric(library, handle))
    states: dict[int, int] = {}
    reason = ""
    for link in range(MAX_LINKS):
        try:
            states[link] = int(library.nvmlDeviceGetNvLinkState(handle, link))
        except (library.NVMLError, AttributeError) as error:
            reason = f"NVML: {error}"
            if link == 0:
                break
    asked.facts |= {"nvlinks": len(states) or None, "nvlinks_active": sum(states.values()) if states else None}
    active = [link for link, state in states.items() if state]
    asked.facts |= {"nvlinks_down": [link for link, state in states.items() if not state]}
    if not states:
        asked.why |= dict.fromkeys(("nvlinks", "nvlinks_active"), reason)
    ask("nvlink_mb_per_s", lambda: _link_speed(library, handle, active))
    ask("nvlink_errors", lambda: _link_errors(library, handle, active))


def _link_speed(library: Any, handle: Any, active: list[int]) -> float:
    """Megabytes per second of each active link: the slowest of them."""
    if not active:
        raise ValueError("no active link")
    try:
        return min(float(_field(library, handle, FIELD_NVLINK_SPEED, link)) for link in active)
    except (library.NVMLError, ValueError):
        return float(_field(library, handle, FIELD_NVLINK_SPEED_COMMON))


def _link_errors(library: Any, handle: Any, active: list[int]) -> int:
    """Replays, recoveries and CRC errors of all active links; on NVLink 5 recoveries and symbol errors."""
    if not active:
        raise ValueError("no active link")
    try:
        return sum(int(library.nvmlDeviceGetNvLinkErrorCounter(handle, link, c)) for link in active for c in NVLINK_COUNTERS)
    except library.NVMLError:
        wanted = (FIELD_NVLINK_RECOVERIES, FIELD_NVLINK_SYMBOL_ERRORS)
        return sum(int(_field(library, handle, field, link)) for link in active for field in wanted)


def _fabric(library: Any, handle: Any) -> dict[str, Json]:
    """The GPU's registration with the NVSwitch fabric: {"state", "status"}; a status other than 0 is the fabric manager's error."""
    info = library.c_nvmlGpuFabricInfo_t()
    library.nvmlDeviceGetGpuFabricInfo(handle, _pointer(info))
    return {"state": FABRIC_STATES.get(int(info.state), str(info.state)), "status": int(info.status)}


def _field(library: Any, handle: Any, field: int, scope: int | None = None) -> float:
    """The value of a field; NVMLError or ValueError where the device has none."""
    value = library.nvmlDeviceGetFieldValues(handle, [field if scope is None else (field, scope)])[0]
    if value.nvmlReturn != 0:
        raise ValueError(f"field {field}")
    member = nvml._MEMBER[value.valueType]
    return float(getattr(value.value, member))


def live(library: Any, handle: Any, why: dict[str, str] | None = None) -> Facts:
    """What changes under load: clocks, temperatures, margin, power, reasons and the PCIe link. Some 2 ms of a driver's time."""
    asked = Asked(library)
    meter = nvml.NvmlMeter(library, handle)
    reading = meter.read()
    asked.facts |= {
        "sm_clock_mhz": reading.sm_clock_mhz,
        "temperature_c": reading.temperature_c,
        "power_w": reading.power_w,
        "reasons": reading.throttle_reasons,
    }
    for name, value in asked.facts.items():
        if value is None:
            asked.why[name] = meter.trouble or "NVML does not say"
    ask = asked.ask
    ask("memory_temperature_c", lambda: _field(library, handle, FIELD_MEMORY_TEMPERATURE) or _none())
    ask("margin_c", lambda: float(library.nvmlDeviceGetMarginTemperature(handle)))
    ask("pcie_generation", lambda: int(library.nvmlDeviceGetCurrPcieLinkGeneration(handle)))
    ask("pcie_width", lambda: int(library.nvmlDeviceGetCurrPcieLinkWidth(handle)))
    if why is not None:
        why |= asked.why
    return asked.facts


def _none() -> float:
    """A memory temperature of zero is what boards without that sensor report."""
    raise ValueError("no such sensor")


def grown(before: Mapping[str, Json], after: Mapping[str, Json]) -> dict[str, int]:
    """By how much each counter grew during the run; only those that were read both times."""
    pairs = ((name, before.get(name), after.get(name)) for name in COUNTERS)
    return {name: int(b - a) for name, a, b in pairs if a is not None and b is not None}


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0 if isinstance(handle, ctypes._Pointer) else id(handle)


class XidWatch:
    """Collects the Xid errors that the driver reports between its making and `collect`; `trouble` says why it cannot."""

    EVENT_XID = 0x8

    def __init__(self, library: Any, handles: Mapping[int, Any]) -> None:
        self.trouble = ""
        # By device: why nothing is heard of it.
        self.deaf: dict[int, str] = {}
        self._library = library
        self._set: Any = None
        try:
            self._set = library.nvmlEventSetCreate()
        except (library.NVMLError, AttributeError) as error:
            self.trouble = f"NVML: {error}"
        for index, handle in handles.items() if not self.trouble else ():
            try:
                library.nvmlDeviceRegisterEvents(handle, self.EVENT_XID, self._set)
            except (library.NVMLError, AttributeError) as error:
                self.deaf[index] = f"NVML: {error}"
        self._handles = handles

    def collect(self) -> list[dict[str, int]]:
        """[{"device", "xid"}] in the order they came; nothing more is collected afterwards."""
        found: list[dict[str, int]] = []
        if self.trouble or self._set is None:
            return found
        while len(found) < 1000:
            try:
                event = self._library.nvmlEventSetWait(self._set, 0)
            except self._library.NVMLError as error:
                if getattr(error, "value", None) != self._library.NVML_ERROR_TIMEOUT:  # that one says that there is no more
                    self.trouble = f"NVML: {error}"
                break
            found.append({"device": self._index(event.device), "xid": int(event.eventData)})
        try:
            self._library.nvmlEventSetFree(self._set)
        except (self._library.NVMLError, AttributeError) as error:
            self.trouble = f"NVML: {error}"
        self._set = None
        return found

    def _index(self, handle: Any) -> int:
        """Which of the devices an event is of; -1 where it cannot be told. NVML hands out the pointers that it knows a device by, also of
        one that is lost and does not tell its UUID any more.
        """
        same = next((i for i, known in self._handles.items() if _address(known) == _address(handle)), None)
        if same is not None:
            return same
        try:
            uuid = self._library.nvmlDeviceGetUUID(handle)
            return next((i for i, known in self._handles.items() if self._library.nvmlDeviceGetUUID(known) == uuid), -1)
        except self._library.NVMLError:
            return -1
