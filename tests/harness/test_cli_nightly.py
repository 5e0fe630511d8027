"""`klab nightly` as a user and as CI run it: once for real on the CPU, and on made-up processes for every way that a night can end."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from night_fleet import NightFleet, write_policy

from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Status
from klab.harness.watch.history import History

OUTPUTS = {"night.json", "junit.xml", "summary.md", "badge.json", "report.html"}
OWN = "norm/cpu_blocked"


@pytest.fixture(autouse=True)
def _no_ci(monkeypatch):
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "KLAB_RESULTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_policy(tmp_path, operators=("norm",))
    return tmp_path


@pytest.fixture
def night(place, monkeypatch, klab):
    """Run a night on a made-up fleet, a minute after the last one; returns (exit code, stdout, stderr)."""
    count, began = iter(range(100)), datetime.now(UTC)

    class Nights(datetime):
        """Made nights end within one second, and the order of nights of one second is the order of their random names."""

        @classmethod
        def now(cls, tz=None):
            return began + timedelta(minutes=run.seed)

    monkeypatch.setattr("klab.harness.watch.night.datetime", Nights)
    monkeypatch.setattr("klab.harness.tune.job.new_run_id", lambda: f"{Nights.now():%Y%m%dT%H%M%SZ}-made{run.seed:02}")
    # Drawing takes seconds, and is drawn for real above.
    monkeypatch.setattr("klab.harness.report.night_page.night_page", lambda night, earlier, **_: "<html>")

    def run(outcome=lambda trial, process: 100.0, *words):
        run.asked, run.seed = [], next(count)
        fleet = NightFleet(outcome, seed=run.seed)

        def open_fleet(kind, chips, run_id, **given):
            run.asked.append((kind, [chip.name for chip in chips], given))
            return fleet

        monkeypatch.setattr("klab.harness.fleet.open.open_fleet", open_fleet)
        return klab("nightly", "--policy", "policy.toml", "--chip", "cpu", "--out", "out", "--history", "nights", *words)

    return run


def slow(trial, process):
    return 115.0 if trial.kernel == OWN else 100.0


def nights_of(place):
    return History(place / "nights").nights("cpu")


def test_a_real_night_on_the_cpu_writes_everything(tmp_path):
    write_policy(tmp_path, operators=("norm",), measure="limit_s = 0.2\nmin_rounds = 5\nmax_rounds = 9\nthreads = 1").read_text()
    text = (tmp_path / "policy.toml").read_text().replace("processes = 3", "processes = 2")
    (tmp_path / "policy.toml").write_text(text)
    summary = tmp_path / "step.md"
    summary.write_text("before\n")
    words = ("nightly", "--policy", "policy.toml", "--chip", "cpu", "--out", "out", "--history", "nights", "--budget", "5m", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "klab.harness.cli", *words],
        cwd=tmp_path, env={**os.environ, "GITHUB_STEP_SUMMARY": str(summary), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    verdicts = [row for row in told if row["type"] == "verdict"]
    assert {(v["call"], v["series"]["role"]) for v in verdicts} == {("unknown", "chosen"), ("unknown", "library")}
    assert told[-1]["type"] == "night" and told[-1]["exit"] == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    parts = {name for name in files if name.endswith(".jsonl")}
    assert files - parts == OUTPUTS and len(parts) == 1
    rows = list(iter_results(tmp_path / "out"))
    assert len(rows) == 2 * len(verdicts) and {row.status for row in rows} == {Status.OK}
    assert all(row.build["anchors"][name]["us"] for row in rows for name in ("matmul", "copy"))
    for v in verdicts:
        own = [row.median_us for row in rows if row.kernel == v["point"]["kernel"]]
        assert v["point"]["values"] == own and len(v["point"]["anchored"]) == 2, "one entry per fresh process"
    assert len(nights_of(tmp_path)) == 1 and nights_of(tmp_path)[0].identity in next(iter(parts)).replace("_", "-")
    assert ET.parse(tmp_path / "out" / "junit.xml").getroot().tag in ("testsuites", "testsuite")
    assert summary.read_text().startswith("before\n") and "klab nightly" in summary.read_text()
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    report = ReadReport()
    assert not list(iter_results(tmp_path / "nights", report)) and not report.lines(), "nights are no rows of the store"


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_the_same_kernels_on_this_machine_are_never_slower(tmp_path, monkeypatch, klab):
    """A/A, with real processes: 20 compressed nights in a row. docs/nightly.md has what was seen."""
    measure = 'threads = 1\nround_ms = 0.5\nmin_rounds = 40\nmax_rounds = 60\nanchors = ["copy"]'
    write_policy(tmp_path, operators=("norm", "activation", "matmul"), measure=measure)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("klab.harness.report.night_page.night_page", lambda night, earlier, **_: "<html>")
    for _ in range(20):
        code, _, err = klab("nightly", "--policy", "policy.toml", "--chip", "cpu", "--out", "out", "--history", "nights")
        assert code == 0, err
    found = nights_of(tmp_path)
    assert len(found) == 20 and not [v for night in found for v in night.verdicts if v.fails]


def test_a_slow_down_ends_with_1_and_an_accepted_level_with_0(night, place):
    for _ in range(8):
        assert night()[0] == 0
    code, out, err = night(slow)
    assert code == 1 and "slower" in out and "norm" in out and "1 slower" in err
    assert ET.parse(place / "out" / "junit.xml").getroot().iter("failure")
    assert json.loads((place / "out" / "badge.json").read_text())["color"] == "red"
    code, out, err = night(slow, "--accept", "cpu norm * chosen time", "--owner", "ann", "--reason", "checks its input")
    assert code == 0 and "accepted by ann" in err and len(nights_of(place)) == 9, "nothing was measured"
    assert night(slow)[0] == 0


def test_a_broken_kernel_ends_with_1_and_a_waived_one_with_0(night, place):
    night()
    assert night(lambda t, p: Status.INCORRECT if t.kernel == OWN else 100.0)[0] == 1
    with (place / "policy.toml").open("a") as file:
        file.write('[[waiver]]\nseries = "cpu norm * chosen *"\nowner = "ann"\nexpires = 2999-01-01\n')
    code, _, err = night(lambda t, p: Status.INCORRECT if t.kernel == OWN else 100.0)
    assert code == 0 and "incorrect" in err


def test_an_expired_waiver_ends_with_1_and_is_told_everywhere(night, place):
    with (place / "policy.toml").open("a") as file:
        file.write('[[waiver]]\nseries = "h200 *"\nowner = "ann"\nexpires = 2020-02-29\n')
    code, out, err = night(lambda t, p: 100.0, "--json")
    told = "the waiver of ann for 'h200 *' expired on 2020-02-29: renew it in the policy or remove it"
    last = json.loads(out.splitlines()[-1])
    assert code == last["exit"] == 1 and last["lapsed"] == [{"series": "h200 *", "owner": "ann", "expires": "2020-02-29"}]
    assert err.count(told) == 1 and "1 expired waiver; 2 unknown of 2 series" in err
    assert told in (place / "out" / "junit.xml").read_text() and json.loads((place / "out" / "badge.json").read_text())["color"] == "red"
    code, out, err = night(pytest.fail, "--dry-run")
    assert code == 0 and told in err, "and before anything is measured"


def test_a_suspect_ends_with_3_where_it_is_asked_for(night):
    crashed = lambda t, p: Status.CRASHED if t.kernel == OWN and p == 0 else 100.0  # noqa: E731
    assert night(crashed)[0] == 0
    assert night(crashed, "--strict")[0] == 3


def test_the_night_goes_into_the_history_unless_it_is_told_not_to(night, place):
    night(lambda t, p: 100.0, "--no-record")
    assert nights_of(place) == [] and {p.name for p in (place / "out").iterdir()} >= OUTPUTS
    night()
    assert len(nights_of(place)) == 1


def test_all_words_reach_the_fleet(night):
    night(lambda t, p: 100.0, "--fleet", "ray", "--address", "here:1")
    assert night.asked == [("ray", ["cpu"], {"address": "here:1", "kernel_dirs": (), "only_devices": None})]


def test_github_reads_commands_from_stdout_and_json_stays_json(night, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    broken = lambda t, p: Status.INCORRECT if t.kernel == OWN else 100.0  # noqa: E731
    code, out, _ = night(broken)
    assert code == 1 and any(line.startswith("::error ") for line in out.splitlines())
    code, out, err = night(broken, "--json")
    assert code == 1 and all(json.loads(line) for line in out.splitlines()) and "::error " in err


def test_a_job_summary_that_cannot_be_written_fails_nothing(night, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/proc/none/summary")
    code, _, err = night()
    assert code == 0 and "no job summary" in err


def test_a_page_that_cannot_be_drawn_hides_no_verdict(night, place, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr("klab.harness.report.night_page.night_page", fail)
    code, _, err = night(lambda t, p: Status.INCORRECT if t.kernel == OWN else 100.0)
    assert code == 1 and "no report page: RuntimeError: no ink" in err and len(nights_of(place)) == 1


def test_an_interrupt_keeps_the_rows_and_makes_no_night(night, place):
    def outcome(trial, process):
        if process == 1:
            raise KeyboardInterrupt
        return 100.0

    code, _, err = night(outcome)
    assert code == 130 and "interrupted: no verdicts; 2 rows are in" in err
    assert len(list(iter_results(place / "out"))) == 2 and nights_of(place) == []


def test_a_corrupt_night_is_told_and_stops_nothing(night, place):
    night()
    (place / "nights" / "cpu" / "20200101T000000Z-bad.json").write_text('{"identity":')
    code, _, err = night()
    assert code == 0 and "20200101T000000Z-bad.json: left out of the history" in err


def test_a_dry_run_shows_the_series_and_measures_nothing(night, place):
    code, out, _ = night(pytest.fail, "--dry-run")
    assert code == 0 and "cpu norm" in out and "chosen time" in out and "minutes (modelled, not measured)" in out
    code, out, _ = night(pytest.fail, "--dry-run", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert told[-1]["series"] == len(told) - 1 == 2 and told[0]["kernels"] == [OWN]
    assert not (place / "out").exists() and not night.asked


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--policy", "none.toml"), 2, "none.toml"),
        (("--policy", "broken.toml"), 2, "track 1: unknown key modle"),
        (("--chip", "b200"), 2, "tracks nothing on b200 (it has cpu)"),
        (("--chip", "h900"), 2, "h900"),
        (("--budget", "soon"), 2, "not a time"),
        (("--profile", "none.json"), 2, "no such profile"),
        (("--results", "nowhere"), 2, "nowhere"),
        (("--fleet", "slurm"), 2, "--fleet slurm"),
        (("--kernels", "nowhere"), 2, "not a folder"),
        (("--accept", "*"), 2, "--owner"),
        (("--accept", "*", "--owner", "ann"), 2, "no series of the history"),
        (("--policy", "gpu.toml", "--chip", "h200"), 4, "H200"),
        (("--out", "/proc/klab"), 4, "/proc/klab"),
        (("--out", "policy.toml"), 4, "policy.toml"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else None,
)
def test_bad_input_is_one_clear_line_and_measures_nothing(place, klab, words, code, says):
    (place / "broken.toml").write_text('[[track]]\nmodle = "x"\n')
    (place / "gpu.toml").write_text('[[track]]\nmodel = "qwen3-0.6b"\nchip = "h200"\n')
    ended, out, err = klab("nightly", "--policy", "policy.toml", "--chip", "cpu", "--history", "nights", "--out", "out", *words)
    assert ended == code, err
    assert "Traceback" not in err and says in err and out == "" and len([line for line in err.splitlines() if line]) == 1
    assert not Path("nights").exists() and not (place / "out").exists()
