"""Anchors: in every lap, beside every sample, and never the reason why a row is lost."""

import dataclasses

import pytest
from fake_cuda import FakeCuda, Meter
from test_measure_contest_logic import ENERGY, POLICY, ScriptedWorker, run

from klab.harness.catalog.chips import find_chip
from klab.harness.measure import anchor
from klab.harness.measure.anchor import anchor_trouble, anchored, pairs, which_anchor, work
from klab.harness.measure.client import WorkerDied, WorkerHung
from klab.harness.measure.cuda_timer import CudaTimer
from klab.harness.measure.power import NullMeter
from klab.harness.measure.session import Session
from klab.harness.measure.timer import CpuTimer
from klab.harness.plan.trial import Policy
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

BOTH = {"contest": {"anchors": ("matmul", "copy")}}
CHIP = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 20)


class WithAnchors(ScriptedWorker):
    """A scripted worker that knows anchors: the n-th round of one takes 100 + n us (matmul) or 200 + n (copy)."""

    def __init__(self, script=None, **how):
        super().__init__(script, **how)
        self.ready, self.rounds, self.lap = set(), {}, []

    def start(self, *, limit_s):
        if not self.alive:
            self.ready = set()
        super().start(limit_s=limit_s)

    def ask(self, operation, *, limit_s, **fields):
        if operation not in ("anchor", "sample_anchor"):
            answer = super().ask(operation, limit_s=limit_s, **fields)
            if operation == "sample":
                self.lap.append(self.slots[fields["slot"]])
            return answer
        assert self.alive
        name = fields["name"]
        key = (operation, name)
        self.counts[key] = self.counts.get(key, 0) + 1
        answer = self.script.get(key, {})
        answer = answer(self.counts[key]) if callable(answer) else answer
        if isinstance(answer, Exception):
            if not isinstance(answer, UsageError):
                self.kill()
            raise answer
        if operation == "anchor":
            self.ready.add(name)
            return {"status": "ok", "what": f"the {name}", "launches": 2, "estimate_us": 50.0} | answer
        assert name in self.ready, "a fresh worker knows no anchors"
        self.lap.append(name)
        us = {"matmul": 100.0, "copy": 200.0}[name] + self.counts[key]
        return {"status": "ok", "us": us, "sm_clock_mhz": 1500.0 + self.counts[key], "throttle_reasons": 4} | answer


def test_each_anchor_has_a_round_in_every_lap_at_its_ends():
    worker = WithAnchors()
    rows, _ = run(worker, ["lib", "a"], **BOTH)
    assert worker.lap[:8] == ["matmul", "lib", "a", "copy", "copy", "a", "lib", "matmul"]
    assert len(worker.lap) == 6 * 4
    found = rows["a"].build["anchors"]
    assert found["matmul"] == {
        "us": [101.0, 102.0, 103.0, 104.0, 105.0, 106.0],
        "mhz": [1501.0 + i for i in range(6)],
        "what": "the matmul",
    }
    assert found["copy"]["us"][0] == 201.0
    assert Result.from_json(rows["a"].to_json()).build["anchors"] == found


def test_one_that_ends_early_keeps_the_laps_that_it_took_part_in():
    noisy = iter([10, 30, 20, 50, 10, 40] * 50)
    worker = WithAnchors({("sample", "a"): lambda n: {"us": float(next(noisy))}}, times={"b": 20.0})
    rows, _ = run(worker, ["a", "b"], Policy(min_rounds=6, max_rounds=20, target_ci=0.01), **BOTH)
    assert (len(rows["b"].samples_us), len(rows["b"].build["anchors"]["copy"]["us"])) == (6, 6)
    assert (len(rows["a"].samples_us), len(rows["a"].build["anchors"]["copy"]["us"])) == (20, 20)


def test_a_crash_costs_the_anchors_the_broken_lap_too():
    # The order of the third lap is matmul, lib, a, b, c, copy: the matmul's third round is thrown away with it.
    worker = WithAnchors({("sample", "b"): lambda n: WorkerDied("killed by SIGSEGV") if n == 3 else {}})
    rows, _ = run(worker, ["lib", "a", "b", "c"], **BOTH)
    assert rows["b"].status is Status.CRASHED
    assert rows["a"].build["anchors"]["matmul"]["us"] == [101.0, 102.0, 104.0, 105.0, 106.0, 107.0]
    assert rows["a"].build["anchors"]["copy"]["us"] == [201.0, 202.0, 203.0, 204.0, 205.0, 206.0]


