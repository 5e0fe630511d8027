"""What figures share: a checker of what is drawn, limits, looks, the front; and the same front in the page's script."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from made_results import contest, made

from klab.harness.choose.decide import decide
from klab.harness.report import shell
from klab.harness.report.figures.energy_price import ENERGY
from klab.harness.report.figures.front import TIME, front
from klab.harness.report.figures.style import DASHES, PALETTE, Figure, colours, digits, distinct, grouped, log_axis, looks, plain, short
from klab.harness.report.frames import standing
from klab.harness.report.limits import Limits, bound, limits_of
from klab.harness.report.subject import Story, tell
from klab.harness.store.result import Result
from klab.harness.tune.objective import Interval
from klab.harness.tune.pareto import Point, front_of
from klab.kernels.contract import Chip
from klab.kernels.matmul.problem import Matmul

H200 = limits_of("h200", "NVIDIA H200")
SCRIPT = Path(shell.__file__).parent / "script" / "derive_front.js"


def accepted(figure: Figure) -> None:
    """Plotly's own checker refuses a property or a value that it does not know."""
    graph_objects = pytest.importorskip("plotly.graph_objects", reason="plotly is not installed: figures are drawn nowhere")
    colour = {"var(--ink)": "#000000", "var(--faint)": "#cccccc"}

    def concrete(value: object) -> object:
        if isinstance(value, dict):
            return {name: concrete(item) for name, item in value.items()}
        if isinstance(value, list):
            return [concrete(item) for item in value]
        return colour.get(value, value) if isinstance(value, str) else value

    graph_objects.Figure(concrete({"data": figure.traces, "layout": figure.layout}))


def filterable(figure: Figure) -> None:
    """Every mark names its row of the table, and every list that a filter has to cut is as long as the marks."""
    assert figure.table is not None and "chip" in figure.table and "kernel" in figure.table
    json.dumps([figure.traces, figure.layout], allow_nan=False)
    told = [trace for trace in figure.traces if "rows" in trace.get("meta", {})]
    assert told or not len(figure.table)
    for trace in told:
        rows = trace["meta"]["rows"]
        assert all(0 <= row < len(figure.table) for row in rows)
        lists = [trace["x"], trace["y"], trace.get("customdata", []), *trace.get("marker", {}).values()]
        lists += [trace.get(bar, {}).get(end, []) for bar in ("error_x", "error_y") for end in ("array", "arrayminus")]
        assert all(len(values) == len(rows) for values in lists if isinstance(values, list) and values)


def told(rows: Sequence[Result], limits: Limits = H200) -> Story:
    """The story of made results; chips other than the H200 have no known limits."""
    return tell(
        rows,
        lambda chip, found: decide(found, None, chip),
        lambda chip, _: limits if chip == "h200" else Limits(None, "this chip is made up"),
    )


def frame_of(rows: Sequence[Result], limits: Limits = H200) -> Any:
    return standing(told(rows, limits))


def test_the_bound_is_memory_or_compute() -> None:
    small, large = made(Matmul(1, 4096, 4096)), made(Matmul(8192, 8192, 8192))
    assert (found := bound(small, H200)) is not None and found.by == "memory"
    assert found.us == pytest.approx(small.bytes_moved / 4800e9 * 1e6)
    assert (found := bound(large, H200)) is not None and found.by == "compute"


def test_a_dtype_without_a_peak_is_bounded_by_float32() -> None:
    chip = Chip("toy", "Toy", "cpu", 2, 2000.0, 2000.0, {"float32": 0.1}, 1 << 30, 20.0, 1 << 20)
    found = bound(made(Matmul(512, 512, 512)), Limits(chip))
    assert found is not None and found.peak_dtype == "float32" and found.us == pytest.approx(2 * 512**3 / 0.1e12 * 1e6)


