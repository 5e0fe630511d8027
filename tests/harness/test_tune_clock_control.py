"""Clocks and power limit against a board of paper: put back on every exit, and by the next start after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from contest import CPU
from made_results import made
from paper_board import GPU, USUAL, Board
from typer.testing import CliRunner

from klab.harness.choose.choose import choose
from klab.harness.cli.main import build_app
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.read import iter_results
from klab.harness.tune import clock_sweep
from klab.harness.tune.clock_control import clock_control, put_back
from klab.harness.tune.clock_state import left_changed, state_path
from klab.harness.tune.job import Job
from klab.harness.tune.pareto import front_of, points_of
from klab.kernels.contract import NoConfig
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.matmul.problem import Matmul


@pytest.fixture
def board(tmp_path, monkeypatch):
    monkeypatch.setenv("KLAB_LOCK_DIR", str(tmp_path))
    return Board(tmp_path / "board.json")


def control(board, **how):
    return clock_control(GPU, allowed=True, library=board, **how)


def test_nothing_without_the_option(board):
    with pytest.raises(UsageError, match="--allow-clock-control"), clock_control(GPU, allowed=False, library=board):
        pytest.fail("not entered")
    with pytest.raises(CannotMeasure, match="does not know GPU-other"), clock_control("GPU-other", allowed=True, library=board):
        pytest.fail("not entered")
    assert board.calls == [] and not state_path(GPU).exists()


def test_the_axes_are_what_the_board_takes(board):
    with control(board) as clocks:
        axes = clocks.axes(clocks=4, limits=3)
        assert axes.power_limits_w == (700.0, 450.0, 200.0) and axes.power_limit_w == 700.0
        assert axes.sm_clocks_mhz[0] == 1980 and axes.sm_clocks_mhz[-1] == 345 and len(axes.sm_clocks_mhz) == 4
        for wrong in ({"sm_clock_mhz": 1501}, {"power_limit_w": 900.0}, {"power_limit_w": 100.0}):
            with pytest.raises(UsageError, match="takes"):
                clocks.set(**wrong)
        for clock in axes.sm_clocks_mhz:
            clocks.set(sm_clock_mhz=clock)
    assert board.settings == USUAL


def test_what_was_set_is_put_back_and_looking_changes_nothing(board):
    with control(board):
        pass
    assert board.calls == []
    board.settings = {"power_limit_mw": 650_000, "locked": None}
    with control(board) as clocks:
        clocks.set(power_limit_w=500.0)
        clocks.set(power_limit_w=300.0, sm_clock_mhz=1500)
        assert board.settings == {"power_limit_mw": 300_000, "locked": [1500, 1500]}
        assert json.loads(state_path(GPU).read_text()) == {"device": GPU, "power_limit_mw": 650_000, "clocks_locked": True}
    assert board.settings == {"power_limit_mw": 650_000, "locked": None} and not state_path(GPU).exists()
    with pytest.raises(CannotMeasure, match="has ended"):
        clocks.set(power_limit_w=300.0)
    assert board.settings["power_limit_mw"] == 650_000


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_puts_back(board, error):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error), control(board) as clocks:
        clocks.set(power_limit_w=300.0, sm_clock_mhz=1500)
        raise error
    assert board.settings == USUAL and not state_path(GPU).exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("refused", "what"), [("power", "power limit"), ("lock", "SM clock")])
def test_without_permission_nothing_stays_changed(board, refused, what):
    board.refuses = {refused}
    with control(board) as clocks, pytest.raises(CannotMeasure) as told:
        clocks.set(power_limit_w=300.0, sm_clock_mhz=1500)
    assert what in str(told.value) and "root" in str(told.value) and "\n" not in str(told.value)
    assert board.settings == USUAL and not state_path(GPU).exists()


def test_what_cannot_be_put_back_is_said_and_stays_noted(board):
    with pytest.raises(CannotMeasure, match=r"nvidia-smi -i GPU-paper -pl 700$"), control(board) as clocks:
        clocks.set(power_limit_w=300.0, sm_clock_mhz=1500)
        board.refuses = {"power"}
    assert board.settings == {"power_limit_mw": 300_000, "locked": None}
    board.refuses = set()
    with control(board):
        assert board.settings == USUAL, "the next start puts back first"


def test_one_controller_at_a_time(board):
    with control(board) as clocks:
        clocks.set(power_limit_w=300.0)
        assert left_changed() == [], "its process lives"
        with pytest.raises(CannotMeasure, match="another process controls"), control(board):
            pytest.fail("not entered")
        assert board.settings["power_limit_mw"] == 300_000
    assert board.settings == USUAL


@pytest.mark.parametrize("text", ["{torn", '{"device": "GPU-paper", "power_limit_mw": -5, "clocks_locked": true}', "[]"])
def test_a_note_that_says_nothing_is_not_guessed_at(board, text):
    state_path(GPU).write_text(text)
    with pytest.raises(CannotMeasure, match="does not tell what clocks were"), control(board):
        pytest.fail("not entered")
    assert board.calls == [] and left_changed() == []


def test_in_another_thread_the_block_puts_back_too(board):
    def use():
        with control(board) as clocks:
            clocks.set(power_limit_w=300.0)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert board.settings == USUAL


def test_a_sweep_measures_at_each_setting_and_puts_back_between(board, tmp_path, monkeypatch):
    at = []

    class Fleet:
        size = 1

        def run(self, trials, store, *, deadline=None, stop=None):
            policies = {(t.policy.sm_clock_mhz, t.policy.power_limit_w, t.policy.energy) for t in trials}
            at.append((*policies, board.settings))
            for trial in trials:
                clock = trial.policy.sm_clock_mhz or 1980
                energy = {"energy_j": clock / 4e4, "energy_ci_low_j": clock / 4.01e4, "energy_ci_high_j": clock / 3.99e4}
                row = made(trial.problem, "torch", samples=[2e5 / clock] * 20, policy=trial.policy.to_json(), key=trial.key, **energy)
                store(row)

    monkeypatch.setattr(clock_sweep, "SETTLE_S", 0.0)
    trial = Trial("matmul/torch", "0" * 16, Matmul(16, 64, 64), NoConfig(), "cpu", Policy())
    job = Job(CPU, tmp_path / "rows")
    with control(board) as clocks:
        rows = clock_sweep.sweep(job, Fleet(), clocks, [trial], clocks.axes(clocks=2, limits=2))
        assert board.settings == USUAL
    assert at == [
        ((0, 0.0, True), USUAL),
        ((1980, 0.0, True), USUAL | {"locked": [1980, 1980]}),
        ((345, 0.0, True), USUAL | {"locked": [345, 345]}),
        ((0, 200.0, True), USUAL | {"power_limit_mw": 200_000}),
    ]
    assert len({row.key for row in rows}) == 4 and len(list(iter_results(job.folder))) == 4
    front = front_of(points_of(rows))
    assert [p.config for p in front.points][-1] == {"sm_clock_mhz": 345}, "slow, and the least energy"
    # A time at a clock of one's own choosing is never taken for one of the device as it is.
    (choice,) = choose(rows, None).choices
    assert choice.evidence.candidates == 1 and choice.evidence.median_us == pytest.approx(2e5 / 1980)
    with pytest.raises(UsageError, match="one device"), control(board) as clocks:
        clock_sweep.sweep(job, type("Two", (), {"size": 2})(), clocks, [trial])


CHILD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from paper_board import GPU, Board
from klab.harness.tune.clock_control import clock_control
how = sys.argv[3]
manager = clock_control(GPU, allowed=True, library=Board(sys.argv[2]))
clocks = manager.__enter__()
clocks.set(power_limit_w=300.0, sm_clock_mhz=1500)
print("set", flush=True)
if how == "exit":
    sys.exit(3)  # the block is never left: the exit of the process puts back
for _ in range(600):  # a signal that comes just before a sleep begins is heard at its end
    time.sleep(0.1)
"""


