"""The pytest-benchmark suite as its users run it: in a process of its own, compared, and imported into the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_fleet import FakeFleet
from made_results import failed, made
from tiny_model import CONFIG

from klab.harness.catalog import find_chip
from klab.harness.choose.benchmark import DeviceTime, Measured, extra_info, names, timed, verdict, why_no_time
from klab.harness.plan.trial import Policy, Trial
from klab.harness.plan.trials import trials as make_trials
from klab.harness.store.benchmark_json import read_benchmarks
from klab.harness.store.journal import Journal, row_of
from klab.harness.store.read import iter_results
from klab.harness.store.result import Result, Status
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

SUITE = Path(__file__).parents[2] / "ci" / "benchmarks"
OWN = """
from klab.kernels.contract import kernel
from klab.kernels.norm.problem import Norm


@kernel(Norm, backend="cpu", kinds=("cpu",))
def zeros(problem, config, chip):
    '''Wrong.'''
    return lambda inputs, outputs: [out.zero_() for out in outputs.values()]
"""


def suite(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "pytest", SUITE, "-p", "no:cacheprovider", "--model", folder / "config.json", "--chip", "cpu", "--isl", "32",
        "--osl", "8", "--batch", "2", "--phase", "decode", "--kernel", "norm/torch_norm", *words,
    ]  # fmt: skip
    # A suite that believes itself to be one of several processes measures nothing.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    variables |= {"OMP_NUM_THREADS": "1", "CI": "1"}
    return subprocess.run(list(map(str, command)), cwd=folder, env=variables, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "mine").mkdir()
    (folder / "mine" / "bad_norms.py").write_text(OWN)
    return folder


NORM = "rms norm 2x64 +residual fp32"
STATISTICS = ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3", "ld15iqr", "hd15iqr", "total")


@pytest.fixture(scope="module")
def first(place: Path) -> subprocess.CompletedProcess[str]:
    """Klab's own kernel and one that is wrong (one that crashes: below, without a worker); beside an earlier run of a nanosecond: this one
    is slower.
    """
    test = f"ci/benchmarks/test_kernels.py::test_kernel[{NORM} norm/torch_norm]"
    stats = dict.fromkeys(STATISTICS, 1e-9) | {
        "rounds": 5,
        "iterations": 1,
        "ops": 1e9,
        "outliers": "0;0",
        "iqr_outliers": 0,
        "stddev_outliers": 0,
    }
    bench = {"fullname": test, "name": test.partition("::")[2], "group": NORM, "params": {}, "param": "", "extra_info": {}, "stats": stats}
    (place / "fast.json").write_text(json.dumps({"machine_info": {}, "commit_info": {}, "benchmarks": [bench], "version": "5"}))
    more = ("--kernel", "norm/zeros", "--kernels", "mine", "--benchmark-json=bench.json", "--benchmark-autosave",
            "--benchmark-storage=kept", "--benchmark-compare=fast.json", "--benchmark-compare-fail=median:50%")  # fmt: skip
    return suite(place, *more)


@pytest.fixture
def data(first: subprocess.CompletedProcess[str], place: Path) -> dict[str, Any]:
    assert (place / "bench.json").exists(), first.stdout + first.stderr
    found: dict[str, Any] = json.loads((place / "bench.json").read_text())
    return found


def test_a_kernel_that_fails_is_a_failing_test_with_its_reason(first: subprocess.CompletedProcess[str], data: dict[str, Any]) -> None:
    assert first.returncode == 1
    wrong = [line for line in first.stdout.splitlines() if line.startswith("FAILED") and "norm/zeros" in line]
    assert wrong and all("incorrect: " in line for line in wrong)
    assert "never used" not in first.stdout and "was not used" not in first.stdout
    assert {bench["extra_info"]["kernel"] for bench in data["benchmarks"]} == {"norm/torch_norm"}


def test_its_times_are_the_labs_rounds(data: dict[str, Any]) -> None:
    for bench in data["benchmarks"]:
        info, stats = bench["extra_info"], bench["stats"]
        row = info["klab"]["rows"][0]
        assert stats["data"] == [us / 1e6 for us in row["samples_us"]] and stats["rounds"] >= 5
        assert stats["median"] * 1e6 == pytest.approx(row["median_us"])
        assert info["status"] == "ok" and info["verdict"].startswith("alone") and info["tflops"] > 0 and info["gb_per_s"] > 0
        assert info["roofline_limit"] == "memory" and 0 < info["roofline_share"] < 2 and info["sm_clock_mhz"] is None
        assert info["power_w"] is None and info["energy_j"] is None and "CPU" in info["energy_reason"]
        assert bench["group"] == info["problem"] and bench["options"]["timer"] == DeviceTime().__name__
        assert bench["params"] == {"problem": info["problem"], "kernel": "norm/torch_norm", "config": "-"}
    assert " object at 0x" not in json.dumps(data)
    assert data["machine_info"]["klab"]["chip"] == "cpu"


def test_the_store_takes_its_rows_once_and_labels_them(data: dict[str, Any], place: Path, tmp_path: Path, klab: Callable[..., Any]) -> None:
    code, out, err = klab("import", place / "bench.json", "--results", tmp_path, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["stored"] == 0 and not list(tmp_path.iterdir())
    code, out, err = klab("import", place / "bench.json", "--results", tmp_path, "--json")
    told = json.loads(out)
    rows = list(iter_results(tmp_path))
    assert code == 0 and told["stored"] == len(rows) and told["new"].keys() == {"ok", "incorrect"} and not told["left_out"], err
    assert all(row.build["imported"]["by"].startswith("pytest-benchmark") for row in rows)
    own = {row.recorded_at + row.key: row for row in rows if row.status is Status.OK}
    for bench in data["benchmarks"]:
        stored = bench["extra_info"]["klab"]["rows"][0]
        again = row_of(own[stored["recorded_at"] + stored["key"]])
        label = again["build"].pop("imported")
        assert again == stored | {"build": stored.get("build", {})} and label["test"] == bench["fullname"]
    code, out, _ = klab("import", place / "bench.json", "--results", tmp_path, "--json")
    assert json.loads(out)["stored"] == 0 and json.loads(out)["known"] == len(rows) == len(list(iter_results(tmp_path)))
    code, out, _ = klab("results", "--results", tmp_path)
    assert "ok (imported)" in out


def test_compare_and_its_limit_work(first: subprocess.CompletedProcess[str], data: dict[str, Any], place: Path) -> None:
    assert "Performance has regressed" in first.stderr and "norm/torch_norm] (NOW)" in first.stdout
    saved = list((place / "kept").rglob("*.json"))
    assert len(saved) == 1
    files = [str(place / "bench.json"), str(saved[0])]
    command = [sys.executable, "-m", "pytest_benchmark", "compare", *files, "--group-by=param:kernel", "--columns=median,rounds"]
    compared = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=100)
    assert compared.returncode == 0, compared.stderr
    assert "'kernel=norm/torch_norm': 2 tests" in compared.stdout
    assert read_benchmarks(saved[0]).rows  # what --benchmark-autosave keeps, without the rounds, can be imported too


def test_a_usage_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Inside this process: it ends before anything is collected."""
    code = pytest.main([str(SUITE), "-p", "no:cacheprovider", "-p", "no:timeout", "--model", "no-such-model", "--co", "-q"])
    told = capsys.readouterr().err
    assert code == pytest.ExitCode.USAGE_ERROR and "unknown model 'no-such-model'" in told and "Traceback" not in told


