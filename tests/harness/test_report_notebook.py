"""Figures for Jupyter: plotly's own objects with the page's numbers, and a notebook that is valid and shows without being run."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_nights import eventful
from made_results import contest, made
from test_report_page import NASTY, story

from klab.harness.report import notebook, page
from klab.harness.report.figures.style import Figure
from klab.harness.report.shell import asset
from klab.harness.report.subject import Story
from klab.harness.store.journal import Journal
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.matmul.problem import Matmul

go = pytest.importorskip("plotly.graph_objects", reason="plotly is not installed: figures are drawn nowhere")


@pytest.fixture(scope="module")
def told() -> Iterator[Story]:
    """A story whose figures are made once for all tests of this module."""
    tonight, earlier = eventful()
    found = story([*contest(), *contest("cpu", seed=1)], nights={"h200": (*earlier, tonight)}, sources=("results",))
    make, made_once = page.figures, page.figures(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "figures", lambda one: made_once if one is found else make(one))
        yield found


def valid(value: Any) -> None:
    """The rules of nbformat 4.5, and its own schema where it is installed."""
    if importlib.util.find_spec("nbformat"):
        import nbformat  # type: ignore[import-not-found,unused-ignore]

        nbformat.validate(value)
    assert set(value) == {"cells", "metadata", "nbformat", "nbformat_minor"} and (value["nbformat"], value["nbformat_minor"]) == (4, 5)
    assert value["metadata"]["kernelspec"]["name"] and value["metadata"]["language_info"]["name"] == "python"
    names = [cell["id"] for cell in value["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in value["cells"]:
        common = {"id", "cell_type", "metadata", "source"}
        assert isinstance(cell["source"], str) and isinstance(cell["metadata"], dict)
        if cell["cell_type"] == "markdown":
            assert set(cell) == common
            continue
        assert cell["cell_type"] == "code" and set(cell) == common | {"execution_count", "outputs"}
        compile(cell["source"], "cell", "exec")
        for output in cell["outputs"]:
            assert set(output) == {"output_type", "execution_count", "data", "metadata"} and output["output_type"] == "execute_result"
            assert output["execution_count"] == cell["execution_count"] and output["data"]["text/plain"]


def test_every_figure_of_the_page_is_there_as_plotly_takes_it(told: Story) -> None:
    found = notebook.figures(told)
    shown = {one.identity: one for several in page.figures(told).values() for one in several if one.traces and not one.empty}
    assert list(found) == list(shown) and len(found) > 20
    for identity, one in found.items():
        assert isinstance(one, go.Figure) and len(one.data) == len(shown[identity].traces)
        text = one.to_json()
        assert "var(--" not in text and one.layout.title.text and one.layout.meta["caption"] == shown[identity].caption
        assert one.layout.meta["chapter"] in ("won", "why", "cost", "changed")
    series = [one for one in found.values() if one.layout.meta["variant"].endswith("chosen time")]
    assert len({one.layout.title.text for one in series}) == len(series) == 20, "variants are entries of their own"


def test_the_numbers_are_those_of_the_page(told: Story) -> None:
    (drawn,) = [one for several in page.figures(told).values() for one in several if one.identity == "history-series-0"]
    one = notebook.figures(told)["history-series-0"]
    assert list(one.data[1].y) == pytest.approx(drawn.traces[1]["y"]) and list(one.data[1].x) == drawn.traces[1]["x"]
    table = notebook.tables(told)["history-series-0"]
    rows = one.data[1].meta["rows"]
    assert table["judged"].iloc[rows].tolist() == pytest.approx(drawn.traces[1]["y"], rel=1e-4)


def test_the_themes_are_the_page_s() -> None:
    css = asset("page.css")
    light, dark = (dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2])
    for name, colours in (("light", light), ("dark", dark)):
        assert notebook.THEMES[name] == {key: colours[key] for key in notebook.THEMES[name]}
    figure = Figure("x", "T", "C", [{"type": "scatter", "x": [1], "y": [float("nan")], "line": {"color": "var(--ink)"}}], {"height": 300})
    one = notebook.drawn(figure, "dark")
    assert one.data[0].line.color == dark["ink"] and one.layout.paper_bgcolor == dark["card"]
    assert one.layout.height == 300 + notebook.TITLE_PX
    assert one.data[0].y == (None,), "what is not a number is a gap"
    with pytest.raises(UsageError, match="light nor dark"):
        notebook.drawn(figure, "blue")
    with pytest.raises(ValueError, match="nonsense"):
        notebook.drawn(Figure("x", "T", "C", [{"type": "scatter", "nonsense": 1}]))


def test_a_written_notebook_shows_without_being_run(told: Story, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.ipynb"
    notebook.write_notebook(told, path)
    value = json.loads(path.read_text(encoding="utf-8"))
    valid(value)
    outputs = [output["data"] for cell in value["cells"] for output in cell.get("outputs", [])]
    plots = [data["application/vnd.plotly.v1+json"] for data in outputs if "application/vnd.plotly.v1+json" in data]
    assert len(plots) >= 8 and all(plot["data"] and plot["layout"]["title"]["text"] for plot in plots)
    assert any("<table" in data.get("text/html", "") for data in outputs)
    text = path.read_text(encoding="utf-8")
    assert "18 more are in `figures` by these names" in text and "`history-series-19`" in text
    assert "notebook.story(['results'], chips=['cpu', 'h200'])" in text
    assert notebook.notebook(told) == value, "the same story gives the same bytes"
    assert len(text) < 8e6


def test_what_its_cells_call_gives_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klab.kernels.discover.discover", lambda: None)
    with Journal(tmp_path / "results", "run-7") as journal:
        for row in contest("cpu", seed=1)[:24]:
            journal.append(row)
    read = notebook.story(tmp_path / "results", runs=["run-1"])
    value = notebook.notebook(read, asked={"runs": ["run-1"], "history": [tmp_path], "reference": False})
    assert f"chips=['cpu'], runs=['run-1'], history=[{str(tmp_path)!r}])" in value["cells"][1]["source"]
    code = [cell for cell in value["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    exec(code[0]["source"], names)
    shown = [cell for cell in code[1:] if "application/vnd.plotly.v1+json" in cell["outputs"][0]["data"]]
    assert shown
    for cell in shown:
        again = json.loads(notebook.compact(eval(cell["source"], names).to_plotly_json()))
        assert again == {k: v for k, v in cell["outputs"][0]["data"]["application/vnd.plotly.v1+json"].items() if k != "config"}


def test_no_name_breaks_out_of_a_notebook() -> None:
    rows = [made(Matmul(m, 64, 64), NASTY, config={NASTY: NASTY}, problem_label=NASTY) for m in (1, 2)]
    value = notebook.notebook(story(rows, model=NASTY, notes=(NASTY, "![x](http://example.org/x) $x$"), sources=(NASTY,)))
    valid(value)
    for cell in value["cells"]:
        if cell["cell_type"] == "markdown":
            assert "<" not in cell["source"] and "](" not in cell["source"] and "$" not in cell["source"]
        for output in cell.get("outputs", []):
            assert "<script" not in output["data"].get("text/html", "") and "<img" not in output["data"].get("text/html", "")
    first = next(cell for cell in value["cells"] if cell["cell_type"] == "code")
    assert repr([NASTY]) in first["source"]


def test_nothing_to_draw_is_a_notebook_too(tmp_path: Path) -> None:
    value = notebook.notebook(Story(()))
    valid(value)
    assert "There is nothing to draw" in value["cells"][-1]["source"] and notebook.figures(Story(())) == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotMeasure, match="cannot write"):
        notebook.write_notebook(Story(()), tmp_path / "file" / "report.ipynb")
