"""The logic of CUDA timing against a simulated device: a stream is a list of work, an event is the device's clock."""

import time

import pytest
import torch
from fake_cuda import FakeCuda, Meter

from klab.harness.measure.cuda_timer import CudaTimer, SpoiledByCapture
from klab.harness.measure.power import Reading
from klab.harness.measure.rotation import Rotation
from klab.harness.plan.trial import Policy
from klab.kernels.contract import Chip

CHIP = Chip("h200", "H200", "cuda", 132, 1980, 1830, {"bfloat16": 989.0}, 141 << 30, 4800.0, 50 << 20, (9, 0))


def rotation(sets, state="cold"):
    inputs = [{"x": torch.full((1,), float(i))} for i in range(sets)]
    return Rotation(inputs, [{"out": torch.zeros(1)} for _ in range(sets)], (inputs[0], inputs[-1]), state)


class Kernel:
    """A launch of `us` microseconds that adds its input to its output and notes which set it ran on."""

    def __init__(self, cuda, us):
        self.cuda, self.us, self.sets = cuda, us, []

    def __call__(self, inputs, outputs):
        def work():
            outputs["out"].copy_(inputs["x"])
            self.sets.append(int(inputs["x"]))

        self.cuda.enqueue(self.us, work)


def ready(us, sets=7, state="cold", meter=None, **policy):
    cuda = FakeCuda()
    timer = CudaTimer(CHIP, meter or Meter(), cuda=cuda)
    kernel = Kernel(cuda, us)
    batch = timer.batch(kernel, rotation(sets, state), Policy(**{"warmup_ms": 1.0, **policy}))
    return cuda, kernel, batch


def test_short_kernels_are_launched_by_a_graph_of_at_least_ten():
    cuda, _, batch = ready(8.0)
    assert batch.shape.mode == "graph"
    assert cuda.captures == 1
    assert batch.shape.details["launches_per_graph"] >= 10
    assert batch.shape.estimate_us == pytest.approx(8.0)
    assert batch.shape.launches * 8.0 == pytest.approx(4000, rel=0.1), "a round is round_ms long"
    assert batch.round().us == pytest.approx(8.0)


def test_long_kernels_are_launched_one_by_one():
    cuda, _, batch = ready(900.0)
    assert (batch.shape.mode, cuda.captures, batch.shape.launches) == ("events", 0, 5)
    assert batch.round().us == pytest.approx(900.0)


@pytest.mark.parametrize("us", [3.0, 60.0, 400.0])
@pytest.mark.parametrize("sets", [1, 4, 300])
def test_launches_walk_through_the_sets_without_a_break(us, sets):
    _, kernel, batch = ready(us, sets=sets)
    kernel.sets.clear()
    for _ in range(3):
        assert batch.round().us == pytest.approx(us)
    assert len(kernel.sets) > 3 * batch.shape.launches * 0.9
    assert all(b == (a + 1) % sets for a, b in zip(kernel.sets, kernel.sets[1:], strict=False))


def test_many_sets_are_split_over_several_graphs():
    cuda, _, batch = ready(40.0, sets=1000)
    assert batch.shape.mode == "graph"
    assert cuda.captures == batch.shape.details["graphs"] == 10
    assert batch.shape.launches * 40.0 < 3 * 4000, "a round does not replay all of them"


def test_verify_writes_the_first_and_the_last_set():
    for us in (5.0, 500.0):
        cuda = FakeCuda()
        timer, sets = CudaTimer(CHIP, Meter(), cuda=cuda), rotation(5)
        batch = timer.batch(Kernel(cuda, us), sets, Policy(warmup_ms=1.0))
        for outputs in sets.outputs:
            outputs["out"].fill_(float("nan"))
        batch.verify()
        assert [float(sets.outputs[i]["out"]) for i in (0, 4)] == [0.0, 4.0]


def test_work_that_is_not_captured_leaves_the_poison_in_place():
    cuda = FakeCuda()
    timer, sets = CudaTimer(CHIP, Meter(), cuda=cuda), rotation(3)

    def launch(inputs, outputs):
        outputs["out"].copy_(inputs["x"])  # behind the stream's back, at capture only
        cuda.enqueue(5.0)

    batch = timer.batch(launch, sets, Policy(warmup_ms=1.0))
    for outputs in sets.outputs:
        outputs["out"].fill_(float("nan"))
    batch.verify()
    assert torch.isnan(sets.outputs[0]["out"]).all()


def synchronizing(cuda):
    def launch(inputs, outputs):
        cuda.enqueue(10.0)
        cuda.synchronize()

    return launch


def test_what_cannot_be_captured_is_launched_one_by_one_and_says_why():
    cuda = FakeCuda()
    batch = CudaTimer(CHIP, Meter(), cuda=cuda).batch(synchronizing(cuda), rotation(3), Policy(warmup_ms=1.0))
    assert batch.shape.mode == "events"
    assert batch.shape.details["not_captured"] == "operation not permitted when stream is capturing"


