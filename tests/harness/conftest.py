"""What the harness's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Browser, missing


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for the tests of a module; they are skipped, with the reason, where none can be had."""
    if missing():
        pytest.skip(missing())
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found
