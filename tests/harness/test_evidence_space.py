"""Which rows a recorded space rests on, and what the README says of energy, of failures, and of the device: by made rows of known truth."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from pathlib import Path

import pytest
from made_evidence import CHIP, LEVELS, SPACE, TILES, journal, projections, space_rows, stored, timed, to_best
from made_results import failed, made

from klab.harness.choose.candidates import candidates
from klab.harness.measure.calibration import Calibration, Figure
from klab.harness.report import evidence_finish
from klab.harness.report.evidence_energy import joules
from klab.harness.report.evidence_failures import failures
from klab.harness.report.evidence_markdown import plain
from klab.harness.report.evidence_readme_device import calibration_text, energy_text, failures_text
from klab.harness.report.evidence_readme_search import search_text
from klab.harness.report.evidence_search import Found, finals, rests_on, searches, time_to_best
from klab.harness.report.evidence_space import held_out
from klab.harness.report.figures.search_journals import Recorded
from klab.harness.store.result import Result, Status
from klab.harness.tune.replay.export import Recordings, export
from klab.kernels.discover import discover


def recording(rows: list[Result]) -> Recordings:
    return Recordings(SPACE.key, SPACE.label(), "matmul", tuple(rows))


def whole(epoch: str = "epoch-1", tried: int = 8) -> Found:
    found = journal([(n, 0.5) for n in range(tried)], "exhaustive")
    return dataclasses.replace(found, journal=Recorded({**found.journal.header, "epoch": epoch}, found.journal.evaluations))


def test_a_few_defaults_under_a_newer_driver_do_not_hide_a_recorded_space() -> None:
    later = {"epoch": "epoch-2", "recorded_at": "2026-12-01T10:00:00Z", "run_id": "run-9"}
    rows = [*space_rows(), timed("torch", 40.0), timed("triton_tiled", 50.0, config=TILES[0], **later), timed("torch", 40.0, **later)]
    assert len(export(recording(rows)).space) == 2, "by itself the export takes the newest driver"
    kept, every, notes = rests_on(recording(rows), [whole(), whole("epoch-2", 1)])
    assert every is not None and every.epoch == "epoch-1" and len(export(kept).space) == 9 and len(notes) == 1
    found = time_to_best(recording(rows), SPACE, CHIP, {}, [whole(), whole("epoch-2", 1)], [], [])
    assert found.complete and found.best_us == pytest.approx(60.0) and "another driver" in found.notes[0]
    assert rests_on(recording(rows), [whole(), whole("epoch-2")])[1] == whole("epoch-2"), "of two that are complete the newer"
    tuned = journal([(5, 1.0)], "gaussian")
    assert any(
        "searched it under another" in note for note in time_to_best(recording(rows), SPACE, CHIP, {}, [whole()], [tuned], rows).notes
    )


def test_the_default_of_changed_code_does_not_hide_the_recorded_candidates() -> None:
    changed = timed("triton_tiled", 30.0, config=TILES[0], source_digest="new", recorded_at="2026-12-01T10:00:00Z")
    kept, _, notes = rests_on(recording([*space_rows(), changed]), [whole()])
    assert len(export(kept).space) == 8 and "triton_tiled has changed" in notes[0]
    other = [dataclasses.replace(row, source_digest="new", recorded_at="2026-12-01T10:00:00Z") for row in space_rows()]
    kept, _, notes = rests_on(recording([*space_rows(), *other]), [whole()])
    assert {row.source_digest for row in kept.rows} == {"new"} and not notes, "all of it again: the newer code"


def test_a_space_of_two_devices_is_judged_by_corrected_times(tmp_path: Path) -> None:
    """The sixth tile was measured on a device that is slow by half, and is the best nevertheless."""
    folder = stored(tmp_path / "h200", [])
    (folder / "tune").mkdir()
    lines = [{"candidate": n, "value": us, "status": "ok", "rounds": 0, "spent_s": 0.5} for n, us in enumerate(LEVELS)]
    header = {"kind": "search", **whole().journal.header}
    (folder / "tune" / "a.search").write_text("".join(json.dumps(one) + "\n" for one in (header, *lines)))
    fair = space_rows()
    raw = [*fair[:5], timed("triton_tiled", 90.0, config=TILES[5]), *fair[6:]]
    recorded, found = evidence_finish._searched(raw, fair, CHIP, discover(), folder)
    one = next(one for one in found if one.problem == SPACE.label())
    assert one.best_us == pytest.approx(60.0) and export(recorded[0]).optimum_us == pytest.approx(61.0), "what is exported is as measured"


def test_regret_without_the_luck_of_the_best() -> None:
    """Three hundred candidates that all take as long: the best of them is luck, and the choice of any misses nothing."""
    rng = random.Random(3)
    rows = [
        made(SPACE, "triton_tiled", config={"tile": n}, samples=[100 * math.exp(rng.gauss(0, 0.01)) for _ in range(20)]) for n in range(300)
    ]
    field = candidates(rows)
    chosen = field[0]
    assert chosen.row.median_us is not None
    naive = chosen.row.median_us / min(row.median_us or math.inf for row in rows)
    fair = held_out(field, chosen)
    assert naive > 1.004 and fair is not None and abs(fair - 1) < 0.4 * (naive - 1)
    halves = [[statistics.median(row.samples_us[start::2]) for row in rows] for start in (0, 1)]
    at = [min(range(300), key=halves[n].__getitem__) for n in (0, 1)]
    own = next(n for n, row in enumerate(rows) if row is chosen.row)
    assert fair == pytest.approx(math.sqrt(halves[1][own] / halves[1][at[0]] * halves[0][own] / halves[0][at[1]]))
    short = candidates([made(SPACE, "triton_tiled", samples=[100.0] * 7)])
    assert held_out(short, short[0]) is None


def test_time_to_best_is_summed_up() -> None:
    tuned = journal([(6, 2.0), (0, 3.0)], "gaussian")
    text = search_text([to_best([tuned], whole()), to_best([], whole())])
    assert "On 1 problem with a whole space and a search: the tuner took 5 s of the device, every candidate 4 s" in text
    assert "its regret was 1.017 in the median" in text and "| held out |" in text
    assert "On no problem are both" in search_text([to_best([], whole())])


def test_energy_beside_libraries() -> None:
    def metered(kernel: str, us: float, joule: float, problem: object = SPACE) -> Result:
        return timed(
            kernel, us, problem, energy_j=joule, energy_ci_low_j=joule * 0.99, energy_ci_high_j=joule * 1.01, power_w=joule / us * 1e6
        )

    first, second = projections()
    rows = [metered("triton_a", 50.0, 0.02), metered("cuda_b", 60.0, 0.015), metered("torch", 55.0, 0.03), timed("torch_x", 1.0)]
    rows += [metered("triton_a", 50.0, 0.2, first), metered("torch", 60.0, 0.1, first), metered("triton_a", 50.0, 0.2, second)]
    found = joules(rows)
    assert [one.problem for one in found] == [first.label(), SPACE.label()], "the most joules first, and none of one kernel alone"
    over = found[1].over
    assert over is not None and over.ratio == pytest.approx(2.0) and over.low == pytest.approx(2 * 0.99 / 1.01)
    assert (found[1].frugal, found[1].fastest) == ("matmul/cuda_b", "matmul/triton_a")
    text = energy_text(found)
    assert (
        "takes less on 1, more on 1, and on 0 the two" in text and "On 2 the most frugal of the metered kernels is not the fastest" in text
    )
    assert f"| {SPACE.label()} | cuda_b | 15.0 mJ | 250 W | torch | 30.0 mJ | 545 W | 2.000 (1.960 to 2.040) | cuda_b | triton_a |" in text
    assert "No problem has the joules" in energy_text([])


def test_what_failed_is_told_with_its_reason() -> None:
    other, later = projections()[0], {"recorded_at": "2026-12-01T10:00:00Z"}
    rows = [
        failed(SPACE, "cuda_a", Status.COMPILE_ERROR, "old"),
        failed(other, "cuda_a", Status.COMPILE_ERROR, "ptxas: <b>|no|</b>\nmore", **later),
    ]
    rows += [failed(SPACE, "cuda_b", Status.CRASHED, "once"), timed("cuda_b", 5.0, **later)]
    rows += [
        failed(SPACE, "cuda_c", Status.INCORRECT, "off by 0.3"),
        failed(SPACE, "cuda_d", Status.COMPILE_ERROR, "no room", kind="screened"),
    ]
    rows += [timed("cuda_e", 5.0), failed(SPACE, "cuda_e", Status.INCORRECT, "off now", **later)]
    rows.append(timed("cuda_f", 5.0, marked=(1,) * 22))
    found = failures(rows)
    assert (found.trials, found.failed) == (7, 5) and found.wavering == ("matmul/cuda_e",)
    assert [(one.kernel, one.trials, one.problems) for one in found.kinds] == [
        ("matmul/cuda_c", 1, 1), ("matmul/cuda_e", 1, 1), ("matmul/cuda_a", 2, 2), ("matmul/cuda_d", 1, 1)]  # fmt: skip
    text = failures_text(found)
    assert "5 trials of 7 ended without a verified result" in text and "ptxas: &lt;b>\\|no\\|&lt;/b> more" in text
    assert "compile_error, before the device" in text and "Found wrong and right by the same code: matmul/cuda_e." in text
    assert "Timed, and not chosen from: 1 throttled" in text
    assert "0 trials of 0" in failures_text(failures([]))


def test_the_devices_own_figures() -> None:
    one = Calibration("GPU-0123456789abcdef", "NVIDIA H200", "h200", "2026-11-20T10:00:00Z", "e", launch_overhead_us=Figure(2.1, 2.0, 2.2),
                      matmul_tflops={"bfloat16": Figure(700.0, 690.0, 710.0)})  # fmt: skip
    two = dataclasses.replace(one, device_uuid="GPU-b", matmul_tflops={}, launch_overhead_us=Figure.missing("no time left"))
    text = calibration_text([one, two])
    assert "| launch, one after another | 2.1 (2..2.2) µs | no time left |" in text
    assert "| matmul peak, bfloat16, random data | 700 (690..710) TFLOP/s | not measured |" in text
    assert "GPU-01234567, 2026-11-20" in text and "copy" not in text
    assert "No device is calibrated" in calibration_text([])


def test_foreign_endings_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "tune"
    folder.mkdir()
    header = json.dumps({"kind": "search", "strategy": "exhaustive", "problem": ["a list"], "candidates": 2})
    line = json.dumps({"candidate": 0, "value": 1.0, "status": "ok", "rounds": 0, "spent_s": 1.0})
    odd = ("[1]", '{"ending": 5}', '{"ending": {"kernel": "a", "config": 5}}', '{"ending": {"kernel": "a", "config": {}, "took_s": "x"}}')
    for n, text in enumerate(odd):
        (folder / f"{n}.search").write_text(f"{header}\n{line}\n")
        (folder / f"{n}.final").write_text(text)
    assert len(list(searches(tmp_path))) == 4 and finals(tmp_path) == {}


def test_no_markup_comes_out_of_names() -> None:
    assert plain("a|b <img> [x](http://y)\n c") == "a\\|b &lt;img> [x]\\(http://y) c"
