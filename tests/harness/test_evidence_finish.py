"""`klab evidence --finish` on made rows: what the README says is what the rows say, by computations of the test's own."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_results import contest, made

from klab.harness.catalog import find_chip
from klab.harness.choose.engines.names import USUAL_TOKENS
from klab.harness.choose.evidence_repeats import repeats
from klab.harness.choose.profile import Profile
from klab.harness.report import evidence_beside, evidence_finish
from klab.harness.report.evidence_coverage import BEGUN, COMPLETE, IMPOSSIBLE, NEVER, coverage
from klab.harness.report.evidence_files import pack_path, packs, served, tables
from klab.harness.report.evidence_finish import finish
from klab.harness.report.evidence_gaps import LOSES, TIES, WINS, gaps, standings
from klab.harness.report.evidence_search import WITHIN, Found, ToBest, finals, time_to_best
from klab.harness.report.evidence_sittings import seats
from klab.harness.report.figures.search_journals import Recorded
from klab.harness.report.limits import limits_of
from klab.harness.store.result import Result
from klab.harness.tune.evidence import PARTS
from klab.harness.tune.replay.export import Recordings
from klab.harness.tune.replay.files import read_space
from klab.harness.tune.strategy import Evaluation
from klab.kernels.contract import Problem
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.fused_moe._engine_config import vllm_default
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.matmul.problem import Matmul

CHIP = find_chip("h200")
CATALOGUE = discover()
MODELS = ["llama-3.1-8b", "llama-3.1-70b@4", "qwen3-30b-a3b"]
SPACE = Matmul(16, 14336, 4096)
TILES = [{"tile": n} for n in range(8)]
# The level of each tile; the best is the sixth.
LEVELS = [100.0, 95.0, 90.0, 99.0, 80.0, 60.0, 61.0, 75.0]


def timed(kernel: str, us: float, problem: Any = SPACE, **changes: Any) -> Result:
    """Twenty rounds within 0.2% of `us`, so that its median is `us`."""
    samples = [us * (1 + 0.0001 * (n % 11 - 5)) for n in range(22)]
    return made(problem, kernel, samples=samples, **changes)


def stored(folder: Path, rows: Iterable[Result]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
    (folder / "results.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def three_runs() -> list[Result]:
    """A kernel and a library in three runs on two devices: the kernel's medians lie 6% apart, 2% on one device."""
    rows = []
    for run, device, slow, joules in (("run-1", "GPU-a", 1.0, 0.05), ("run-2", "GPU-a", 1.02, 0.051), ("run-3", "GPU-b", 1.06, 0.052)):
        where = {"run_id": run, "device_uuid": device, "recorded_at": f"2026-11-2{run[-1]}T10:00:00Z"}
        rows.append(timed("triton_tiled", 60.0 * slow, config={"tile": 5}, energy_j=joules, **where))
        rows.append(timed("torch", 90.0, **where))
    return rows


def journal(order: Iterable[tuple[int, float]], strategy: str, final: Mapping[str, Any] | None = None, candidates: int = 8) -> Found:
    found = tuple(Evaluation(c, LEVELS[c], spent_s=spent) for c, spent in order)
    header = {"strategy": strategy, "candidates": candidates, "problem": SPACE.key, "seed": 0}
    return Found(Recorded(header, found), final or {})


def space_rows() -> list[Result]:
    return [timed("triton_tiled", us, config=tile) for tile, us in zip(TILES, LEVELS, strict=True)]


def projections() -> list[Problem]:
    """Two problems of llama-3.1-8b."""
    return [problem for problem in served("llama-3.1-8b", CHIP).plan.problems() if problem.operator == "matmul"][:2]


def to_best(tuned: list[Found], exhaustive: Found | None = None) -> Any:
    rows = [*space_rows(), timed("torch", 40.0)]
    every = exhaustive or journal([(n, 0.5) for n in range(8)], "exhaustive")
    return time_to_best(Recordings(SPACE.key, SPACE.label(), "matmul", tuple(rows)), SPACE, CHIP, {}, [every], tuned, space_rows())