def test_unknown_limits_are_said_to_be_unknown() -> None:
    away = limits_of("cpu", "A CPU that no machine has")
    assert away.chip is None and "another CPU" in away.reason and limits_of("cpu", "").chip is not None
    assert limits_of("mi300x", "").chip is None and "not in the catalog" in limits_of("mi300x", "").reason


def test_colours_stay_and_text_is_text() -> None:
    names = [f"k{n}" for n in range(25)]
    assert colours(names) == colours(reversed(names)) and set(colours(names).values()) == set(PALETTE)
    assert plain("<a href='x'>&") == "&lt;a href='x'&gt;&amp;"
    assert short("<b>" * 300, 20) == "&lt;b&gt;" * 5 + "&lt;b..." and digits([1 / 3, float("nan"), None]) == [0.33333, None, None]
    assert distinct(["a", "b", "a"]) == ["a (1)", "b", "a (3)"]


def test_kernels_that_compete_look_different() -> None:
    pytest.importorskip("pandas")
    frame = frame_of([made(Matmul(1, 64, 64), f"triton_{n:02d}") for n in range(25)] + contest())
    found = looks(frame)
    assert set(found) == set(frame["kernel_id"])
    seen = [(look.colour, look.dash) for kernel, look in found.items() if kernel.startswith("matmul/")]
    assert len(set(seen)) == len(seen) > 25 and {dash for _, dash in seen} == set(DASHES[:4])
    assert found["decode_attention/torch"].symbol == "circle" and found == looks(frame.iloc[::-1])


def test_labels_of_a_logarithmic_axis_have_room() -> None:
    assert log_axis("", [1.0, 2.0])["dtick"] == "D1" and log_axis("", [1.0, 50.0])["dtick"] == "D2"
    assert log_axis("", [1.0, 1e6])["dtick"] == 1 and log_axis("", [1.0, 1e12])["dtick"] == 2 and log_axis("", [])["type"] == "log"


def _marks(seed: int, count: int = 40) -> Any:
    """Made marks in a frame: some without an interval, some without an energy, some published, some equal."""
    pandas = pytest.importorskip("pandas")
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        us, joules = rng.choice([rng.uniform(10, 20), float(rng.randint(10, 14))]), rng.choice([rng.uniform(1, 2), 1.5])
        wide, none = rng.uniform(0, 0.1), rng.random() < 0.1
        ends = [us * (1 - wide), us * (1 + wide)] if rng.random() < 0.8 else [float("nan")] * 2
        energy = [float("nan")] * 3 if none else [joules, joules * (1 - wide), joules * (1 + wide)]
        rows.append([f"k{n}", "-", "reference" if rng.random() < 0.15 else "measured", us, *ends, *energy])
    return pandas.DataFrame(rows, columns=["kernel", "config", "origin", *TIME.columns, *ENERGY.columns])


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_the_tuner_s(seed: int) -> None:
    marks = _marks(seed)
    found = front(marks, TIME, ENERGY)
    points = {}
    for n, row in enumerate(marks.itertuples()):
        if row.origin == "measured" and row.energy_j == row.energy_j:
            points[n] = Point(f"{n}", {}, Interval(row.median_us, *TIME.ends(row)), Interval(row.energy_j, *ENERGY.ends(row)))
    assert {str(n) for n in found.unbeaten} == {point.kernel for point in front_of(list(points.values())).points}
    best = [n for n, one in points.items() if not any(_better(other, one) for other in points.values())]
    assert {_place(points[n]) for n in found.line} == {_place(points[n]) for n in best} and set(found.line) <= set(found.unbeaten)
    steps = [_place(points[n]) for n in found.line]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(steps)), "from the upper left to the lower right"


def _place(point: Point) -> tuple[float, float]:
    assert point.joules is not None
    return point.time.median, point.joules.median


def _better(one: Point, other: Point) -> bool:
    a, b = _place(one), _place(other)
    return a != b and a[0] <= b[0] and a[1] <= b[1]


NODE = shutil.which("node")


