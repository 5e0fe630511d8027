"""Energy and sensors against a fake NVML on a simulated clock: nothing here waits, and nothing needs a GPU."""

from types import SimpleNamespace

import pytest

from klab.harness.measure import nvml as sensors
from klab.harness.measure.energy import MIN_UPDATES, TRACE_POINTS, idle_power, judge, sustain
from klab.harness.measure.nvml import NvmlMeter, torch_address
from klab.harness.measure.power import Frame, NullMeter, Reading, ReplayMeter


class FakeNvml:
    """The part of pynvml that klab calls, on a board that draws `watts` since 0 s and steps its counter every `update_s`."""

    class NVMLError(Exception):
        def __init__(self, value, text):
            super().__init__(text)
            self.value = value

    NVML_ERROR_UNINITIALIZED, NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_GPU_IS_LOST = 1, 9, 15
    NOT_SUPPORTED = 3

    def __init__(self, *, watts=500.0, update_s=0.1, sensor_gain=1.0, lost_at=float("inf"), fields=(83, 186), reasons=0x4, heat=0.0):
        self.now = 0.0
        self.watts, self.update_s, self.sensor_gain = watts, update_s, sensor_gain
        self.lost_at, self.fields, self.reasons, self.heat = lost_at, fields, reasons, heat
        self.asked = []

    def _alive(self):
        if self.now >= self.lost_at:
            raise self.NVMLError(self.NVML_ERROR_GPU_IS_LOST, "GPU is lost")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        return "board"

    def nvmlDeviceGetHandleByPciBusId(self, bus):
        self.asked.append(bus)
        return "board"

    def nvmlDeviceGetFieldValues(self, handle, fields):
        self._alive()
        (field,) = fields
        if field not in self.fields:
            return [SimpleNamespace(nvmlReturn=self.NOT_SUPPORTED, valueType=0, value=None)]
        if field == 83:
            steps = int(self.now / self.update_s + 1e-9)
            return [
                SimpleNamespace(nvmlReturn=0, valueType=3, value=SimpleNamespace(ullVal=round(1000 * self.watts * steps * self.update_s)))
            ]
        return [SimpleNamespace(nvmlReturn=0, valueType=1, value=SimpleNamespace(uiVal=round(1000 * self.watts * self.sensor_gain)))]

    def nvmlDeviceGetPowerUsage(self, handle):
        self._alive()
        return round(900 * self.watts)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self._alive()
        raise self.NVMLError(self.NOT_SUPPORTED, "Not Supported")

    def nvmlDeviceGetClockInfo(self, handle, kind):
        self._alive()
        assert kind == sensors.CLOCK_SM
        return 1755

    def nvmlDeviceGetTemperature(self, handle, kind):
        self._alive()
        return round(40 + self.heat * self.now)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        self._alive()
        return self.reasons


class FakeLoad:
    """Launches of `us` microseconds, 250 to a chunk, that let the board's time pass."""

    def __init__(self, board, us=20.0):
        self.board, self.us, self.ended, self.settled = board, us, 0, False

    def advance(self):
        self.board.now += 250 * self.us / 1e6
        self.ended += 250
        return self.ended

    def settle(self):
        self.settled = True


