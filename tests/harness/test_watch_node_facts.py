"""What the driver says, by a NVML that is not there; and that nothing on a machine is ever changed."""

import ctypes

import pytest
from fake_node import Board, FakeNvml

from klab.harness.watch.node_facts import XidWatch, grown, read, short_id

pynvml = pytest.importorskip("pynvml")


def test_every_function_that_is_asked_is_one_of_nvidias():
    names = [name for name in vars(FakeNvml) if name.startswith(("nvml", "c_nvml"))]
    assert len(names) > 30
    assert [name for name in names if not hasattr(pynvml, name)] == []


def test_fields_have_nvidias_numbers():
    from klab.harness.watch import node_facts

    for ours, theirs in (
        ("MEMORY_TEMPERATURE", "MEMORY_TEMP"), ("NVLINK_SPEED_COMMON", "NVLINK_SPEED_MBPS_COMMON"), ("NVLINK_SPEED", "NVLINK_GET_SPEED"),
        ("NVLINK_RECOVERIES", "NVLINK_COUNT_LINK_RECOVERY_EVENTS"), ("NVLINK_SYMBOL_ERRORS", "NVLINK_COUNT_SYMBOL_ERRORS"),
        ("RECOVERY_ACTION", "GET_GPU_RECOVERY_ACTION"),
    ):  # fmt: skip
        assert getattr(node_facts, f"FIELD_{ours}") == getattr(pynvml, f"NVML_FI_DEV_{theirs}")
    assert pynvml.nvmlEventTypeXidCriticalError == XidWatch.EVENT_XID
    assert pynvml.NVML_GPU_FABRIC_STATE_COMPLETED == 3


def test_a_healthy_gpu():
    board = Board(0)
    library = FakeNvml([board])
    facts = read(library, board)
    assert facts["name"] == "NVIDIA H200"
    assert facts["pci_bus_id"] == "00000000:18:00.0"
    assert (facts["power_limit_w"], facts["power_limit_default_w"], facts["power_limit_max_w"]) == (700, 700, 700)
    assert (facts["pcie_generation"], facts["pcie_width"], facts["pcie_width_max"]) == (5, 16, 16)
    assert (facts["nvlinks"], facts["nvlinks_active"], facts["nvlinks_down"]) == (18, 18, [])
    assert facts["nvlink_mb_per_s"] == 26562
    assert facts["nvlink_errors"] == 0
    assert facts["fabric"] == {"state": "completed", "status": 0}
    assert (facts["rows_corrected"], facts["rows_failed"]) == (0, 0)
    assert facts["remap_reserve"]["max"] == 2304
    assert facts["memory_temperature_c"] == 72
    assert facts["margin_c"] == 25
    assert not any(serial in name.lower() for name in library.asked for serial in ("serial", "boardid"))
    assert [name for name, value in facts.items() if value is None] == ["slowdown_c", "memory_limit_c", "operating_limit_c"]


def test_nvlink_of_the_fifth_generation_answers_by_fields():
    board = Board(0, grows={"nvlink_errors": 3})
    library = FakeNvml([board], generation=5)
    before, after = read(library, board), read(library, board)
    assert before["nvlink_mb_per_s"] == 53125
    assert grown(before, after)["nvlink_errors"] == 3


def test_what_cannot_be_read_is_null_with_its_reason():
    board = Board(0, facts={"ecc": None, "rows": None, "fabric": None, "sram": None}, margin_c=None, memory_temperature_c=0)
    facts = read(FakeNvml([board]), board)
    for name in ("ecc_pending", "rows_corrected", "rows_failed", "fabric", "sram_threshold_exceeded", "margin_c"):
        assert facts[name] is None
        assert "Not Supported" in facts["why"][name]
    assert facts["memory_temperature_c"] is None, "zero degrees is what a board without the sensor says"


def test_a_driver_of_another_version_lacks_functions():
    board = Board(0)
    library = FakeNvml([board])
    library.nvmlDeviceGetMarginTemperature = None
    facts = read(library, board)
    assert facts["margin_c"] is None
    assert "does not answer" in facts["why"]["margin_c"]


def test_a_lost_gpu_gives_nulls_and_no_error():
    class Lost(FakeNvml):
        def __getattribute__(self, name):
            if name.startswith("nvmlDevice"):
                raise FakeNvml.NVMLError("GPU is lost")
            return object.__getattribute__(self, name)

    facts = read(Lost([Board(0)]), Board(0))
    assert facts["uuid"] is None
    assert facts["ecc_uncorrected"] is None
    assert "GPU is lost" in facts["why"]["power_w"]
    assert grown(facts, facts) == {}


def test_xids_are_told_of_the_gpu_that_had_them():
    boards = [Board(0), Board(1, xids=(63, 48))]
    watch = XidWatch(FakeNvml(boards), dict(enumerate(boards)))
    assert watch.collect() == [{"device": 1, "xid": 63}, {"device": 1, "xid": 48}]
    assert watch.collect() == []
    assert watch.trouble == ""


def test_a_lost_gpu_is_known_by_its_pointer():
    """It does not tell its UUID any more, and the others must not be blamed for its Xid 79."""
    known, again = ({i: ctypes.cast(0x1000 * (i + 1), pynvml.c_nvmlDevice_t) for i in range(3)} for _ in range(2))
    stranger = known.pop(2)
    library = FakeNvml([])

    def lost(handle):
        raise library.error("GPU is lost", library.NVML_ERROR_GPU_IS_LOST)

    library.nvmlDeviceGetUUID = lost
    library.pending = [(again[1], 79), (stranger, 45)]
    assert XidWatch(library, known).collect() == [{"device": 1, "xid": 79}, {"device": -1, "xid": 45}]


def test_events_that_may_not_be_asked_for_say_so():
    library = FakeNvml([Board(0)])

    def refuse(handle, kinds, events):
        raise FakeNvml.NVMLError("Insufficient Permissions")

    library.nvmlDeviceRegisterEvents = refuse
    watch = XidWatch(library, {0: library.boards[0]})
    assert "Insufficient Permissions" in watch.deaf[0]
    assert watch.collect() == []


def test_short_names_betray_nothing_and_last():
    uuid = "GPU-12345678-aaaa-bbbb-cccc-dddddddddddd"
    assert short_id(uuid) == short_id(uuid)
    assert short_id(uuid) != short_id(uuid[:-1] + "e")
    assert not any(part in short_id(uuid) for part in uuid.split("-")[1:])


def test_the_fake_refuses_to_set():
    with pytest.raises(AssertionError, match="changes the machine"):
        _ = FakeNvml([]).nvmlDeviceSetPowerManagementLimit