def test_the_tuners_seconds_and_its_regret() -> None:
    found = to_best([journal([(0, 0.0), (2, 1.0), (6, 2.0), (7, 4.0)], "gaussian")])
    assert found.recorded == found.space == 8 and found.complete and found.exhaustive_s == 4.0
    assert found.best_us == pytest.approx(60.0) and "40" not in found.best, "a library is no candidate of the search"
    pace = found.tuner
    assert pace.evaluations == 4 and pace.seconds == 7.0
    assert pace.regret.ratio == pytest.approx(61 / 60, rel=1e-6) and pace.regret.low <= pace.regret.ratio <= pace.regret.high
    assert pace.within == {1.05: 3.0, 1.01: float("inf")}
    assert found.replayed.evaluations <= 4 and found.replayed.regret.ratio >= 1.0


def test_a_final_decides_what_the_tuner_chose() -> None:
    final = {"kernel": "matmul/triton_tiled", "config": {"tile": 5}, "took_s": 9.0}
    pace = to_best([journal([(6, 2.0), (5, 1.0)], "gaussian", final)]).tuner
    assert pace.regret.ratio == 1.0 and pace.final_s == 9.0 and pace.within == {1.05: 2.0, 1.01: 3.0}


def test_a_space_that_is_not_complete_and_a_search_that_is_not_there() -> None:
    found = to_best([], journal([(0, 1.0)], "exhaustive"))
    assert not found.complete and (found.recorded, found.space) == (1, 8) and found.tuner is None and found.replayed is not None
    foreign = dataclasses.replace(journal([], "gaussian"), journal=Recorded({"strategy": "gaussian"}, (Evaluation(0, 5.0, spent_s=1.0),)))
    noted = to_best([foreign])
    assert noted.tuner.regret is None and noted.tuner.within == dict.fromkeys(WITHIN, float("inf")) and "left out" in noted.notes[0]


def test_repeatability_over_three_runs() -> None:
    found = repeats(three_runs())
    assert found.runs == ("run-1", "run-2", "run-3") and found.devices == ("GPU-a", "GPU-b")
    kernel, library = found.times
    assert kernel.kernel == "matmul/triton_tiled" and kernel.spread == pytest.approx(0.06 / 1.02, rel=1e-4)
    assert kernel.on_one_device == pytest.approx(0.02 / 1.01, rel=1e-4) and library.spread == pytest.approx(0.0, abs=1e-9)
    (energy,) = found.energies
    assert energy.spread == pytest.approx(0.002 / 0.051)
    (problem,) = found.problems
    assert problem.stable and problem.same_winner and problem.candidates == 2


def test_winners_that_change_are_told() -> None:
    rows = [timed(k, us, run_id=run) for run, a, b in (("r1", 50.0, 60.0), ("r2", 60.0, 50.0)) for k, us in (("torch", a), ("cuda_x", b))]
    (problem,) = repeats(rows).problems
    assert not problem.stable and not problem.same_winner
    assert repeats(rows[:2]).problems == () and repeats([]).times == ()
    half = [*rows[:2], rows[2]]
    assert repeats(half).problems == (), "one candidate alone shows no winner"


def test_gaps_by_verdict() -> None:
    other, third = Matmul(512, 2048, 1024), Matmul(64, 2048, 1024)
    rows = [timed("triton_a", 50.0), timed("torch", 100.0), timed("triton_a", 100.0, other), timed("torch", 50.0, other)]
    rows += [timed("triton_a", 50.0, third), timed("torch", 50.0, third)]
    found = {gap.problem: gap for gap in gaps(rows, limits_of("h200", ""))}
    assert {g.verdict for g in found.values()} == {WINS, LOSES, TIES}
    one = found[SPACE.label()]
    assert one.verdict == WINS and one.over is not None and one.over.ratio == pytest.approx(2.0)
    bound_us = max(SPACE.flops() / 989e12, SPACE.bytes_moved() / 4.8e12) * 1e6
    assert (
        one.share is not None and one.share[0] == pytest.approx(bound_us / 50.0, rel=0.01) and one.share[1] <= one.share[0] <= one.share[2]
    )
    (standing,) = standings(found.values())
    assert (standing.compared, standing.wins, standing.loses, standing.ties) == (3, 1, 1, 1)
    assert standing.mean[0] == pytest.approx(1.0, rel=1e-3)
    (alone,) = gaps([timed("triton_a", 50.0)], limits_of("h200", ""))
    assert alone.over is None and alone.verdict == ""


