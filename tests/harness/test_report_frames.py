"""The one DataFrame of the page: whose time stands for a kernel."""

import pandas as pd

from klab.harness.report.frames import best

COLUMNS = ["chip", "origin", "problem_key", "kernel_id", "conditions", "chosen", "status", "median_us"]


def kept(*rows):
    """(kernel, conditions, median) of the rows that stand."""
    frame = pd.DataFrame([("h200", "measured", "p", *row) for row in rows], columns=COLUMNS, index=range(10, 10 + len(rows)))
    found = best(frame)
    assert set(found.index) <= set(frame.index) and list(found.columns) == COLUMNS
    return sorted(found[["kernel_id", "conditions", "median_us"]].itertuples(index=False, name=None))


def test_the_choices_own_conditions():
    rows = [
        ("a", "cold", True, "ok", 5.0),
        ("a", "cold", False, "ok", 4.9),
        ("b", "warm", False, "ok", 1.0),
        ("b", "cold", False, "ok", 6.0),
    ]
    assert kept(*rows, ("c", "warm", False, "ok", 0.5)) == [("a", "cold", 5.0), ("b", "cold", 6.0)]


def test_without_a_choice_those_of_most_rows():
    rows = [
        ("a", "warm", False, "ok", 2.0),
        ("a", "cold", False, "ok", 5.0),
        ("b", "cold", False, "ok", 6.0),
        ("b", "cold", False, "ok", 5.5),
    ]
    assert kept(*rows) == [("a", "cold", 5.0), ("b", "cold", 5.5)]
    assert kept(rows[0], rows[1]) == [("a", "cold", 5.0)], "equal numbers: by name, whatever the order"


def test_what_has_no_time_does_not_stand():
    assert kept(("a", "cold", False, "crashed", 1.0), ("b", "cold", False, "ok", None)) == []
