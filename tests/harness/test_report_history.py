"""The history of series on the page: levels, changes and intervals against what was planted, and that points belong to their rows."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import statistics

import pytest
from made_nights import EPOCH, NEW_EPOCH, eventful, history, night, series, verdict
from made_results import contest
from test_report_figures import accepted
from test_report_page import Reader, story
from test_watch_outputs import hostile

from klab.harness.report.figures import history_series
from klab.harness.report.figures.history_table import Known, level_interval, level_now, nights_of, overview
from klab.harness.report.figures.style import Figure
from klab.harness.report.frames import standing
from klab.harness.report.page import render
from klab.harness.report.sections.night_changes import changes
from klab.harness.report.subject import Occurrence
from klab.harness.watch.series import Call, Metric, Night, Point

NOTHING = Known({}, {})


def drawn(*nights: Night, chip: str = "h200", **changes: object) -> list[Figure]:
    told = story(contest(), nights={chip: nights}, **changes)
    found = history_series.figures(told, standing(told))
    for figure in found:
        accepted(figure)
        assert figure.empty or consistent(figure)
    return found


def consistent(figure: Figure) -> bool:
    """Every point names a row of the table, and no point is without one."""
    assert figure.table is not None
    for trace in figure.traces:
        rows = trace["meta"]["rows"]
        if trace["type"] == "heatmap":
            assert [len(row) for row in rows] == [len(row) for row in trace["z"]]
            rows = [n for row in rows for n in row]
        else:
            assert len(rows) == len(trace["x"]) == len(trace["y"])
        assert all(0 <= n < len(figure.table) for n in rows)
    return True


def test_a_planted_change_is_told_with_its_size_its_night_and_its_commits() -> None:
    nights = history(4, 40, lambda n, day: 20.0 * (n + 1) * (1.08 if n == 1 and day >= 30 else 1.0))
    overall, *several = drawn(*nights)
    assert several[0].variant == series(1).name, "what changed comes first"
    table = overview(history_series.told({"h200": nights})["h200"][1], NOTHING).set_index("series")
    row = table.loc[series(1).name]
    assert row["changed_at"] == nights[30].at and row["change_low_percent"] < 8.0 < row["change_high_percent"]
    assert row["change_percent"] == pytest.approx(8.0, abs=1.0) and row["between_commits"] == f"{30:012x} to {31:012x}"
    assert row["level"] == pytest.approx(43.2, rel=0.01) and row["level_nights"] == 10
    assert row["level_low"] < row["level"] < row["level_high"] and row["level_high"] / row["level_low"] < 1.03
    quiet = table.drop(series(1).name)
    assert quiet["change_percent"].isna().all() and (quiet["level_nights"] == 40).all()
    assert "1 of 4 series changed their level in the last 14 nights" in overall.caption and series(1).name in overall.caption
    assert "on 2026-11-01" in several[0].caption and "between the nights of 00000000001e and 00000000001f" in several[0].caption
    assert several[0].caption.startswith("The level is 43.") and "No change was found" in several[1].caption


@pytest.mark.parametrize(("planted", "held"), [(1, False), (2, False), (3, False), (5, False), (6, True), (8, True)])
def test_a_change_too_late_for_its_size_is_told_without_an_interval(planted: int, held: bool) -> None:
    """Levels have four nights or more, so one of three takes a night of the old level with it: 4.5% for 6%."""
    nights = history(2, 30, lambda n, day: 20.0 * (n + 1) * (1.06 if n == 0 and day >= 30 - planted else 1.0))
    overall, one, quiet = drawn(*nights)
    row = overview(history_series.told({"h200": nights})["h200"][1], NOTHING).iloc[0]
    if planted == 1:
        assert row["changed_at"] == "" and "No change was found that lasts 4 nights or more" in one.caption
        assert "No change of level that lasts 4 nights or more was found" in overall.caption
        return
    for caption in (overall.caption, one.caption):
        assert ("too few nights for an interval" in caption, "95% interval +" in caption) == (not held, held)
    assert ("the change is larger then" in one.caption) is not held
    (told,) = history_series.told({"h200": nights})["h200"][1][:1]
    assert ("too few nights for an interval" in changes({"": told})) is not held, "on the page of the night too"
    assert one.layout["annotations"][-1]["text"].endswith("(few nights)") is not held
    assert math.isnan(row["change_low_percent"]) is not held and math.isnan(row["change_high_percent"]) is not held
    assert not held or row["change_low_percent"] < 6.0 < row["change_high_percent"]
    assert planted != 3 or row["change_percent"] == pytest.approx(4.5, abs=0.4), "what an interval around it would deny"
    assert "No change was found" in quiet.caption
    (found,) = re.findall(r"The level is ([\d.]+) µs \(95% interval ([\d.]+) to ([\d.]+) µs\)", quiet.caption)
    level, low, high = map(float, found)
    assert low <= level <= high, "rounding takes the level out of its interval nowhere"


def test_the_interval_of_a_level_holds() -> None:
    """Of 400 made levels of 6, 9 and 30 nights the true one lies inside in 95 of 100 or more, as the binomial distribution has it."""
    rng = random.Random(5)
    (curve,) = history_series.told({"h200": history(1, 30)})["h200"][1]
    for count, least, out in ((6, 0.94, 0), (9, 0.93, 1), (30, 0.93, 9)):
        inside = 0
        for _ in range(400):
            places = tuple(dataclasses.replace(one, judged=rng.gauss(20.0, 0.1)) for one in curve.places[:count])
            low, high = level_interval(dataclasses.replace(curve, places=places), (0, count - 1, 20.0))
            inside += low <= 20.0 <= high
        assert inside >= least * 400, (count, inside)
        values = sorted(place.judged for place in places)
        assert (low, high) == (values[out], values[-1 - out])
    assert all(math.isnan(end) for end in level_interval(curve, (0, 4, 20.0)))


def test_the_level_is_the_median_of_its_nights() -> None:
    nights = history(1, 20)
    (curve,) = history_series.told({"h200": nights})["h200"][1]
    anchored = [statistics.median(one.point.anchored) for n in nights for one in n.verdicts if one.point]
    values = [statistics.median(one.point.values) for n in nights for one in n.verdicts if one.point]
    usual = statistics.median(v / a for v, a in zip(values, anchored, strict=True))
    table = overview([curve], NOTHING)
    assert table["level"][0] == pytest.approx(usual * statistics.median(anchored))
    own = nights_of(curve, NOTHING)
    assert own["value"].tolist() == pytest.approx(values) and own["judged"].tolist() == pytest.approx([usual * a for a in anchored])
    assert (own["least"] <= own["judged"]).all() and (own["judged"] <= own["most"]).all()


def test_marks_of_a_map_stand_for_the_series_of_their_row() -> None:
    tonight, earlier = eventful()
    overall, *several = drawn(*earlier, tonight)
    assert overall.table is not None and len(overall.table) == 20
    (trace,) = overall.traces
    for row, names in zip(trace["meta"]["rows"], overall.layout["yaxis"]["ticktext"], strict=True):
        assert len(set(row)) == 1 and overall.table["series"][row[0]].endswith(names)
    assert overall.caption.startswith('The last of 31 nights, 2026-11-01, says "1 broken, 2 slower (1 waived)')
    first = several[0]
    assert first.table is not None and first.table["verdict"].iloc[-1] == Call.BROKEN
    absent = first.traces[2]
    assert absent["meta"]["rows"] == [len(first.table) - 1] and math.isnan(first.table["judged"].iloc[-1])
    assert ["95% interval +" in one.caption for one in several[:3]] == [False, False, False], "a change of three nights has none"
    assert "The last night says broken: incorrect: error 0.3 above" in first.caption and first.caption.startswith("The level was 39.97 µs")


def test_a_new_epoch_is_told_apart_from_a_change() -> None:
    nights = history(1, 30, lambda n, day: 20.0 * (1.1 if day >= 15 else 1.0), new_epoch_at=15)
    _, one = drawn(*nights)
    assert "No change was found" in one.caption and "A new epoch began on 2026-10-16 (+10." in one.caption
    assert "driver 580.65 to 580.95" in one.caption and one.table is not None
    assert one.table["epoch"].tolist() == [EPOCH] * 15 + [NEW_EPOCH] * 15
    (curve,) = history_series.told({"h200": nights})["h200"][1]
    level = level_now(curve)
    assert level is not None and (level[0], level[1]) == (15, 29), "the level of this epoch alone"


def test_the_filters_know_a_series_by_what_the_page_knows_of_its_problem() -> None:
    rows = contest()
    nights = history(1, 10)
    key = rows[0].problem_key
    of_page = [
        dataclasses.replace(
            one, verdicts=tuple(dataclasses.replace(v, series=dataclasses.replace(v.series, problem_key=key)) for v in one.verdicts)
        )
        for one in nights
    ]
    places = {key: (Occurrence("a", "decode", 1, "q", 2), Occurrence("b", "decode", 8, "q", 2), Occurrence("b", "prefill", 1, "q", 1))}
    _, one = drawn(*of_page, occurs=places)
    assert one.table is not None
    last = one.table.iloc[-1]
    assert (last["model"], last["phase"], last["dtype"], last["kernel"]) == (("a", "b"), ("decode", "prefill"), "bfloat16", "triton_split")
    _, other = drawn(*nights)
    assert other.table is not None and other.table["model"].iloc[0] == ("qwen3-0.6b",) and other.table["phase"].iloc[0] == ()


def test_no_night_says_what_makes_a_history() -> None:
    (one,) = drawn()
    assert "klab nightly" in one.empty and one.table is None
    assert "klab nightly" in Reader(render(story(contest()))).text


def test_few_nights_say_less() -> None:
    overall, *several = drawn(*history(2, 1))
    assert overall.empty and len(several) == 2 and "so no interval" in several[0].caption and "1 night from" in several[0].caption
    overall, *several = drawn(*history(2, 3))
    assert "looked for from 8 nights on" in overall.caption and "No change" not in several[0].caption
    gone = night([verdict(series(0), Call.MISSING, "gone")])
    (overall,) = drawn(gone)
    assert overall.empty and overall.table is not None and overall.table["verdict"].tolist() == ["missing"]
    (nothing,) = drawn(night())
    assert nothing.empty == "The last night watched no series."


def test_with_a_model_only_its_series_are_shown() -> None:
    nights = history(4, 10)
    verdicts = nights[-1].verdicts
    other = dataclasses.replace(verdicts[0], series=dataclasses.replace(verdicts[0].series, models=("other",)))
    nights[-1] = dataclasses.replace(nights[-1], verdicts=(other, *verdicts[1:]))
    overall, *several = drawn(*nights, model="qwen3-0.6b")
    assert len(several) == 3 and "3 series: all ok" in overall.caption and series(0).name not in {one.variant for one in several}
    (none,) = drawn(*nights, model="nobody")
    assert none.empty == "The last night watched no series of nobody."


def test_energy_is_in_joules_and_never_in_microseconds() -> None:
    nights = []
    for n, one in enumerate(history(1, 10)):
        (told,) = one.verdicts
        joules = Point(tuple(0.01 * (1 + 0.001 * (n % 3)) for _ in range(3)), kernel="matmul/a", epoch=EPOCH)
        nights.append(dataclasses.replace(one, verdicts=(dataclasses.replace(told, series=series(0, Metric.ENERGY), point=joules),)))
    overall, one = drawn(*nights)
    assert "10.0 mJ" in one.caption and "µs" not in one.caption and overall.table is not None and overall.table["unit"].tolist() == ["J"]
    assert one.layout["yaxis"]["title"]["text"] == "joules per launch"


def test_many_series_and_chips_are_cut_by_a_rule_that_is_told() -> None:
    _, *several = drawn(*history(60, 10))
    assert len(several) == history_series.MOST_FIGURES and "40 of 60 series" in several[0].caption
    chips = {f"chip-{n}": tuple(history(10, 10)) for n in range(50)}
    told = story(contest(), nights=chips)
    found = history_series.figures(told, standing(told))
    maps = [figure for figure in found if figure.identity.startswith("history-map")]
    assert len(maps) == 50 and len(found) == 90 and len({figure.identity for figure in found}) == 90
    assert all("The first 6 of 10 series" in figure.caption and "10 series: all ok" in figure.caption for figure in maps)
    cells = sum(len(row) for figure in maps for trace in figure.traces for row in trace["z"])
    assert cells <= history_series.MOST_CELLS


def test_odd_nights_are_drawn_as_what_they_are() -> None:
    tonight = hostile()
    before = [dataclasses.replace(tonight, identity=f"night {n}") for n in range(9)]
    found = drawn(*before, tonight, chip=tonight.chip)
    assert len({(figure.title, figure.variant) for figure in found}) == len(found)
    holes = history(1, 20)
    for n, hole in (
        (3, Point(status="crashed", epoch=EPOCH)),
        (5, None),
        (7, Point((math.nan, math.inf), epoch=EPOCH)),
        (8, Point((0.0,))),
    ):
        holes[n] = dataclasses.replace(holes[n], verdicts=(verdict(series(0), Call.BROKEN, "odd", point=hole),))
    holes[9] = dataclasses.replace(holes[9], verdicts=())
    _, one = drawn(*holes)
    assert one.table is not None and len(one.table) == 19
    assert sum(len(trace["x"]) for trace in one.traces[1:]) == 19, "every night that tells of it has a mark"