def child(board, tmp_path, how):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(board.path), how],
        stdout=subprocess.PIPE,
        env=os.environ | {"KLAB_LOCK_DIR": str(tmp_path)},
    )
    assert process.stdout.readline() == b"set\n"
    return process


def test_ended_by_signals_and_at_exit(board, tmp_path):
    for how, code in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT), ("exit", 3)):
        process = child(board, tmp_path, str(how))
        if how != "exit":
            assert board.settings == {"power_limit_mw": 300_000, "locked": [1500, 1500]}
            process.send_signal(how)
        assert process.wait(timeout=30) == code, how
        process.stdout.close()
        assert board.settings == USUAL and left_changed() == [], how


def test_killed_at_once_and_put_back_by_the_next(board, tmp_path, monkeypatch):
    process = child(board, tmp_path, "sleep")
    process.kill()
    process.wait(timeout=30)
    process.stdout.close()
    assert board.settings == {"power_limit_mw": 300_000, "locked": [1500, 1500]}
    (before,) = left_changed()
    assert before.remedy == "nvidia-smi -i GPU-paper -pl 700 && nvidia-smi -i GPU-paper -rgc"
    monkeypatch.setattr("klab.harness.measure.probes.examine", lambda folder: [])
    told = CliRunner().invoke(build_app(), ["doctor", "--json"], catch_exceptions=False)
    (finding,) = map(json.loads, told.stdout.splitlines())
    assert finding["finding"].endswith("put back: GPU-paper: power limit 700 W, SM clock not locked") and before.remedy in finding["remedy"]
    assert board.settings["locked"], "the doctor says it, and touches nothing unasked"
    with pytest.raises(UsageError):
        put_back(allowed=False, library=board)
    monkeypatch.setattr("klab.harness.measure.nvml.load", lambda: board)
    told = CliRunner().invoke(build_app(), ["doctor", "--restore-clocks"], catch_exceptions=False)
    assert "put back: GPU-paper" in told.stderr and board.settings == USUAL and left_changed() == []
    assert put_back(allowed=True, library=object()) == [], "no board is asked where nothing is left"
