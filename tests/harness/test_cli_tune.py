"""`klab tune` as a user runs it, on the CPU: stopped, continued, exported; and what it says to wrong input."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake_fleet import FakeFleet
from tiny_model import CONFIG

from klab.harness.cli import _clocks, _tuning
from klab.harness.cli.main import build_app
from klab.harness.store.result import Status
from klab.harness.tune import job as jobs
from klab.harness.tune import tuner as tuners
from klab.harness.tune.replay.files import read_space
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure, UsageError

SMALL = ("tune", "--model", "config.json", "--chip", "cpu", "--isl", "32", "--osl", "8", "--batch", "2", "--results", "rows")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def in_search_and_final(trial):
    """Made up: the library takes 100 us, a configuration 60 to 90; in finals it is 150 less that, so that the ranking turns round."""
    config = trial.config.to_json_full()
    if not config:
        return 100.0
    time_us = 60.0 + 30.0 * np.random.default_rng(int(trial.config.key[:8], 16)).random()
    return 150.0 - time_us if trial.policy.seed else time_us


@pytest.fixture
def made_fleet(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("KLAB_LOCK_DIR", str(place))
    monkeypatch.setattr(tuners, "NEAR_BEST", 9.0)
    fleet = FakeFleet(in_search_and_final)
    monkeypatch.setattr(jobs, "Fleet", fleet)
    return fleet


def tune(capsys, rows, *words):
    build_app()(args=[*SMALL[:-1], rows, *words], standalone_mode=False)
    return capsys.readouterr()


def of_type(told, name):
    return [row for row in map(json.loads, told.out.splitlines()) if row.get("type") == name]


def test_a_tuning_run_is_stopped_continued_chosen_from_and_exported(made_fleet, capsys):
    words = ("--problem", "matmul 32x64x64", "--strategy", "random", "--evaluations", "4", "--out", "pack.json", "--json")

    def interrupted(trial, seen=[]):  # noqa: B006  it counts
        seen.append(trial)
        if len(seen) == 4:  # the two baselines, a candidate of the search, and in the midst of the next
            raise KeyboardInterrupt
        return in_search_and_final(trial)

    made_fleet.outcome = interrupted
    assert build_app()(args=[*SMALL[:-1], "rows", *words], standalone_mode=False) == 130
    told = capsys.readouterr()
    rows = of_type(told, "trial")
    assert "The same command goes on where it was" in told.err and of_type(told, "tuning")
    assert len(rows) == 3 and all(row["status"] == "ok" for row in rows)

    made_fleet.outcome = in_search_and_final
    told = tune(capsys, "rows", *words, "--export", "spaces")
    (tuned,), (whole,) = of_type(told, "tuned"), of_type(told, "tuning")
    assert tuned["evaluations"] == tuned["candidates"] == 4 and tuned["resumed"] >= 1 and whole["ended"] in ("evaluations", "exhausted")
    assert tuned["default_us"] > 0 and tuned["library_us"] > 0 and tuned["further_is"] == "modelled"
    measured = {row["key"] for row in of_type(told, "trial")}
    assert measured and not measured & {row["key"] for row in rows}, "what was measured before was not measured again"
    choice = json.loads(Path("pack.json").read_text())["choices"][0]
    assert choice["kernel"] == tuned["chosen"] and choice["config"] == tuned["chosen_config"]
    (exported,) = of_type(told, "export")
    space = read_space(Path(exported["file"]))
    assert len(space.space) >= 4 and space.optimum_us > 0 and any(len(samples) for samples in space.samples_us)


def test_table_json_pack_and_clock_sweep_name_the_winner_of_the_final(made_fleet, capsys, monkeypatch):
    ran = []
    finish = _tuning.show
    monkeypatch.setattr(_tuning, "show", lambda *told, **how: (ran.append((told[0], told[2])), finish(*told, **how)))
    words = ("--problem", "matmul 32x", "--strategy", "random", "--evaluations", "12", "--out", "made.json")
    told = tune(capsys, "made", *words, "--json")
    tuned, profile = ran[0]
    rows = {row["problem_key"]: row for row in of_type(told, "tuned")}
    pack = {c["wanted"]["problem_key"]: c for c in json.loads(Path("made.json").read_text())["choices"]}
    assert tuned.decided and {"trial"} == {row["type"] for row in map(json.loads, told.out.splitlines()) if "run_id" in row}
    turned = 0
    for key, (kernel, config, _) in tuned.decided.items():
        assert (rows[key]["chosen"], rows[key]["chosen_config"]) == (kernel, config) == (pack[key]["kernel"], pack[key]["config"])
        course = next(c for c in tuned.courses if c.prospect.key == key)
        turned += course.finalists(1, 1.0)[0].config.to_json_full() != config
    assert turned, "the final must have overruled a search"
    swept = _clocks.winners(tuned, profile, discover().kernels)
    assert {t.problem.key: (t.kernel, t.config.to_json_full()) for t in swept} == {k: (c["kernel"], c["config"]) for k, c in pack.items()}

    again = tune(capsys, "made", *words, "--json")
    (whole,) = of_type(again, "tuning")
    assert not whole["new"] and whole["finals_s"] == 0 and all(row["final_known"] for row in of_type(again, "tuned") if row["final_reason"])
    assert {row["problem_key"]: row["chosen_config"] for row in of_type(again, "tuned")} == {k: r["chosen_config"] for k, r in rows.items()}
    shown = tune(capsys, "made", *words).out
    assert "known from an earlier final" in shown and "(known)" in " ".join(shown.split())


def test_all_candidates_failing_is_told_though_the_library_was_measured(made_fleet, capsys):
    made_fleet.outcome = lambda trial: 100.0 if "torch" in trial.kernel else Status.CRASHED
    words = ("--problem", "matmul 32x64x64", "--strategy", "random", "--evaluations", "3", "--out", "failed.json")
    told = tune(capsys, "failed", *words)
    assert "cpu_blocked: 3 of 3 candidates failed: crashed (3)" in told.out
    (row,) = of_type(tune(capsys, "failed", *words, "--json"), "tuned")
    assert row["all_failed"] == {"matmul/cpu_blocked": {"crashed": 3}} and row["final"] == "none"


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("--strategy", "clever"), UsageError, "no strategy 'clever'; there are"),
        (("--evaluations", "0"), UsageError, "too small for one"),
        (("--gpu-seconds", "-1"), UsageError, "too small"),
        (("--seed", "-1"), UsageError, "--seed -1"),
        (("--budget", "0s"), UsageError, "no time"),
        (("--budget", "50ms"), UsageError, "not a time"),
        (("--budget", "0.01s", "--strategy", "random"), UsageError, "too small for one evaluation"),
        (("--problem", "nowhere"), UsageError, "--problem nowhere: none matches; there are"),
        (("--kernel", "no_such"), UsageError, "no_such"),
        (("--objective", "speed"), UsageError, "unknown objective"),
        (("--objective", "energy", "--strategy", "random"), CannotMeasure, "power sensor"),
        (("--pareto",), CannotMeasure, "power sensor"),
        (("--allow-clock-control", "--strategy", "random"), CannotMeasure, "for GPUs"),
        (("--phase", "denoise"), UsageError, "--phase denoise"),
        (("--kernel", "torch_matmul", "--strategy", "random"), UsageError, "nothing to tune"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_input_is_one_clear_line(place, monkeypatch, words, error, says):
    monkeypatch.chdir(place)
    monkeypatch.setenv("KLAB_LOCK_DIR", str(place))
    with pytest.raises(error, match=says) as raised:
        build_app()(args=[*SMALL, *words], standalone_mode=False)
    assert "\n" not in str(raised.value)


def test_a_dry_run_tells_the_spaces_and_measures_nothing(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    build_app()(args=[*SMALL[:-1], "none", "--dry-run", "--json"], standalone_mode=False)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(row["candidates"] for row in told if row["type"] == "target") == told[-1]["candidates"] > 50
    assert not (place / "none").exists()