def test_a_second_crash_while_all_are_prepared_anew_keeps_samples_and_anchors_in_step():
    script = {
        ("sample", "a"): lambda n: WorkerDied("gone") if n == 4 else {},
        ("prepare", "lib"): lambda n: WorkerDied("gone too") if n == 2 else {},
        ("sample", "c"): lambda n: {"us": 1000.0 + n},
    }
    worker = WithAnchors(script)
    rows, _ = run(worker, ["lib", "a", "c"], **BOTH)
    assert {name: row.status.value for name, row in rows.items()} == {"lib": "crashed", "a": "crashed", "c": "ok"}
    assert len(rows["c"].samples_us) == len(rows["c"].build["anchors"]["matmul"]["us"]) == 6
    # Three whole laps stand. The fourth began from the far end (copy, c, a), so c's and the copy's fourth rounds are gone.
    assert rows["c"].samples_us[:4] == (1001.0, 1002.0, 1003.0, 1005.0)
    assert rows["c"].build["anchors"]["copy"]["us"][:4] == [201.0, 202.0, 203.0, 205.0]


def test_energy_after_the_laps_may_fail_and_leaves_the_anchors_alone():
    worker = WithAnchors({("energy", "b"): lambda n: WorkerDied("gone")})
    rows, _ = run(worker, ["lib", "b"], ENERGY, **BOTH)
    assert rows["lib"].status is Status.OK
    assert len(rows["lib"].build["anchors"]["copy"]["us"]) == len(rows["lib"].samples_us) == 6


@pytest.mark.parametrize(
    ("script", "reason", "starts"),
    [
        ({("anchor", "copy"): {"status": "out_of_memory", "reason": "512 MiB are not free"}}, "512 MiB are not free", 1),
        ({("sample_anchor", "copy"): lambda n: {"status": "crashed", "reason": "odd"} if n == 3 else {}}, "odd", 1),
        ({("sample_anchor", "copy"): WorkerHung("no answer to sample_anchor within 30 s")}, "no answer", 2),
        ({("sample_anchor", "copy"): WorkerDied("killed by SIGBUS")}, "killed by SIGBUS", 3),
        ({("anchor", "copy"): {"status": "crashed", "reason": "no device", "fatal": True}}, "no device", 3),
        ({("anchor", "copy"): UsageError("unknown operation 'anchor'")}, "unknown operation", 1),
    ],
)
def test_an_anchor_that_fails_costs_no_row_and_says_why(script, reason, starts):
    worker = WithAnchors(script)
    rows, _ = run(worker, ["lib", "a"], **BOTH)
    assert all(row.status is Status.OK and len(row.samples_us) == 6 for row in rows.values())
    assert worker.starts == starts
    row = rows["a"]
    assert reason in anchor_trouble(row, "copy")
    assert len(anchored(row, "copy")) < 6
    assert len(anchored(row, "matmul")) == 6
    assert anchor_trouble(row, "matmul") == ""


def test_an_anchor_that_a_contestant_broke_once_is_tried_again():
    worker = WithAnchors({("sample_anchor", "copy"): lambda n: WorkerDied("killed by SIGBUS") if n == 2 else {}})
    rows, _ = run(worker, ["lib", "a"], **BOTH)
    assert len(anchored(rows["a"], "copy")) == 6
    assert rows["a"].build["anchors"]["copy"]["us"] == [201.0, 203.0, 204.0, 205.0, 206.0, 207.0]


def test_anchored_divides_lap_by_lap_and_leaves_out_rounds_that_do_not_count():
    script = {
        ("sample", "a"): lambda n: {"us": 50.0, "throttle_reasons": 0x48 if n == 2 else 4},
        ("sample_anchor", "matmul"): lambda n: {"throttle_reasons": 0x8 if n == 3 else 4, "us": 100.0 * n},
    }
    rows, _ = run(WithAnchors(script), ["a"], dataclasses.replace(POLICY, min_rounds=5, max_rounds=6), **BOTH)
    assert rows["a"].build["anchors"]["matmul"]["marked"] == [0, 0, 1, 0, 0, 0]
    assert anchored(rows["a"], "matmul") == pytest.approx([50 / 100, 50 / 400, 50 / 500, 50 / 600])
    assert pairs(rows["a"], "matmul")[0] == (50.0, 100.0)


