"""Validation: errors, fitted overheads and the page, on points made with a known truth."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from klab.harness.catalog import find_chip
from klab.harness.cli import validate as verb
from klab.harness.cost.closed_loop import Replayed
from klab.harness.cost.estimate import Estimate, Estimator, Origin
from klab.harness.cost.layer_check import read_layers
from klab.harness.cost.modelled import Modelled
from klab.harness.cost.published import COLUMNS, INFERENCEX, SWEEP, Published
from klab.harness.cost.ranges import Range
from klab.harness.cost.validation import (
    Checked,
    Errors,
    Overhead,
    Predictor,
    Validation,
    _line,
    errors,
    first_half,
    quantile,
    summarise,
    validate,
    weighted,
)
from klab.harness.cost.validation_page import BEGIN, END, goals, markdown, page, sections, write
from klab.harness.plan.communication import Collective
from klab.kernels.contract import Chip, Problem
from klab.kernels.errors import UsageError

BASE = Published(
    "p", "qwen3-8b", "h200", "vllm", "1.0", INFERENCEX, 1, False, "", "", isl=1024, osl=256, concurrency=4, ttft_s=1.0, tpot_s=1.0
)
ESTIMATORS = {"h200": Estimator(find_chip("h200")), "b200": Estimator(find_chip("b200"))}


def estimator(point: Published) -> Estimator:
    return ESTIMATORS[point.chip]


def made(truth: dict[str, Overhead], points: list[Published]) -> list[Published]:
    """Points as an engine with these overheads would have been measured."""
    predicted = Predictor(estimator, truth)
    found = []
    for point in points:
        one = predicted.check(point)
        assert one.replayed and not one.why_not
        found.append(replace(point, tpot_s=one.tpot_s.mid, ttft_s=one.replayed.ttft_s))
    return found


GRID = [
    replace(BASE, id=f"{tp} {concurrency} {isl}", tp=tp, concurrency=concurrency, isl=isl)
    for tp in (1, 2, 4)
    for concurrency in (2, 6)
    for isl in (512, 4096)
]


def test_without_overheads_a_measurement_that_is_the_prediction_has_no_error() -> None:
    points = made({}, GRID[:2])
    found = [Predictor(estimator).check(point) for point in points]
    assert errors([(c.tpot_s, c.point.tpot_s) for c in found]) == Errors(2, 0.0, 0.0, 1.0, 1.0)
    assert errors([(c.replayed.ttft_s, c.point.ttft_s) for c in found if c.replayed]).median == 0


def test_planted_overheads_are_found_on_one_half_and_hold_on_the_other() -> None:
    truth = {"vllm": Overhead(Range.exact(2500.0), 0.040, 5e-6)}
    points = made(truth, GRID)
    halves = {point.setting: first_half(point) for point in points}
    assert set(halves.values()) == {True, False}, "the grid must have deployments on both sides"
    found = validate(points, estimator)
    one = found.overheads["vllm"]
    assert one.host_us.mid == pytest.approx(2500, rel=0.02)
    assert one.first_s == pytest.approx(0.040, rel=0.02)
    assert one.token_s == pytest.approx(5e-6, rel=0.02)
    plain = errors([(c.tpot_s, c.point.tpot_s) for c in found.checked])
    after = errors([(c.tpot_s, c.point.tpot_s) for c in found.held_out])
    first = errors([(c.replayed.ttft_s, c.point.ttft_s) for c in found.held_out if c.replayed])
    assert plain.median > 0.2 and after.median < 0.02 and first.median < 0.05
    assert {c.point.id for c in found.held_out} == {p.id for p in points if not halves[p.setting]}
    # Whatever the other half was measured at, nothing of it is in what was fitted.
    elsewhere = [point if halves[point.setting] else replace(point, tpot_s=3 * point.tpot_s, ttft_s=3 * point.ttft_s) for point in points]
    assert validate(elsewhere, estimator).overheads == found.overheads


class Sure:
    """A source that has every launch as the model does, and calls it published."""

    def __init__(self, chip: Chip) -> None:
        self.modelled = Modelled(chip)

    def launch(self, problem: Problem) -> Estimate:
        return Estimate(self.modelled.us(problem)[0], Origin.REFERENCE, "made up")

    def collective(self, one: Collective) -> Estimate:
        return Estimate(self.modelled.collective_us(one)[0], Origin.REFERENCE, "made up")


def test_overheads_are_fitted_where_kernels_are_known() -> None:
    chip = find_chip("h200")
    known = Estimator(chip, [Sure(chip)])
    covered = [replace(point, tpot_s=2 * Predictor(lambda p: known).check(point).tpot_s.mid) for point in GRID if first_half(point)]
    odd = [replace(point, id=f"x{point.id}", model="llama-3.1-8b", tpot_s=1e-4) for point in GRID]
    assert covered and any(first_half(point) for point in odd), "both kinds must be on the side that is fitted"
    alone = validate(covered, lambda p: known)
    beside = validate([*covered, *odd], lambda p: known if p.model == "qwen3-8b" else estimator(p))
    assert alone.overheads == beside.overheads and alone.overheads["vllm"].host_us.mid > 500


def test_what_cannot_be_predicted_says_why() -> None:
    predictor = Predictor(estimator)
    crowd = predictor.check(replace(BASE, isl=30_000, concurrency=512))
    assert "memory holds fewer" in crowd.why_not
    odd = predictor.check(replace(BASE, tp=7))
    assert odd.why_not
    found = validate([replace(BASE, tp=7)], estimator, {"earlier": 3})
    assert found.skipped == {"earlier": 3, odd.why_not: 1} and not found.overheads and not summarise(found.checked, lambda one: ())


def test_quantiles_by_hand() -> None:
    assert [quantile([1.0, 2.0, 4.0], share) for share in (0, 0.25, 0.5, 0.9, 1)] == [1, 1.5, 2, pytest.approx(3.6), 4]
    assert errors([(2.0, 1.0), (1.0, 1.0), (Range(0.4, 0.5, 1.1), 1.0)]) == Errors(3, 0.5, pytest.approx(0.9), 1.0, 1.0)
    assert errors([(Range(0.4, 0.5, 0.6), 1.0), (Range(0.4, 0.5, 1.6), 1.0)]).inside == 0.5
    assert errors([]).count == 0


def test_the_weighted_median_and_the_line_have_the_least_absolute_error() -> None:
    draw = random.Random(1)
    pairs = [(draw.gauss(3, 2), draw.uniform(0.1, 5)) for _ in range(41)]

    def off(value: float) -> float:
        return sum(weight * abs(one - value) for one, weight in pairs)

    best = weighted(pairs, 0.5)
    assert all(off(best) <= off(best + step) + 1e-9 for step in (-0.5, -0.01, 0.01, 0.5))
    points = [(float(x), 2 + 0.5 * x + draw.gauss(0, 0.1), 1.0) for x in range(1, 20)] + [(10.0, 100.0, 1.0)]  # and one far off
    a, b = _line(points)
    assert (a, b) == (pytest.approx(2, abs=0.2), pytest.approx(0.5, abs=0.02))
    assert _line([(1.0, -5.0, 1.0), (2.0, -6.0, 1.0)]) == (0, 0)  # nothing is ever faster than its kernels


def test_deployments_do_not_straddle_the_halves() -> None:
    assert first_half(BASE) == first_half(replace(BASE, id="x", isl=7, concurrency=9, tpot_s=3.0))


# -- the page


def checked(tpot: float, covered: float = 0.95, replayed: Replayed | None = None, **changes: object) -> Checked:
    point = replace(BASE, **changes)  # type: ignore[arg-type]
    return Checked(point, Range.exact(1.0), Range(tpot * 0.9, tpot, tpot * 1.1), covered=covered, replayed=replayed)


def test_goals_count_covered_points_alone() -> None:
    again = Replayed(1.3, 1.0, 1.0, 1.0, 4)
    plain = (checked(1.02, replayed=again), checked(9.0, covered=0.5, id="q"), checked(1.02, id="s", campaign=SWEEP, replayed=again))
    found = Validation(plain, (checked(1.5, covered=0.5), checked(9.0, id="q")), {}, {})
    tpot, ttft, held_out = goals(found)
    assert "TPOT, no overhead assumed: 2.0% median" in tpot and "over 2 covered points (aimed at 10%: met)" in tpot
    assert "TTFT, no overhead assumed: 30.0% median" in ttft and "over 1 covered points whose benchmark" in ttft and "missed" in ttft
    # Covered is what the kernels cover: the same points are judged with the host's time beside them.
    assert "50.0% median" in held_out and "over 1 covered points (aimed at 10%: missed)" in held_out
    assert "nothing is judged" in goals(Validation((checked(1.0, covered=0.1),), (), {}, {}))[0]


def test_the_page_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    found = Validation((checked(1.02, backend="<b>|"),), (), {"vllm": Overhead(Range(1, 2, 3), 0.04, 5e-6)}, {"a | b": 3})
    tables = sections(found)
    path = tmp_path / "validation.md"
    path.write_text(f"# By hand\n\n{BEGIN}\nof yesterday\n{END}\n\nand after\n")
    write(path, tables, ["a note"])
    text = path.read_text()
    assert text.startswith(f"# By hand\n\n{BEGIN}\n- a note\n") and text.endswith(f"{END}\n\nand after\n") and "yesterday" not in text
    assert "| vllm | 2 | 1..3 | 40 | 5.0 |" in text and "a \\| b" in text
    write(path, tables, ["a note"])
    assert path.read_text() == text
    shown = page(tables, ["<note>"])
    assert "&lt;b&gt;|" in shown and "&lt;note&gt;" in shown and "<script" not in shown and "http" not in shown
    for line in markdown(tables, []).splitlines():
        assert not line.startswith("|") or line.endswith("|")
    write(tmp_path / "new.md", tables, [])
    assert BEGIN in (tmp_path / "new.md").read_text()


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "plain.md").write_text("# nothing to replace\n")
    for name, words in (("plain.md", "no place for the tables"), ("x.txt", ".md or an .html"), ("nowhere/x.html", "cannot write")):
        with pytest.raises(UsageError, match=words):
            write(tmp_path / name, [], [])


PART = {"type": "part", "role": "qkv", "median_us": 30.0}
LAYER = {
    "type": "layer",
    "title": "m, 2 layers",
    "chip": "cpu",
    "parts": 2,
    "median_us": 50.0,
    "ratio": [0.8, 0.5, 1.25],
    "bare_ratio": [0.9, 0.8, 1],
    "laps": 15,
}


def test_whole_layers_beside_their_parts(tmp_path: Path) -> None:
    path = tmp_path / "layer.jsonl"
    path.write_text("\n".join(map(json.dumps, [PART, PART, LAYER, PART, LAYER])))
    first, second = read_layers([path])
    assert (first.sum_us, second.sum_us, first.whole_us) == (60, 30, 50)
    assert (first.ratio, first.low, first.high) == (1.25, 0.8, 2.0)
    assert "sum / whole" in markdown(sections(Validation((), (), {}, {}), [first]), [])
    for text in ("", "{}", "[1]", "no", json.dumps(PART), json.dumps(LAYER | {"ratio": [0, 0, 0]})):
        path.write_text(text)
        with pytest.raises(UsageError):
            read_layers([path])


# -- the verb


def run(*arguments: str) -> tuple[int, str, str]:
    app = typer.Typer()
    verb.command(app)
    found = CliRunner().invoke(app, list(arguments))
    return found.exit_code, found.stdout, found.stderr + str(found.exception or "")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "points.csv"
    values = {
        "id": "a", "silicon_data_source": "x", "backend": "vllm", "backend_version": "1", "model_path": "meta-llama/Llama-3.1-8B-Instruct",
        "system": "h100_sxm", "mode": "agg", "isl": 1000, "osl": 200, "batch_size": 4, "tp_size": 1, "pp_size": 1, "moe_tp_size": 1,
        "moe_ep_size": 1, "silicon_ttft_ms": 60, "silicon_tpot_ms": 8,
    }  # fmt: skip
    path.write_text(",".join(COLUMNS) + "\n" + ",".join(str(values.get(name, "")) for name in COLUMNS) + "\n")
    return path


def test_the_verb_on_a_table_of_ones_own(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    code, text, talk = run("--points", str(table), "--modelled", "--out", str(out))
    assert code == 0, talk
    assert "All points" in text and "llama-3.1-8b" in text and "nothing is judged" in talk
    assert "llama-3.1-8b" in out.read_text()
    code, text, talk = run("--points", str(table), "--modelled", "--json")
    rows = [json.loads(line) for line in text.splitlines()]
    assert (
        code == 0
        and rows[0]["model"] == "llama-3.1-8b"
        and rows[0]["tpot_s"]["low"] < rows[0]["tpot_s"]["mid"] < rows[0]["replayed_ttft_s"]
    )


def test_layers_alone_where_no_tables_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klab.harness.store.reference.tables.available", lambda given=None: None)
    path = tmp_path / "layer.jsonl"
    path.write_text("\n".join(map(json.dumps, [PART, PART, LAYER])))
    code, text, talk = run("--layer", str(path))
    assert code == 0 and "sum / whole" in text and "All points" not in text, talk
    code, text, talk = run()
    assert code != 0 and "no reference tables are here" in talk


def test_the_verb_says_what_is_wrong(table: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("--points", str(table), "--modelled", "--chip", "b200"), "has no comparable point of --chip b200"),
        (("--points", str(tmp_path / "none.csv"), "--modelled"), "cannot read"),
        (("--points", str(table), "--out", "x.txt"), ".md or an .html"),
        (("--layer", str(table)), "is not what klab layer --json writes"),
        (("--data", str(tmp_path)), "holds no tables"),
    ):
        code, text, talk = run(*arguments)
        assert code != 0 and words in talk and not text, (arguments, talk)
