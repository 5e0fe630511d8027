"""What a report rests on: the runs that are named, the choice before the newest run, and a large store told as a small one is."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_nights import history
from made_results import failed, made
from made_store import write_store

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.profile import Profile
from klab.harness.plan import plan as make_plan
from klab.harness.report.figures.style import Figure
from klab.harness.report.frames import standing
from klab.harness.report.gather import gather, story_of, text_bytes
from klab.harness.report.guard import guarded
from klab.harness.report.limits import Limits
from klab.harness.report.request import Request
from klab.harness.report.runs import named_runs, runs_of
from klab.harness.report.subject import Story
from klab.harness.report.write import story_from
from klab.harness.store.compact import compact
from klab.harness.store.journal import Journal
from klab.harness.store.result import Result, Status
from klab.harness.watch.history import History
from klab.kernels.contract import Problem, canonical_json
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

PROBLEMS: list[Problem] = [Matmul(m, 64, 64) for m in (1, 8, 64)] + [DecodeAttention(kv_lens=(512,), heads=8, kv_heads=8, head_dim=64)]
FAILURES = (Status.CRASHED, Status.TIMEOUT, Status.COMPILE_ERROR, Status.INCORRECT, Status.THROTTLED, Status.UNSUPPORTED)


def unknown(chip: str, device: str) -> Limits:
    return Limits(None, "no limits here")


def random_rows(rng: random.Random, count: int, devices: int = 1) -> list[Result]:
    """Rows of a few problems, kernels and configurations in a few runs: repeated, failed since, wrong, unchecked, throttled, warm, of
    other code, of other devices, screened and published.
    """
    rows = []
    for _ in range(count):
        problem, kernel = rng.choice(PROBLEMS), rng.choice(("torch", "triton_a", "triton_b", "cuda_c"))
        config = {} if kernel == "torch" else {"block": rng.choice((16, 32, 64)), "warps": rng.choice((4, 8))}
        chip = rng.choice(("h200", "h200", "cpu"))
        device = rng.randrange(devices)
        run, hour = f"run-{(at := rng.randrange(6))}'s", at
        common: dict[str, Any] = {
            "chip": chip, "config": config, "run_id": run, "device_uuid": f"GPU-{device}", "epoch": f"epoch-{rng.randrange(2)}",
            "recorded_at": f"2026-11-2{hour}T{rng.randrange(24):02d}:00:{rng.randrange(60):02d}Z",
        }  # fmt: skip
        slow = 1 + 0.06 * device
        if devices > 1 and rng.random() < 0.7:
            common["build"] = {"anchors": {name: {"us": [slow * (50 + n / 10) for n in range(6)]} for name in ("matmul", "copy")}}
        if rng.random() < 0.25:
            status = rng.choice(FAILURES)
            row = failed(
                problem, kernel, status, rng.choice(("", "this", "it's that")), **common, kind=rng.choice(("measured", "screened"))
            )
        else:
            level = {"torch": 100, "triton_a": 97, "triton_b": 104, "cuda_c": 150}[kernel] * slow * rng.choice((1.0, 1.01, 1.02, 1.3))
            row = made(problem, kernel, level_us=level, rounds=rng.choice((4, 6, 12)), seed=rng.randrange(1000), **common)
            odd: dict[str, Any] = rng.choice(
                [{}] * 8
                + [
                    {"checks": 0}, {"error": 1.0}, {"l2_state": "warm"}, {"source_digest": "older"}, {"policy": {"sm_clock_mhz": 1200}},
                    {"policy": {"seed": 1}}, {"marked": (1,) * len(row.samples_us)}, {"marked": ()}, {"kind": "reference"},
                    {"ci_low_us": None}, {"device": "another's device"},
                    {"energy_j": 1e-3, "energy_ci_low_j": 9e-4, "energy_ci_high_j": 2e-3},
                    {"build": {"contest": {"id": f"{run} {problem.key}"}}},
                ]
            )  # fmt: skip
            row = dataclasses.replace(row, **odd)
        rows.append(row)
    return rows


def write(folder: Path, rows: list[Result], rng: random.Random) -> None:
    """Several files, some packed, with copies of rows, foreign and corrupt lines, and torn ends."""
    for number in range(4):
        mine = rows[number::4]
        text = [json.dumps(row.to_json()) for row in mine]
        text += rng.sample(text, min(3, len(text)))
        text.insert(1, '{"key": "foreign"}')
        text.insert(0, "not JSON")
        text.append("")
        text.append(json.dumps(mine[0].to_json() | {"schema": 99}))
        whole = ("\n".join(text) + "\n").encode()
        if number == 3:
            packed = gzip.compress(whole)
            (folder / f"{number}.jsonl.gz").write_bytes(packed[:-9] if rng.random() < 0.5 else packed)
        else:
            (folder / f"{number}.jsonl").write_bytes(whole + (b'{"key": "torn", "st' if number == 1 else b""))


def texts(profiles: Mapping[str, Profile]) -> dict[str, str]:
    return {chip: profile.to_text() for chip, profile in profiles.items()}


# Two devices and packed into Parquet, runs that are named, neither. Every seed up to 60 was tried; each takes a second.
@pytest.mark.parametrize("seed", [int(seed) for seed in os.environ.get("KLAB_GATHER_SEEDS", "5 3 12").split()])
def test_a_large_store_is_told_as_a_small_one(seed: int, tmp_path: Path) -> None:
    """The same choices with the same evidence, counts and notes; every standing row there, and what is there whole is the row itself."""
    pytest.importorskip("duckdb")
    rng = random.Random(seed)
    write(tmp_path, random_rows(rng, 160, devices=1 + seed % 2), rng)
    if seed % 3 == 2:
        compact(tmp_path)
    request = Request(limits=unknown, runs=("run-1", "run-2", "latest") if seed % 4 == 3 else ())
    small, large = gather([tmp_path], request), gather([tmp_path], request, large_bytes=0)
    assert [one.chip for one in small.subjects] == [one.chip for one in large.subjects] == ["cpu", "h200"]
    assert texts({one.chip: one.profile for one in small.subjects}) == texts({one.chip: one.profile for one in large.subjects})
    assert any(one.profile.choices for one in small.subjects)
    for one, other in zip(small.subjects, large.subjects, strict=True):
        assert sorted(row.key for row in one.rows) == sorted(row.key for row in (*other.rows, *other.light)) and not other.left_out
        stored = {json.dumps(row.to_json()) for row in one.rows}
        assert {json.dumps(row.to_json()) for row in other.rows} <= stored
        assert [row.key for row in one.reference] == [row.key for row in other.reference]
    assert small.statuses == large.statuses and small.newest_run == large.newest_run
    assert texts(small.before) == texts(large.before)
    assert small.failed_before == large.failed_before
    assert len(small.reading) + 1 == len(large.reading), "what was passed over, and that the store is large"


def test_a_plan_and_chips_narrow_a_large_store_too(tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    plan = make_plan(find_model("qwen3-0.6b"), find_chip("h200"))
    with Journal(tmp_path, "run") as journal:
        for problem in [*plan.problems()[:3], PROBLEMS[0]]:
            for kernel, chip in (("torch", "h200"), ("triton_a", "h200"), ("torch", "cpu")):
                journal.append(made(problem, kernel, chip=chip))
    request = Request(plans={"h200": plan}, limits=unknown)
    (small,), (large,) = (gather([tmp_path], request, large_bytes=size).subjects for size in (1 << 30, 0))
    assert len(small.rows) == 6 and small.profile.to_text() == large.profile.to_text() and len(large.profile.choices) == 3
    assert {row.key for row in large.rows} == {row.key for row in small.rows}
    empty = gather([tmp_path], Request(chips=("b200",), limits=unknown), large_bytes=0)
    assert [one.chip for one in empty.subjects] == ["b200"] and not empty.subjects[0].rows and not empty.newest_run


def test_a_choice_of_a_large_store_is_compared_with_its_default_however_slow(tmp_path: Path) -> None:
    """What a choice gains over its kernel's default is told also where the default is far behind what competes."""
    pytest.importorskip("duckdb")
    catalogue, problem = discover(), Matmul(64, 256, 256)
    kernel = catalogue.kernels["matmul/triton_tiled"]
    default = kernel.default(problem, find_chip("h200")).to_json_full()
    times = {50.0: 2 * default["block_m"], 400.0: default["block_m"], 320.0: 4 * default["block_m"]}
    with Journal(tmp_path, "run") as journal:
        journal.append(made(problem, "torch", level_us=300.0))
        for n, (us, block) in enumerate(times.items()):
            config = default | {"block_m": block}
            row = made(problem, "triton_tiled", config=dict(reversed(config.items())), level_us=us, run_id=f"run-{n}")
            journal.append(dataclasses.replace(row, source_digest=kernel.source_digest))
    (small,), (large,) = (gather([tmp_path], Request(catalogue=catalogue), large_bytes=size).subjects for size in (1 << 30, 0))
    assert small.profile.to_text() == large.profile.to_text()
    told = large.profile.choices[0].evidence.default
    assert told is not None and told.config == default and told.ratio == pytest.approx(8, rel=0.05)
    assert default in [row.config for row in large.rows], "the default's row is on the page, with its samples"


