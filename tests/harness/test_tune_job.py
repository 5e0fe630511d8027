"""A job remembers what it dropped, tries last what hung before, and a campaign's stages grow and cover every feature."""

import dataclasses
import itertools
import json
import time
from types import SimpleNamespace

import pytest
from contest import CPU, HOPPER
from fake_fleet import FakeFleet

from klab.harness.fleet import local
from klab.harness.measure import environment
from klab.harness.plan.trials import default_policy, trials
from klab.harness.store.journal import Journal
from klab.harness.store.result import Result, Status
from klab.harness.tune import campaign
from klab.harness.tune import job as jobs
from klab.harness.tune.campaign import Campaign, correctness_trials, pack
from klab.harness.tune.job import Job
from klab.kernels.contract import NoConfig
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

FAILS_TO_COMPILE = """
from klab.kernels.contract import kernel
from klab.kernels.matmul.problem import Matmul

@kernel(Matmul, backend="triton", kinds=("cpu",))
def fails(problem, config, chip):
    '''Never compiles.'''
    raise ValueError("no")
"""


@pytest.fixture
def recorded(monkeypatch):
    """Instead of measuring: every trial ends ok; the orders in which they were asked for are kept."""
    asked = []

    def run_trials(todo, *, run_id, on_result, **_):
        asked.append([t.kernel for t in todo])
        for trial in todo:
            on_result(Result.of(trial, Status.OK, backend="cpu", library=False, run_id=run_id, median_us=1.0))
        return type("Summary", (), {"unfinished": [], "stopped": "", "notes": []})()

    monkeypatch.setattr(jobs, "run_trials", run_trials)
    return asked


def test_what_screening_dropped_stays_dropped(tmp_path, recorded):
    (tmp_path / "fails.py").write_text(FAILS_TO_COMPILE)
    catalogue = discover([tmp_path])
    made = trials([Matmul(4, 64, 64)], [catalogue.kernels["matmul/fails"]], CPU).trials
    job = Job(CPU, tmp_path / "rows", kernel_dirs=[tmp_path], jobs=1)
    assert job.run(made, catalogue.kernels).by_status == {"compile_error": 1}
    assert job.run(made, catalogue.kernels).by_status == {}
    assert recorded == []


def test_what_hung_before_is_tried_last(tmp_path, recorded):
    catalogue = discover()
    kernels = [k for k in catalogue.of("matmul") if "cpu" in k.kinds]
    made = trials([Matmul(4, 64, 64, "float32")], kernels, CPU, default_policy(CPU)).trials
    first = made[0]
    rows = tmp_path / "rows"
    rows.mkdir()
    hung = Result.of(first, Status.TIMEOUT, backend="cpu", library=True, run_id="before", reason="hung")
    (rows / "a.jsonl").write_text(json.dumps(hung.to_json()) + "\n")
    Job(CPU, rows).run(made, catalogue.kernels)
    assert recorded == [[t.kernel for t in made[1:]], [first.kernel]]


def test_the_correctness_stage_covers_every_example_in_bf16_and_more_than_defaults():
    kernels = [k for k in discover().kernels.values() if k.backend in ("triton", "cuda")]
    made = correctness_trials(kernels, HOPPER)
    for kernel in kernels:
        own = [t for t in made if t.kernel == kernel.id]
        fitting = {p.key for p in kernel.problem_type.examples() if p.dtype == "bfloat16" and kernel.unfit(p, HOPPER) is None}
        assert fitting <= {t.problem.key for t in own}
        # Small examples leave some kernels one candidate; kernels for Blackwell's own instructions have no trial here.
        if own and all(len(list(itertools.islice(kernel.space(t.problem, HOPPER), 2))) == 2 for t in own):
            assert any(t.config != kernel.default(t.problem, HOPPER) for t in own), kernel.id
    assert all(t.policy.max_rounds == 0 for t in made)


def test_packing_keeps_every_row_in_one_file(tmp_path):
    trial = jobs.Trial("matmul/a", "0" * 16, Matmul(1, 2, 3), NoConfig(), "cpu", default_policy(CPU))
    for n in range(3):
        row = Result.of(dataclasses.replace(trial, problem=Matmul(n + 1, 2, 3)), Status.OK, backend="cpu", library=False, run_id="r")
        (tmp_path / f"part{n}.jsonl").write_text(json.dumps(row.to_json()) + "\n" + ("{torn" if n == 2 else ""))
    packed = pack(tmp_path)
    again = packed.read_bytes()
    # The torn file is kept beside the packed one: what could not be read is not thrown away.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part2.jsonl", "results.jsonl.gz"]
    assert len(list(jobs.iter_results(tmp_path))) == 3
    assert pack(tmp_path).read_bytes() == again
    assert pack(tmp_path / "nothing_here") is None


def test_a_campaign_ends_in_searches_and_leaves_its_rows_alone(tmp_path, monkeypatch):
    fleet = FakeFleet(lambda trial: 50.0 + int(trial.config.key[:2], 16))
    monkeypatch.setattr(jobs, "Fleet", fleet)
    monkeypatch.setattr(local, "Fleet", fleet)
    worker = SimpleNamespace(start=lambda: None, kill=lambda: None, environment=fleet.environment())
    monkeypatch.setattr(jobs, "WorkerClient", lambda *_, **__: worker)
    monkeypatch.setattr(campaign, "CHECK_LEAST_S", 3.0)
    # Time passes by being asked for: a busy machine comes as far as an idle one.
    began, asked = time.monotonic(), itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: began + 0.02 * next(asked))
    job = Job(CPU, tmp_path / "rows", deadline=time.monotonic() + 15.0)
    made = Campaign(job, discover(), ["qwen3-0.6b"])
    stages = {stage.name: outcome for stage, outcome in made.run()}
    assert list(stages) == ["correctness", "comparison", "tuning"]
    assert made.tuned is not None and sum(c.evaluations for c in made.tuned.courses) > 8
    assert stages["tuning"].results and not made.notes
    assert {p.suffix for p in (tmp_path / "rows").iterdir()} == {".jsonl"}, "no journals: a campaign leaves one file"
    tried = {t.key for t in fleet.measured}
    later = Job(CPU, tmp_path / "rows", deadline=time.monotonic() + 10.0)
    again = Campaign(later, discover(), ["qwen3-0.6b"])
    before = len(fleet.asked)
    assert [stage.name for stage, _ in again.run()] == ["correctness", "comparison", "tuning"]
    full = [t for run in fleet.asked[before:] for t in run if t.policy == default_policy(CPU)]
    assert not {t.key for t in full} & tried, "nothing is measured twice"


def test_what_is_known_in_any_epoch_of_a_fleet_is_not_measured_again(tmp_path, recorded):
    kernels = discover(only=["matmul"]).kernels
    made = trials([Matmul(4, 64, 64)], [kernels["matmul/torch_matmul"]], CPU).trials
    here, there = ({"kind": "cpu", "cpu_model": name, "torch": "2", "cores": 2} for name in ("one", "another"))
    other = environment.epoch({**there, "threads": 2})
    Journal(tmp_path, "r").append(Result.of(made[0], Status.OK, backend="cpu", library=True, run_id="r", median_us=1.0, epoch=other))
    job = Job(CPU, tmp_path)
    job._environments["cpu"] = [here]
    assert job.known(made) == []
    job._environments["cpu"] = [here, there]
    assert job.known(made) == made and job.epoch() != other and job.epochs() == [job.epoch(), other]
    with pytest.raises(UsageError, match="need a cluster"):
        Job(CPU, tmp_path, others=[HOPPER])