def test_foreign_and_edited_files_are_refused(data: dict[str, Any], tmp_path: Path, klab: Callable[..., Any]) -> None:
    foreign = json.loads(json.dumps(data))
    foreign.pop("klab")
    for bench in foreign["benchmarks"]:
        bench["extra_info"] = {"note": "mine"}
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(foreign))
    code, _, err = klab("import", file, "--results", tmp_path / "rows")
    assert code == 2 and "benchmarks that are not klab's" in err and not (tmp_path / "rows").exists()

    edited = json.loads(json.dumps(data))
    edited["klab"]["failed"] = [{"schema": 1}]
    edited["benchmarks"][0]["stats"]["min"] /= 2
    for bench in edited["benchmarks"][1:]:
        bench["extra_info"]["klab"]["rows"][0]["kernel"] = "../../x"
    file.write_text(json.dumps(edited))
    found = read_benchmarks(file)
    assert not found.rows and len(found.left_out) == len(edited["benchmarks"]) + 1
    assert "its min of" in next(iter(found.left_out.values()))

    code, _, err = klab("import", file, "--engine", "vllm", "--results", tmp_path / "rows")
    assert code == 2 and "goes with --results" in err
    file.write_text('{"machine_info": {}, "benchmarks": [')
    with pytest.raises(UsageError, match="is not JSON"):
        read_benchmarks(file)