def part(name: str, left: int = 0, notes: Iterable[str] = (), **statuses: int) -> dict[str, Any]:
    return {"part": name, "seconds": 2.0, "statuses": statuses, "known": 0, "left": left, "notes": list(notes)}


def test_coverage_by_part() -> None:
    sittings = [
        {"parts": [part("tests", passed=5), part("correctness", 9, ok=3), part("energy", notes=["klab reads no power sensor"])]},
        {"parts": [part("correctness", ok=9), part("spaces", 2), {"part": "of another klab"}, "no part"]},
        {},
    ]
    reached = [to_best([journal([(0, 1.0)], "gaussian")]), to_best([], journal([(0, 1.0)], "exhaustive"))]
    found = {one.part: one for one in coverage(sittings, three_runs(), reached, repeats(three_runs()), [SPACE.key])}
    assert list(found) == list(PARTS)
    assert {name: one.state for name, one in found.items()} == {
        "tests": COMPLETE, "correctness": COMPLETE, "calibration": NEVER, "comparison": NEVER, "energy": IMPOSSIBLE, "spaces": BEGUN,
        "tuner": BEGUN, "repeat": NEVER, "energy_rest": NEVER,
    }  # fmt: skip
    assert found["correctness"].seconds == 4.0 and found["spaces"].missing == found["tuner"].missing == SPACE.label()
    assert "1 of the models' 1 problems timed, 1 beside a library" in found["comparison"].holds
    assert "1 of 2 complete, 9 candidates" in found["spaces"].holds and "1 of 2 problems searched" in found["tuner"].holds
    none = {one.part: one.state for one in coverage([], [], [ToBest("x", 0, None)], repeats([]), [])}
    assert set(none.values()) == {NEVER}
    skipped = coverage([{"parts": [part("tests", skipped=9)]}], [], [], repeats([]), [])[0]
    assert skipped.state == IMPOSSIBLE and "no GPU" in skipped.missing
    few = coverage([{"parts": [part("repeat", ok=9)]}], [], [], repeats(three_runs()[:4]), [])
    assert next(one for one in few if one.part == "repeat").missing == "only 2 sittings with times: 3 wanted"


def test_sittings_are_told_from_rows_and_notes() -> None:
    noted = {"run_id": "run-2", "at": "2026-11-22T09:59:00Z", "budget_s": 540.0, "parts": [part("spaces")]}
    first, second, third = seats([noted], three_runs())
    assert [one.run_id for one in (first, second, third)] == ["run-1", "run-2", "run-3"]
    assert second.budget_s == 540.0 and second.parts == (("spaces", 2.0),) and first.parts == () and first.budget_s is None
    assert first.clocks_mhz == (1755.0, 1755.0) and first.versions["driver"] == "580.159" and third.uuids == ("GPU-b",)
    empty = seats([{"run_id": "gone", "environment": {"device": "a made one"}}], [])[0]
    assert empty.device == "a made one" and empty.rows == 0 and empty.clocks_mhz is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("recorded") / "h200"
    served_rows = [timed(k, us, problem) for problem in projections() for k, us in (("torch", 50.0), ("triton_tiled", 40.0))]
    rows = [*contest(), *three_runs(), *served_rows, *[row for row in space_rows() if row.config != {"tile": 5}]]
    stored(folder, rows)
    (folder / "sittings.json").write_text(json.dumps([{"run_id": "run-2", "at": "2026-11-22", "budget_s": 540, "parts": [part("spaces")]}]))
    stored(folder.with_name("h200-tuner"), space_rows())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evidence_finish, "write_report", page_of(folder))
        return folder, finish(folder, CHIP, CATALOGUE, MODELS)