def test_a_result_without_anchors_has_no_anchored_values():
    rows, _ = run(WithAnchors(), ["a"])
    assert "anchors" not in rows["a"].build
    assert anchored(rows["a"], "copy") == []
    assert anchor_trouble(rows["a"], "copy") == "no copy anchor was taken"


def test_a_check_without_rounds_takes_no_anchor():
    worker = WithAnchors()
    rows, _ = run(worker, ["a"], Policy(min_rounds=0, max_rounds=0), **BOTH)
    assert rows["a"].status is Status.OK
    assert worker.lap == []
    assert "anchors" not in rows["a"].build


def test_an_unknown_anchor_is_refused_before_anything_starts():
    with pytest.raises(UsageError, match="unknown anchor fft; known: matmul, copy"):
        run(WithAnchors(), ["a"], contest={"anchors": ("fft",)})


@pytest.mark.parametrize(("m", "expected"), [(1, "copy"), (16, "copy"), (8192, "matmul")])
def test_the_roofline_says_which_anchor_a_problem_is_divided_by(m, expected):
    assert which_anchor(Matmul(m, 14336, 4096), find_chip("h200")) == expected


def test_the_anchors_do_not_fit_a_cache_and_say_what_they_are():
    assert work("copy", "cuda").bytes_moved > 4 * find_chip("b200").l2_bytes
    assert work("matmul", "cuda").flops == 2 * 8192 * 8192 * 4096
    assert "bfloat16" in work("matmul", "cuda").what
    with pytest.raises(UsageError, match="unknown anchor"):
        work("fft", "cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(anchor, "MATMUL", {"cpu": (16, 16, 16, "float32"), "cuda": (16, 16, 16, "float32")})
    monkeypatch.setattr(anchor, "COPY", {"cpu": (4096, 4), "cuda": (4096, 1)})


@pytest.fixture
def session():
    made = Session(CHIP, discover(()), CpuTimer(CHIP, NullMeter()), NullMeter("no sensor"))
    made.open("matmul", Matmul(8, 48, 64, "float32").to_json(), Policy(warmup_ms=1.0, round_ms=0.1, threads=1).to_json())
    return made


def test_a_worker_times_both_anchors(small, session):
    for name in ("matmul", "copy"):
        ready = session.anchor(name)
        assert (ready["status"], ready["what"]) == ("ok", work(name, "cpu").what)
        assert ready["launches"] >= 1
        sample = session.sample_anchor(name)
        assert sample["us"] > 0
        assert sample["sm_clock_mhz"] is None
    with pytest.raises(UsageError, match="not ready"):
        session.sample_anchor("fft")


def test_anchors_outlive_a_problem_and_are_made_anew_for_another_policy(small, session):
    session.anchor("copy")
    batch = session._anchors["copy"][1]
    session.close()
    session.open("matmul", Matmul(4, 48, 64, "float32").to_json(), Policy(warmup_ms=2.0, round_ms=0.1, threads=1).to_json())
    session.anchor("copy")
    assert session._anchors["copy"][1] is batch
    session.open("matmul", Matmul(4, 48, 64, "float32").to_json(), Policy(warmup_ms=1.0, round_ms=0.2, threads=1).to_json())
    session.anchor("copy")
    assert session._anchors["copy"][1] is not batch


def test_an_anchor_that_finds_no_memory_is_a_status(small, session, monkeypatch):
    def none_left(*_):
        raise MemoryError("512 MiB")

    monkeypatch.setattr(anchor, "_copy", none_left)
    answer = session.anchor("copy")
    assert answer["status"] == "out_of_memory"
    assert "fatal" not in answer


def test_on_a_gpu_an_anchor_reads_the_clock_and_launches_as_the_timer_chooses(small, monkeypatch):
    cuda = FakeCuda()

    def slow(launch, device):
        from klab.harness.measure.rotation import Rotation

        return lambda inputs, outputs: cuda.enqueue(700.0), Rotation([{}], [{}], (), "cold")

    monkeypatch.setattr(anchor, "_matmul", slow)
    timer = CudaTimer(CHIP, Meter(), cuda=cuda)
    batch = anchor.make("matmul", timer, Policy(warmup_ms=50.0, round_ms=4.0))
    assert batch.shape.launches == 6
    taken = batch.round()
    assert taken.us == pytest.approx(700.0)
    assert taken.reading.sm_clock_mhz == 1500.0