def _row(data: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = data["benchmarks"][0]["extra_info"]["klab"]["rows"][0]
    return row


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda d: d["benchmarks"][0]["stats"].update(min=10**400), "OverflowError"),
        (lambda d: d["benchmarks"][0]["stats"].update(max=float("nan")), "its max of nan us"),
        (lambda d: d["benchmarks"][0].update(stats=[]), "TypeError"),
        (lambda d: _row(d).update(median_us=_row(d)["median_us"] / 2, q1_us=None, ci_low_us=None), "is not that of its rounds"),
        (lambda d: _row(d).update(marked=[1] * len(_row(d)["samples_us"])), "its row has no time"),
        (lambda d: _row(d).update(config={"block": 7}), "its key is not that"),
        (lambda d: _row(d).update(problem_label="half a \ud800 pair"), "problem_label is not text"),
        (lambda d: d["benchmarks"][0]["extra_info"]["klab"]["rows"].append(d["klab"]["failed"][0]), "of several kernels"),
    ],
)
def test_a_row_that_cannot_be_is_left_out(
    data: dict[str, Any], tmp_path: Path, klab: Callable[..., Any], edit: Callable[[dict[str, Any]], None], why: str
) -> None:
    edit(data)
    data["klab"]["failed"] = []
    (tmp_path / "bench.json").write_text(json.dumps(data))
    code, _, err = klab("import", tmp_path / "bench.json", "--results", tmp_path / "rows")
    assert code == 2 and why in " ".join(err.split()) and "can be imported" in err and not (tmp_path / "rows").exists()


def test_a_row_is_stored_once_and_none_passes_as_failed(data: dict[str, Any], tmp_path: Path, klab: Callable[..., Any]) -> None:
    data["benchmarks"] *= 2
    data["klab"]["failed"] = [_row(data)]
    (tmp_path / "bench.json").write_text(json.dumps(data, sort_keys=True))  # as jq -S writes it
    code, out, _ = klab("import", tmp_path / "bench.json", "--results", tmp_path / "rows", "--json")
    told = json.loads(out)
    assert code == 0 and told["stored"] == 1 and "it did not fail" in told["left_out"]["failed 0"]


def test_the_timer_plays_rounds_back_exactly() -> None:
    row = made(Matmul(1, 64, 64), samples=[3.3, 1.1, 2.2, 9.9], marked=(0, 0, 0, 1))
    timer = DeviceTime()
    assert timer.load(row) == 3
    seen = []
    for _ in range(3):
        start = timer()
        timer.launch()
        seen.append(timer() - start)
    assert seen == [3.3 / 1e6, 1.1 / 1e6, 2.2 / 1e6]
    timer.launch()  # a profiler's look at what was timed
    assert timer() == 0


