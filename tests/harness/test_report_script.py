"""What travels to the page's script: numbers, what is not there, text that cannot break out; and the frame of a figure without a script."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_figures import heat, made_page, points, rows, variants

from klab.harness.report.figures.style import Figure
from klab.harness.report.payload import compact, figure_value, packed, payload, table_value
from klab.harness.report.shell import POLICY, asset, document, framed, framed_all, script

NASTY = '</script><script>alert("x")</script><!--\u2028'
SCRIPTS = Path(__file__).parents[2] / "harness" / "report" / "script"


def unpacked(page: str, identity: str) -> str:
    found = re.search(rf'<script type="application/gzip" id="{identity}">([A-Za-z0-9+/=]*)</script>', page)
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1])).decode()


def cells(table: dict[str, Any]) -> list[list[Any]]:
    """The rows of a table of the payload, as the script has them."""
    columns = [v if isinstance(v, list) else [v["of"][n] for n in v["at"]] for v in json.loads(compact(table["values"]))]
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "null"), (float("inf"), "null"), (np.float64("-inf"), "null"), (None, "null"), (True, "true"),
        (np.bool_(False), "false"),
        (1 / 3, "0.333333"), (-1234.5678, "-1234.57"), (1e-9 / 3, "3.33333e-10"), (1732282000.5, "1732282000.5"), (2**60, str(2**60)),
        (np.int64(7), "7"), (np.array([1.0, np.nan]), "[1,null]"), ((1, "a"), '[1,"a"]'), ({"a": [float("nan")]}, '{"a":[null]}'),
        (pd.Series([1.5, 2.0]), "[1.5,2]"), (pd.Timestamp("2026-11-20"), '"2026-11-20 00:00:00"'), ("\u2028<", '"\\u2028<"'),
    ],
)  # fmt: skip
def test_numbers_are_compact_and_what_is_none_is_null(value: object, text: str) -> None:
    assert compact(value) == text
    json.loads(compact(value))


def test_a_table_keeps_every_cell() -> None:
    frame = pd.DataFrame(
        {
            "chip": ["a", "a", "b"],
            "model": [("x", "y"), (), ("x",)],
            "settings": [{"m": 1, "n": "z"}, {}, None],
            "when": [pd.Timestamp("2026-11-20"), pd.NaT, None],
            "us": [1.5, np.nan, 3e-7],
            "count": [1, 2, 3],
            "mixed": [1, "1", None],
            "flag": [True, False, True],
        }
    )
    found = table_value(frame)
    assert found["columns"] == list(frame.columns) and found["length"] == 3
    assert cells(found) == [
        ["a", ["x", "y"], "m=1 n=z", "2026-11-20 00:00:00", 1.5, 1, 1, True],
        ["a", [], "", None, None, 2, "1", False],
        ["b", ["x"], None, None, 3e-07, 3, None, True],
    ]
    assert all("of" in found["values"][n] for n in (0, 1)), "what is filtered by has its distinct values"
    assert cells(table_value(frame.iloc[:0])) == [] and table_value(frame.iloc[:0])["length"] == 0


def test_a_number_and_a_text_that_look_alike_stay_two() -> None:
    frame = pd.DataFrame({"kernel": [1, "1", 1.0, True, 1, "1"]}, dtype="object")
    assert cells(table_value(frame)) == [[1], ["1"], [1], [True], [1], ["1"]]


def test_the_payload_cannot_end_its_element() -> None:
    figure = Figure("f", NASTY, NASTY, [{"text": [NASTY]}], {"title": NASTY}, table=pd.DataFrame({"kernel": [NASTY]}), derive="front")
    text = packed("klab-payload", payload([figure], {"evidence": {NASTY: NASTY}}))
    assert re.fullmatch(r'<script type="application/gzip" id="klab-payload">[A-Za-z0-9+/=]+</script>', text)
    found = json.loads(unpacked(text, "klab-payload"))
    assert found["evidence"] == {NASTY: NASTY} and found["figures"]["f"]["data"][0]["text"] == [NASTY]
    assert found["figures"]["f"]["derive"] == "front" and figure_value(points(rows()))["table"]["length"] == 24


def test_equal_pages_are_equal_bytes() -> None:
    assert made_page() == made_page()


def test_a_figure_reads_without_a_script() -> None:
    page = made_page(rows(problems=30))
    assert "The first 60 of 180 rows." in page and "Table behind it (180 rows)" in page
    assert page.count("This figure needs a script") == 4 and "The words of the whole." in page


def test_many_figures_have_short_tables() -> None:
    frame = rows(problems=40)
    boxes = framed_all([points(frame, f"p{n}", title=f"title {n}") for n in range(100)], True)
    assert len(boxes) == 100 and all("The first 15 of 240 rows." in box for box in boxes)


def test_variants_stand_together_under_one_title() -> None:
    boxes = framed_all([points(rows()), *variants(rows()), heat(rows())], True)
    assert len(boxes) == 3 and boxes[1].count("<figure") == 2 and 'data-group="by-chip"' in boxes[1]
    assert 'data-variant="b200"' in boxes[1] and 'data-variant="h200"' in boxes[1]
    twins = framed_all([points(rows(), "one"), points(rows(), "two")], True)
    assert len(twins) == 2, "figures that share a title and are no variants stay apart"


def test_a_figure_without_data_says_why() -> None:
    box = framed(Figure("f", "Title", "Words.", empty="Nothing was measured."), True)
    assert "Nothing was measured." in box and "plot" not in box and "<details" not in box
    assert "There is nothing to draw." in framed(Figure("f", "Title", "Words."), True)
    assert "pip install" in framed(points(rows()), False) and "Table behind it (24 rows)" in framed(points(rows()), False)


def test_the_policy_opens_no_door_to_the_network() -> None:
    class Meta(HTMLParser):
        found = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if dict(attrs).get("http-equiv") == "Content-Security-Policy":
                self.found = str(dict(attrs)["content"])

    def policy(page: str) -> str:
        reader = Meta()
        reader.feed(page)
        return reader.found

    lines = Figure("f", "t", "c", [{"type": "parcoords", "dimensions": []}])
    assert policy(document("t", "c", figures=[points(rows())])) == POLICY.format("")
    assert policy(document("t", "c", figures=[lines])) == POLICY.format(" 'unsafe-eval'")
    for name in ("connect-src", "http", "*"):
        assert name not in POLICY
    assert POLICY.startswith("default-src 'none'")


def test_a_dark_screen_prints_no_pale_colours() -> None:
    """page.css gives paper colours of its own; what the other two define must be of screens."""
    for name in ("night.css", "accept.css"):
        assert re.findall(r"@media ([^{]*prefers-color-scheme[^{]*) \{", asset(name)) == ["screen and (prefers-color-scheme: dark)"]


def test_the_script_is_whole_and_each_file_is_short() -> None:
    text = script()
    order = [text.index(f"klab.{name} = ") for name in ("Table", "state", "filters", "plots", "tables", "ready")]
    assert order == sorted(order) and "</script" not in text
    assert not re.search(r"\bfetch\(|XMLHttpRequest|sendBeacon|WebSocket|EventSource|\bimport\(|\beval\(|innerHTML", text)
    found = sorted(SCRIPTS.glob("*.js"))
    assert sum(len(path.read_text(encoding="utf-8")) for path in found) == len(text), "no file is left out"
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 250 for path in found)
