"""The table of winners and the tables beside it: each figure against the rows it comes from, and what is not known said to be so."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence

import pytest
from made_results import contest, failed, made
from test_report_strip import NASTY, A, B, row, story

from klab.harness.catalog import find_chip
from klab.harness.choose.choose import choose
from klab.harness.choose.profile import Profile
from klab.harness.report.frames import DIMS
from klab.harness.report.gain import chosen_rows
from klab.harness.report.sections import evidence, failures, steps, winners
from klab.harness.report.subject import Occurrence, Story
from klab.harness.store.result import Result, Status
from klab.kernels.matmul.problem import Matmul


def cells(page: str, table: str = "winners") -> list[dict[str, tuple[str, str]]]:
    """The rows of a table: by head, what a cell shows and what it is sorted by."""
    body = page.split(f'id="{table}"', 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    found = []
    for line in re.findall(r"<tr.*?</tr>", body, re.DOTALL):
        parts = re.findall(r'<td(.*?)data-label="(.*?)"(.*?)>(.*?)</td>', line, re.DOTALL)
        sort = [re.search(r'data-sort="(.*?)"', after) for _, _, after, _ in parts]
        texts = [" ".join(re.sub(r"<.*?>", " ", inner).split()) for *_, inner in parts]
        found.append({head: (text, at.group(1) if at else "") for (_, head, _, _), text, at in zip(parts, texts, sort, strict=True)})
    return found


def metered(one: Result) -> Result:
    return dataclasses.replace(one, energy_j=0.02, energy_ci_low_j=0.019, energy_ci_high_j=0.021, power_w=612.0, energy_reason="counter")


def test_every_figure_of_a_winner() -> None:
    rows = [metered(row(B, "triton_a", 40.0, config={"block": 64})), row(B, "torch", 50.0), row(A, "torch", 10.0), row(A, "triton_a", 12.0)]
    shown = winners.section(story(rows))
    one = next(line for line in cells(shown) if line["Kernel and configuration"][1] == "triton_a")
    other = next(line for line in cells(shown) if line["Kernel and configuration"][1] == "torch")
    chip = find_chip("h200")
    assert one["Time"] == ("40.0 µs [39.60 to 40.40 µs]", "40.0")
    tflops = B.flops() / 40e-6 / 1e12
    assert one["Speed"][0].startswith(f"{tflops:.0f} TFLOP/s") and float(one["Speed"][1]) == pytest.approx(tflops)
    share = B.flops() / (chip.peak_tflops["bfloat16"] * 1e12) / 40e-6
    assert one["Of roofline"][0].startswith(f"{100 * share:.0f}%") and f"{40 * share:.1f} µs by compute" in one["Of roofline"][0]
    assert f"{100 * share * chip.spec_clock_mhz / 1755:.0f}% at 1755 MHz" in one["Of roofline"][0]
    assert one["Energy per call"] == ("20.0 mJ [19.0 to 21.0 mJ] 612 W", "0.02")
    assert one["Against library"][0].startswith("1.250× [1.250, 1.250] torch")
    assert one["Nearest rival"][0].startswith("1.250×") and "of" in one["Error"][0]
    assert other["Against library"] == ("is a library", "1.0") and other["Energy per call"][0] == "not asked for"
    assert "Chip" not in one, "one chip needs no column"
    assert "Not compared with the default: the kernel&#x27;s default configuration is not known here (2 choices)." in shown


def test_against_the_default_configuration() -> None:
    """Of the chosen kernel on the same problem; a choice that is the default says so, a default without a valid row too."""
    rows = [row(B, "triton_a", 40.0, config={"block": 64}), row(B, "triton_a", 50.0, config={"block": 128}), row(A, "triton_b", 10.0)]

    def decided(default: dict[str, object]) -> Profile:
        return choose(rows, None, chip="h200", defaults=lambda one: default if one.kernel.endswith("_a") else {})

    def table(profile: Profile) -> list[dict[str, tuple[str, str]]]:
        told = story(rows)
        return cells(winners.section(dataclasses.replace(told, subjects=(dataclasses.replace(told.subjects[0], profile=profile),))))

    profile = decided({"block": 128})
    by_kernel = {choice.kernel: choice.evidence for choice in profile.choices}
    default = by_kernel["matmul/triton_a"].default
    assert default is not None and default.ratio == pytest.approx(1.25) and default.config == {"block": 128}
    assert by_kernel["matmul/triton_b"].default_reason == "the choice is the default configuration"
    again = Profile.from_text(profile.to_text())
    assert again.choices[0].evidence.default == profile.choices[0].evidence.default or again.to_text() == profile.to_text()
    shown = {line["Kernel and configuration"][1]: line["Against default"] for line in table(profile)}
    assert shown["triton_a"][0].startswith("1.250×") and shown["triton_b"] == ("is the default", "1.0")
    absent = decided({"block": 1})
    assert "has no valid result" in {c.kernel: c.evidence for c in absent.choices}["matmul/triton_a"].default_reason
    older = json.loads(profile.to_text())
    for choice in older["choices"]:
        del choice["evidence"]["default"], choice["evidence"]["default_reason"]
    assert Profile.from_text(json.dumps(older)).choices[0].evidence.default is None, "profiles of before have no such field"


def test_rows_carry_what_filters_ask() -> None:
    place = (Occurrence("qwen3-0.6b", "decode", 64, "qkv_proj", 28), Occurrence("llama", "prefill", 1, "o_proj", 32))
    told = story([row(A, "triton_a", 10.0), row(B, "torch", 40.0)], occurs={A.key: place})
    by_problem = {one.choice.wanted.problem_key: winners.dims(told, one) for one in winners.winners(told)}
    assert by_problem[A.key] == {
        "chip": "h200", "model": ("qwen3-0.6b", "llama"), "phase": ("decode", "prefill"), "operator": "matmul", "dtype": "bfloat16",
        "kernel": "triton_a", "status": "ok",
    }  # fmt: skip
    assert by_problem[B.key]["model"] == () and set(by_problem[B.key]) == set(DIMS)
    shown = winners.section(told)
    assert shown.count("data-evidence=") == 2 and "qwen3-0.6b (decode), llama (prefill)" in shown
    names = re.findall(r'data-evidence="(.*?)"', shown)
    assert len(set(names)) == 2 and all(f'id="{name}"' in shown and f'data-copy="{name}"' in shown for name in names)


def test_columns_of_which_nothing_is_known_are_left_out_with_the_reason() -> None:
    shown = winners.section(story(contest("cpu")))
    heads = list(cells(shown)[0])
    assert not {"Of roofline", "Energy per call", "Against default", "Chip"} & set(heads)
    assert (
        "No share of the roofline: the peaks of this CPU are not known." in shown and "No energy: no power meter on this machine." in shown
    )
    assert "Chip" in cells(winners.section(story([*contest(), *contest("cpu", seed=1)])))[0]


def test_a_tie_is_told_with_what_settled_it() -> None:
    rows = [
        made(A, "triton_a", samples=[10.0, 10.1, 10.2, 10.1, 10.0, 10.2]),
        made(A, "triton_b", samples=[10.1, 10.0, 10.1, 10.2, 10.1, 10.0]),
    ]
    line = cells(winners.section(story(rows)))[0]
    frugal = dataclasses.replace(metered(rows[0]), library=False)
    library = dataclasses.replace(metered(rows[1]), library=True, energy_j=0.2, energy_ci_low_j=0.19, energy_ci_high_j=0.21)
    assert re.search(r'class="even">1\.0\d\d×', winners.section(story([frugal, library]))), "neither won nor lost"
    assert line["Nearest rival"][0].startswith("tie of 2 with triton_") and "settled by simplicity" in line["Nearest rival"][0]


def test_a_narrower_format_and_stale_code_are_marked() -> None:
    told = story([row(A, "triton_a", 10.0)])
    subject = told.subjects[0]
    choice = dataclasses.replace(subject.profile.choices[0], stale=True, instead="fp8 64x2048x1024", instead_problem={"m": 64})
    told = dataclasses.replace(
        told, subjects=(dataclasses.replace(subject, profile=dataclasses.replace(subject.profile, choices=(choice,))),)
    )
    shown = winners.section(told)
    assert "narrower format" in shown and "fp8 64x2048x1024" in shown and "stale" in shown
    assert chosen_rows(told.subjects[0]) == {}, "a row of the wide problem is not what a narrower choice rests on"


def test_of_two_states_the_row_is_the_one_that_was_chosen() -> None:
    cold = row(A, "triton_a", 10.0)
    warm = dataclasses.replace(cold, key="warm", l2_state="warm", median_us=5.0, recorded_at="2026-11-22T00:00:00Z")
    found = chosen_rows(story([cold, warm]).subjects[0])
    assert found[A.key].l2_state == "cold"


@pytest.mark.parametrize("rows", [[], [failed(A, "triton_a", Status.CRASHED, "gone")], [row(A, "torch", 9.0, kind="reference")]])
def test_without_winners_it_says_so(rows: list[Result]) -> None:
    shown = winners.section(story(rows))
    assert "No problem has a result that may be chosen" in shown and "<table" not in shown


def test_names_are_text_and_long_ones_are_cut() -> None:
    long = "x" * 300
    rows = [made(Matmul(m, 64, 64), name, config={NASTY: name}, problem_label=f"{name}{m}") for m, name in ((1, NASTY), (2, long))]
    shown = winners.section(story(rows))
    assert "<script" not in shown and f'title="{long}' in shown and f">{long}<" not in shown
    assert "<script" not in failures.section(story([failed(A, NASTY, Status.CRASHED, NASTY)]))


def test_what_is_no_number_is_not_measured() -> None:
    nan = math.nan
    odd = {"sm_clock_mhz": nan, "power_w": nan, "energy_j": nan, "energy_ci_low_j": nan}
    rows = [
        row(A, "triton_a", 10.0, **odd, clocks_mhz=(nan,) * 10),
        row(A, "torch", 5.0, median_us=nan),
        row(B, "torch", 5.0, ci_low_us=nan),
    ]
    told = story(rows)
    shown = winners.section(told)
    assert [one.choice.kernel for one in winners.winners(told)] == ["matmul/triton_a"], "no choice rests on what is no number"
    assert not re.search(r"\bnan\b", shown) and "no interval of its time" in shown
    assert "Energy per call" not in cells(shown)[0] and " MHz" not in shown
    found = evidence.payload(told)
    assert not re.search(r"\bnan\b", json.dumps(found), re.IGNORECASE) and "NaN" not in json.dumps(found)


def test_failures_are_one_table_that_filters_reach() -> None:
    rows: Sequence[Result] = [
        *(failed(Matmul(m, 64, 64), "triton_a", Status.TIMEOUT, "no answer") for m in (1, 2)),
        failed(A, "cuda_a", Status.INCORRECT, "off", chip="cpu"), made(A, "torch", kind="reference", status=Status.INCORRECT),
    ]  # fmt: skip
    told = story(rows, occurs={A.key: (Occurrence("qwen3-0.6b", "decode", 64, "qkv_proj", 28),)})
    shown = failures.section(told)
    lines = cells(shown, "failures")
    assert [(line["Status"][0], line["Chip"][0], line["Rows"]) for line in lines] == [
        ("incorrect", "cpu", ("1", "1")), ("timeout", "h200", ("2", "2")),
    ]  # fmt: skip
    dims = [json.loads(text.replace("&quot;", '"')) for text in re.findall(r'data-dims="(.*?)"', shown)]
    assert dims[0]["model"] == ["qwen3-0.6b"] and dims[1]["status"] == ["timeout"] and dims[1]["dtype"] == ["bfloat16"]
    assert "<b>2 timeout</b>" in shown and "<b>1 incorrect</b>" in shown
    assert "None: no trial was run." in failures.section(story([made(A, "torch", kind="reference")]))
    assert "None: every trial" in failures.section(story([row(A, "torch", 9.0)]))


def test_steps_need_a_plan() -> None:
    assert steps.section(story([row(A, "torch", 9.0)]).subjects[0]) is None and not Story(()).statuses
