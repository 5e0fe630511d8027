"""Collectives: the model behaves, tables interpolate and say what they are, and ranks on this CPU are really measured."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from klab.harness.catalog import find_chip, find_model
from klab.harness.cli.main import build_app
from klab.harness.fleet import devices as fleet_devices
from klab.harness.measure import communication as ranks
from klab.harness.measure import lock
from klab.harness.plan import plan, scenario_for
from klab.harness.plan.communication import (
    BOARD_GPUS,
    KINDS,
    Collective,
    Point,
    Table,
    exchanges,
    messages,
    modelled,
    read_table,
    sweep,
    total_us,
)  # fmt: skip
from klab.kernels.errors import CannotMeasure, UsageError

H200 = find_chip("h200")


def invoke(*words):
    return CliRunner().invoke(build_app(), ["communication", *words])


@given(kind=st.sampled_from(KINDS), gpus=st.integers(2, 16), size=st.integers(1, 1 << 30))
def test_the_model_grows_with_the_message_and_never_beats_the_wire(kind, gpus, size):
    one, more = (modelled(Collective(kind, gpus, s), 450.0) for s in (size, 2 * size))
    assert one.origin == "modelled" and 6 < one.us <= more.us
    # In-switch reduction sends less than a ring's 2 (n - 1)/n: at least the tensor itself goes up once.
    least = size * (gpus - 1) / gpus / 450e3
    assert one.us >= least


def test_the_model_is_what_the_sources_say():
    # NCCL's maintainer: all-reduce of a large tensor on 8 H100 reaches a bus bandwidth of 480 GB/s, the others about 370.
    big = Collective("all_reduce", 8, 4 << 30)
    assert big.wire_bytes / modelled(big, 450.0).us / 1e3 == pytest.approx(480, rel=0.01)
    big = Collective("all_gather", 8, 4 << 30)
    assert big.wire_bytes / modelled(big, 450.0).us / 1e3 == pytest.approx(370, rel=0.01)
    assert modelled(Collective("all_gather", 2, 8), 450.0).us == pytest.approx(6.6 + 0.6, rel=0.01)


def table():
    points = (Point("all_reduce", 2, 1000, 10.0, 9.0, 11.0, 15), Point("all_reduce", 2, 100_000, 40.0, 39.0, 41.0, 15))
    return Table("cpu", "gloo", points, {"torch": "2.13.0"})


def test_a_table_interpolates_between_its_sizes_and_says_so():
    assert table().expected(Collective("all_reduce", 2, 1000), None).us == 10.0
    between = table().expected(Collective("all_reduce", 2, 10_000), None)
    assert between.us == pytest.approx(20.0) and between.origin == "measured" and "between" in between.how
    for other in (Collective("all_reduce", 4, 1000), Collective("all_reduce", 2, 10**7), Collective("all_gather", 2, 1000)):
        assert table().expected(other, 450.0).origin == "modelled"
        with pytest.raises(UsageError, match="no link"):
            table().expected(other, None)
    us, share = total_us({Collective("all_reduce", 2, 1000): 3, Collective("all_gather", 2, 1000): 1}, table(), 450.0)
    assert 0.5 < share < 1 and us > 30


def test_a_table_survives_its_file_and_a_foreign_one_is_named(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table().to_json()))
    assert read_table(path) == table()
    for text in ("{}", "[]", "not json", '{"schema": 1}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="klab communication"):
            read_table(path)
    path.write_text(json.dumps(table().to_json() | {"schema": 9}))
    with pytest.raises(UsageError, match="schema 9"):
        read_table(path)


@pytest.mark.parametrize("change", [
    {"median_us": float("nan")}, {"median_us": float("inf")}, {"median_us": 0}, {"median_us": -1.0}, {"median_us": "10"},
    {"ci_low_us": 10.5}, {"ci_high_us": True}, {"message_bytes": 1000.5}, {"message_bytes": 0}, {"gpus": 1}, {"gpus": True},
    {"rounds": 1.5}, {"kind": "broadcast"}, {"message_bytes": 100_000}, {"median_us": 10**400}, {"more": 1},
])  # fmt: skip
def test_a_table_with_an_impossible_or_a_doubled_point_is_refused(tmp_path, change):
    data = json.loads(json.dumps(table().to_json()))
    data["points"][0] |= change
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="klab communication wrote") as found:
        read_table(path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("chip", "backend", "says"), [("h100", "nccl", "measured on h100"), ("h200", "gloo", "with gloo")])
def test_a_table_of_another_chip_is_never_called_measured(tmp_path, chip, backend, says):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table().to_json() | {"chip": chip, "backend": backend}))
    found = invoke("-c", "h200", "--gpus", "2", "--table", str(path))
    assert isinstance(found.exception, UsageError) and says in str(found.exception)
    path.write_text(json.dumps(table().to_json() | {"chip": "h200", "backend": "nccl"}))
    assert invoke("-c", "h200", "--gpus", "2", "--table", str(path), "--json").exit_code == 0


def test_beyond_a_board_the_model_says_what_it_assumes():
    assert "one board" not in modelled(Collective("all_reduce", BOARD_GPUS, 4096), 450.0).how
    assert "as if all were on one board" in modelled(Collective("all_reduce", 2 * BOARD_GPUS, 4096), 450.0).how


def gpus_here(monkeypatch, *names):
    found = [SimpleNamespace(name=name, multi_processor_count=132, major=9, minor=0) for name in names]
    devices = [(fleet_devices.Device(f"GPU-{i}", p.name, "cuda", i), p) for i, p in enumerate(found)]
    monkeypatch.setattr(fleet_devices, "_cuda", lambda: devices)


def test_nccl_measures_only_the_asked_chip(monkeypatch):
    asked = ("-c", "h200", "--gpus", "2", "--backend")
    gpus_here(monkeypatch, "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3")
    found = invoke(*asked, "nccl")
    assert isinstance(found.exception, CannotMeasure) and "not in this machine" in str(found.exception)
    # By itself klab then models, and says so.
    rows = [json.loads(line) for line in invoke(*asked, "auto", "--json").stdout.splitlines()]
    assert {row["origin"] for row in rows} == {"modelled"}
    gpus_here(monkeypatch, "NVIDIA H200", "NVIDIA H100 80GB HBM3")
    found = invoke(*asked, "nccl")
    assert isinstance(found.exception, CannotMeasure) and "1 are here" in str(found.exception)


def test_nccl_holds_the_lock_of_each_gpu_it_uses(monkeypatch, tmp_path):
    monkeypatch.setenv("KLAB_LOCK_DIR", str(tmp_path))
    gpus_here(monkeypatch, "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H200", "NVIDIA H200")
    held = []

    def measure(wanted, *, backend, devices):
        assert (backend, devices) == ("nccl", [1, 2])
        for i in range(4):
            try:
                with lock.exclusive(f"GPU-{i}"):
                    pass
            except CannotMeasure:
                held.append(i)
        return [Point(one.kind, one.gpus, one.message_bytes, 10.0, 9.0, 11.0, 15) for one in wanted]

    monkeypatch.setattr(ranks, "measure", measure)
    asked = ("-c", "h200", "--gpus", "2", "--json")
    found = invoke(*asked)
    assert found.exit_code == 0 and held == [1, 2]
    with lock.exclusive("GPU-2"):
        found = invoke(*asked)
    assert isinstance(found.exception, CannotMeasure) and "GPU-2 is being measured" in str(found.exception)


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_a_parent_that_is_killed(tmp_path, how):
    # The only rank that is started waits for the second, which never comes.
    job = {"collectives": [], "backend": "gloo", "folder": str(tmp_path), "gpus": 2, "devices": [0, 1]}
    code = f"import os, time; from klab.harness.measure import communication as c; j = {job!r} | {{'parent': os.getpid()}}\n" \
        "print(c._start(j, 0).pid, flush=True); time.sleep(60)"  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        os.kill(parent.pid, how)
    finally:
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_ranks_are_reaped(monkeypatch):
    started = []
    start = ranks._start
    monkeypatch.setattr(ranks, "_start", lambda job, rank: started.append(start(job, rank)) or started[-1])
    monkeypatch.setattr(ranks, "START_LIMIT_S", 0.0)
    with pytest.raises(CannotMeasure, match="did not end"):
        ranks.measure([Collective("all_reduce", 2, 64)], backend="gloo", limit_s=0.1)
    assert [rank.returncode for rank in started] == [-signal.SIGKILL] * 2


def test_the_messages_are_the_plans():
    model = find_model("deepseek-v3")
    made = plan(model, H200, scenario_for(model, H200, tp=8, batches=(4,), expert_parallel=True))
    decode = messages(made)["decode", 4]
    # Two per layer, and one behind the embedding: 4 tokens x 7168 x 2 bytes.
    assert decode[Collective("all_reduce", 8, 4 * 7168 * 2)] == 2 * 61 + 1
    # The vocabulary of 129280 is padded to 64 x 8 x 253.
    assert decode[Collective("all_gather", 8, 4 * 129536 * 2)] == 1
    assert exchanges(made)["decode", 4] == {Collective("all_to_all", 8, 4 * 8 * 7168 * 2 // 8): 2 * 58}
    assert not messages(plan(model, H200, scenario_for(model, H200, batches=(4,))))


def test_ranks_on_this_machine_are_checked_and_timed():
    points = ranks.measure([Collective(kind, 2, 4096) for kind in KINDS], backend="gloo")
    assert [p.kind for p in points] == list(KINDS)
    assert all(0 < p.ci_low_us <= p.median_us <= p.ci_high_us for p in points)


def test_a_rank_that_fails_ends_the_others():
    with pytest.raises(CannotMeasure, match="a rank of 2"):
        ranks.measure([Collective("all_reduce", 2, 64)], backend="no-such-backend")


def test_impossible_requests():
    for arguments in (("all_reduce", 1, 8), ("broadcast", 2, 8), ("all_gather", 2, 0)):
        with pytest.raises(UsageError):
            Collective(*arguments)
    assert {one.kind for one in sweep(4)} == set(KINDS)


@pytest.mark.parametrize(("words", "says"), [
    (("-c", "h200"), "two or more"),
    (("-c", "cpu", "--gpus", "2"), "no link_gb_per_s"),
    (("-c", "h200", "--gpus", "8", "--backend", "gloo"), "--chip cpu"),
    (("-c", "h200", "--gpus", "8", "--backend", "mpi"), "--backend"),
    (("-c", "cpu", "--gpus", "2", "--backend", "nccl"), "--backend gloo"),
])  # fmt: skip
def test_the_verb_refuses_in_one_line(words, says):
    found = invoke(*words)
    assert isinstance(found.exception, UsageError | CannotMeasure) and says in str(found.exception)


def test_the_verb_models_without_gpus():
    words = [sys.executable, "-m", "klab.harness.cli", "communication", "-c", "h200", "--gpus", "8", "--backend", "none", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(sweep(8)) and {row["origin"] for row in rows} == {"modelled"}
