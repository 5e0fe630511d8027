"""A figure whose drawing fails costs the page that figure and no more, and the page says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from klab.harness.report.figures.style import Figure
from klab.harness.report.subject import Story

if TYPE_CHECKING:
    import pandas as pd

LOG = logging.getLogger(__name__)
LONGEST = 200


def guarded(draw: Callable[[Story, pd.DataFrame], list[Figure]], story: Story, frame: pd.DataFrame) -> list[Figure]:
    """What `draw` makes of a story; where it fails, one figure without data that names the module and the error, which is logged whole."""
    try:
        return draw(story, frame)
    except Exception as error:
        name = draw.__module__.rpartition(".")[2]
        LOG.exception("no figures of %s", draw.__module__)
        told = f"{type(error).__name__}: {error}".splitlines()[0][:LONGEST]
        said = f"This figure could not be drawn, which is a defect of klab ({name}: {told}). Everything else on the page stands."
        return [Figure(f"failed-{name.replace('_', '-')}", name.replace("_", " ").capitalize(), "", empty=said)]
