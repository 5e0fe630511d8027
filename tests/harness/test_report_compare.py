"""`klab report --compare A B`: what A and B may be, that its answers are those of `klab compare`, and that its page tells the truth."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, missing
from made_results import contest, failed, made

from klab.harness.report.compare_judged import judge
from klab.harness.report.compare_page import render, write_compare
from klab.harness.report.figures import compared
from klab.harness.report.pick import Kind, Side, pick
from klab.harness.store.journal import Journal
from klab.harness.store.result import Result, Status
from klab.harness.watch.compare_results import compare_results
from klab.harness.watch.compare_rule import Answer
from klab.harness.watch.compare_run import Request
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.matmul.problem import Matmul

NASTY = '<script>alert("x")</script>&amp;"\''
KERNEL = NASTY.replace("/", "")
TIMES = ("median_us", "q1_us", "q3_us", "ci_low_us", "ci_high_us")


def again(rows: Sequence[Result], run: str, day: int, factor: Callable[[Result], float], **changes: Any) -> list[Result]:
    """The rows measured once more, in another run of another day."""
    found = []
    for row in rows:
        by = factor(row)
        scaled: dict[str, Any] = {name: getattr(row, name) * by for name in TIMES if getattr(row, name) is not None}
        scaled |= {"samples_us": tuple(us * by for us in row.samples_us), "run_id": run, "recorded_at": f"2026-11-{day:02d}T10:00:00Z"}
        found.append(dataclasses.replace(row, **scaled | changes))
    return found


def two_weeks() -> tuple[list[Result], list[Result]]:
    """Three runs of one commit, three of the next, in which some kernels changed, one is gone and one broke."""
    rng, base = random.Random(4), contest()
    change = {(row.problem_key, row.kernel): rng.choice((1.0, 1.0, 0.9, 1.08)) for row in base}
    old = {"commit": "0123456789abcdef", "driver": "580.159", "torch": "2.13.0"}
    a = [r for n in range(3) for r in again(base, f"night-a{n}", 10 + n, lambda row: rng.uniform(0.999, 1.001), environment=old)]
    new = old | {"commit": "fedcba9876543210", "driver": "590.10"}
    left = [row for row in base if row.kernel != "matmul/cuda_mma"]
    b = []
    for n in range(3):
        moved = {name: by * rng.uniform(0.999, 1.001) for name, by in change.items()}
        b += again(left, f"night-b{n}", 20 + n, lambda row, moved=moved: moved[row.problem_key, row.kernel], environment=new)  # type: ignore[misc]
    fails = failed(Matmul(8, 2048, 1024), "triton_tiled", Status.INCORRECT, "out is off by 0.3", run_id="night-b3", environment=new)
    fails = dataclasses.replace(fails, recorded_at="2026-11-24T10:00:00Z")
    own = [row for row in base if (row.kernel, row.problem_key) == ("matmul/triton_tiled", fails.problem_key)]
    broken = [dataclasses.replace(fails, key=row.key, config=row.config) for row in own]
    return a, b + broken


def stored(folder: Path, rows: Sequence[Result]) -> Path:
    runs: dict[str, list[Result]] = {}
    for row in rows:
        runs.setdefault(row.run_id, []).append(row)
    for run, own in runs.items():
        with Journal(folder, run) as journal:
            for row in own:
                journal.append(row)
    return folder


def side(rows: Sequence[Result], kind: Kind = Kind.RUN, name: str = "x") -> Side:
    return Side(kind, name, f"{kind} {name}", tuple(rows))


# The answers


def test_the_answers_are_those_of_klab_compare(tmp_path: Path) -> None:
    def over(row: Result) -> Result:
        """With anchors that were taken in the same laps, as a run of matmuls has them."""
        build = {"anchors": {name: {"us": [100.0 + n % 3 for n in range(len(row.samples_us))]} for name in ("matmul", "copy")}}
        return dataclasses.replace(row, build=build) if row.operator == "matmul" and row.samples_us else row

    a, b = (list(map(over, rows)) for rows in two_weeks())
    wanted = compare_results(str(stored(tmp_path / "a", a)), str(stored(tmp_path / "b", b)), Request())
    found = judge(a, b)
    assert [pair.found for pair in found.pairs] == [one.found for one in wanted.lines]
    names = [f"h200 {pair.like.problem_label} {pair.kernel}" for pair in found.pairs]
    assert (
        names == [one.name for one in wanted.lines] == [one.name for one in found.comparison.lines] and found.comparison.mean == wanted.mean
    )
    assert (found.comparison.answer, found.comparison.why) == (wanted.answer, wanted.why)
    assert sorted(found.alone) == sorted((name, why.removeprefix("only ")[:1]) for name, why in wanted.alone)
    assert any("over the copy anchor" in pair.found.reason for pair in found.pairs)
    answers = {pair.found.answer for pair in found.pairs}
    assert {Answer.SLOWER, Answer.FASTER, Answer.SAME, Answer.BROKEN} <= answers
    for pair in found.pairs:
        if pair.found.answer in (Answer.SLOWER, Answer.FASTER, Answer.SAME):
            assert pair.a is not None and pair.b is not None and pair.a.run_id == "night-a2" and pair.b.run_id == "night-b2"
            assert pair.a.kernel == pair.b.kernel and pair.a.problem_key == pair.b.problem_key == pair.like.problem_key


def test_what_is_alike_stands_in_the_order_of_klab_compare(tmp_path: Path) -> None:
    a = [made(Matmul(m, 64, 64)) for m in (64, 8, 512, 1, 128, 4096, 2, 16, 32, 256, 1024, 4)]
    b = [failed(Matmul(row.problem["m"], 64, 64), "torch", Status.CRASHED, "gone", key=row.key, run_id="b") for row in a]
    wanted = compare_results(str(stored(tmp_path / "a", a)), str(stored(tmp_path / "b", b)), Request())
    found = judge(a, b)
    assert [one.name for one in found.comparison.lines] == [one.name for one in wanted.lines]
    assert [f"h200 {pair.problem} torch" for pair in found.pairs] == [one.name for one in wanted.lines]


def test_the_best_of_each_is_over_all_kernels() -> None:
    a, b = two_weeks()
    found = judge(a, b, best=True)
    assert len(found.pairs) == 14 and not found.alone
    for pair in found.pairs:
        for own, rows in ((pair.a, a), (pair.b, b)):
            assert own is not None
            fine = [r for r in rows if r.problem_key == pair.like.problem_key and r.median_us]
            bad = {r.kernel for r in rows if r.status is Status.INCORRECT and r.source_digest == fine[0].source_digest}
            each: dict[tuple[str, str], list[float]] = {}
            for r in fine:
                if r.kernel not in bad and (r.kernel != "matmul/triton_tiled" or rows is a):
                    each.setdefault((r.kernel, str(r.config)), []).append(r.median_us or 0.0)
            least = min(each, key=lambda name: statistics.median(each[name]))
            assert (own.kernel, str(own.config)) == least


def test_code_that_was_wrong_anywhere_is_no_best() -> None:
    rows = [made(Matmul(m, 64, 64), kernel, level_us=us) for m in (1, 2) for kernel, us in (("torch", 20.0), ("triton_a", 10.0))]
    bad = failed(
        Matmul(2, 64, 64),
        "triton_a",
        Status.INCORRECT,
        "off",
        recorded_at="2026-12-01T00:00:00Z",
        key=rows[3].key,
        error=0.5,
        tolerance=0.1,
    )
    (one, two) = sorted(judge(rows, [*rows, bad], best=True).pairs, key=lambda pair: pair.like.problem_label)
    assert one.a is not None and one.b is not None and (one.a.kernel, one.b.kernel) == ("matmul/triton_a", "matmul/torch")
    assert two.b is not None and two.b.kernel == "matmul/torch" and one.found.answer is Answer.SLOWER


def test_between_chips_neither_clocks_nor_anchors_correct() -> None:
    where = {"device": "NVIDIA B200", "device_uuid": "GPU-9", "sm_clock_mhz": 900.0}
    a = [made(Matmul(m, 2048, 1024), level_us=100.0, noise=0.001) for m in (8, 4096)]
    b = [dataclasses.replace(made(Matmul(m, 2048, 1024), level_us=50.0, noise=0.001), chip="b200", **where) for m in (8, 4096)]
    found = judge(a, b, between_chips=True)
    for pair in found.pairs:
        assert pair.a is not None and pair.b is not None
        assert pair.a.chip == "h200" and pair.b.chip == "b200" and pair.found.cycles is None
        (mid_a, low_a, high_a), (mid_b, low_b, high_b) = (
            (r.median_us or 0.0, r.ci_low_us or 0.0, r.ci_high_us or 0.0) for r in (pair.a, pair.b)
        )
        within = max(high_a - mid_a, mid_a - low_a) / mid_a + max(high_b - mid_b, mid_b - low_b) / mid_b
        reach = within + math.log1p(0.03) + math.log1p(0.05)
        assert pair.found.ratio == pytest.approx(mid_b / mid_a) and pair.found.answer is Answer.FASTER
        assert math.log((pair.found.high or 0.0) / (pair.found.low or 1.0)) == pytest.approx(2 * reach)
    with pytest.raises(UsageError, match="no kernel on a problem in common"):
        judge(a, b)


def test_energy_has_the_interval_of_both_rows() -> None:
    energy = {"energy_j": 2.0, "energy_ci_low_j": 1.9, "energy_ci_high_j": 2.1}
    a = [made(Matmul(8, 64, 64), **energy)]
    b = [made(Matmul(8, 64, 64), energy_j=1.0, energy_ci_low_j=0.9, energy_ci_high_j=1.1)]
    (pair,) = judge(a, b).pairs
    assert pair.energy == pytest.approx((0.5, 0.9 / 2.1, 1.1 / 1.9))
    (pair,) = judge(a, [made(Matmul(8, 64, 64))]).pairs
    assert pair.energy is None
    bare = [dataclasses.replace(b[0], energy_ci_low_j=None, energy_ci_high_j=None)]
    (pair,) = judge(a, bare).pairs
    assert pair.energy == (0.5, None, None), "an energy without an interval gives a ratio without one"
    (figure,) = [figure for figure in compared.heat([pair], compared.Sides("A", "B"), "h") if figure.variant == "energy"]
    assert figure.table is not None and figure.table["low"].isna().all() and "allow for no days and boards" in figure.caption
    assert "0.500×" in render(side(a), side(bare))[1]


def test_energy_that_was_measured_apart_is_found() -> None:
    times = [made(Matmul(8, 64, 64), recorded_at="2026-11-21T00:00:00Z")]
    energy = {"energy_j": 2.0, "energy_ci_low_j": 1.9, "energy_ci_high_j": 2.1}
    apart = [dataclasses.replace(row, policy={**row.policy, "energy": True}, key="apart", **energy) for row in [made(Matmul(8, 64, 64))]]
    (pair,) = judge([*times, *apart], [*times, *apart]).pairs
    assert pair.a is not None and pair.a.energy_j is None and pair.energies == (2.0, 2.0)
    assert pair.energy == pytest.approx((1.0, 1.9 / 2.1, 2.1 / 1.9))
    slower = [dataclasses.replace(row, config={"splits": 2}, median_us=1e4) for row in apart]
    (pair,) = judge([*times, *apart], [*times, *slower], best=True).pairs
    assert pair.energy is None, "the energy of another configuration is not that of the fastest"


def test_each_state_of_the_cache_has_its_own_rows() -> None:
    cold = [made(Matmul(8, 64, 64), level_us=100.0)]
    warm = [
        dataclasses.replace(row, policy={**row.policy, "l2": "warm"}, l2_state="warm", key="warm", recorded_at="2026-11-25T00:00:00Z")
        for row in [made(Matmul(8, 64, 64), level_us=40.0)]
    ]
    for best in (False, True):
        found = judge([*cold, *warm], [*warm, *cold], best=best)
        shown = {pair.problem: (pair.a.median_us, pair.b.median_us) for pair in found.pairs if pair.a and pair.b}
        label = cold[0].problem_label
        assert shown == {label: (cold[0].median_us,) * 2, f"{label} (warm)": (warm[0].median_us,) * 2}


def test_the_headline_says_where_it_is_worse() -> None:
    a = [made(Matmul(m, 64, 64), level_us=100.0) for m in (1, 2, 4)]
    b = again(a, "b", 21, lambda row: 1.5 if row.problem["m"] == 1 else 0.5, chip="b200", device="NVIDIA B200", device_uuid="GPU-9")
    _, page = render(side(a, Kind.CHIP, "h200"), side(b, Kind.CHIP, "b200"))
    assert "<h1>B200 is slower than H200 on 1 of 3 problems, faster in the mean</h1>" in page
    worse = again(a, "b", 21, lambda row: 1.5, chip="b200", device="NVIDIA B200", device_uuid="GPU-9")
    _, page = render(side(a, Kind.CHIP, "h200"), side(worse, Kind.CHIP, "b200"))
    assert "<h1>B200 is slower than H200</h1>" in page


# What a side may be


@pytest.fixture(scope="module")
def rows() -> list[Result]:
    a, b = two_weeks()
    other = again(contest(), "night-c", 25, lambda row: 0.5, chip="b200", device="NVIDIA B200", device_uuid="GPU-9")
    theirs = dataclasses.replace(contest()[0], kind="reference", chip="gb200", run_id="published", recorded_at="")
    return [*a, *b, *other, theirs]


def test_sides_by_name(rows: list[Result], tmp_path: Path) -> None:
    def names(a: str, b: str) -> list[tuple[Kind, str]]:
        return [(one.kind, one.name) for one in pick(lambda: rows, a, b)]

    assert names("previous", "latest") == [(Kind.RUN, "night-b3"), (Kind.RUN, "night-c")]
    assert names("night-a0", "night-b0") == [(Kind.RUN, "night-a0"), (Kind.RUN, "night-b0")]
    assert names("night-c", "run:night-a1") == [(Kind.RUN, "night-c"), (Kind.RUN, "night-a1")]
    assert names("H200", "b200") == [(Kind.CHIP, "h200"), (Kind.CHIP, "b200")]
    assert names("0123", "FEDCBA") == [(Kind.COMMIT, "0123456789ab"), (Kind.COMMIT, "fedcba987654")]
    folder = stored(tmp_path / "other", rows[:5])
    theirs = dataclasses.replace(rows[-1], run_id="night-a1", chip="h200", environment={"commit": "0123456789abcdef"})
    for a, b in (("night-a1", "night-b0"), ("h200", "b200"), ("0123", "fedc")):
        assert theirs not in pick(lambda: [*rows, theirs], a, b)[0].rows, "what others published is on no side"
    one, two = pick(lambda: rows, str(folder), "night-a1")
    assert (one.kind, len(one.rows), two.kind) == (Kind.RESULTS, 5, Kind.RUN) and one.name == str(folder.resolve())
    assert all(row.kind == "measured" for row in (*one.rows, *two.rows)) and "2026-11-10" in one.title


def test_sides_that_are_none(rows: list[Result]) -> None:
    for a, b, words in (
        ("night-a", "night-b0", r"'night-a' is 3 things: run:night-a\d, run:night-a\d, run:night-a\d; write one of them"),
        ("nothing", "latest", "names nothing here: runs night-c, night-b3.*chips b200, h200; commits 0123456789ab"),
        ("h200", "night-c", "h200 is a chip and night-c a run: a chip is compared with a chip"),
        ("h200", "chip:h200", "are both chip h200"),
        ("gb200", "h200", "published rows alone"),
        ("012", "h200", "names nothing here"),
        ("run:", "h200", "is empty"),
        ("run:h200", "b200", "names nothing here"),
    ):
        with pytest.raises(UsageError, match=words):
            pick(lambda: rows, a, b)
    with pytest.raises(UsageError, match="there are no results"):
        pick(list, "latest", "previous")


# The page


def test_a_page_of_two_commits(rows: list[Result], tmp_path: Path) -> None:
    store, out = stored(tmp_path / "results", [row for row in rows if row.kind == "measured"]), tmp_path / "deep" / "page.html"
    told = write_compare([store], "0123", "fedc", out, chips=["h200"])
    page = out.read_text()
    wanted = judge(*(pick(lambda: rows, "0123", "fedc")[n].rows for n in (0, 1)))
    slower = [pair for pair in wanted.pairs if pair.found.answer is Answer.SLOWER]
    assert told.comparison.answer is Answer.BROKEN and "B is broken" in told.headline and "commit 0123456789ab" in told.a
    assert (
        "fedcba987654 is broken against 0123456789ab" in page and f"{len(slower)} slower" in page and "1 fail on B and did not on A" in page
    )
    assert f"B takes {told.comparison.mean.ratio:.3f}× [" in page and "Most changed: " in page
    assert "Only A has 5 kernels on a problem" in page and "cuda_mma" in page
    around = page[page.index('id="around"') :]
    for words in ("driver", "580.159", "590.10", "The same on both sides: ", "torch 2.13.0"):
        assert words in around, words
    assert "Different" not in page[: page.index("<nav")] and "out is off by 0.3" in page


def test_a_page_of_two_chips(rows: list[Result]) -> None:
    a, b = pick(lambda: rows, "h200", "b200")
    found, page = render(a, b)
    assert found.answer is Answer.FASTER and "B200 is faster than H200" in page and "The sides are two chips" in page
    assert f"B200 takes {found.mean.ratio:.3f}× [" in page and "Kernel by kernel" in page
    assert page.index('id="best"') < page.index('id="kernels"')


def test_figures_of_a_comparison(rows: list[Result]) -> None:
    found = judge(pick(lambda: rows, "0123", "fedc")[0].rows, pick(lambda: rows, "0123", "fedc")[1].rows)
    table = compared.data(found.pairs)
    timed = [pair for pair in found.pairs if pair.found.ratio is not None]
    assert table["ratio"].tolist() == [pair.found.ratio for pair in timed]
    assert table["a"].tolist() == [pair.a.median_us for pair in timed if pair.a is not None]
    figure = compared.scatter(table, compared.Sides("A", "B"), "s")
    counts = {answer: sum(pair.found.answer is answer for pair in timed) for answer in Answer}
    assert figure.caption.startswith(f"{counts[Answer.SLOWER]} slower, {counts[Answer.FASTER]} faster, {counts[Answer.SAME]} same")
    drawn = sorted(row for trace in figure.traces[1:] for row in trace["meta"]["rows"])
    assert drawn == list(range(len(timed)))
    assert compared.scatter(table[:0], compared.Sides("A", "B"), "s").empty and compared.heat([], compared.Sides("A", "B"), "h") == []


def test_other_devices_are_warned_of() -> None:
    a = [made(Matmul(m, 64, 64), chip="cpu", level_us=100.0) for m in (1, 2)]
    b = [dataclasses.replace(row, device="Other CPU", device_uuid="cpu-1") for row in a]
    _, page = render(side(a, name="one"), side(b, name="two"))
    assert "Different devices: A on Example CPU @ 2.50GHz, B on Other CPU" in page and "tell the machines apart" in page
    boards = [dataclasses.replace(row, device_uuid="cpu-2") for row in a]
    _, page = render(side(a, name="one"), side(boards, name="two"))
    assert "Different boards" in page and "One or two runs on a side" in page


def test_names_stay_text() -> None:
    rows = [
        made(Matmul(m, 64, 64), KERNEL, config={NASTY: NASTY}, problem_label=NASTY, environment={NASTY: NASTY + str(m)}) for m in (1, 2)
    ]
    theirs = [dataclasses.replace(row, device=NASTY, environment={NASTY: "y" * 300}, run_id="z" * 300) for row in rows]
    lone = [made(Matmul(3, 64, 64), KERNEL, problem_label=NASTY)]
    _, page = render(side([*rows, *lone], name=NASTY), side(theirs, name="z" * 300))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "z" * 170 not in page[: page.index("<nav")]


def test_one_row_without_an_interval_and_one_without_a_time() -> None:
    bare = made(Matmul(1, 64, 64), samples_us=(10.0,), ci_low_us=None, ci_high_us=None)
    check = made(Matmul(2, 64, 64), samples_us=(), median_us=None, ci_low_us=None, ci_high_us=None, marked=())
    strange = dataclasses.replace(bare, median_us=math.nan, energy_j=math.nan, recorded_at="2026-12-01T00:00:00Z")
    (pair,) = judge([bare, strange], [bare]).pairs
    assert pair.a == bare and pair.energy is None, "what is no number is no value to show"
    found, page = render(side([bare, check], name="a"), side([bare, check], name="b"))
    assert found.answer is Answer.CANNOT_TELL and len(found.lines) == 1 and "cannot tell" in page
    with pytest.raises(UsageError, match="1 measured result of 1 problem on h200 in A"):
        render(side([bare], name="a"), side([check], name="b"))


def test_what_cannot_be_written_or_compared(tmp_path: Path) -> None:
    store = stored(tmp_path / "r", [made(Matmul(1, 64, 64), run_id="one"), made(Matmul(2, 64, 64), run_id="two")])
    with pytest.raises(UsageError, match="no kernel on a problem in common"):
        write_compare([store], "one", "two", tmp_path / "page.html")
    (tmp_path / "file").write_text("")
    both = stored(tmp_path / "b", [made(Matmul(1, 64, 64), run_id="one"), made(Matmul(1, 64, 64), run_id="two", seed=2)])
    with pytest.raises(CannotMeasure, match="cannot write"):
        write_compare([both], "one", "two", tmp_path / "file" / "page.html")
    assert write_compare([both], "one", "two", tmp_path / "page.html").comparison.answer is Answer.CANNOT_TELL
    with pytest.raises(UsageError, match="are one place"):
        write_compare([], str(both), f"{both}/../{both.name}", tmp_path / "page.html")


def test_the_latest_run_is_that_of_the_chips_asked_for(rows: list[Result], tmp_path: Path) -> None:
    good = [row for row in rows if row.kind == "measured" and row.run_id != "night-b3"]
    store = stored(tmp_path / "results", good)
    told = write_compare([store], "night-a0", "latest", tmp_path / "page.html", chips=["h200"])
    assert "run night-b2" in told.b, "night-c is newer, and of another chip"


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_in_a_browser(rows: list[Result], tmp_path: Path) -> None:
    _, page = render(*pick(lambda: rows, "0123", "fedc"))
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        browser.open(path, width=400)
        assert browser.run("return klab.ready.then(() => { klab.plots.dirty(); return klab.plots.all(); })") >= 2
        assert browser.run("return document.documentElement.scrollWidth") <= 400
        browser.run("location.hash = '#kernels?operator=matmul'; return new Promise((done) => setTimeout(done, 80))")
        left = browser.run("return [...document.querySelectorAll('#kernels tbody tr')].filter((tr) => !tr.hidden).length")
        assert left == sum(
            pair.like.operator == "matmul" for pair in judge(*(one.rows for one in pick(lambda: rows, "0123", "fedc"))).pairs
        )
        assert browser.console() == []
        assert [url for url in browser.requests() if not url.startswith(("data:", "blob:"))] == [path.resolve().as_uri()]
