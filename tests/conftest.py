"""What every test shares: compiled candidates of a test run are cached in a folder of that run alone."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A user's cache neither helps nor suffers; child processes inherit the variable."""
    os.environ["KLAB_CACHE"] = str(tmp_path_factory.mktemp("klab-cache"))
