"""Which parameters of a searched space matter: the share of the variance of the time's logarithm that each explains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from klab.harness.report.figures.search_spaces import Space, repeated
from klab.harness.report.figures.search_trees import MOST, RESAMPLES, TREES, shares
from klab.harness.report.figures.style import INK, PALETTE, Figure, axis, distinct, layout, marks, plain
from klab.harness.report.units import percent
from klab.harness.store.result import Status

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Which parameters matter"
# With fewer timed configurations the shares would be noise.
LEAST = 12
REST = "not explained"
# A parameter whose interval begins below this matters too little to be named.
MATTERS = 0.02


def data(space: Space, most: int = MOST) -> pd.DataFrame:
    """A row per parameter, the most important first, and one for what is not explained: parameter, values (how many), share_percent,
    low_percent, high_percent (95%), alone_percent, configurations, and the columns of DIMS. Empty where there is too little to tell from.
    most: configurations that the estimate may rest on.
    """
    import pandas as pd

    fine, times = space.fine, space.times_us
    columns = ["parameter", "values", "share_percent", "low_percent", "high_percent", "alone_percent", "configurations"]
    used = [p for p in space.parameters if len(set(p.codes[fine])) > 1]
    found = None
    if fine.sum() >= LEAST and used:
        codes = np.stack([p.codes[fine] for p in used], axis=1)
        found = shares(codes, np.log(times[fine]), [p.ordered for p in used], most=most)
    if found is None:
        return pd.DataFrame(columns=columns)
    rows: list[tuple[Any, ...]] = [
        (p.name, len(set(p.codes[fine])), *(100 * float(v[n]) for v in (found.share, found.low, found.high, found.alone)))
        for n, p in enumerate(used)
    ]
    rows.sort(key=lambda row: (-row[2], row[0]))
    rest = (REST, np.nan, *(100 * value for value in found.unexplained), np.nan)
    made = pd.DataFrame([(*row, found.configurations) for row in [*rows, rest]], columns=columns)
    return made.assign(**repeated(space, len(made)), status=Status.OK.value)


def draw(space: Space, table: pd.DataFrame, identity: str) -> Figure | None:
    """Bars with intervals; an open mark for what the parameter explains by itself. None where there is too little to tell from."""
    if table.empty:
        return None
    # Names that are the same when shortened would share one bar.
    names = distinct([plain(shortened(name)) for name in table["parameter"]])
    share, alone = table["share_percent"].clip(lower=0.0), table["alone_percent"]
    colour = [INK if name == REST else PALETTE[0] for name in table["parameter"]]
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": "with the other parameters",
        "y": names,
        "x": share.tolist(),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": (table["high_percent"] - share).clip(lower=0.0).tolist(),
            "arrayminus": (share - table["low_percent"].clip(lower=0.0)).clip(lower=0.0).tolist(),
            "thickness": 1.2,
            "width": 4,
            "color": INK,
        },
        "marker": {"color": colour, "opacity": 0.85},
        "customdata": [f"{percent(max(low, 0.0) / 100)} to {percent(max(high, 0.0) / 100)}" for low, high in zip(
            table["low_percent"], table["high_percent"], strict=True)],
        "hovertemplate": "<b>%{y}</b><br>%{x:.1f}% (%{customdata})<extra></extra>",
    }  # fmt: skip
    own = [n for n, value in enumerate(alone) if np.isfinite(value)]
    dots = {
        "type": "scatter",
        "mode": "markers",
        "name": "its value alone",
        "y": [names[n] for n in own],
        "x": [float(alone.iloc[n]) for n in own],
        "marker": {"symbol": "diamond-open", "size": 10, "color": PALETTE[1], "line": {"width": 2}},
        "hovertemplate": "<b>%{y}</b><br>alone %{x:.1f}%<extra></extra>",
    }
    shape = layout(
        height=130 + 30 * len(names),
        xaxis=axis("% of the variance of log time", rangemode="tozero"),
        yaxis=axis("", autorange="reversed"),
        showlegend=True,
    )
    traces = [marks(bars, range(len(names))), marks(dots, own)]
    return Figure(identity, TITLE, caption(space, table), traces, shape, table=table, variant=space.name)


def caption(space: Space, table: pd.DataFrame) -> str:
    """The finding, then the method."""
    parts = table[table["parameter"] != REST]
    rest = table[table["parameter"] == REST].iloc[0]
    told = [_told(row) for row in parts.to_dict("records") if row["low_percent"] >= 100 * MATTERS]
    used = int(table["configurations"].iloc[0])
    words = [f"{_joined(told[:3])} of the variance of log time." if told else "No parameter's share stands out from noise."]
    weak = [str(row["parameter"]) for row in parts.to_dict("records") if row["high_percent"] < 100 * MATTERS]
    if weak:
        words.append(f"{_joined([shortened(name) for name in weak[:6]])} {'hardly matters' if len(weak) == 1 else 'hardly matter'}.")
    hidden = parts[(parts["low_percent"] > 2 * parts["alone_percent"]) & (parts["low_percent"] >= 100 * MATTERS)]
    if len(hidden):
        name = shortened(hidden["parameter"].iloc[0])
        by_itself = percent(hidden["alone_percent"].iloc[0] / 100)
        words.append(f"{name} acts mainly together with others: its value alone explains {by_itself}.")
    # Trees that foretell worse than the mean leave "more than all" unexplained, which as a share is all.
    left, lowest, highest = (min(max(rest[name], 0.0) / 100, 1.0) for name in ("share_percent", "low_percent", "high_percent"))
    words.append(f"{percent(left)} ({percent(lowest)} to {percent(highest)}) is not explained.")
    fine = int(space.fine.sum())
    sample = f"{used} of {fine}" if used < fine else str(used)
    words.append(
        f"From {sample} configurations with a time, as they were chosen by whoever tried them. Bars: credit of the splits on a parameter "
        f"in {RESAMPLES * TREES} randomised regression trees, measured on what each tree had not seen; an interaction is divided among its "
        f"parameters. Intervals: 95% over {RESAMPLES} bootstrap samples. Diamonds: one-way analysis of variance; one beyond its bar goes "
        "along with another parameter that explains the same."
    )
    return " ".join(words)


def shortened(name: object, longest: int = 28) -> str:
    """A name that leaves room for the data."""
    text = str(name)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _told(row: dict[object, object]) -> str:
    share, low, high = (max(float(str(row[name])), 0.0) / 100 for name in ("share_percent", "low_percent", "high_percent"))
    return f"{shortened(row['parameter'])} explains {percent(share)} ({percent(low)} to {percent(high)})"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
