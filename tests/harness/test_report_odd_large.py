"""The odd stores that are odd by their size, larger than `test_report_odd` has them: bounded pages, and no figure that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_odd import fifty_chips, large_space, many_problems, store

from klab.harness.report.page import render
from klab.harness.report.write import story_from
from klab.harness.store.result import Result, Status

LARGE: dict[str, Callable[[], list[Result]]] = {
    "fifty_chips": lambda: fifty_chips(8),
    "large_space": lambda: large_space(2000),
    "many_problems": lambda: many_problems(400),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_page_of_very_much_stays_whole_and_small(tmp_path: Path, name: str) -> None:
    rows = LARGE[name]()
    told = story_from([store(tmp_path / "results", rows)])
    text = render(told)
    assert told.statuses["ok"] == sum(row.status is Status.OK for row in rows)
    assert len(told.subjects) == len({row.chip for row in rows})
    assert "which is a defect of klab" not in text, "no figure failed"
    assert len(text) < 8e6