def test_what_does_not_fit_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("duckdb")
    write_store(tmp_path, 1500, problems=3, runs=5, chips=("h200",))
    whole = gather([tmp_path], Request(limits=unknown))
    monkeypatch.setattr("klab.harness.report.sift.SHOWN_WHOLE", 10)
    monkeypatch.setattr("klab.harness.report.sift.SHOWN_LIGHT", 40)
    sifted = gather([tmp_path], Request(limits=unknown), large_bytes=0)
    (one,) = sifted.subjects
    assert len(one.light) == 40 and sifted.statuses == whole.statuses
    assert sum(one.left_out.values()) == sum(whole.statuses.values()) - 40 - len(one.rows)
    named = {(c.wanted.problem_key, c.kernel, canonical_json(c.config)) for c in one.profile.choices}
    assert named <= {(r.problem_key, r.kernel, canonical_json(r.config)) for r in one.rows if r.samples_us}, "a choice is always whole"
    assert not any(row.samples_us for row in one.light) and f"{sum(one.left_out.values()):,} are counted only" in sifted.reading[-1]
    light = standing(sifted)[lambda frame: frame["light"] & (frame["status"] == "ok")]
    assert (light["rounds"] == 20).all() and (light["gpu_s"] > 0).all(), "what a light row cost is still known"


