"""A GPU of paper: the part of pynvml that controls clocks, its settings in a file."""

import json
from pathlib import Path

GPU = "GPU-paper"
USUAL = {"power_limit_mw": 700_000, "locked": None}


class Board:
    """The part of pynvml that is called; its settings are in a file, so that they outlive a process as a board's do."""

    class NVMLError(Exception):
        def __init__(self, value, text):
            super().__init__(text)
            self.value = value

    NVML_ERROR_NO_PERMISSION, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND = 4, 3, 6

    def __init__(self, path, *, refuses=()):
        self.path, self.refuses, self.calls = Path(path), set(refuses), []
        if not self.path.exists():
            self.settings = dict(USUAL)

    @property
    def settings(self):
        return json.loads(self.path.read_text())

    @settings.setter
    def settings(self, value):
        self.path.write_text(json.dumps(value))

    def _set(self, name, **change):
        self.calls.append(name)
        if name in self.refuses:
            raise self.NVMLError(self.NVML_ERROR_NO_PERMISSION, "Insufficient Permissions")
        self.settings = self.settings | change

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != GPU:
            raise self.NVMLError(self.NVML_ERROR_NOT_FOUND, "Not Found")
        return "board"

    def nvmlDeviceGetPowerManagementLimit(self, handle):
        return self.settings["power_limit_mw"]

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle):
        return [200_000, 700_000]

    def nvmlDeviceSetPowerManagementLimit(self, handle, milliwatts):
        self._set("power", power_limit_mw=milliwatts)

    def nvmlDeviceGetSupportedMemoryClocks(self, handle):
        return [3201, 1593]

    def nvmlDeviceGetSupportedGraphicsClocks(self, handle, memory):
        assert memory == 3201
        return list(range(1980, 344, -15))

    def nvmlDeviceSetGpuLockedClocks(self, handle, least, most):
        self._set("lock", locked=[least, most])

    def nvmlDeviceResetGpuLockedClocks(self, handle):
        self._set("unlock", locked=None)