def measure(board, *, seconds=6.0, passes=2):
    meter = NvmlMeter(board, "board")
    load = FakeLoad(board)
    windows = [
        sustain(load, meter, seconds=seconds / passes, updates=MIN_UPDATES // passes, clock=lambda: board.now) for _ in range(passes)
    ]
    assert load.settled
    return judge(windows, seconds=seconds), windows


def test_energy_per_launch_is_power_times_time():
    found, windows = measure(FakeNvml(watts=500.0))
    # 500 W for 20 us is 10 mJ. An edge is seen at the first poll behind it, so the polls' 5 ms in 3 s are the error.
    assert found.energy_j == pytest.approx(0.010, rel=0.005)
    assert found.low_j <= found.energy_j <= found.high_j
    assert found.high_j - found.low_j < 0.05 * found.energy_j
    assert found.power_w == pytest.approx(500.0, rel=0.005)
    assert "agrees within 0." in found.reason
    for window in windows:
        assert len(window.edges) - 1 >= MIN_UPDATES // 2
        assert window.edges[0][0] >= 2.0, "the ramp-up is not part of the window"


def test_trace_is_thinned_and_keeps_its_span():
    found, windows = measure(FakeNvml())
    assert 100 <= len(found.trace) <= TRACE_POINTS
    assert found.trace[-1][0] >= sum(w.trace[-1][0] for w in windows) * 0.98
    assert all(power == 500.0 for _, power in found.trace)


def test_refused_when_counter_and_power_disagree():
    found, _ = measure(FakeNvml(sensor_gain=1.08))
    assert found.energy_j is None
    assert found.low_j is None
    assert "disagree by 8.0%" in found.reason
    assert found.power_w == pytest.approx(540.0)


def test_small_disagreement_is_accepted_and_stated():
    found, _ = measure(FakeNvml(sensor_gain=1.03))
    assert found.energy_j is not None
    assert "within 3.0%" in found.reason


def test_refused_when_the_counter_steps_too_seldom():
    found, _ = measure(FakeNvml(update_s=1.0))
    assert found.energy_j is None
    assert found.reason.startswith("too short:")


def test_refused_when_one_pass_is_missing():
    board = FakeNvml()
    window = sustain(FakeLoad(board), NvmlMeter(board, "board"), seconds=3.0, updates=25, clock=lambda: board.now)
    assert judge([window], seconds=6.0).reason.startswith("too short:")


def test_a_counter_that_stands_still_does_not_hold_up_the_run():
    board = FakeNvml(update_s=1e9)
    found, _ = measure(board)
    assert found.energy_j is None
    assert board.now < 40


def test_sensor_that_disappears_leaves_nulls_and_its_reason():
    found, _ = measure(FakeNvml(lost_at=4.0))
    assert found.energy_j is None
    assert "GPU is lost" in found.reason
    assert found.trace, "what was read before is kept"


def test_lost_gpu_is_not_asked_again():
    board = FakeNvml(lost_at=1.0)
    meter = NvmlMeter(board, "board")
    assert meter.read() == Reading(1755.0, 40.0, 4, 500.0)
    board.now = 2.0
    assert meter.read() == Reading()
    board.now = 0.0
    assert meter.energy_j() is None, "a GPU that was lost stays lost"


def test_refused_under_hardware_throttling_but_not_at_the_power_cap():
    assert "throttled" in measure(FakeNvml(reasons=0x48))[0].reason
    assert measure(FakeNvml(reasons=0x4))[0].energy_j is not None


def test_a_board_that_warms_is_left_to_settle_longer():
    _, cold = measure(FakeNvml(heat=0.0))
    _, warming = measure(FakeNvml(heat=4.0))
    assert 2.0 <= cold[0].edges[0][0] < 2.5
    assert 6.0 <= warming[0].edges[0][0] < 6.5


def test_old_boards_fall_back_on_average_power():
    meter = NvmlMeter(FakeNvml(fields=(83,)), "board")
    assert meter.power_w() == pytest.approx(450.0)
    assert NvmlMeter(FakeNvml(fields=()), "board").energy_j() is None


def test_no_sensor_reads_null_never_zero():
    meter = NullMeter("no NVML")
    assert (meter.read(), meter.power_w(), meter.energy_j()) == (Reading(), None, None)
    board = FakeNvml()
    window = sustain(FakeLoad(board), meter, seconds=1.0, clock=lambda: board.now)
    found = judge([window], seconds=1.0)
    assert found.energy_j is None
    assert found.power_w is None
    assert "no NVML" in found.reason
    assert idle_power(meter, sleep=lambda s: pytest.fail("waits for nothing")) is None


def test_idle_power_rests_before_it_reads():
    board = FakeNvml(watts=75.0)
    slept = []
    assert idle_power(NvmlMeter(board, "board"), sleep=slept.append) == pytest.approx(75.0)
    assert slept[0] == 1.0


def test_device_is_found_by_uuid_then_by_bus_never_by_index():
    board = FakeNvml()
    with_uuid = SimpleNamespace(uuid="12ab", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    without = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    for properties in (with_uuid, without):
        sensors.handle_of(board, **torch_address(properties))
    assert board.asked == ["GPU-12ab", "00000000:3b:00.0"]


def test_open_meter_without_a_driver_is_a_null_meter_with_the_reason(monkeypatch):
    def no_driver():
        raise FakeNvml.NVMLError(9, "Driver Not Loaded")

    monkeypatch.setattr(sensors, "load", no_driver)
    meter = sensors.open_meter(SimpleNamespace(uuid="1"))
    assert isinstance(meter, NullMeter)
    assert "Driver Not Loaded" in meter.trouble


def test_replay_shows_the_recording_at_its_pace_and_ends():
    now = [0.0]
    frames = [Frame(0.0, Reading(1700.0, 50.0, 0, 400.0), 1.0), Frame(1.0, Reading(1600.0, 51.0, 4, 450.0), 401.0)]
    meter = ReplayMeter(frames, ends_s=2.0, clock=lambda: now[0])
    assert (meter.power_w(), meter.energy_j()) == (400.0, 1.0)
    now[0] = 1.5
    assert meter.read().sm_clock_mhz == 1600.0
    now[0] = 2.5
    assert meter.energy_j() is None
    assert meter.trouble == "the recording has ended"


def test_energy_from_a_replayed_recording():
    board = FakeNvml()  # its clock alone is used
    frames = [Frame(i / 10, Reading(1700.0, 50.0, 0, 300.0), 30.0 * i) for i in range(200)]
    meter = ReplayMeter(frames, clock=lambda: board.now)
    load = FakeLoad(board, us=50.0)
    windows = [sustain(load, meter, seconds=3.0, updates=25, clock=lambda: board.now) for _ in range(2)]
    assert judge(windows, seconds=6.0).energy_j == pytest.approx(300 * 50e-6, rel=0.01)