def page_of(folder: Path) -> Any:
    """A stand-in that writes no page, and asks that the right one is wanted."""

    def write(folders: list[Path], page: Path, *, chips: list[str], catalogue: Any) -> None:
        assert folders == [folder, folder.with_name("h200-tuner")] and chips == ["h200"] and catalogue is CATALOGUE
        page.write_text("a page")

    return write


def test_everything_is_written_and_nothing_outside(finished: tuple[Path, Any]) -> None:
    folder, made_of = finished
    assert all(path.is_file() and path.is_relative_to(folder) for path in made_of.files)
    names = {path.relative_to(folder).as_posix() for path in made_of.files}
    slug = "spaces/matmul_16x14336x4096_bf16_h200"
    assert {f"{slug}.json.gz", f"{slug}.t4.json.gz", "README.md", "report.html", "packs/llama-3.1-8b.json"} <= names
    plain, t4 = (read_space(folder / f"{slug}{ending}") for ending in (".json.gz", ".t4.json.gz"))
    assert len(plain.space) == len(t4.space) == 9 and plain.optimum_us == t4.optimum_us == pytest.approx(60.0, rel=0.07)
    pack = Profile.from_text((folder / "packs" / "llama-3.1-8b.json").read_text())
    assert pack.model == "llama-3.1-8b" and [c.kernel for c in pack.choices] == ["matmul/triton_tiled"] * 2
    assert all(c.evidence.library is not None and c.evidence.library.ratio == pytest.approx(1.25) for c in pack.choices)
    assert any("no pack for llama-3.1-70b.tp4" in line for line in made_of.lines)


