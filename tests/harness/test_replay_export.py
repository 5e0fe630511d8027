"""klab's own results as recorded spaces, and the verb `klab space`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Done
from made_results import contest, failed, made
from typer.testing import CliRunner

from klab.harness.cli.main import build_app
from klab.harness.store.journal import Journal
from klab.harness.store.result import Result, Status
from klab.harness.tune.replay.export import Recordings, export, policy_key, recordings
from klab.harness.tune.replay.files import read_space, write_space
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.strategy import Ask
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

SHAPE = Matmul(16, 2048, 1024)
TILES = [{"block": b, "warps": w} for b in (32, 64, 128) for w in (4, 8)]


def tuned() -> list[Result]:
    """A tuning run of two kernels and a library, with failures and screened candidates."""
    rows = [made(SHAPE, "triton_tiled", config=c, level_us=100.0 - 5 * i, seed=i) for i, c in enumerate(TILES[:4])]
    rows += [
        made(SHAPE, "cuda_mma", config={"splits": 4, "swizzle": None}, power_w=610.0, energy_j=0.05, sm_clock_mhz=1700.0),
        made(SHAPE, "torch"),
        failed(SHAPE, "triton_tiled", Status.TIMEOUT, "no answer", config=TILES[4], compile_s=3.0),
        failed(
            SHAPE,
            "cuda_mma",
            Status.SCREENED,
            "spills: 900 B",
            config={"splits": 8, "swizzle": 2},
            kind="screened",
            epoch="",
            compile_s=2.5,
        ),
    ]
    return rows


def space_of(rows: list[Result], **chosen: str) -> RecordedSpace:
    (recording,) = recordings(rows, "h200")
    return export(recording, **chosen)


def at(recorded: RecordedSpace, kernel: str, **config: Any) -> int:
    found = recorded.space.find({"kernel": f"matmul/{kernel}", **config})
    assert found is not None
    return found


def test_all_that_is_known_of_a_run() -> None:
    rows = tuned()
    found = space_of(rows)
    assert len(found.space) == len(rows) and found.space.names == ("kernel", "splits", "swizzle", "block", "warps")
    assert found.by_status == {"ok": 6, "timeout": 1, "screened": 1}
    assert (found.name, found.device, found.kernel, found.kind) == ("matmul_16x2048x1024_bf16_h200", "NVIDIA H200", "matmul", "measured")
    assert found.problem_size == [16, 2048, 1024] and found.about["problem"] == SHAPE.to_json()
    assert found.about["policy"] == rows[0].policy and found.about["environment"] == rows[0].environment
    assert found.about["sources"]["matmul/torch"] == rows[5].source_digest and found.about["libraries"] == ["matmul/torch"]
    mma, late, screened = (
        at(found, "cuda_mma", splits=4, swizzle=None),
        at(found, "triton_tiled", **TILES[4]),
        at(found, "cuda_mma", splits=8, swizzle=2),
    )
    assert found.time_us[mma] == rows[4].median_us and tuple(found.samples_us[mma]) == rows[4].samples_us
    assert found.clocks_mhz is not None and set(found.clocks_mhz[mma]) == {1755.0}
    assert found.sm_clock_mhz is not None and found.sm_clock_mhz[mma] == 1700.0
    assert found.power_w is not None and found.power_w[mma] == 610.0 and math.isnan(found.power_w[late])
    assert found.energy_j is not None and found.energy_j[mma] == 0.05
    assert found.metrics["temperature_c"][mma] == 52.0 and found.metrics["ci_low_us"][mma] == rows[4].ci_low_us
    assert found.benchmark_s[mma] == pytest.approx(0.05 + 40 * sum(rows[4].samples_us) / 1e6), "warm-up and rounds of 40 launches"
    assert found.compile_s[late] == 3.0 and found.reasons[late] == "no answer" and found.reasons[screened] == "spills: 900 B"
    (short,) = found.evaluate(Ask((mma,), rounds=2))
    assert short.value == pytest.approx(sum(rows[4].samples_us[:2]) / 2) and short.spent_s < found.benchmark_s[mma]


@pytest.mark.parametrize("format", ["kernel-tuner", "t4"])
def test_nothing_is_lost_in_a_file(tmp_path: Path, format: str) -> None:
    found = space_of(tuned())
    write_space(found, tmp_path / "a.json.gz", format)
    assert read_space(tmp_path / "a.json.gz") == found


def test_epochs_are_not_mixed() -> None:
    old = [
        dataclasses.replace(r, epoch="epoch-0", recorded_at="2026-11-01T00:00:00Z", samples_us=(7.0,), median_us=7.0) for r in tuned()[:3]
    ]
    rows = [dataclasses.replace(r, q1_us=None, q3_us=None, ci_low_us=None, ci_high_us=None) for r in old] + tuned()
    found = space_of(rows)
    assert found == space_of(tuned()) and found.notes[0] == "left out: 3 rows of epoch epoch-0 (up to 2026-11-01)"
    older = space_of(rows, epoch="epoch-0")
    assert older.about["epoch"] == "epoch-0" and older.by_status == {"ok": 3, "screened": 1} and older.optimum_us == 7.0
    with pytest.raises(UsageError, match=r"epoch 'x' matches none of epoch-0, epoch-1"):
        space_of(rows, epoch="x")
    with pytest.raises(UsageError, match=r"epoch 'epoch' matches 2 of"):
        space_of(rows, epoch="epoch")


def test_policies_are_not_mixed_but_for_energy() -> None:
    rows = tuned()
    warm = [dataclasses.replace(r, policy={"l2": "warm"}, recorded_at="2026-11-21T00:00:00Z") for r in rows[:2]]
    checked = dataclasses.replace(rows[5], policy={"max_rounds": 0}, samples_us=(), median_us=None, marked=())
    found = space_of(rows + warm + [checked])
    assert found.about["policy_key"] == policy_key(rows[0])
    assert found.notes[:2] == (
        "left out: 1 rows were checked and not timed",
        "left out: 2 rows of policy " + policy_key(warm[0]) + " (up to 2026-11-21)",
    )
    assert space_of(rows + warm, policy=policy_key(warm[0])[:6]).by_status == {"ok": 2, "screened": 1}
    with_energy = dataclasses.replace(rows[0], policy={"energy": True}, recorded_at="2026-11-20T09:00:00Z", energy_j=0.2, power_w=500.0)
    both = space_of([*rows, with_energy])
    first = at(both, "triton_tiled", **TILES[0])
    assert both.energy_j is not None and both.energy_j[first] == 0.2, "energy from the older row"
    assert both.time_us[first] == rows[0].median_us and len(both.space) == len(rows)


def test_a_changed_kernel_is_another_contestant() -> None:
    stale = dataclasses.replace(made(SHAPE, "triton_tiled", config=TILES[5]), source_digest="0" * 16, recorded_at="2026-11-01T00:00:00Z")
    found = space_of([stale, *tuned()])
    assert found == space_of(tuned()) and found.notes[0] == "left out: 1 rows are of a kernel's source that has changed since"


def test_of_one_candidate_the_newest_verdict_counts() -> None:
    base = made(SHAPE, config=TILES[0])
    later = [f"2026-11-20T1{n}:00:00Z" for n in range(5)]
    faster = dataclasses.replace(made(SHAPE, config=TILES[0], level_us=50.0), recorded_at=later[1])
    crash = failed(SHAPE, "torch", Status.CRASHED, "gone", config=TILES[0], recorded_at=later[2])
    wrong = failed(SHAPE, "torch", Status.INCORRECT, "off", config=TILES[0], recorded_at=later[3])
    other = made(SHAPE, config=TILES[1])
    again = dataclasses.replace(base, recorded_at=later[4])
    for rows, status, time_us in (
        ([faster, base], Status.OK, faster.median_us),
        ([crash, faster, base], Status.OK, faster.median_us),
        ([base, wrong, crash], Status.INCORRECT, math.inf),
        ([wrong, again], Status.OK, base.median_us),
        ([wrong, crash], Status.INCORRECT, math.inf),
        ([crash], Status.CRASHED, math.inf),
    ):
        found = space_of([*rows, other])
        candidate = at(found, "torch", **TILES[0])
        assert (found.status[candidate], found.time_us[candidate]) == (status, time_us)


def test_rounds_that_do_not_count_are_left_out() -> None:
    row = made(
        SHAPE, samples=[10.0, 90.0, 11.0], clocks_mhz=(1700.0, 300.0, None), marked=(0, 1, 0), temperatures_c=(), throttle_reasons=()
    )
    hot = dataclasses.replace(row, status=Status.THROTTLED, config=TILES[0])
    found = space_of([row, hot])
    assert list(found.samples_us[0]) == [10.0, 11.0] and found.clocks_mhz is not None
    assert found.clocks_mhz[0][0] == 1700.0 and math.isnan(found.clocks_mhz[0][1])
    assert found.time_us[1] == math.inf and list(found.samples_us[1]) == [10.0, 11.0]


def test_where_nothing_is_valid_or_there() -> None:
    with pytest.raises(UsageError, match="no valid candidate: 1 crashed"):
        space_of([failed(SHAPE, "torch", Status.CRASHED, "gone")])
    with pytest.raises(UsageError, match="no result that can be exported"):
        export(Recordings("k", "mm", "matmul", (dataclasses.replace(tuned()[0], median_us=None),)))
    with pytest.raises(UsageError, match="no result of chip 'b200'; the store has: h200"):
        recordings(tuned(), "b200")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with Journal(tmp_path / "store", "run") as journal:
        for row in [*tuned(), *contest(), *contest("cpu")]:
            journal.append(row)
    return tmp_path / "store"


def klab(*words: object) -> Done:
    return CliRunner().invoke(build_app(), ["space", *map(str, words)], env={"COLUMNS": "200"})


def refused(*words: object) -> str:
    done = klab(*words)
    assert isinstance(done.exception, UsageError), done.exception
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_export_show_and_convert(store: Path, tmp_path: Path) -> None:
    out, t4 = tmp_path / "mm.json", tmp_path / "mm.t4.json.gz"
    words = ("export", "--chip", "h200", "--results", store, "--problem", "16x2048", "--out", out)
    done = klab(*words)
    assert done.exit_code == 0 and "8 candidates" in done.stderr
    assert "exists; --force replaces it" in refused(*words)
    (told,) = map(json.loads, klab(*words, "--force", "--json").stdout.splitlines())
    assert told["status"] == {"ok": 6, "timeout": 1, "screened": 1}
    shown = klab("show", out)
    for part in (
        "matmul_16x2048x1024_bf16_h200",
        "8: 6 valid, 1 screened, 1 timeout",
        "recorded by",
        "klab",
        "block",
        "3 values",
        "energy_j",
    ):
        assert part in shown.stdout, part
    assert klab("convert", out, t4, "--format", "t4").exit_code == 0
    rows = [json.loads(line) for line in klab("show", out, t4, "--json").stdout.splitlines()]
    assert rows[0] | {"file": ""} == rows[1] | {"file": ""} and rows[0]["digest"] == told["digest"]
    best = min((r for r in tuned() if r.median_us), key=lambda r: r.median_us or 0)
    assert rows[0]["optimum_us"] == best.median_us and rows[0]["optimum"] == {"kernel": best.kernel, **best.config}
    assert rows[0]["parameters"]["kernel"] == 3 and set(rows[0]["within"]) == {"1%", "5%", "20%"}


def test_every_problem_into_a_folder(store: Path, tmp_path: Path) -> None:
    done = klab("export", "--chip", "cpu", "--results", store, "--out", tmp_path / "out", "--format", "t4")
    files = sorted((tmp_path / "out").iterdir())
    assert done.exit_code == 0 and len(files) == len({r.problem_key for r in contest("cpu")})
    assert all(f.name.endswith("_cpu.t4.json.gz") for f in files)
    assert {read_space(f).device for f in files} == {"Example CPU @ 2.50GHz"}


def test_what_is_asked_for_must_be_there_and_one(store: Path, tmp_path: Path) -> None:
    words = ("export", "--results", store, "--out", tmp_path / "a.json", "--chip")
    assert "no result of chip 'b200'; the store has: cpu, h200" in refused(*words, "b200")
    unknown = refused(*words, "h200", "--problem", "conv")
    assert "no problem 'conv'" in unknown and "matmul 16x2048x1024 bf16" in unknown and "more" in unknown
    several = refused(*words, "h200", "--problem", "prefill")
    assert "'prefill' matches 3 problems" in several and "a folder with --out" in several
    assert "there are 15 problems" in refused(*words, "h200")
    key = SHAPE.key
    assert klab(*words, "h200", "--problem", key[:8]).exit_code == 0 and read_space(tmp_path / "a.json").about["problem_key"] == key
    assert "no format 'csv'" in refused(*words, "h200", "--problem", key, "--format", "csv")
    assert "matches none of epoch-1" in refused(*words, "h200", "--problem", key, "--epoch", "2", "--force")
    assert "none of the 15 problems" in refused("export", "--results", store, "--chip", "h200", "--epoch", "2", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_torn_file_is_told_and_mended(tmp_path: Path) -> None:
    write_space(space_of(tuned()), tmp_path / "whole.json")
    (tmp_path / "torn.json").write_bytes((tmp_path / "whole.json").read_bytes()[:-150])
    done = klab("show", tmp_path / "torn.json")
    assert done.exit_code == 0 and "bytes are torn or damaged and were dropped; 7 entries are whole" in done.stderr
    assert klab("convert", tmp_path / "torn.json", tmp_path / "mended.json").exit_code == 0
    assert not read_space(tmp_path / "mended.json").notes and json.loads((tmp_path / "mended.json").read_text())
    (tmp_path / "empty.json").write_text("")
    assert "is empty" in refused("show", tmp_path / "empty.json")
    assert "does not exist" in refused("convert", tmp_path / "gone.json", tmp_path / "b.json")