def test_what_fails_newly_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed rows of every kernel and status are on the page, of the newest run and of those before it."""
    pytest.importorskip("duckdb")
    write_store(tmp_path, 2000, problems=2, runs=4, chips=("h200",), rounds=5)
    monkeypatch.setattr("klab.harness.report.sift.SHOWN_LIGHT", 150)
    few, everything = (gather([tmp_path], Request(limits=unknown), large_bytes=size).subjects[0] for size in (0, 1 << 30))
    seen, there = ({(row.kernel, row.status, row.run_id == "run-0003") for row in one.failed} for one in (few, everything))
    assert seen == there and len(there) > 10 and len(few.failed) < len(everything.failed)


def test_without_duckdb_a_large_store_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path, "run") as journal:
        journal.append(made(PROBLEMS[0]))
    monkeypatch.setattr("klab.harness.report.gather.importlib.util.find_spec", lambda name: None)
    told = gather([tmp_path], Request(limits=unknown), large_bytes=0)
    assert told.statuses == {"ok": 1} and "without DuckDB" in told.reading[0]


def test_where_duckdb_gives_up_every_row_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("duckdb")
    with Journal(tmp_path, "run") as journal:
        journal.append(made(PROBLEMS[0]))
    monkeypatch.setattr("klab.harness.store.index.Index.__init__.__kwdefaults__", {"memory": "no memory", "threads": 2})
    told = gather([tmp_path], Request(limits=unknown), large_bytes=0)
    assert told.statuses == {"ok": 1} and "DuckDB could not sift it" in told.reading[0]


def test_the_size_of_a_store_is_told_from_its_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 100)
    (tmp_path / "b.jsonl.gz").write_bytes(b"x" * 100)
    (tmp_path / "c.txt").write_bytes(b"x" * 100)
    assert text_bytes([tmp_path]) == 900


def runs() -> list[Result]:
    """Three runs, in the order of their days: an old one, one in which torch wins, and one in which triton is faster."""
    return [
        made(PROBLEMS[0], kernel, level_us=us, run_id=run, recorded_at=f"2026-11-{day}T08:00:00Z", seed=day)
        for run, day, torch, triton in (("a-old", 10, 90, 100), ("b-mid", 11, 90, 100), ("b-new", 12, 90, 50))
        for kernel, us in (("torch", torch), ("triton_a", triton))
    ]


def test_the_choice_without_the_newest_run() -> None:
    found = story_of(runs(), Request(limits=unknown))
    assert found.newest_run == {"h200": "b-new"}
    assert found.subjects[0].profile.choices[0].kernel == "matmul/triton_a" and found.before["h200"].choices[0].kernel == "matmul/torch"
    alone = story_of(runs()[:2], Request(limits=unknown))
    assert alone.newest_run == {"h200": "a-old"} and not alone.before


def test_runs_by_name() -> None:
    known = runs_of(runs())
    assert [run.identity for run in known] == ["b-new", "b-mid", "a-old"] and [run.rows for run in known] == [2, 2, 2]
    assert named_runs(["latest", "a", "previous", "b-new"], known) == ["b-new", "a-old", "b-mid"]
    for word, said in (("c", "no run 'c': b-new (2026-11-12 08:00, h200, 2 rows); b-mid"), ("b-", "begins the ids of 2 runs: b-new")):
        with pytest.raises(UsageError, match=re.escape(said)):
            named_runs([word], known)
    with pytest.raises(UsageError, match="no previous run: b-new"):
        named_runs(["previous"], known[:1])
    with pytest.raises(UsageError, match="no rows of any run"):
        named_runs(["latest"], [])
    one = story_of(runs(), Request(limits=unknown, runs=("previous",)))
    assert {row.run_id for row in one.subjects[0].rows} == {"b-mid"} and not one.before


def test_nights_lie_beside_the_results(tmp_path: Path) -> None:
    with Journal(tmp_path, "run") as journal:
        journal.append(made(PROBLEMS[0]))
    kept = History(tmp_path / "nights")
    for night in history(2, 3):
        kept.add(night)
    (tmp_path / "nights" / "h200" / "broken.json").write_text("{")
    found = story_from([tmp_path], limits=unknown)
    assert [night.at[:10] for night in found.nights["h200"]] == ["2026-10-01", "2026-10-02", "2026-10-03"]
    assert len(found.reading) == 1 and "broken.json: left out of the history" in found.reading[0]
    assert not story_from([tmp_path], limits=unknown, history=[tmp_path / "nowhere"]).nights


def test_a_figure_that_fails_says_so_and_costs_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def draw(story: Story, frame: object) -> list[Figure]:
        raise ZeroDivisionError("no <time>")

    story = story_of(runs(), Request(limits=unknown))
    (said,) = guarded(draw, story, standing(story))
    assert "ZeroDivisionError: no <time>" in said.empty and not said.traces and "no figures of" in caplog.text
    assert guarded(lambda story, frame: [], story, standing(story)) == []