def test_the_readme_says_what_the_rows_say(finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    text = (folder / "README.md").read_text()
    assert str(folder) not in text and str(folder.parent) not in text, "where it lies is of this machine"
    wins = re.search(r"On (\d+) problems .* faster on (\d+), slower on (\d+), and on (\d+)", text)
    own = [timed("torch", 50.0, problem) for problem in projections()] + [timed("triton_tiled", 40.0, problem) for problem in projections()]
    compared = [gap for gap in gaps([*contest(), *three_runs(), *space_rows(), *own], limits_of("h200", "")) if gap.over is not None]
    assert wins is not None and int(wins[1]) == len(compared) == sum(int(wins[n]) for n in (2, 3, 4))
    medians = [60.0, 61.2, 63.6]
    spread = (max(medians) - min(medians)) / statistics.median(medians)
    assert f"| {SPACE.label()} | matmul/triton_tiled | 3 | {spread * 100:.1f}% |" in text
    assert "4 sittings" not in text and "run-1" in text and "run-3" in text and "540 s" in text
    assert "Winners: on 1 of 1 problem the sittings' tie sets" in text
    joules = re.search(r"Energy of 1 trial: spread ([\d.]+)% in the median", text)
    assert joules is not None and float(joules[1]) == pytest.approx(0.002 / 0.051 * 100, abs=0.05)
    assert ("| not begun | 0 |" in text and "cannot tell" in text.split("## Goals")[1]) or "missed" in text.split("## Goals")[1]
    assert all(
        line.count("|") == text.splitlines()[at - 1].count("|") for at, line in enumerate(text.splitlines()) if line.startswith("|---")
    )


def test_again_gives_the_same_files(finished: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made_of = finished
    kept = {path: path.read_bytes() for path in made_of.files if path.suffix != ".html"}
    monkeypatch.setattr(evidence_finish, "write_report", page_of(folder))
    finish(folder, CHIP, CATALOGUE, MODELS)
    assert {path: path.read_bytes() for path in kept} == kept


def test_names_with_markup_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_finish, "write_report", lambda *_, **__: None)
    odd = dataclasses.replace(timed("torch", 50.0), problem_label="matmul <b>|x|</b> " + "n" * 300, device="<i>|GPU|")
    finish(stored(tmp_path / "h200", [odd]), CHIP, CATALOGUE, ["llama-3.1-8b"])
    text = (tmp_path / "h200" / "README.md").read_text()
    assert "<b>" not in text and "<i>" not in text and "No problem has both" in text


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        finish(tmp_path / "none", CHIP, CATALOGUE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CannotMeasure, match="no row of h200"):
        finish(tmp_path / "empty", CHIP, CATALOGUE)
    only_cpu = stored(tmp_path / "cpu", [made(SPACE, chip="cpu")])
    with pytest.raises(CannotMeasure, match="no row of h200; it has rows of cpu, which --chip names"):
        finish(only_cpu, CHIP, CATALOGUE)
    damaged = stored(tmp_path / "h200", three_runs())
    (damaged / "sittings.json").write_text("{")
    with pytest.raises(UsageError, match="move it away, the rows are safe"):
        finish(damaged, CHIP, CATALOGUE, ["llama-3.1-8b"])
    with pytest.raises(UsageError, match="name@4"):
        served("llama-3.1-8b@four", CHIP)


def test_a_pack_goes_to_the_profiles_for_results_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from klab.harness.choose import profile
    from klab.harness.report import evidence_files

    for module in (evidence_files, profile):
        monkeypatch.setattr(module, "checkout", lambda: tmp_path)
    one = served("llama-3.1-70b@4", CHIP)
    assert pack_path(one, CHIP, tmp_path / "results" / "h200") == tmp_path / "profiles" / "tuned" / "h200" / "llama-3.1-70b.tp4.json"
    assert pack_path(one, CHIP, tmp_path / "elsewhere") == tmp_path / "elsewhere" / "packs" / "llama-3.1-70b.tp4.json"


def test_a_page_shows_recorded_chips_beside_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from klab.harness.catalog import find_model
    from klab.harness.plan import plan, scenario_for

    monkeypatch.setattr(evidence_beside, "checkout", lambda: tmp_path)
    own = stored(tmp_path / "results" / "local", contest("cpu"))
    stored(tmp_path / "results" / "h200", contest())
    stored(tmp_path / "results" / "h200-tuner", contest())
    stored(tmp_path / "results" / "no-such-chip", contest())
    (tmp_path / "results" / "b200").mkdir()
    found = evidence_beside.kept(own, ["cpu"])
    assert [one.chip.name for one in found] == ["h200"]
    assert evidence_beside.kept(tmp_path / "elsewhere", ["cpu"]) == [] and evidence_beside.kept(own, ["cpu", "h200"]) == []
    chip, model = find_chip("cpu"), find_model("qwen3-0.6b")
    plans = {"cpu": plan(model, chip, scenario_for(model, chip))}
    page = tmp_path / "page.html"
    story = evidence_beside.write_beside([own], page, plans, CATALOGUE, found)
    by_chip = {subject.chip: subject for subject in story.subjects}
    assert set(by_chip) == {"cpu", "h200"}
    assert len(by_chip["h200"].rows) > len(by_chip["cpu"].rows) > 0, "all that is recorded, and of the own chip the model's problems"
    assert all(row.chip == "h200" and row.device == "NVIDIA H200" for row in by_chip["h200"].rows)
    said = "recorded on NVIDIA H200 on 2026-11-20"
    assert story.notes[0] == f"h200: {said}; it was not measured by this run, which measured cpu"
    assert page.read_text().count(said) >= 2 and said in by_chip["h200"].title and said not in by_chip["cpu"].title


def test_engines_tables_are_written_where_no_gap_lies_between_their_entries(tmp_path: Path) -> None:
    def engine(tokens: int) -> Result:
        problem = FusedMoe(tokens, 2048, 768, 128, 8)
        config = vllm_default(problem).to_json_full()
        return timed("triton_engine", 10.0 + tokens / 10, problem, config=config, environment={"triton": "3.6.0"})

    qwen = [served("qwen3-30b-a3b", CHIP)]
    paths, lines = tables(qwen, [engine(tokens) for tokens in USUAL_TOKENS], CHIP, CATALOGUE, tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in paths}
    assert "engines/vllm/E=128,N=768,device_name=NVIDIA_H200.json" in names and any(name.startswith("engines/sglang/") for name in names)
    written = json.loads((tmp_path / "engines" / "vllm" / "E=128,N=768,device_name=NVIDIA_H200.json").read_text())
    assert [int(key) for key in written if key.isdigit()] == sorted(USUAL_TOKENS)
    assert sum("finds nothing wrong" in line for line in lines) == 2
    paths, lines = tables(qwen, [engine(64), engine(1024)], CHIP, CATALOGUE, tmp_path / "far")
    assert paths == [] and all("is not written" in line for line in lines) and not (tmp_path / "far").exists()
    assert tables([served("llama-3.1-8b", CHIP)], [], CHIP, CATALOGUE, tmp_path)[1] == [
        "no engines' tables: none of these models has routed experts"
    ]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_run_without_a_gpu_reports_recorded_chips_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from klab.harness.cli import run
    from klab.harness.report import write

    monkeypatch.setattr(evidence_beside, "checkout", lambda: tmp_path)
    own = stored(tmp_path / "results" / "local", contest("cpu"))
    stored(tmp_path / "results" / "h200", contest())
    told: list[str] = []
    monkeypatch.setattr(evidence_beside, "write_beside", lambda *given: told.append(f"beside {given[-1][0].chip.name}"))
    monkeypatch.setattr(write, "write_report", lambda *_, **given: told.append(f"alone {given['chips']}"))
    setup: Any = SimpleNamespace(chip=SimpleNamespace(name=kind, kind=kind), plan=None, catalogue=CATALOGUE)
    job: Any = SimpleNamespace(folder=own, sources=lambda: [own])
    run._report([setup], job, tmp_path / "page.html", as_json=False)
    assert told == (["beside h200"] if kind == "cpu" else ["alone ['cuda']"])


def test_finals_that_were_decided_are_the_packs_choice(tmp_path: Path) -> None:
    problem = projections()[0]
    rows = [timed("triton_tiled", us, problem, config={"tile": n}) for n, us in enumerate((40.0, 41.0))]
    folder = stored(tmp_path / "h200", rows)
    header = {"kind": "search", "strategy": "exhaustive", "problem": problem.key, "candidates": 2}
    line = {"candidate": 0, "value": 40.0, "status": "ok", "rounds": 0, "spent_s": 1.0}
    (folder / "tune").mkdir()
    for name, took_s, tile in (("a", 9.0, 1), ("b", 3.0, 0), ("c", 99.0, None)):
        (folder / "tune" / f"{name}.search").write_text("".join(json.dumps(one) + "\n" for one in (header, line)))
        winner = {"kernel": "matmul/triton_tiled", "config": {"tile": tile}} if tile is not None else {"kernel": "", "config": {}}
        (folder / "tune" / f"{name}.final").write_text(json.dumps({"ending": {**winner, "took_s": took_s, "reason": f"final {name}"}}))
    (folder / "tune" / "d.search").write_text("no journal")
    (folder / "tune" / "a.prior.npz").write_bytes(b"")
    found = finals(folder)
    assert found == {problem.key: ("matmul/triton_tiled", {"tile": 1}, "final a")}, "the longest that was decided"
    profiles, _, _ = packs([served("llama-3.1-8b", CHIP)], rows, CHIP, CATALOGUE, found, folder)
    (choice,) = profiles["llama-3.1-8b"].choices
    assert choice.config == {"tile": 1} and choice.evidence.settled_by == "final" and choice.evidence.final_reason == "final a"
