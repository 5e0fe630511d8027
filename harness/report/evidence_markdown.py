"""What the READMEs of recorded evidence are written with: tables whose cells stay in their place, numbers with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from klab.harness.report.units import plain_ratio


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(plain(str(cell)) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def plain(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(").split())


def ratio(value: float, low: float, high: float) -> str:
    """`1.25 (1.24 to 1.26)`."""
    return f"{plain_ratio(value)} ({plain_ratio(low)} to {plain_ratio(high)})"


def count(number: int, noun: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