def script_front(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page's script makes of figures under filters: [{figure, shown}] -> [{data, caption}]."""
    if NODE is None:
        pytest.skip("node is not installed (Debian: nodejs): the page's script is tested in the browser alone")
    program = f"""const klab = {{ derive: {{}} }};
    {SCRIPT.read_text(encoding="utf-8")}
    const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
    const told = cases.map(({{ figure, shown }}) => {{
      const caption = klab.derive.front(figure, shown) || null;
      return {{ data: figure.data, caption }};
    }});
    console.log(JSON.stringify(told));"""
    done = subprocess.run([NODE, "-e", program], input=json.dumps(cases), capture_output=True, text=True, timeout=240, check=True)
    answer: list[dict[str, Any]] = json.loads(done.stdout)
    return answer


def table_json(frame: Any) -> dict[str, Any]:
    return {"columns": list(frame.columns), "rows": json.loads(frame.to_json(orient="values", double_precision=15))}


def test_the_page_computes_the_same_front() -> None:
    ways = [[way.median, way.low, way.high, way.name, way.unit] for way in (TIME, ENERGY)]
    cases, frames = [], []
    for seed in range(20):
        marks = _marks(seed)
        shown = sorted(random.Random(seed).sample(range(len(marks)), 25))
        line = {"meta": {"front": ways}, "x": [0], "y": [0]}
        points = {"meta": {"rows": list(range(len(marks)))}, "marker": {"size": [6] * len(marks)}}
        cases.append({"figure": {"data": [line, points], "table": table_json(marks)}, "shown": shown})
        frames.append(marks.iloc[shown])
    for case, left, told_by_page in zip(cases, frames, script_front(cases), strict=True):
        found = front(left, TIME, ENERGY)
        on = left.iloc[list(found.line)]
        line, points = told_by_page["data"]
        assert line["x"] == pytest.approx(list(on["median_us"])) and line["y"] == pytest.approx(list(on["energy_j"]))
        large = [row for row, size in zip(case["shown"], points["marker"]["size"], strict=True) if size == 11]
        assert large == [case["shown"][n] for n in found.unbeaten]
        assert f"nothing beats {len(found.unbeaten)}." in told_by_page["caption"] and on["kernel"].iloc[0] in told_by_page["caption"]


def test_a_long_name_does_not_fill_the_caption() -> None:
    marks = _marks(1).assign(kernel="<b>" * 100, config="c" * 300)
    ways = [[way.median, way.low, way.high, way.name, way.unit] for way in (TIME, ENERGY)]
    (some,) = script_front([{"figure": {"data": [{"meta": {"front": ways}}], "table": table_json(marks)}, "shown": [0, 1, 2, 3]}])
    assert "<b>" * 32 + "<..." in some["caption"] and len(some["caption"]) < 450


def test_rows_are_grouped_in_order() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"kernel": ["b", "A", "a", "b"], "origin": ["measured"] * 3 + ["reference"]})
    found = {key: [row.Index for row in rows] for key, rows in grouped(frame.itertuples(), "kernel", "origin").items()}
    assert found == {("A", "measured"): [1], ("a", "measured"): [2], ("b", "measured"): [0], ("b", "reference"): [3]}
    assert list(found) == [key for key, _ in frame.groupby(["kernel", "origin"])]


def test_the_page_says_when_nothing_measured_is_left() -> None:
    marks = _marks(1).assign(origin="reference")
    ways = [[way.median, way.low, way.high, way.name, way.unit] for way in (TIME, ENERGY)]
    figure = {"data": [{"meta": {"front": ways}}], "table": table_json(marks)}
    (some, every) = script_front([{"figure": figure, "shown": [0, 1]}, {"figure": figure, "shown": list(range(len(marks)))}])
    assert some["caption"] == "The filter leaves nothing that was measured here." and some["data"][0]["x"] == []
    assert every["caption"] is None, "without a filter the words of the page stand"
