"""A machine with GPUs that are not there: NVML as klab reads it, and processes that say what such devices would have said."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from klab.harness.fleet.devices import Device as Place
from klab.harness.measure.anchor import work
from klab.harness.watch.accept import Node
from klab.harness.watch.node_runner import Said


@dataclass
class Board:
    """One GPU: what NVML says of it, and how it works. A value of None in `facts` is not supported by its driver."""

    index: int
    serial: int = -1
    tflops: float = 735.0
    copy_gb_per_s: float = 4310.0
    host_gb_per_s: float = 54.0
    peer_gb_per_s: float = 385.0
    clock_mhz: float = 1700.0
    temperature_c: float = 61.0
    memory_temperature_c: float = 72.0
    margin_c: float = 25.0
    power_w: float = 695.0
    reasons: int = 0x4
    drop: float = 0.0
    noise: float = 0.002
    wrong: int = 0
    wrong_at_first: str = ""
    words_wrong: int = 0
    error: str = ""
    xids: tuple[int, ...] = ()
    # What the counters grow by during a run.
    grows: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    links_down: int = 0
    # What the lines of the last 40 seconds under load say instead.
    lines: dict[str, Any] = field(default_factory=dict)

    @property
    def uuid(self) -> str:
        return f"GPU-{self.index if self.serial < 0 else self.serial:08x}-aaaa-bbbb-cccc-dddddddddddd"

    def fact(self, name: str, usual: Any) -> Any:
        return self.facts.get(name, usual)


class FakeNvml:
    """The part of nvidia-ml-py that klab asks for acceptance. Whoever sets, clears or resets anything is an error of the test."""

    class NVMLError(Exception):
        value = 3

    NVML_ERROR_UNINITIALIZED, NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_TIMEOUT, NVML_ERROR_GPU_IS_LOST = 1, 9, 10, 15

    def __init__(self, boards: list[Board], *, driver: str = "580.95.05", generation: int = 4) -> None:
        self.boards, self.driver, self.generation = boards, driver, generation
        self.pending = [(board, xid) for board in boards for xid in board.xids]
        self.asked: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvmlDevice"):
            assert not any(verb in name for verb in ("Set", "Clear", "Reset", "Freeze")), f"{name} changes the machine"
            object.__getattribute__(self, "asked").append(name)
        return object.__getattribute__(self, name)

    def error(self, text: str, value: int) -> Exception:
        made = self.NVMLError(text)
        made.value = value
        return made

    def _known(self, value: Any) -> Any:
        if value is None:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlSystemGetCudaDriverVersion(self):
        return 13000

    def nvmlDeviceGetCount(self):
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.boards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return next(board for board in self.boards if board.uuid == uuid)

    def nvmlDeviceGetName(self, board):
        return board.fact("name", "NVIDIA H200")

    def nvmlDeviceGetUUID(self, board):
        return board.uuid

    def nvmlDeviceGetPciInfo(self, board):
        return SimpleNamespace(busId=f"00000000:{0x18 + board.index:02X}:00.0")

    def nvmlDeviceGetVbiosVersion(self, board):
        return board.fact("vbios", "96.00.A9.00.01")

    def nvmlDeviceValidateInforom(self, board):
        if not board.fact("inforom", True):
            raise self.NVMLError("InfoROM is corrupted")

    def nvmlDeviceGetMemoryInfo(self, board):
        return SimpleNamespace(total=board.fact("memory", 143771 << 20))

    def nvmlDeviceGetMigMode(self, board):
        return [board.fact("mig", 0), 0]

    def nvmlDeviceGetComputeMode(self, board):
        return 0

    def nvmlDeviceGetEccMode(self, board):
        return [self._known(board.fact("ecc", 1)), 1]

    def nvmlDeviceGetEnforcedPowerLimit(self, board):
        return 1000 * board.fact("power_limit", 700)

    def nvmlDeviceGetPowerManagementDefaultLimit(self, board):
        return 700_000

    def nvmlDeviceGetPowerManagementLimitConstraints(self, board):
        return [200_000, 700_000]

    def nvmlDeviceGetMaxClockInfo(self, board, kind):
        return 1980 if kind == 1 else 3201

    def nvmlDeviceGetClockInfo(self, board, kind):
        return board.clock_mhz if kind == 1 else 3201

    def nvmlDeviceGetApplicationsClock(self, board, kind):
        return board.fact("application_clock", 1980)

    def nvmlDeviceGetPersistenceMode(self, board):
        return board.fact("persistence", 1)

    def nvmlDeviceGetComputeRunningProcesses(self, board):
        return [SimpleNamespace(pid=4242 + i, usedGpuMemory=1 << 30) for i in range(board.fact("processes", 0))]

    def nvmlDeviceGetTemperature(self, board, kind):
        return board.temperature_c

    def nvmlDeviceGetTemperatureThreshold(self, board, kind):
        return self._known(board.fact("thresholds", {}).get(kind))

    def nvmlDeviceGetMarginTemperature(self, board):
        return self._known(board.margin_c)

    def nvmlDeviceGetCurrentClocksEventReasons(self, board):
        return board.reasons

    def nvmlDeviceGetPowerUsage(self, board):
        return 1000 * board.power_w

    def nvmlDeviceGetTotalEccErrors(self, board, kind, counter):
        name = ("ecc_corrected", "ecc_uncorrected")[kind] + ("_ever" if counter else "")
        return self._known(board.fact(name, 0)) + self._grown(board, name)

    def _grown(self, board, name):
        """A counter has grown at its second reading."""
        key = f"read {name}"
        board.facts[key] = board.facts.get(key, 0) + 1
        return board.grows.get(name, 0) if board.facts[key] > 1 else 0

    class c_nvmlEccSramErrorStatus_v1_t:
        bThresholdExceeded = 0

    def nvmlDeviceGetSramEccErrorStatus(self, board, status):
        status.bThresholdExceeded = self._known(board.fact("sram", 0))

    def nvmlDeviceGetRemappedRows(self, board):
        rows = list(self._known(board.fact("rows", (0, 0, 0, 0))))
        rows[1] += self._grown(board, "rows_uncorrected")
        return tuple(rows)

    def nvmlDeviceGetRowRemapperHistogram(self, board):
        return SimpleNamespace(**(dict.fromkeys(("high", "partial", "low", "none"), 0) | {"max": 2304} | board.fact("reserve", {})))

    def nvmlDeviceGetMaxPcieLinkGeneration(self, board):
        return 5

    def nvmlDeviceGetGpuMaxPcieLinkGeneration(self, board):
        return 5

    def nvmlDeviceGetMaxPcieLinkWidth(self, board):
        return 16

    def nvmlDeviceGetCurrPcieLinkGeneration(self, board):
        return board.fact("pcie_generation", 5)

    def nvmlDeviceGetCurrPcieLinkWidth(self, board):
        return board.fact("pcie_width", 16)

    def nvmlDeviceGetPcieReplayCounter(self, board):
        return 7 + self._grown(board, "pcie_replays")

    class c_nvmlGpuFabricInfo_t:
        state, status = 0, 0

    def nvmlDeviceGetGpuFabricInfo(self, board, info):
        info.state, info.status = self._known(board.fact("fabric", (3, 0)))

    def nvmlDeviceGetNvLinkState(self, board, link):
        if link >= 18:
            raise self.NVMLError("Invalid Argument")
        return 0 if link < board.links_down else 1

    def nvmlDeviceGetNvLinkErrorCounter(self, board, link, counter):
        if self.generation == 5:
            raise self.NVMLError("Not Supported")
        return self._grown(board, "nvlink_errors") if (link, counter) == (17, 0) else 0

    def nvmlDeviceGetFieldValues(self, board, fields):
        (field_id,) = fields
        number = field_id[0] if isinstance(field_id, tuple) else field_id
        speed = 26562 if self.generation == 4 else 53125
        known = {82: board.memory_temperature_c, 90: speed, 186: 1000 * board.power_w, 230: board.fact("recovery", 0)}
        if self.generation == 5:
            known |= {164: speed, 215: self._grown(board, "nvlink_errors") if field_id == (215, 17) else 0, 221: 0}
        if known.get(number) is None:
            return [SimpleNamespace(nvmlReturn=3, valueType=0, value=None)]
        return [SimpleNamespace(nvmlReturn=0, valueType=1, value=SimpleNamespace(uiVal=known[number]))]

    def nvmlEventSetCreate(self):
        return "events"

    def nvmlDeviceRegisterEvents(self, board, kinds, events):
        assert kinds == 8

    def nvmlEventSetWait(self, events, timeout):
        if not self.pending:
            raise self.error("Timeout", self.NVML_ERROR_TIMEOUT)
        board, xid = self.pending.pop(0)
        return SimpleNamespace(device=board, eventData=xid)

    def nvmlEventSetFree(self, events):
        pass


class FakeRunner:
    """Says what node_load's processes would say on these boards; `seconds` is what a sustained run lasts."""

    def __init__(self, boards: list[Board], *, seconds: float = 400.0) -> None:
        self.boards, self.seconds = boards, seconds
        self.jobs: list[Any] = []
        self.probes = 0

    def run(self, jobs):
        self.jobs += jobs
        if jobs and jobs[0].work in ("first", "probe"):
            self.probes += 1
        return [self.say(job) for job in jobs]

    def say(self, job) -> Said:
        if job.work == "links":
            return self.links()
        board = next(board for board in self.boards if board.uuid == job.visible)
        if board.error:
            return Said([], board.error)
        described = {"device": "NVIDIA H200", "uuid": board.uuid, "driver": "580.95.05", "torch": "2.11.0", "cuda": "13.0",
                     "host": "ab12cd34", "cpu_model": "AMD EPYC 9654", "sm_count": 132, "epoch": "e0", "kind": "cuda"}  # fmt: skip
        lines: list[dict[str, Any]] = [{"describe": described}]
        if job.work == "first":
            tested = board.fact("memory_tested", 135_000_000_000)
            lines.append({"memory_bytes_tested": tested, "memory_bytes_total": 150_754_820_096, "memory_words_wrong": board.words_wrong})
        if job.work in ("first", "probe"):
            # Processes differ by board.noise between the fastest and the slowest.
            shift = board.noise * ((self.probes - 1) % 2)
            for name, rate in (("matmul", board.tflops * 1e6), ("copy", board.copy_gb_per_s * 1e3)):
                done = work(name, "cuda")
                us = (done.flops or done.bytes_moved) / rate * (1 + shift)
                wave = [us * (1 + 0.0005 * (i % 3)) for i in range(30)]
                lines.append(
                    {"work": name, "flops": done.flops, "bytes": done.bytes_moved, "us": wave, "mhz": [1700] * 30, "marked": [0] * 30}
                )
            lines.append({"work": "events", "flops": 0.0, "bytes": 0.0, "us": [4.2] * 30, "mhz": [1700] * 30, "marked": [0] * 30})
            return Said([*lines, {"done": True}])
        lines[0]["wrong_at_first"] = board.wrong_at_first
        for second in range(1, int(self.seconds) + 1):
            rate = board.tflops * (1 - board.drop * second / self.seconds) * (1 + 0.001 * ((second * 7) % 5 - 2))
            lines.append(
                {"at": float(second), "tflops": rate, "sm_clock_mhz": board.clock_mhz, "temperature_c": board.temperature_c,
                 "memory_temperature_c": board.memory_temperature_c, "margin_c": board.margin_c, "power_w": board.power_w,
                 "reasons": board.reasons, "pcie_generation": board.fact("pcie_generation", 5), "pcie_width": board.fact("pcie_width", 16)}
                | (board.lines if second > self.seconds - 40 else {})
            )  # fmt: skip
        return Said([*lines, {"checked": int(self.seconds), "wrong": board.wrong}, {"done": True}])

    def links(self) -> Said:
        lines: list[dict[str, Any]] = []
        for board in self.boards:
            for pair in ((-1, board.index), (board.index, -1)):
                lines.append({"link": "host", "from": pair[0], "to": pair[1], "gb_per_s": [board.host_gb_per_s] * 10})
            for other in self.boards:
                if other is not board:
                    rate = min(board.peer_gb_per_s, other.peer_gb_per_s)
                    lines.append({"link": "peer", "from": board.index, "to": other.index, "direct": True, "gb_per_s": [rate] * 10})
        return Said([*lines, {"done": True}])


def node_of(boards: list[Board], library: FakeNvml | None = None) -> Node:
    """The machine with these boards."""
    library = library or FakeNvml(boards)
    places = [Place(board.uuid, "NVIDIA H200", "cuda", board.index) for board in boards]
    return Node(places, library, handles={board.index: board for board in boards})