@pytest.mark.parametrize("ends_pools", [False, True])
def test_a_failed_capture_leaves_nothing_for_the_next_contestant_to_trip_over(ends_pools):
    cuda = FakeCuda(ends_pools=ends_pools)
    timer = CudaTimer(CHIP, Meter(), cuda=cuda)
    assert timer.batch(synchronizing(cuda), rotation(3), Policy(warmup_ms=1.0)).shape.mode == "events"
    assert cuda.stream == "main"
    assert not cuda.underway
    assert cuda.released == ([] if ends_pools else [(0, 1)]), "a pool that torch has ended is torch's to release"
    assert timer.batch(Kernel(cuda, 8.0), rotation(3), Policy(warmup_ms=1.0)).shape.mode == "graph"


@pytest.mark.parametrize("launch", ["auto", "graph"])
def test_a_failed_capture_that_cannot_be_undone_is_said_at_once(launch):
    cuda = FakeCuda(mendable=False)
    with pytest.raises(SpoiledByCapture, match=r"^operation not permitted when stream is capturing$"):
        CudaTimer(CHIP, Meter(), cuda=cuda).batch(synchronizing(cuda), rotation(3), Policy(warmup_ms=1.0, launch=launch))
    assert cuda.stream == "main"


def test_a_policy_that_insists_on_a_graph_is_refused_one_line():
    cuda = FakeCuda()
    with pytest.raises(Exception, match="cannot be captured in a CUDA graph: operation not permitted") as raised:
        CudaTimer(CHIP, Meter(), cuda=cuda).batch(synchronizing(cuda), rotation(3), Policy(launch="graph"))
    assert "\n" not in str(raised.value)


def test_a_broken_device_is_not_mistaken_for_a_launch_that_cannot_be_captured():
    cuda = FakeCuda()

    def launch(inputs, outputs):
        cuda.enqueue(10.0)
        if cuda.capturing is not None:
            cuda.broken = True
            raise RuntimeError("something")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        CudaTimer(CHIP, Meter(), cuda=cuda).batch(launch, rotation(3), Policy(warmup_ms=1.0))


def test_warm_up_lasts_until_the_clock_is_steady():
    meter = Meter()
    ready(300.0, meter=meter)
    assert meter.clocks == [1500.0], "1980, 1700 and 1505 MHz were waited out"


def test_a_clock_that_never_settles_ends_the_warm_up_at_its_limit(monkeypatch):
    monkeypatch.setattr("klab.harness.measure.cuda_timer.WARMUP_LIMIT_S", 0.2)
    _, _, batch = ready(300.0, meter=Meter([1000.0, 2000.0] * 500))
    assert 0.2 <= batch.shape.details["warmup_s"] < 1.0


def test_the_reading_belongs_to_the_round():
    _, _, batch = ready(300.0)
    assert batch.round().reading == Reading(1500.0, 60.0, 4, 650.0)


def test_a_launch_that_keeps_the_host_busy_is_tried_in_a_graph():
    cuda = FakeCuda()

    def launch(inputs, outputs):
        end = time.perf_counter() + 200e-6
        while time.perf_counter() < end:
            pass
        cuda.enqueue(150.0)

    batch = CudaTimer(CHIP, Meter(), cuda=cuda).batch(launch, rotation(3), Policy(warmup_ms=1.0))
    assert batch.shape.mode == "graph", "150 us are long enough for events, but the host takes 200 us to launch them"


def test_l2_is_what_the_driver_says_where_that_is_more():
    timer = CudaTimer(CHIP, Meter(), cuda=FakeCuda())
    assert timer.l2_bytes == 60 << 20
    assert timer.memory_bytes == 50 << 30
    assert timer.free_share() == pytest.approx(100 / 141)


def test_flushed_launches_are_timed_one_by_one_without_the_flush():
    cuda = FakeCuda()
    timer = CudaTimer(CHIP, Meter(), cuda=cuda)
    timer.l2_bytes = 1 << 10
    batch = timer.batch(Kernel(cuda, 12.0), rotation(1, "flush"), Policy(warmup_ms=1.0))
    assert (batch.shape.mode, batch.shape.l2_state) == ("events", "flush")
    assert batch.round().us == pytest.approx(12.0)


def test_a_sustained_run_keeps_work_queued_and_counts_what_ended():
    cuda, kernel, batch = ready(50.0)
    kernel.sets.clear()
    counts = [batch.advance() for _ in range(4)]
    assert counts == sorted(counts)
    assert counts[0] > 0
    assert len(kernel.sets) >= 2 * counts[0] + counts[-1], "two chunks more are queued than have been counted"
    batch.settle()
    assert cuda.us > 0