def test_energy_and_verdict_of_a_gpu() -> None:
    h200 = find_chip("h200")
    problem = Matmul(512, 2048, 1024)
    fast = made(problem, "triton_tiled", level_us=50.0, noise=0.001, power_w=610.0)
    slow = made(problem, "torch", level_us=60.0, noise=0.001)
    metered = made(
        problem, "triton_tiled", level_us=51.0, policy=Policy(energy=True).to_json(), energy_j=0.03, power_w=600.0, energy_reason=""
    )
    contest = [fast, slow, metered, failed(problem, "cuda_mma", Status.INCORRECT, "off by 2")]
    info = extra_info([fast, metered], contest, h200)
    assert info["verdict"] == "fastest" and info["energy_j"] == 0.03 and info["power_w"] == 600.0 and info["sm_clock_mhz"] == 1755.0
    assert info["tflops"] == pytest.approx(problem.flops() / fast.median_us / 1e6) and len(info["klab"]["rows"]) == 2
    told = verdict(slow, contest)
    assert told.startswith("slower: 1.2") and told.endswith("of matmul/triton_tiled's time")
    tie = made(problem, "torch", samples=list(fast.samples_us), median_us=fast.median_us)
    assert verdict(fast, [fast, tie]) == "fastest, tied with 1 of 1"
    assert extra_info([slow], contest, h200)["energy_reason"] == "not asked for"
    assert verdict(made(problem, "torch", error=None, checks=0), contest) == "none: its output was not checked"
    assert why_no_time(contest[-1]) == "incorrect: off by 2" and not why_no_time(fast)


def test_a_problem_is_one_contest_and_on_gpus_its_best_are_metered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for one kernel, the whole contest is measured, once; then the winner, its runner-up and the best library."""
    h200 = find_chip("h200")
    times = {"matmul/torch_matmul": 40.0, "matmul/triton_tiled": 20.0, "matmul/cuda_mma": 30.0, "matmul/cuda_gemv": Status.CRASHED}
    kernels = [kernel for name, kernel in discover().kernels.items() if name in times]
    problems = [Matmul(8, 4096, 4096), Matmul(16, 4096, 4096)]
    wanted = make_trials(problems, kernels, h200).trials
    fleet = FakeFleet(lambda trial: times[trial.kernel])
    monkeypatch.setattr("klab.harness.choose.benchmark.Fleet", fleet)
    with Measured(h200, wanted) as measured:
        for trial in wanted[:4]:
            rows = measured.of(trial)
            assert [bool(row.policy.get("energy")) for row in rows] == [False, True][: 1 if trial.kernel == "matmul/cuda_gemv" else 2]
        assert [len(run) for run in fleet.asked] == [4, 3] and all(t.policy.energy for t in fleet.asked[1])
        assert timed(measured.of(wanted[0])) is not None and len(fleet.asked) == 2
        tiled = next(t for t in wanted[4:] if t.kernel == "matmul/triton_tiled")
        assert len(measured.of(tiled)) == 2 and len(fleet.asked) == 4
        assert [why_no_time(row) for row in measured.all_rows() if why_no_time(row)] == ["crashed: as the test says"] * 2
    fleet = FakeFleet(lambda trial: times[trial.kernel])
    monkeypatch.setattr("klab.harness.choose.benchmark.Fleet", fleet)
    with Measured(h200, wanted, energy=False) as measured:
        assert len(measured.of(wanted[0])) == 1 and len(fleet.asked) == 1


def test_names_stay_and_are_unique() -> None:
    kernel = discover().kernels["matmul/torch_matmul"]
    problem = Matmul(8, 64, 64)
    a = Trial.of(kernel, problem, kernel.default(problem, find_chip("h200")), "cpu", Policy())
    assert names([a])[a.key] == f"{problem.label()} matmul/torch_matmul"
    b = a.with_policy(seed=1)
    found = names([a, b])
    assert len(set(found.values())) == 2 and all(name.startswith(problem.label()) for name in found.values())


def test_a_row_of_the_store_and_its_import_count_once(tmp_path: Path, klab: Callable[..., Any], place: Path, data: dict[str, Any]) -> None:
    rows = [row for bench in data["benchmarks"] for row in bench["extra_info"]["klab"]["rows"]] + data["klab"]["failed"]
    with Journal(tmp_path, "own") as journal:
        for row in rows:
            journal.append(Result.from_json(row))
    code, out, _ = klab("import", place / "bench.json", "--results", tmp_path, "--json")
    assert code == 0 and json.loads(out)["stored"] == 0 and json.loads(out)["known"] == len(rows)
