"""`klab evidence --finish` on made rows: what the README says is what the rows say, by computations of the test's own."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_evidence import CHIP, SPACE, part, projections, space_rows, stored, three_runs, timed
from made_results import contest, made

from klab.harness.catalog import find_chip
from klab.harness.choose.engines.names import FIELDS, USUAL_TOKENS, far_off
from klab.harness.choose.profile import Profile
from klab.harness.report import evidence_beside, evidence_finish
from klab.harness.report.evidence_files import pack_path, packs, served, tables
from klab.harness.report.evidence_finish import finish
from klab.harness.report.evidence_gaps import gaps
from klab.harness.report.evidence_search import finals
from klab.harness.report.limits import limits_of
from klab.harness.report.sections.sentences import sentences
from klab.harness.store.result import Result
from klab.harness.tune.device_tests import DeviceTests, Ended
from klab.harness.tune.device_tests_kept import KeptTests
from klab.harness.tune.replay.files import read_space
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.fused_moe._engine_config import sglang_default, vllm_default
from klab.kernels.fused_moe.problem import FusedMoe

CATALOGUE = discover()
MODELS = ["llama-3.1-8b", "llama-3.1-70b@4", "qwen3-30b-a3b"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("recorded") / "h200"
    served_rows = [timed(k, us, problem) for problem in projections() for k, us in (("torch", 50.0), ("triton_tiled", 40.0))]
    rows = [*contest(), *three_runs(), *served_rows, *[row for row in space_rows() if row.config != {"tile": 5}]]
    stored(folder, rows)
    (folder / "sittings.json").write_text(json.dumps([{"run_id": "run-2", "at": "2026-11-22", "budget_s": 540, "parts": [part("spaces")]}]))
    stored(folder.with_name("h200-tuner"), space_rows())
    wrong = Ended("failed", 1.0, "E   AssertionError: off by 3e-02")
    KeptTests(folder, list(CATALOGUE.kernels.values())).save(DeviceTests({"t.py::test_a": Ended("passed"), "t.py::test_b": wrong}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evidence_finish, "write_report", page_of(folder))
        return folder, finish(folder, CHIP, CATALOGUE, MODELS)


def page_of(folder: Path) -> Any:
    """A stand-in that writes no page, and asks that the right one is wanted."""

    def write(folders: list[Path], page: Path, *, chips: list[str], catalogue: Any) -> None:
        assert folders == [folder, folder.with_name("h200-tuner")] and chips == ["h200"] and catalogue is CATALOGUE
        page.write_text("a page")

    return write


def test_the_readme_tells_the_device_tests_of_the_present_code(finished: tuple[Path, Any]) -> None:
    text = (finished[0] / "README.md").read_text()
    assert "| tests | begun | 0 | 1 failed, 1 passed | 1 to be run once more; test_b: failed: AssertionError: off by 3e-02 |" in text
    assert "| test_b | failed | AssertionError: off by 3e-02 |" in text.partition("## What did not work")[2]


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
    joules = re.search(r"Energy of 1 trial \(1 in 3 sittings or more\): spread ([\d.]+)% in the median", text)
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


def test_the_same_rows_give_the_same_readme_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_finish, "write_report", lambda *_, **__: None)
    texts = []
    for place in (tmp_path / "here" / "h200", tmp_path / "there" / "deeper" / "h200"):
        stored(place, three_runs())
        (place / "more.jsonl").write_text('{"a": NaN}\n')
        (place / "calibration").mkdir()
        (place / "calibration" / "GPU-x.json").write_text("no calibration")
        finish(place, CHIP, CATALOGUE, ["llama-3.1-8b"])
        texts.append((place / "README.md").read_text())
    assert texts[0] == texts[1] and "more.jsonl: 1 skipped" in texts[0] and "calibration/GPU-x.json: " in texts[0]
    monkeypatch.chdir(tmp_path / "here")
    finish(Path("h200"), CHIP, CATALOGUE, ["llama-3.1-8b"])
    assert (tmp_path / "here" / "h200" / "README.md").read_text() == texts[0]


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
    won = sentences(story)[0].lines
    assert won[0].startswith("On cpu the") and won[1].startswith("On h200 (recorded elsewhere) the"), "its own measurements first"
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
    assert tables([served("llama-3.1-8b", CHIP)], [], CHIP, CATALOGUE, tmp_path)[1] == [
        "no engines' tables: none of these models has routed experts"
    ]


def test_far_from_what_was_measured_a_table_says_what_the_engine_would_do_without_it(tmp_path: Path) -> None:
    """An engine takes the nearest entry, however far: with tokens 64 alone it would run a decode's tiles in a prefill of thousands."""

    def engine(tokens: int, warps: int, us: float) -> Result:
        problem = FusedMoe(tokens, 2048, 768, 128, 8)
        config = {**vllm_default(problem).to_json_full(), "num_warps": warps}
        return timed("triton_engine", us, problem, config=config, environment={"triton": "3.6.0"})

    qwen = [served("qwen3-30b-a3b", CHIP)]
    few = [engine(64, 4, 50.0), engine(64, 8, 40.0)]
    _, lines = tables(qwen, few, CHIP, CATALOGUE, tmp_path)
    for engines, default in (("vllm", vllm_default), ("sglang", sglang_default)):
        (path,) = (p for p in (tmp_path / "engines" / engines).rglob("E=128*.json") if "evidence" not in p.name)
        written = {int(key): entry for key, entry in json.loads(path.read_text()).items() if key.isdigit()}
        sidecar = json.loads(path.with_name(path.name.replace(".json", ".evidence.json")).read_text())
        assert far_off(tuple(written)) == {} and written[64]["num_warps"] == 8, engines
        assert list(sidecar["entries"]) == ["64"] and sorted(map(int, sidecar["engine_default"])) == sorted(set(written) - {64})
        for tokens in set(written) - {64}:
            whole = default(FusedMoe(tokens, 2048, 768, 128, 8)).to_json_full()
            assert written[tokens] == {name: whole[name] for name in FIELDS}, tokens
        assert list(written) == sorted(written) and set(written) >= {1, 1024, 4096}
    assert sum(".json, measured at 64 tokens" in line and "have what the engine runs without a table" in line for line in lines) == 2
    assert sum("finds nothing wrong" in line for line in lines) == 2
    more = [*few, engine(1024, 8, 90.0)]
    assert len(tables(qwen, more, CHIP, CATALOGUE, tmp_path)[0]) == 2, "what was the engine's own may become measured"
    paths, lines = tables(qwen, few, CHIP, CATALOGUE, tmp_path)
    assert paths == [] and sum("has entries that the new one lacks (1024 tokens)" in line for line in lines) == 2, "and not the reverse"


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
