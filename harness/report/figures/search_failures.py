"""Which configurations of a searched space failed, how, and the one condition that tells them best from those that passed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from klab.harness.report.figures.search_spaces import Parameter, Space, dims
from klab.harness.report.figures.style import PALETTE, Figure, axis, distinct, layout, marks, plain
from klab.harness.report.units import percent
from klab.harness.store.result import Status

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Configurations that failed"
# A bar per value of a parameter, until there are so many.
BARS = 24
LONGEST_REASON = 160
# A condition is told where chance, over all conditions that were looked at, would make one as good this rarely.
CHANCE = 0.05
HUES = dict(zip([status.value for status in Status if status not in (Status.OK, Status.SCREENED)], PALETTE[1:], strict=False))


@dataclass(frozen=True)
class Condition:
    """`inside` of so many configurations within the condition failed, `outside` of the others; each as (failed, all)."""

    words: str
    parameter: str
    inside: tuple[int, int]
    outside: tuple[int, int]
    chance: float

    @property
    def caught(self) -> float:
        """The share of all failures that it holds."""
        return self.inside[0] / (self.inside[0] + self.outside[0])


def data(space: Space) -> pd.DataFrame:
    """A row per parameter, value and status that is not ok: parameter, value, failed, tried (with that value), share_percent, reason (the
    most frequent, shortened), reasons (how many different ones), and the columns of DIMS. The parameter that separates best comes first.
    """
    import pandas as pd

    status, reasons = space.tried["status"].to_numpy(), space.tried["reason"].to_numpy()
    found = condition(space)
    rows: list[dict[str, Any]] = []
    for parameter in _ranked(space, found.parameter if found else ""):
        for code, name in enumerate(parameter.words):
            here = parameter.codes == code
            for one, count in sorted(Counter(status[here & ~space.fine]).items()):
                told = Counter(reasons[here & (status == one)])
                reason, _ = told.most_common(1)[0]
                rows.append({
                    "parameter": parameter.name, "value": name, "failed": count, "tried": int(here.sum()),
                    "share_percent": 100 * count / int(here.sum()), "reason": str(reason)[:LONGEST_REASON], "reasons": len(told),
                    **dims(space), "status": one,
                })  # fmt: skip
    return pd.DataFrame(rows)


def condition(space: Space) -> Condition | None:
    """Of all conditions on one parameter (a value; for numbers also "at most" and "at least") the one that best separates what failed from
    what passed: the greatest difference between the share of the failures and the share of the others that it holds.

    None where all passed or all failed, or where it may be chance (Fisher's exact test, corrected for how many were looked at).
    """
    failed = ~space.fine
    total, bad = len(failed), int(failed.sum())
    if bad in (0, total):
        return None
    best: tuple[float, int, str, str, NDArray[np.bool_]] | None = None
    looked_at = 0
    for name, words, simple, inside in _conditions(space):
        looked_at += 1
        gap = failed[inside].sum() / bad - (~failed)[inside].sum() / (total - bad)
        if best is None or (gap, simple) > (best[0] + 1e-12, best[1]) or (abs(gap - best[0]) <= 1e-12 and simple > best[1]):
            best = float(gap), simple, name, words, inside
    if best is None or best[0] <= 0:
        return None
    _, _, name, words, inside = best
    held, size = int(failed[inside].sum()), int(inside.sum())
    chance = min(1.0, looked_at * at_least(held, size, bad, total))
    return Condition(words, name, (held, size), (bad - held, total - size), chance) if chance < CHANCE else None


def at_least(held: int, size: int, bad: int, total: int) -> float:
    """The probability that of `size` drawn from `total`, of which `bad` are bad, at least `held` are bad: one side of Fisher's test."""

    def ways(all_of: int, part: int) -> float:
        return math.lgamma(all_of + 1) - math.lgamma(part + 1) - math.lgamma(all_of - part + 1)

    whole = ways(total, size)
    possible = range(max(held, size - (total - bad)), min(size, bad) + 1)
    return min(1.0, math.fsum(math.exp(ways(bad, k) + ways(total - bad, size - k) - whole) for k in possible))


def _conditions(space: Space) -> Iterator[tuple[str, str, int, NDArray[np.bool_]]]:
    """(parameter, in words, how simple, which configurations it holds) of each that does not hold all or none."""
    for p in space.parameters:
        last = len(p.values) - 1
        for code, value in enumerate(p.words):
            yield p.name, f"{p.name} = {value}", 2, p.codes == code
            if p.ordered and 0 < code < last and p.values[code] is not None:
                yield p.name, f"{p.name} at least {value}", 1, p.codes >= code
                if p.values[0] is not None:
                    yield p.name, f"{p.name} at most {value}", 1, p.codes <= code


def _ranked(space: Space, first: str) -> list[Parameter]:
    """The parameter of the condition, then those by how much the share of failures differs between their values."""

    def spread(p: Parameter) -> float:
        counts = np.bincount(p.codes)
        return float(np.ptp(np.bincount(p.codes, ~space.fine) / np.maximum(counts, 1)))

    return sorted(space.parameters, key=lambda p: (p.name != first, -spread(p)))


def draw(space: Space, table: pd.DataFrame, identity: str) -> Figure | None:
    """Stacked bars, one per value of a parameter. None where nothing failed."""
    if table.empty:
        return None
    bars = list(dict.fromkeys(zip(table["parameter"], table["value"], strict=True)))
    shown = table[[pair in set(bars[:BARS]) for pair in zip(table["parameter"], table["value"], strict=True)]].reset_index(drop=True)
    # Names that are the same when shortened would share one bar.
    names = distinct([plain(f"{_short(parameter)} = {_short(value)}") for parameter, value in bars[:BARS]])
    name_of = dict(zip(bars, names, strict=False))
    labels = [name_of[pair] for pair in zip(shown["parameter"], shown["value"], strict=True)]
    traces = []
    for status in sorted(set(shown["status"]), key=lambda s: -shown.loc[shown["status"] == s, "failed"].sum()):
        at = np.flatnonzero(shown["status"] == status).tolist()
        part = shown.iloc[at]
        trace = {
            "type": "bar",
            "orientation": "h",
            "name": plain(str(status).replace("_", " ")),
            "y": [labels[n] for n in at],
            "x": part["share_percent"].tolist(),
            "customdata": [_hover(row) for row in part.to_dict("records")],
            "hovertemplate": "<b>%{y}</b>: %{x:.0f}% %{fullData.name}<br>%{customdata}<extra></extra>",
            "marker": {"color": HUES.get(str(status), PALETTE[9])},
        }  # fmt: skip
        traces.append(marks(trace, at))
    shape = layout(
        barmode="stack",
        showlegend=True,
        height=140 + 24 * len(names),
        xaxis=axis("% of the configurations with this value", rangemode="tozero"),
        yaxis=axis("", categoryorder="array", categoryarray=names[::-1]),
    )
    return Figure(identity, TITLE, caption(space, len(bars)), traces, shape, table=shown, variant=space.name)


def _hover(row: dict[Hashable, Any]) -> str:
    others = f"<br>and {row['reasons'] - 1} other reasons" if row["reasons"] > 1 else ""
    return f"{row['failed']} of {row['tried']}<br>{plain(row['reason']) or 'no reason recorded'}{others}"


def caption(space: Space, bars: int) -> str:
    """How many, why, and what they have in common."""
    failed = ~space.fine
    total, bad = len(failed), int(failed.sum())
    counts = Counter(space.tried["status"][failed]).most_common()
    kinds = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts)
    low, high = proportion(bad, total)
    words = [f"{bad} of {total} configurations failed ({percent(bad / total)}, 95% {percent(low)} to {percent(high)}): {kinds}."]
    found = condition(space)
    if found:
        inside, outside = found.inside, found.outside
        words.append(
            f"Best separated by {_short(found.words, 60)}: {inside[0]} of {inside[1]} fail with it ({_ends(inside)}) and {outside[0]} of "
            f"{outside[1]} without ({_ends(outside)}); it holds {percent(found.caught)} of the failures."
        )
    elif bad < total:
        words.append("No condition on a single parameter separates them from those that passed by more than chance would.")
    reason, often = Counter(space.tried["reason"][failed]).most_common(1)[0]
    if reason:
        words.append(f"The most frequent reason ({often} times): {str(reason)[:LONGEST_REASON]}.")
    words.append("Bars: of the configurations with this value, how many failed and how; values without a failure have no bar.")
    if bars > BARS:
        words.append(f"The {bars - BARS} further values of parameters that separate less are left out.")
    return " ".join(words)


def proportion(count: int, total: int) -> tuple[float, float]:
    """95% interval of a share (Wilson)."""
    z2 = 1.959964**2
    share = count / total
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = float(np.sqrt(z2 * (share * (1 - share) + z2 / (4 * total)) / total) / (1 + z2 / total))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _ends(counts: tuple[int, int]) -> str:
    low, high = proportion(*counts)
    return f"{percent(low)} to {percent(high)}"


def _short(value: object, longest: int = 28) -> str:
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
