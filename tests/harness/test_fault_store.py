"""Faults of the disk, injected into nights and runs: a small file system, one that is read-only, torn files. What was stored stays.

Where a user may mount in a namespace of his own, the file system is a real one; else limits and permissions stand in for it.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from fault_table import fault
from night_fleet import NightFleet, write_policy
from night_lab import Lab, verdict
from tiny_model import CONFIG

from klab.harness.store.read import iter_results
from klab.harness.watch.history import History
from klab.harness.watch.night import exit_code
from klab.kernels.discover import discover

# Runs a night on made-up processes on a disk of its own; `before`: what befalls the disk ahead of the second pass.
SCRIPT = """
import os, pathlib, resource, signal, sys
sys.path.insert(0, {tests!r})
from night_fleet import NightFleet
from klab.harness.cli.main import main
from klab.harness.fleet import open as opening
from klab.harness.report import night_page

def limited():
    # As a full disk does: the last write is cut short, the next one is refused.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    part = next(pathlib.Path("disk/out").glob("*.jsonl"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (part.stat().st_size + 100, resource.RLIM_INFINITY))

def filled():
    with open("disk/filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        with open("disk/rest", "wb", buffering=0) as rest:
            try:
                while True:
                    rest.write(bytes(64))
            except OSError:
                pass

def outcome(trial, process):
    if process == 1 and not done:
        done.append({fill} and ({real} and filled or limited)())
    return 100.0

done = []
opening.open_fleet = lambda *_, **__: NightFleet(outcome)
night_page.night_page = lambda night, earlier, **_: "<html>"
sys.argv = ["klab", "nightly", "--policy", "policy.toml", "--chip", "cpu", "--out", "disk/out", "--history", "nights"]
try:
    main()
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.system("mkdir -p kept && cp -r disk/. kept/")
"""


@cache
def may_mount() -> bool:
    """Can this user mount in a namespace of his own?"""
    if not shutil.which("unshare"):
        return False
    done = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False, timeout=30)
    return done.returncode == 0


def night_on(place, *, mounted="", fill=False):
    """A night in a process of its own whose output folder is on a disk with these options of tmpfs; (exit code, stderr)."""
    real = bool(mounted) and may_mount()
    script = SCRIPT.format(tests=str(Path(__file__).parent), fill=fill, real=real)
    command = [sys.executable, "-c", script]
    if real:
        shell = 'mount -t tmpfs -o "$1" tmpfs disk && shift && exec "$@"'
        command = ["unshare", "-Urm", "sh", "-c", shell, "sh", mounted, *command]
    (place / "disk").mkdir(exist_ok=True)
    env = {**os.environ, "KLAB_LOCK_DIR": str(place)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.fixture(autouse=True)
def _no_ci(monkeypatch):
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "KLAB_RESULTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def place(tmp_path):
    write_policy(tmp_path, operators=("norm",))
    return tmp_path


def test_a_disk_that_is_full_at_the_start_ends_the_night_before_it_begins(place, klab, monkeypatch):
    declared = fault("disk-full-at-start")
    if may_mount():
        code, err = night_on(place, mounted="size=256k")
    else:
        monkeypatch.chdir(place)
        monkeypatch.setattr("klab.harness.store.journal.LEAST_FREE_BYTES", 1 << 62)
        code, _, err = klab("nightly", "--policy", "policy.toml", "--chip", "cpu", "--out", "disk/out", "--history", "nights")
    assert code == declared.exit_code and declared.says in err and declared.row == ""
    assert not list((place / "disk").rglob("*.jsonl")) and History(place / "nights").nights("cpu") == []


def test_a_disk_that_fills_up_in_the_midst_of_a_night(place):
    declared = fault("disk-fills")
    code, err = night_on(place, mounted="size=9m", fill=True)
    assert code == declared.exit_code and declared.says in err, err
    rows = list(iter_results(place / "kept" / "out"))
    assert len(rows) == 2 and {row.status for row in rows} == {"ok"}, "those of the first pass; the torn one was taken back"
    if may_mount():
        assert "cannot write" in err and "night.json" in err
        (night,) = History(place / "nights").nights("cpu")
        assert declared.says in night.incomplete and {v.call for v in night.verdicts} == {declared.verdict}


def test_a_read_only_disk_ends_the_night_before_it_begins(place):
    declared = fault("read-only")
    if not may_mount():
        if os.geteuid() == 0:
            pytest.skip("root writes to read-only folders, and may not mount here")
        (place / "disk").mkdir()
        (place / "disk").chmod(0o555)
    code, err = night_on(place, mounted="ro,size=9m")
    assert code == declared.exit_code and declared.says in err, err
    assert History(place / "nights").nights("cpu") == []


def test_a_torn_line_is_told_and_its_trial_measured_again(tmp_path, klab, monkeypatch):
    declared = fault("torn-line")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    words = ("measure", "--model", "config.json", "--chip", "cpu", "--isl", "32", "--osl", "8", "--batch", "2", "--phase", "decode",
             "-k", "norm/torch_norm", "--results", "rows", "--json")  # fmt: skip
    assert klab(*words)[0] == 0
    (part,) = (tmp_path / "rows").glob("*.jsonl")
    before = list(iter_results(part))
    os.truncate(part, part.stat().st_size - 40)
    code, out, err = klab(*words)
    outcome = json.loads(out.splitlines()[-1])
    assert code == declared.exit_code and declared.says in err and str(part.name) in err
    assert (outcome["known"], outcome["new"]) == (len(before) - 1, {declared.row: 1})
    assert {row.key for row in iter_results("rows")} == {row.key for row in before}


def test_a_torn_night_is_told_and_the_others_judge(tmp_path):
    declared = fault("torn-night")
    lab = Lab(tmp_path, discover(only=("norm", "activation", "embedding")), operators=("norm",))
    lab.nights(9)
    torn = sorted((tmp_path / "nights" / "cpu").glob("*.json"))[-1]
    os.truncate(torn, torn.stat().st_size // 2)
    lab.history = History(tmp_path / "nights")
    night = lab.night(NightFleet(seed=77))
    found = verdict(night, "norm chosen")
    assert (found.call, exit_code(night)) == (declared.verdict, declared.exit_code)
    assert any(torn.name in note and declared.says in note for note in night.notes) and torn.exists()
    assert len(lab.history.nights("cpu")) == 9
