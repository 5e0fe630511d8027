"""Where words go: talk to stderr, tables and JSON lines to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

talk = Console(stderr=True, highlight=False, emoji=False)
out = Console(highlight=False, soft_wrap=False, emoji=False)


def emit(row: dict[str, Any]) -> None:
    """Print one JSON object as a line on stdout and flush, so that a reader of a pipe sees it at once."""
    sys.stdout.write(json.dumps(row, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    """Print a table for people; columns named in `right` are right-aligned. On a pipe it is as wide as it needs to be.

    Cells are shown as they are: a bracket in a name is no markup.
    """
    shown = Table(title=Text(title), title_justify="left", header_style="bold")
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    if out.is_terminal:
        out.print(shown)
    else:
        Console(highlight=False, width=400, emoji=False).print(shown)
