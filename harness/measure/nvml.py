"""NVIDIA's sensors through nvidia-ml-py. Reads only: nothing here ever sets a clock, a limit or a mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from klab.harness.measure.power import NullMeter, PowerMeter, Reading

# Field values: TOTAL_ENERGY_CONSUMPTION (mJ since the driver was loaded), POWER_AVERAGE and POWER_INSTANT (mW).
# nvmlDeviceGetPowerUsage is a one-second average on Ampere and newer (but for GA100), so it stands in only where 186 is not supported.
FIELD_ENERGY = 83
FIELD_POWER_AVERAGE = 185
FIELD_POWER_INSTANT = 186
CLOCK_SM = 1
TEMPERATURE_GPU = 0
_MEMBER = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}


def load() -> Any:
    """The pynvml module, initialised. Raises ImportError without nvidia-ml-py, pynvml.NVMLError without a driver."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def handle_of(nvml: Any, *, uuid: str = "", pci_bus_id: str = "") -> Any:
    """The NVML handle of a device by UUID or PCI bus id, never by index: CUDA_VISIBLE_DEVICES renumbers CUDA alone."""
    if uuid:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    return nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)


def torch_address(properties: Any) -> dict[str, str]:
    """UUID or PCI bus id of a device, from `torch.cuda.get_device_properties`."""
    uuid = str(getattr(properties, "uuid", "") or "")
    if uuid:
        return {"uuid": uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"}
    domain, bus, device = (int(getattr(properties, f"pci_{part}_id", 0)) for part in ("domain", "bus", "device"))
    return {"pci_bus_id": f"{domain:08x}:{bus:02x}:{device:02x}.0"}


def open_meter(properties: Any) -> PowerMeter:
    """The meter of a torch device; a NullMeter with the reason where NVML cannot be had."""
    try:
        nvml = load()
    except ImportError:
        return NullMeter("nvidia-ml-py is not installed")
    except Exception as error:  # noqa: BLE001  NVMLError, and whatever a broken driver library raises
        return NullMeter(f"NVML: {error}")
    try:
        return NvmlMeter(nvml, handle_of(nvml, **torch_address(properties)))
    except nvml.NVMLError as error:
        return NullMeter(f"NVML does not know this device: {error}")


class NvmlMeter:
    """A PowerMeter on one NVML handle. A sensor that fails reads None from then on where it is gone, or once where it stumbled."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.trouble = ""
        self._nvml = nvml
        self._handle = handle
        self._lost = False

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer, or None; a lost GPU or an unloaded driver is not asked again."""
        if self._lost:
            return None
        try:
            return question()
        except Exception as error:  # noqa: BLE001  NVMLError, or an older binding without the function: no kernel is to blame for it
            self.trouble = f"NVML: {error}"
            self._lost = getattr(error, "value", None) in (
                self._nvml.NVML_ERROR_UNINITIALIZED,
                self._nvml.NVML_ERROR_DRIVER_NOT_LOADED,
                self._nvml.NVML_ERROR_GPU_IS_LOST,
            )
            return None

    def _field(self, field: int) -> float | None:
        values = self._ask(lambda: self._nvml.nvmlDeviceGetFieldValues(self._handle, [field]))
        if values is None:
            return None
        value = values[0]
        if value.nvmlReturn != 0 or value.valueType not in _MEMBER:
            return None
        return float(getattr(value.value, _MEMBER[value.valueType]))

    def power_w(self) -> float | None:
        """POWER_INSTANT, or the one-second average where the board has no such field."""
        milliwatts = self._field(FIELD_POWER_INSTANT)
        if milliwatts is None:
            milliwatts = self._ask(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle))
        return None if milliwatts is None else milliwatts / 1e3

    def average_w(self) -> float | None:
        """The driver's average, over a second on most boards. For `klab calibrate`, which finds out."""
        milliwatts = self._field(FIELD_POWER_AVERAGE)
        if milliwatts is None:
            milliwatts = self._ask(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle))
        return None if milliwatts is None else milliwatts / 1e3

    def energy_j(self) -> float | None:
        """The total-energy counter."""
        millijoules = self._field(FIELD_ENERGY)
        if millijoules is None:
            millijoules = self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if millijoules is None else millijoules / 1e3

    def read(self) -> Reading:
        """SM clock, temperature, reasons and power."""
        nvml, handle = self._nvml, self._handle
        clock = self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, CLOCK_SM))
        temperature = self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, TEMPERATURE_GPU))
        reasons = self._ask(lambda: reasons_of(nvml, handle))
        return Reading(
            None if clock is None else float(clock),
            None if temperature is None else float(temperature),
            None if reasons is None else int(reasons),
            self.power_w(),
        )


def reasons_of(nvml: Any, handle: Any) -> int:
    """The mask of clock-event reasons, which older drivers call throttle reasons."""
    try:
        return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    except (nvml.NVMLError, AttributeError):
        return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def processes(nvml: Any, handle: Any, own: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Compute processes on the device other than `own`: [{"pid", "memory_mb"}]. NVMLError where it may not be asked.

    Inside a container NVML may hide other processes or number them by the host: then the list is empty or its pids are foreign.
    """
    found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return [
        {"pid": int(p.pid), "memory_mb": None if p.usedGpuMemory is None else round(p.usedGpuMemory / 2**20)}
        for p in found
        if int(p.pid) not in own
    ]
